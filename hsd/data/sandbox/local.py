"""The code sandbox: what it protects against, in which way on this machine, and how to call it.

With the mechanism "namespaces" the model's program runs as an unprivileged user (never as root) in
user, mount, pid, network, ipc and cgroup namespaces of its own: no network, no file but Python and
/usr, read-only and without installed packages, and an empty directory in memory; no other process
to see or signal; no environment; a seccomp filter; limits on processor and wall-clock time, memory,
processes, file sizes and output. Its tree is killed as one. It shares its kernel with the trainer:
a flaw there defeats all of this, and a machine of its own behind the protocol Sandbox is the
remedy.

The mechanism "limits" is what is left where a container forbids namespaces: another user if root
starts it, the filter (which then refuses sockets) and the limits. Files that this user may read are
open to the program. It is refused unless asked for.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal, Protocol

import hsd
from hsd.data.sandbox import seccomp

Mechanism = Literal["namespaces", "limits"]
"""From the strongest to the weakest."""

_STATEMENTS: dict[Mechanism, str] = {
    "namespaces": "unprivileged user in user, mount, pid, network, ipc and cgroup namespaces, "
    "resource limits",
    "limits": "resource limits only: no namespaces here, files and processes of the user are open",
}
_START_SECONDS = 10.0  # beside the wall-clock limit, for a launcher on a busy machine


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one job may use.

    Args:
        wall_seconds: of the whole job; the paper's 10 s.
        cpu_seconds: of processor time of one process.
        memory_bytes: address space of one process, and private memory of all together.
        work_bytes: files in its directory, all together.
        file_bytes: one file.
        processes: processes and threads at one time.
        output_bytes: standard output of one run of a program.
        message_bytes: arguments or value of one call, encoded.
    """

    wall_seconds: float = 10.0
    cpu_seconds: int = 10
    memory_bytes: int = 1 << 30
    work_bytes: int = 64 << 20
    file_bytes: int = 16 << 20
    processes: int = 16
    output_bytes: int = 1 << 20
    message_bytes: int = 16 << 20


@dataclass(frozen=True, kw_only=True)
class Job:
    """A program and its tests; either tests of its functions or cases of standard input.

    Args:
        program: the model's Python source.
        tests: the task's Python source; an AssertionError or another exception is a failure. If it
            defines check(candidate), that is called with the first function.
        functions: names in tests that call the program's functions. Arguments and values are of
            plain built-in types, copied: a function cannot change its caller's list.
        prelude: source of the task that tests need, run before them.
        cases: (standard input, expected standard output) pairs instead of tests.
    """

    program: str
    tests: str = ""
    functions: tuple[str, ...] = ()
    prelude: str = ""
    cases: tuple[tuple[str, str], ...] | None = None


@dataclass(frozen=True, kw_only=True)
class Result:
    """How a job ended: "error" is the sandbox's or the tests' fault, not the program's."""

    verdict: Literal["passed", "failed", "timeout", "error"]
    reason: str = ""


class Sandbox(Protocol):
    """Runs jobs: this machine's sandbox, or a client of a service elsewhere. Must pickle."""

    def run(self, job: Job) -> Result:
        """Runs a job to its end; raises OSError where the sandbox itself is out of order."""
        ...


@dataclass(frozen=True, kw_only=True)
class LocalSandbox:
    """A sandbox of this machine; each job gets a new one and leaves nothing behind.

    Args:
        mechanism: found by strongest_mechanism() or required by require().
    """

    mechanism: Mechanism = "namespaces"
    limits: Limits = Limits()

    def run(self, job: Job) -> Result:
        """Runs a job to its end, at the latest at limits.wall_seconds."""
        settings = {"mechanism": self.mechanism, "limits": asdict(self.limits)}
        root = str(Path(hsd.__file__).parent.parent)
        start = (
            "import sys; sys.path.insert(0, sys.argv[1]); from hsd.data.sandbox import launcher; "
            "launcher.run(sys.argv[2:])"
        )
        try:
            done = subprocess.run(
                [sys.executable, "-I", "-S", "-B", "-c", start, root, json.dumps(settings)],
                input=json.dumps(asdict(job)).encode(),
                capture_output=True,
                env={"PATH": "/usr/bin:/bin", "HOME": "/tmp", "LANG": "C.UTF-8"},
                timeout=self.limits.wall_seconds + _START_SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return Result(verdict="timeout", reason="the launcher did not end")
        try:
            return Result(**json.loads(done.stdout))
        except (ValueError, TypeError):
            return Result(verdict="error", reason=done.stderr.decode("utf-8", "replace")[-500:])


@lru_cache(maxsize=1)
def strongest_mechanism() -> Mechanism | None:
    """The strongest mechanism in which a small program passes its test here; None if none does."""
    probe = Job(program="def f(x): return x + 1", tests="assert f(1) == 2", functions=("f",))
    mechanisms: tuple[Mechanism, ...] = ("namespaces", "limits")
    for mechanism in mechanisms:
        if LocalSandbox(mechanism=mechanism).run(probe).verdict == "passed":
            return mechanism
    return None


def require(minimum: Mechanism) -> LocalSandbox:
    """The strongest sandbox of this machine.

    Raises:
        ValueError: it is weaker than minimum.
    """
    found = strongest_mechanism()
    if found is None or (minimum, found) == ("namespaces", "limits"):
        shown = "no working mechanism" if found is None else f"{found!r} ({_STATEMENTS[found]})"
        raise ValueError(
            f"task.sandbox: found {shown} on this machine, expected {minimum!r}; allow user "
            "namespaces, or have the code run by a service (hsd.data.sandbox.local.Sandbox)"
        )
    return LocalSandbox(mechanism=found)


def statement(sandbox: LocalSandbox) -> str:
    """One line on the mechanism in force, for the log."""
    user = "as nobody" if os.geteuid() == 0 else f"as user {os.geteuid()}"
    filtered = "seccomp filter" if seccomp.available() else "no seccomp filter on this processor"
    return f"model code runs {user}: {_STATEMENTS[sandbox.mechanism]}, {filtered}"
