"""The candidate's side of the sandbox: runs the model's program for the harness.

`supervise` is the first process of the inner pid namespace. It runs no model code; it forks the
processes that do, reports how they end, and with its own end the kernel kills whatever they left.
It knows the program and the calls to make, and never the tests or what they expect.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import types
from typing import Any, NoReturn

from hsd.data.sandbox import jail, wire


def supervise(control: int, calls: int, limits: Any) -> NoReturn:
    """Serves the harness until it has gone.

    Args:
        control: takes requests {"program", "input"} and answers with how the process ended; an
            input of None asks for a process that serves function calls instead.
        calls: that process's own channel.
        limits: of hsd.data.sandbox.local, as a dictionary.
    """
    jail.die_with_parent()  # where no namespace ends with the harness
    # Python's handler would let the program interrupt this process; by default, the first process
    # of a namespace ignores all signals from inside.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    with contextlib.suppress(EOFError, OSError):
        while True:
            request = wire.receive(control, most=limits["message_bytes"])
            if request["input"] is None:
                report = _serve_calls(request["program"], calls, control, limits)
            else:
                report = _run_program(request["program"], request["input"], limits)
            wire.send(control, report)
    os._exit(0)


def _serve_calls(program: str, calls: int, control: int, limits: Any) -> dict[str, Any]:
    child = os.fork()
    if child == 0:
        os.close(control)
        with contextlib.suppress(BaseException):
            os.setsid()
            jail.die_with_parent()
            jail.limit_cpu(limits["cpu_seconds"])
            _answer_calls(program, calls, limits)
        os._exit(0)
    os.close(calls)
    return {"output": "", **_ending(child, limits)}


def _answer_calls(program: str, calls: int, limits: Any) -> None:
    try:
        namespace = _run(program, name="candidate")
    except BaseException as error:
        wire.send(calls, _raised(error))
        return
    wire.send(calls, {"value": None})
    while True:
        call = wire.receive(calls, most=limits["message_bytes"])
        try:
            positional, named = wire.decode(call["arguments"])
            value = wire.encode(namespace[call["function"]](*positional, **named))
            wire.send(calls, {"value": value})
        except BaseException as error:
            wire.send(calls, _raised(error))


def _run(program: str, *, name: str) -> dict[str, Any]:
    module = types.ModuleType(name)
    sys.modules[name] = module  # dataclasses and pickle look there
    exec(compile(program, f"{name}.py", "exec", dont_inherit=True), module.__dict__)
    return module.__dict__


def _raised(error: BaseException) -> dict[str, Any]:
    return {"raised": type(error).__name__, "message": str(error)[:500]}


def _run_program(program: str, text: str, limits: Any) -> dict[str, Any]:
    stdin_read, stdin_write = os.pipe()
    stdout_read, stdout_write = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        with contextlib.suppress(BaseException):
            os.dup2(stdin_read, 0)
            os.dup2(stdout_write, 1)
            os.closerange(3, 64)
            os.setsid()
            jail.die_with_parent()
            jail.limit_cpu(limits["cpu_seconds"])
            status = _as_main(program)
        os._exit(status)
    os.close(stdin_read)
    os.close(stdout_write)
    output = _exchange(child, text.encode(), stdin_write, stdout_read, limits["output_bytes"])
    report = _ending(child, limits)
    if os.getpid() == 1:  # else there is no namespace, and -1 would mean the user's processes
        with contextlib.suppress(ProcessLookupError):
            os.kill(-1, signal.SIGKILL)
    return {"output": output.decode("utf-8", "replace"), **report}


def _as_main(program: str) -> int:
    try:
        _run(program, name="__main__")
        status = 0
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        status = 1
    sys.stdout.flush()
    return status & 255


def _exchange(child: int, data: bytes, stdin: int, stdout: int, most: int) -> bytes:
    """Feeds a process and collects what it writes, until it ends or writes too much."""
    output = bytearray()
    os.set_blocking(stdin, False)
    os.set_blocking(stdout, False)
    writing = [stdin]
    ended = False
    while len(output) <= most:
        readable, writable, _ = select.select([stdout], writing, [], 0.0 if ended else 0.02)
        if readable:
            piece = os.read(stdout, 1 << 16)
            output += piece
            if not piece:
                break
        elif ended:
            break
        if writable:
            with contextlib.suppress(BlockingIOError):
                try:
                    data = data[os.write(stdin, data[: 1 << 16]) :]
                except BrokenPipeError:
                    data = b""
        if writing and not data:
            os.close(stdin)
            writing = []
        ended = os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
    if len(output) > most:
        os.kill(child, signal.SIGKILL)
    for descriptor in (stdout, *writing):
        os.close(descriptor)
    return bytes(output[: most + 1])


def _ending(child: int, limits: Any) -> dict[str, Any]:
    """Waits for a process, and for orphans that end meanwhile; how the process ended."""
    while True:
        pid, status, usage = os.wait4(-1, 0)
        if pid == child:
            break
    seconds = usage.ru_utime + usage.ru_stime
    return {
        "status": os.waitstatus_to_exitcode(status),
        "out_of_time": seconds >= limits["cpu_seconds"] - 0.1,
    }
