from __future__ import annotations

import os
import signal
import time
from collections import Counter
from pathlib import Path

import pytest
from pool_verifiers import obedient

from hsd.data.questions import Question
from hsd.data.task_configs import ReasoningGymTask
from hsd.data.tasks import load_task
from hsd.data.verify import Outcome, by_path
from hsd.data.verify.pool import VerifierPool

QUESTION = Question(id="q", prompt="p", answer="yes")


def judge(pool: VerifierPool, *texts: str) -> list[str]:
    return [outcome.value for outcome in pool.judge([(QUESTION, text) for text in texts])]


def children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def wait_until_gone(*pids: int) -> None:
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() and state(pid) != "Z" for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return "Z"


@pytest.mark.parametrize(
    ("text", "outcome"),
    [
        ("yes", "correct"),
        ("no", "wrong"),
        ("print", "wrong"),
        ("hang", "timeout"),
        ("long operation", "timeout"),
        ("sleep", "timeout"),
        ("own limit", "timeout"),
        ("exit", "error"),
        ("raise", "error"),
        ("leave", "error"),
        ("no bool", "error"),
        ("memory", "error"),
    ],
)
def test_each_end_of_a_verifier_has_its_outcome_and_the_next_is_judged(
    text: str, outcome: str
) -> None:
    with VerifierPool(obedient, workers=1, timeout=0.5) as pool:
        assert judge(pool, text, "yes", "no") == [outcome, "correct", "wrong"]
        assert pool.counts == Counter([Outcome(outcome), Outcome.CORRECT, Outcome.WRONG])


def test_what_a_verifier_raised_is_told() -> None:
    with VerifierPool(obedient, workers=1, timeout=5) as pool:
        judge(pool, "yes")
        assert pool.last_error is None
        judge(pool, "raise")
        assert pool.last_error == "q: KeyError: 'no such thing'"


def test_a_thousand_with_five_percent_hangs_in_bounded_time() -> None:
    texts = ["hang" if n % 20 == 7 else "yes" if n % 3 else "no" for n in range(1000)]
    expected = [{"hang": "timeout", "yes": "correct", "no": "wrong"}[text] for text in texts]
    with VerifierPool(obedient, workers=4, timeout=0.5) as pool:
        started = time.monotonic()
        assert judge(pool, *texts) == expected
        assert time.monotonic() - started < 50 * 0.5 / 4 + 15
    assert pool.counts == Counter(Outcome(each) for each in expected)


def test_hangs_pass_in_parallel() -> None:
    with VerifierPool(obedient, workers=8, timeout=1.0) as pool:
        started = time.monotonic()
        judge(pool, *["sleep"] * 8)
        assert time.monotonic() - started < 4


def test_a_killed_verifier_takes_its_children_along(tmp_path: Path) -> None:
    note = tmp_path / "pid"
    with VerifierPool(obedient, workers=1, timeout=1.0) as pool:
        assert judge(pool, f"child {note}") == ["timeout"]
        wait_until_gone(int(note.read_text()))


def test_a_dead_supervisor_is_replaced() -> None:
    with VerifierPool(obedient, workers=2, timeout=5) as pool:
        assert judge(pool, "yes") == ["correct"]
        supervisor = pool._process.pid
        workers = children(supervisor)
        os.kill(supervisor, signal.SIGKILL)
        assert judge(pool, "yes", "no") == ["correct", "wrong"]
        wait_until_gone(*workers)


def test_close_leaves_no_process() -> None:
    pool = VerifierPool(obedient, workers=3, timeout=5)
    workers = children(pool._process.pid)
    assert len(workers) == 3
    pool.close()
    wait_until_gone(pool._process.pid, *workers)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"workers": 0}, "workers: found 0, expected at least 1"),
        ({"timeout": 0.0}, "timeout: found 0.0, expected"),
        ({"verify": lambda question, text: True}, "verify: found .*, expected one that pickles"),
    ],
)
def test_bad_arguments(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VerifierPool(**{"verify": obedient, **arguments})  # type: ignore[arg-type]


def test_a_verifier_by_path() -> None:
    verify = by_path.load("pool_verifiers:obedient")
    with VerifierPool(verify, workers=1, timeout=5) as pool:
        assert judge(pool, "yes") == ["correct"]


def test_a_module_in_the_working_directory_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_verifier_of_this_test.py").write_text("def long(q, t): return len(t) > 3\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    with VerifierPool(by_path.load("own_verifier_of_this_test:long"), workers=1) as pool:
        assert judge(pool, "yes", "longer") == ["wrong", "correct"]


@pytest.mark.parametrize(
    "path",
    ["pool_verifiers:", "pool_verifiers:missing", "no_such_module:f", ":f", "os:name", "os:a b"],
)
def test_a_path_to_no_function_is_refused(path: str) -> None:
    with pytest.raises(ValueError, match=r"task\.verifier: found .*, expected a"):
        by_path.load(path)


@pytest.mark.parametrize("dataset", ["arc_1d", "leg_counting", "string_manipulation"])
def test_reasoning_gym_verifiers_reach_the_workers(dataset: str) -> None:
    pytest.importorskip("reasoning_gym")
    sizes = {"train_questions": 4, "validation_questions": 0, "heldout_questions": 0}
    task = load_task(ReasoningGymTask(dataset=dataset, **sizes))
    with VerifierPool(task.verify, workers=1, timeout=10) as pool:
        right = [(q, f"The answer is {q.answer}") for q in task.train]
        assert pool.judge(right) == [Outcome.CORRECT] * 4
        assert pool.judge([(q, "no idea") for q in task.train]) == [Outcome.WRONG] * 4
