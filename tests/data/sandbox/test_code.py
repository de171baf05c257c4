from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from hsd.data.human_eval import load
from hsd.data.questions import Question, UnitTests
from hsd.data.sandbox import local, seccomp, wire
from hsd.data.sandbox.local import Job, Limits, LocalSandbox, Result
from hsd.data.task_configs import HumanEvalTask, JsonlTask
from hsd.data.tasks import load_task
from hsd.data.verify import Outcome
from hsd.data.verify.code import program_text, unit_tests
from hsd.data.verify.pool import VerifierPool


def outcomes(sandbox: LocalSandbox, items: Sequence[tuple[Question, str]]) -> list[str]:
    with VerifierPool(unit_tests(sandbox), workers=2, timeout=15) as pool:
        return [outcome.value for outcome in pool.judge(items)]


@pytest.mark.slow
def test_every_canonical_solution_of_human_eval_passes_and_no_empty_one(
    sandbox: LocalSandbox,
) -> None:
    questions = load(seed=0)
    assert len({question.id for question in questions}) == 164
    right = [(question, question.solution or "") for question in questions]
    empty = [(question, "    pass\n") for question in questions]
    assert outcomes(sandbox, right) == ["correct"] * 164
    assert outcomes(sandbox, empty) == ["wrong"] * 164


QUESTION = Question(
    id="q",
    prompt="p",
    answer="",
    unit_tests=UnitTests(
        prelude="import math\ndef f(x):\n    '''Doubles.'''\n",
        tests="def check(g):\n    assert g(2) == 4\n    assert g((1, 'a')) == (1, 'a', 1, 'a')\n",
        functions=("f",),
    ),
)
CASES = replace(QUESTION, unit_tests=UnitTests(cases=(("1 2\n", "3\n"), ("5 6", "11"))))


@pytest.mark.parametrize(
    ("question", "response", "outcome"),
    [
        (QUESTION, "    return x * 2\n", "correct"),
        (QUESTION, "```python\ndef f(x): return x + x\n```\nDone.", "correct"),
        (QUESTION, "```\ndef f(x): return 0\n```\nNo:\n```py\ndef f(x): return x + x", "correct"),
        (QUESTION, "```python\ndef f(x): return x\n```", "wrong"),
        (QUESTION, "I do not know.", "wrong"),
        (QUESTION, "\0\ud800", "wrong"),
        (QUESTION, "\ud800", "wrong"),
        (CASES, "print(sum(map(int, input().split())))", "correct"),
        (CASES, "print(3)", "wrong"),
        (CASES, "print(3); print(11)", "wrong"),
        (CASES, "raise SystemExit(0)", "wrong"),
        (CASES, "print(sum(map(int, input().split())))\nraise SystemExit(3)", "wrong"),
        (CASES, "import sys\nwhile True: sys.stdout.write('x' * 10**6)", "wrong"),
        (
            CASES,
            "import os, time\nprint(sum(map(int, input().split())), flush=True)\n"
            "if os.fork() == 0: time.sleep(99)",
            "correct",
        ),
        (replace(QUESTION, unit_tests=None), "x", "error"),
        (replace(QUESTION, unit_tests=UnitTests(tests="1 +", functions=("f",))), "x", "error"),
        (
            replace(QUESTION, unit_tests=UnitTests(tests="f(object())", functions=("f",))),
            "def f(x): pass",
            "error",
        ),
    ],
)
def test_code(sandbox: LocalSandbox, question: Question, response: str, outcome: str) -> None:
    assert outcomes(sandbox, [(question, response)]) == [outcome]


def test_a_program_that_takes_too_long_is_a_timeout(sandbox: LocalSandbox) -> None:
    quick = LocalSandbox(limits=Limits(wall_seconds=1))
    items = [(QUESTION, "    while True: pass"), (CASES, "while True: pass")]
    assert outcomes(quick, items) == ["timeout", "timeout"]


def test_exceptions_reach_the_tests_as_their_own_type(sandbox: LocalSandbox) -> None:
    tests = "try: f(1)\nexcept ZeroDivisionError as e: assert 'zero' in str(e)\nelse: assert False"
    job = Job(program="def f(x): return x / 0", tests=tests, functions=("f",))
    assert sandbox.run(job) == Result(verdict="passed")


@pytest.mark.parametrize(
    "value",
    [None, True, -(10**5000), 1.5, float("inf"), 2j, "ä\ud800", b"\0", [1, (2,)], {1}, {(1,): {}}],
    ids=lambda value: type(value).__name__,
)
def test_values_keep_their_type_on_the_wire(value: object) -> None:
    found = wire.decode(json.loads(json.dumps(wire.encode(value))))
    assert found == value and type(found) is type(value)


def test_subclasses_lose_their_methods_on_the_wire() -> None:
    class Same(str):
        __eq__ = lambda self, other: True  # noqa: E731
        __hash__ = str.__hash__

    assert type(wire.decode(wire.encode(Same("a")))) is str


class Service:
    """What a client of a sandbox elsewhere looks like."""

    def run(self, job: Job) -> Result:
        return Result(verdict="passed" if "good" in job.program else "failed")


def test_a_service_can_take_the_place_of_the_local_sandbox() -> None:
    verify = unit_tests(Service())
    assert verify(QUESTION, "good") and not verify(QUESTION, "bad")


def test_a_weaker_mechanism_than_the_minimum_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "strongest_mechanism", lambda: "limits")
    with pytest.raises(ValueError, match=r"task\.sandbox: found 'limits' .*expected 'namesp"):
        load_task(HumanEvalTask())
    task = load_task(HumanEvalTask(sandbox="limits"))
    assert task.sandbox is not None and "resource limits only" in task.sandbox
    monkeypatch.setattr(local, "strongest_mechanism", lambda: None)
    with pytest.raises(ValueError, match="found no working mechanism"):
        load_task(HumanEvalTask(sandbox="limits"))


def test_where_namespaces_are_forbidden_limits_are_what_is_found() -> None:
    if not seccomp.available():
        pytest.skip("no filter on this processor")
    script = (
        "from hsd.data.sandbox import jail, local, seccomp\n"
        "jail.forbid_new_privileges()\n"
        "seccomp.install(sockets=True)\n"  # as in a container: refuses unshare(2)
        "print(local.strongest_mechanism())\n"
        "local.require('namespaces')\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout == "limits\n"
    assert "ValueError: task.sandbox: found 'limits'" in done.stderr


def test_limits_alone_still_bound_a_program() -> None:
    weak = LocalSandbox(mechanism="limits", limits=Limits(wall_seconds=2, cpu_seconds=1))
    if weak.run(Job(program="def f(): pass", functions=("f",))).verdict != "passed":
        pytest.skip("the kernel has no seccomp filter")
    for program, verdicts in (
        ("while True: pass", ["timeout"]),
        ("import os\nassert os.getuid() != 0", ["passed"]),
        ("import socket\nsocket.socket()", ["failed"]),
        ("x = bytearray(10**11)", ["failed"]),
        ("import os\nos.kill(0, 9)", ["failed"]),
    ):
        job = Job(program=program, functions=("f",))
        assert weak.run(job).verdict in verdicts, program


def test_tasks_with_code(sandbox: LocalSandbox, tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    records = [
        {"prompt": "Double.", "tests": "assert f(1) == 2", "functions": ["f"]},
        {"prompt": "Echo.", "cases": [["a", "a"]], "answer": "print(input())"},
    ]
    path.write_text("\n".join(map(json.dumps, records)))
    task = load_task(JsonlTask(train=path, verifier="code", heldout_questions=0))
    assert task.train[0].answer == ""
    assert task.sandbox is not None and "namespaces" in task.sandbox
    texts = ["def f(x): return 2 * x", "print(input())"]
    with VerifierPool(task.verify, workers=2) as pool:
        found = pool.judge(list(zip(task.train, texts, strict=True)))
        assert found == [Outcome.CORRECT, Outcome.CORRECT]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"tests": "x"}, "found tests, expected tests with functions, or cases"),
        ({"prelude": "x"}, "found prelude, expected tests with functions, or cases"),
        ({"tests": "x", "functions": []}, "functions: found a list, expected a list of names"),
        ({"cases": []}, r"cases: found a list, expected a list of \[input, output\]"),
        ({"cases": [["a"]]}, r"cases: found \['a'\], expected"),
        ({"answer": "3"}, "found a question without tests or cases"),
    ],
)
def test_broken_code_questions(tmp_path: Path, record: dict[str, object], message: str) -> None:
    path = tmp_path / "q.jsonl"
    path.write_text(json.dumps({"prompt": "p", **record}))
    with pytest.raises(ValueError, match=message):
        load_task(JsonlTask(train=path, verifier="code", heldout_questions=0))


def test_program_text_takes_the_last_block() -> None:
    assert program_text("a\n```python\nx\n```\nb\n```\ny\n```") == "y\n"
    assert program_text("x = 1") == "x = 1"
