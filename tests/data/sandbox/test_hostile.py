from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hostile_programs import PROGRAMS

import hsd
from hsd.data.questions import Question, UnitTests
from hsd.data.sandbox import seccomp
from hsd.data.sandbox.local import Job, Limits, LocalSandbox, Mechanism
from hsd.data.verify import Outcome
from hsd.data.verify.code import unit_tests
from hsd.data.verify.pool import VerifierPool

LIMITS = Limits(
    wall_seconds=1.2, cpu_seconds=1, memory_bytes=256 << 20, work_bytes=32 << 20, file_bytes=8 << 20
)
LAUNCHER = b"launcher.run(sys.argv[2:])\0" + os.fsencode(Path(hsd.__file__).parent.parent)
WRITTEN = re.compile(r"x|l|d|\d+")  # the names of the files that the programs write
TESTS = "assert f(1) == 2\nassert f(5) == 6"


def descendants() -> set[str]:
    """Process ids of everything that a launcher started."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if LAUNCHER in path.read_bytes():
                found.add(path.parent.name)
        except OSError:
            continue
    return found


def written() -> set[str]:
    """Files of the names that the programs use, wherever they could be."""
    names = [(path, name) for path in ("/tmp", "/usr", "/", "/dev") for name in os.listdir(path)]
    return {f"{path}/{name}" for path, name in names if WRITTEN.fullmatch(name)}


@pytest.mark.parametrize(
    ("program", "verdicts"),
    [pytest.param(program, verdicts, id=name) for name, program, verdicts in PROGRAMS],
)
def test_hostile_program(
    sandbox: LocalSandbox,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    program: str,
    verdicts: tuple[str, ...],
) -> None:
    monkeypatch.setenv("HSD_TEST_SECRET", "secret")
    outside = tmp_path / "outside"
    before = written()
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket(socket.AF_UNIX) as unix:
        server.settimeout(0)
        unix.bind(f"\0hsd-test-{os.getpid()}")
        unix.listen()
        text = (
            program.replace("PORT", str(server.getsockname()[1]))
            .replace("TRAINER", str(os.getpid()))
            .replace("MARKER", str(outside))
            .replace("\\0hsd-test'", f"\\0hsd-test-{os.getpid()}'")
        )
        result = LocalSandbox(limits=LIMITS).run(Job(program=text, tests=TESTS, functions=("f",)))
        with pytest.raises(BlockingIOError):
            server.accept()
    assert result.verdict in verdicts, result
    assert descendants() == set()
    assert written() == before and os.listdir(tmp_path) == []
    innocent = Job(program="def f(x): return x", tests="f(0)", functions=("f",))
    assert sandbox.run(innocent).verdict == "passed"


def test_there_are_at_least_forty_hostile_programs() -> None:
    assert len({program for _, program, _ in PROGRAMS}) >= 40


def test_the_tree_ends_with_the_launcher(sandbox: LocalSandbox) -> None:
    script = (
        "from hsd.data.sandbox.local import *\n"
        "LocalSandbox().run(Job(program='import time; time.sleep(99)', functions=('f',)))"
    )
    process = subprocess.Popen([sys.executable, "-c", script], start_new_session=True)
    for _ in range(100):
        if len(descendants()) >= 4:
            break
        time.sleep(0.05)
    assert len(descendants()) >= 4
    os.killpg(process.pid, 9)
    process.wait()
    for _ in range(100):
        if not descendants():
            return
        time.sleep(0.05)
    raise AssertionError(descendants())


@pytest.mark.parametrize("mechanism", ["namespaces", "limits"])
@pytest.mark.parametrize("program", ["import time\ntime.sleep(99)", "def f(x):\n while True: pass"])
def test_a_verifier_with_an_earlier_deadline_leaves_no_program_behind(
    sandbox: LocalSandbox, mechanism: Mechanism, program: str
) -> None:
    if mechanism == "limits" and not seccomp.available():
        pytest.skip("no filter on this processor")
    tests = UnitTests(tests=TESTS, functions=("f",))
    question = Question(id="q", prompt="p", answer="", unit_tests=tests)
    verify = unit_tests(LocalSandbox(mechanism=mechanism))
    with VerifierPool(verify, workers=1, timeout=1.5) as pool:
        assert pool.judge([(question, program)]) == [Outcome.TIMEOUT]
        deadline = time.monotonic() + 5
        while descendants() and time.monotonic() < deadline:
            time.sleep(0.05)
        assert descendants() == set()
