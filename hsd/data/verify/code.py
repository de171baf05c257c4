"""Code by unit tests, run in a sandbox."""

from __future__ import annotations

import re
from functools import partial

from hsd.data.questions import Question
from hsd.data.sandbox.local import Job, Sandbox
from hsd.data.verify import Verifier

_BLOCK = re.compile(
    r"```[ \t]*(?:python3?|py)?[ \t]*\r?\n(.*?)(?:```|\Z)", re.DOTALL | re.IGNORECASE
)


def unit_tests(sandbox: Sandbox) -> Verifier:
    """A verifier: correct if and only if the program passes all tests of question.unit_tests.

    The program is the last fenced block of the response, or all of it where there is none, behind
    the question's prelude: a completion of the prelude and a whole new function both work.

    Args:
        sandbox: this machine's (hsd.data.sandbox.local.require), or a client of a service.
    """
    return partial(_passes, sandbox)


def program_text(response: str) -> str:
    """The last fenced block of a response, all of it if it has none."""
    blocks: list[str] = _BLOCK.findall(response)
    return blocks[-1] if blocks else response


def _passes(sandbox: Sandbox, question: Question, response: str) -> bool:
    tests = question.unit_tests
    if tests is None:
        raise ValueError(f"question {question.id!r}: found no unit tests, expected some")
    program = f"{tests.prelude}\n{program_text(response)}"
    if "\0" in program:
        return False  # no Python source
    result = sandbox.run(
        Job(
            program=program.encode("utf-8", "replace").decode(),
            prelude=tests.prelude,
            tests=tests.tests,
            functions=tests.functions,
            cases=tests.cases,
        )
    )
    if result.verdict == "timeout":
        raise TimeoutError(result.reason)
    if result.verdict == "error":
        raise RuntimeError(result.reason)
    return result.verdict == "passed"
