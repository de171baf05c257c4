"""The tests' side of the sandbox: judges a candidate it shares no memory with.

A candidate sees the arguments of each call and answers with plain values; neither its exit code
nor its output, nor anything it does to its own interpreter, says that a test passed. What is run
here, prelude and tests, belongs to the task and is not the model's.
"""

from __future__ import annotations

import builtins
import json
import os
import select
from collections.abc import Callable
from typing import Any

from hsd.data.sandbox import wire


class _CandidateFailed(BaseException):
    """Not an Exception: tests that catch those must not catch this."""


class _TestsBroken(BaseException):
    """The task's own fault."""


class Harness:
    """One candidate and the two channels to it.

    Args:
        control: to candidate.supervise.
        calls: to the process that serves calls.
        limits: of hsd.data.sandbox.local, as a dictionary.
    """

    def __init__(self, control: int, calls: int, limits: Any) -> None:
        self._control = control
        self._calls = calls
        self._limits = limits

    def verdict(self, job: Any) -> dict[str, str]:
        """{"verdict": passed | failed | timeout | error, "reason": ...} of one job."""
        try:
            if job["cases"] is None:
                self._run_tests(job)
            else:
                self._run_cases(job)
        except _CandidateFailed as failure:
            verdict, reason = failure.args
            return {"verdict": verdict, "reason": reason}
        except _TestsBroken as error:
            return {"verdict": "error", "reason": str(error)}
        except BaseException as error:
            return {"verdict": "failed", "reason": f"{type(error).__name__}: {error}"[:500]}
        return {"verdict": "passed", "reason": ""}

    def _run_cases(self, job: Any) -> None:
        for number, (text, expected) in enumerate(job["cases"], start=1):
            wire.send(self._control, {"program": job["program"], "input": text})
            # Escaped as JSON, a byte of output may take six.
            report = wire.receive(self._control, most=8 * self._limits["output_bytes"] + 1000)
            self._require_alive(report)
            if report["status"] != 0:
                raise _CandidateFailed("failed", f"case {number}: exit code {report['status']}")
            if not same_output(report["output"], expected):
                raise _CandidateFailed("failed", f"case {number}: another output")

    def _run_tests(self, job: Any) -> None:
        namespace: dict[str, Any] = {"__name__": "tests"}
        try:
            for name, text in (("prelude", job["prelude"]), ("tests", job["tests"])):
                compile(text, f"{name}.py", "exec", dont_inherit=True)
            exec(compile(job["prelude"], "prelude.py", "exec", dont_inherit=True), namespace)
        except BaseException as error:
            raise _TestsBroken(f"{type(error).__name__}: {error}") from None
        wire.send(self._control, {"program": job["program"], "input": None})
        self._receive_value()  # of loading the program
        for name in job["functions"]:
            namespace[name] = self._proxy(name)
        exec(compile(job["tests"], "tests.py", "exec", dont_inherit=True), namespace)
        if job["functions"] and "check" not in job["functions"] and "check" in namespace:
            namespace["check"](namespace[job["functions"][0]])

    def _proxy(self, name: str) -> Callable[..., Any]:
        def candidate(*positional: Any, **named: Any) -> Any:
            try:
                arguments = wire.encode((positional, named))
            except TypeError as error:
                raise _TestsBroken(f"{name}: {error}") from None
            try:
                wire.send(self._calls, {"function": name, "arguments": arguments})
            except OSError:
                self._raise_ending()
            return self._receive_value()

        candidate.__name__ = name
        return candidate

    def _receive_value(self) -> Any:
        # A child of the candidate may keep the channel open: its end shows on the other one.
        ready, _, _ = select.select([self._calls, self._control], [], [])
        if self._calls not in ready:
            self._raise_ending()
        try:
            answer = wire.receive(self._calls, most=self._limits["message_bytes"])
            if "raised" in answer:
                kind, message = str(answer["raised"]), str(answer["message"])
            else:
                return wire.decode(answer["value"])
        except (EOFError, OSError):
            self._raise_ending()
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
            found = f"an answer that is no value ({type(error).__name__})"
            raise _CandidateFailed("failed", found) from None
        raise _exception(kind, message)

    def _raise_ending(self) -> None:
        try:
            report = wire.receive(self._control, most=1000)
        except EOFError:
            raise _CandidateFailed("failed", "the program's supervisor died") from None
        self._require_alive(report)
        raise _CandidateFailed("failed", f"the program ended with {report['status']}")

    def _require_alive(self, report: Any) -> None:
        if report["out_of_time"]:
            raise _CandidateFailed("timeout", "processor time")


def _exception(kind: str, message: str) -> Exception:
    """The built-in exception of this name, else a RuntimeError."""
    found = getattr(builtins, kind, None)
    if isinstance(found, type) and issubclass(found, Exception):
        try:
            return found(message)
        except TypeError:  # such as UnicodeDecodeError, which takes five arguments
            pass
    return RuntimeError(f"{kind}: {message}")


def same_output(found: str, expected: str) -> bool:
    """Equality of the lines, but for white space at their ends and empty lines at the end."""

    def lines(text: str) -> list[str]:
        return [line.rstrip() for line in text.rstrip().split("\n")]

    return lines(found) == lines(expected)


def serve(job_descriptor: int, result: int, harness: Harness) -> None:
    """Reads one job, judges it and writes the verdict."""
    with os.fdopen(job_descriptor, "rb") as file:
        job = json.loads(file.read())
    wire.send(result, harness.verdict(job))
