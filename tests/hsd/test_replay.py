"""Recorded rollouts are untrusted: what is wrong with a line is said with its number."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from hsd.data.questions import Question
from hsd.data.verify import Outcome
from hsd.rollout.protocol import Sampling, stream_seed
from hsd.rollout.replay import Replay, ReplayError

RECORD: Mapping[str, Any] = {
    "step": 1,
    "question": "train:3",
    "index": 0,
    "token_ids": [1, 2],
    "logprobs": [-0.1234567891234567, -2e-7],
    "loss_mask": [True, False],
    "finish_reason": "length",
    "policy_version": 0,
    "outcome": "timeout",
}


def write(path: Path, *records: Any) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_a_group_comes_back_as_it_was_recorded_and_judged(tmp_path: Path) -> None:
    other = {**RECORD, "question": "train:4"}
    path = write(tmp_path / "r.jsonl", other, RECORD, {**RECORD, "index": 1, "outcome": "correct"})
    replay = Replay(path, seed=5, vocab_size=3)
    seeds = [stream_seed("rollout", 5, 0, "train:3")]
    (group,) = replay.generate(
        [[0]], seeds=seeds, group_size=2, sampling=Sampling(max_new_tokens=2)
    )
    assert group[0].logprobs == (-0.1234567891234567, -2e-7)
    assert group[0].loss_mask == (True, False) and group[0].finish_reason == "length"
    question = Question(id="train:3", prompt="p", answer="a")
    outcomes = replay.judge([(question, ""), (question, "")])
    assert outcomes == [Outcome.TIMEOUT, Outcome.CORRECT]


def test_a_question_that_a_step_drew_twice_is_recorded_twice(tmp_path: Path) -> None:
    group = [RECORD, {**RECORD, "index": 1}]
    replay = Replay(write(tmp_path / "r.jsonl", *group, *group), seed=5, vocab_size=3)
    seeds = [stream_seed("rollout", 5, 0, "train:3")] * 2
    sampling = Sampling(max_new_tokens=2)
    first, second = replay.generate([[0], [0]], seeds=seeds, group_size=2, sampling=sampling)
    assert first == second and len(first) == 2


@pytest.mark.parametrize("other", [{"seed": 4}, {"step": 1}, {"group_size": 1}], ids=str)
def test_what_was_not_recorded_is_not_replayed(other: dict[str, int], tmp_path: Path) -> None:
    asked = {"seed": 5, "step": 0, "group_size": 2, **other}
    path = write(tmp_path / "r.jsonl", RECORD, {**RECORD, "index": 1})
    replay = Replay(path, seed=5, vocab_size=3)
    seeds = [stream_seed("rollout", asked["seed"], asked["step"], "train:3")]
    with pytest.raises(ReplayError, match=r"r\.jsonl: found . rollouts of a question"):
        replay.generate(
            [[0]],
            seeds=seeds,
            group_size=asked["group_size"],
            sampling=Sampling(max_new_tokens=2),
        )


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"step": 0}, "step: an integer >= 1"),
        ({"step": True}, "step: an integer >= 1"),
        ({"question": 3}, "question: a string"),
        ({"index": -1}, "index: an integer >= 0"),
        ({"token_ids": [1, 3]}, "integers from 0 to 2"),
        ({"token_ids": [1, -1]}, "integers from 0 to 2"),
        ({"token_ids": None}, "integers from 0 to 2"),
        ({"logprobs": [-1.0, None]}, "logprobs: a list of finite numbers"),
        ({"logprobs": [-1.0, float("nan")]}, "logprobs: a list of finite numbers"),
        ({"logprobs": [-1.0]}, "of one length"),
        ({"loss_mask": [1, 0]}, "loss_mask: a list of true and false"),
        ({"finish_reason": ["stop"]}, "finish_reason: stop or length"),
        ({"policy_version": 0.5}, "policy_version: an integer >= 0"),
        ({"outcome": {}}, "outcome: correct, wrong, error, timeout"),
        ({"index": 2}, "found index 2 of question 'train:3', expected 1"),
        ({"index": 0, "token_ids": [2, 2]}, "found another rollout than in line 1"),
        ({"index": 0, "outcome": "wrong"}, "found another rollout than in line 1"),
    ],
    ids=str,
)
def test_a_line_that_is_no_rollout_is_named(
    change: dict[str, Any], expected: str, tmp_path: Path
) -> None:
    path = write(tmp_path / "r.jsonl", RECORD, {**RECORD, "index": 1, **change})
    with pytest.raises(ValueError, match=r"r\.jsonl:2: found ") as raised:
        Replay(path, seed=0, vocab_size=3)
    assert expected in str(raised.value)


@pytest.mark.parametrize("line", [b"{", b"[]", b"\xff", b"\n", b"[" * 100_000], ids=len)
def test_a_line_that_is_no_object_is_named(line: bytes, tmp_path: Path) -> None:
    (tmp_path / "r.jsonl").write_bytes(json.dumps(RECORD).encode() + b"\n" + line)
    with pytest.raises(ValueError, match=r"r\.jsonl:2: found no "):
        Replay(tmp_path / "r.jsonl", seed=0, vocab_size=3)


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "r.jsonl").write_text("")
    with pytest.raises(ValueError, match="found no rollout"):
        Replay(tmp_path / "r.jsonl", seed=0, vocab_size=3)
