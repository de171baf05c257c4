"""Starts a sandbox, watches it and ends it; an isolated interpreter runs this and nothing else.

    launcher (outside) -> keeper -> harness, process 1 inside -> supervisor of the candidate,
    process 1 of a namespace in there -> the model's program

The job comes on standard input and is read by the harness alone, after the fork of the candidate:
a process that runs model code has never had the tests in its memory. The verdict goes to standard
output. Where the mechanism is "limits" there are no namespaces and no keeper.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import sys
import time
from typing import Any, NoReturn

from hsd.data.sandbox import candidate, harness, jail, seccomp, wire

_POLL_SECONDS = 0.05
_OWN_PROCESSES = 3  # keeper, harness, supervisor


def main(settings: Any) -> None:
    """Runs one job within the limits and prints its verdict as JSON."""
    started = time.monotonic()
    jail.become_subreaper()
    result_read, result_write = os.pipe()
    try:
        child = _start(settings, result_write)
        os.close(result_write)
        verdict = _watch(child, result_read, settings["limits"], started)
    except OSError as error:
        verdict = {"verdict": "error", "reason": str(error)}
    end_descendants()
    os.write(1, json.dumps(verdict).encode())


def _start(settings: Any, result: int) -> int:
    namespaces = settings["mechanism"] == "namespaces"
    to_keeper, from_keeper = socket.socketpair()
    child = os.fork()
    if child == 0:
        to_keeper.close()
        status = 1
        with contextlib.suppress(BaseException):
            jail.die_with_parent()
            if namespaces:
                _keep(from_keeper, settings, result)
            _inside(settings, result, namespaces=False)
        os._exit(status)
    from_keeper.close()
    if namespaces:
        if to_keeper.recv(1) != b"r":
            raise OSError("unshare: the kernel or the container forbids namespaces")
        jail.map_identity(child)
        to_keeper.send(b"m")
    to_keeper.close()
    return child


def _keep(launcher: socket.socket, settings: Any, result: int) -> NoReturn:
    """Enters the namespaces; their first process is a child, and lives as long as this one."""
    jail.enter_namespaces()
    launcher.send(b"r")
    if launcher.recv(1) != b"m":
        os._exit(1)
    launcher.close()
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            jail.die_with_parent()
            _inside(settings, result, namespaces=True)
        os._exit(1)
    os.close(result)
    os.waitpid(child, 0)
    os._exit(0)


def _inside(settings: Any, result: int, *, namespaces: bool) -> NoReturn:
    """Jails this process, forks the candidate's supervisor, then judges the job."""
    limits = settings["limits"]
    try:
        _jail(limits, namespaces=namespaces)
        ours, theirs = socket.socketpair()
        our_calls, their_calls = socket.socketpair()
        if os.fork() == 0:
            for descriptor in (0, 1, 2):
                os.dup2(settings["null"], descriptor)
            kept = (theirs.detach(), their_calls.detach())
            for descriptor in set(range(3, 64)).difference(kept):
                with contextlib.suppress(OSError):
                    os.close(descriptor)
            candidate.supervise(*kept, limits)
        theirs.close()
        their_calls.close()
        for descriptor in (1, 2):
            os.dup2(settings["null"], descriptor)
        judge = harness.Harness(ours.detach(), our_calls.detach(), limits)
        harness.serve(0, result, judge)
    except OSError as error:
        wire.send(result, {"verdict": "error", "reason": str(error)})
    os._exit(0)


def _jail(limits: Any, *, namespaces: bool) -> None:
    # A process group has no namespace: kill(0, ...) would reach the launcher's and its caller's.
    os.setsid()
    if namespaces:
        jail.build_root(work_bytes=limits["work_bytes"])
        jail.nest_pid_namespace()
        jail.drop_privileges(user=jail.INNER_ID)
    else:
        os.chdir("/")
        jail.drop_privileges(user=jail.OUTER_ID_OF_ROOT if os.geteuid() == 0 else None)
    # Without a namespace of its own, the user's other processes count, so the launcher counts.
    processes = limits["processes"] + _OWN_PROCESSES if namespaces else None
    jail.limit_resources(limits, processes=processes)
    if seccomp.available():
        seccomp.install(sockets=namespaces)


def _watch(child: int, result: int, limits: Any, started: float) -> dict[str, str]:
    """Waits for the verdict, the deadline, or more processes or memory than the limits allow."""
    deadline = started + limits["wall_seconds"]
    while True:
        left = deadline - time.monotonic()
        ready, _, _ = select.select([result], [], [], max(0.0, min(left, _POLL_SECONDS)))
        if ready:
            try:
                verdict: dict[str, str] = wire.receive(result, most=1 << 16)
                return verdict
            except EOFError:
                return {"verdict": "error", "reason": "the harness died"}
        if left <= 0:
            return {"verdict": "timeout", "reason": "wall-clock time"}
        pids = descendants(child)
        if len(pids) > limits["processes"] + _OWN_PROCESSES:
            return {"verdict": "failed", "reason": "processes"}
        if sum(map(_private_bytes, pids)) > limits["memory_bytes"]:
            return {"verdict": "failed", "reason": "memory"}


def descendants(pid: int) -> list[int]:
    """A process and its descendants, as far as they could be read in passing."""
    found = [pid]
    for each in found:
        with contextlib.suppress(OSError):
            for thread in os.listdir(f"/proc/{each}/task"):
                with open(f"/proc/{each}/task/{thread}/children") as file:
                    found += map(int, file.read().split())
    return found


def _private_bytes(pid: int) -> int:
    with contextlib.suppress(OSError), open(f"/proc/{pid}/status") as file:
        kilobytes = [line.split()[1] for line in file if line.startswith(("RssAnon", "RssShmem"))]
        return 1024 * sum(map(int, kilobytes))
    return 0


def end_descendants() -> None:
    """Kills and reaps all descendants; orphans come to this process, their reaper."""
    while True:
        for pid in descendants(os.getpid())[1:]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return


def run(arguments: list[str]) -> None:
    """The entry point: settings as JSON; sys.path keeps the standard library alone."""
    settings = json.loads(arguments[0])
    del sys.path[0]
    settings["null"] = os.open("/dev/null", os.O_RDWR)
    main(settings)
