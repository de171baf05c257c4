"""Reading files of rollouts: groups, peers, and one clear error for what is wrong."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from credit_records import CONTEXTS, make_rollout
from transformers import PreTrainedTokenizerFast

from hsd.credit.files import read_records, write_records
from hsd.credit.records import from_record
from hsd.credit.source import CreditGroup, read_groups
from hsd.data.peers import uniform_peers

LINE: dict[str, Any] = {"prompt": "p", "answer": "1", "token_ids": [17, 256], "correct": True}


def read(path: Path, tokenizer: PreTrainedTokenizerFast, **options: Any) -> list[CreditGroup]:
    settings = {"answers": {}, "answer_needed": True, "vocab_size": 260, "seed": 3, **options}
    return list(read_groups(path, tokenizer, **settings))


def write(path: Path, *records: Mapping[str, Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def test_neighbours_of_one_question_and_step_are_a_group(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    at = [("a", 1), ("a", 1), ("b", 1), ("a", 2)]
    path = write(
        tmp_path / "r.jsonl", *({**LINE, "question": q, "step": s, "correct": True} for q, s in at)
    )
    groups = read(path, tokenizer)
    found = [(each.question.id, each.step, len(each.token_ids)) for each in groups]
    assert found == [("a", 1, 2), ("b", 1, 1), ("a", 2, 1)]
    assert [each.step for each in read(path, tokenizer, step=2)] == [2]
    assert groups[0].texts[0] == "\u0001" or groups[0].texts[0] == tokenizer.decode([17])


def test_peers_are_as_recorded_or_drawn_as_in_training(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    outcomes = (True, True, True, False)
    plain = [{**LINE, "question": "q", "step": 5, "correct": c} for c in outcomes]
    (drawn,) = read(write(tmp_path / "drawn.jsonl", *plain), tokenizer)
    assert drawn.peers == uniform_peers(outcomes, seed=3, step=4, question_id="q")
    recorded = [{**line, "peer": peer} for line, peer in zip(plain, (2, None, 0, 1), strict=True)]
    (kept,) = read(write(tmp_path / "kept.jsonl", *recorded), tokenizer)
    assert kept.peers == [2, None, 0, 1]


def test_answers_come_from_the_line_or_from_the_task(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    bare = {key: value for key, value in LINE.items() if key != "answer"}
    path = write(tmp_path / "r.jsonl", {**LINE, "question": "a"}, {**bare, "question": "b"})
    groups = read(path, tokenizer, answers={"a": "7", "b": "9"})
    assert [each.question.answer for each in groups] == ["1", "9"]
    assert read(path, tokenizer, answer_needed=False)[1].question.answer == ""


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"prompt": 3}, "prompt: found 3, expected a string"),
        ({"correct": 1}, "correct: found 1, expected true or false"),
        ({"token_ids": []}, "token_ids: found none, expected integers from 0 to 259"),
        ({"token_ids": [260]}, "token_ids: found 260"),
        ({"token_ids": [True]}, "token_ids: found True"),
        ({"step": True}, "step: found True, expected an integer"),
        ({"loss_mask": [True]}, "loss_mask: found 1 values, expected 2"),
        ({"loss_mask": [1, 1]}, "loss_mask: "),
        ({"peer": 0}, "peer: found 0, expected null or the index of another"),
        ({"peer": 4}, "peer: found 4"),
        ({"answer": 5}, "answer: found 5, expected a string"),
        ({"answer": ""}, "answer: found none"),
        ({"prompt": "a\ud800"}, "prompt: found a lone surrogate at character 1"),
        ({"question": "\ud800"}, "question: found a lone surrogate at character 0"),
        ({"answer": "\udfff"}, "answer: found a lone surrogate at character 0"),
        ({"text": 5}, "text: found 5, expected a string"),
    ],
)
def test_wrong_fields_name_their_line(
    change: dict[str, Any], said: str, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    path = write(tmp_path / "r.jsonl", {**LINE, **change})
    with pytest.raises(ValueError) as caught:
        read(path, tokenizer)
    assert str(caught.value).startswith(f"{path}:1: {said}")


@pytest.mark.parametrize("text", ["{", "[1]", "\xff"])
def test_lines_that_are_no_objects(
    text: str, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    path = tmp_path / "r.jsonl"
    path.write_bytes(b"\n" + text.encode("latin-1") + b"\n")
    with pytest.raises(ValueError, match=r"r\.jsonl:2: found"):
        read(path, tokenizer)


def test_a_question_with_two_prompts_is_refused(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    named = {**LINE, "question": "q"}
    path = write(tmp_path / "r.jsonl", named, {**named, "prompt": "another"})
    with pytest.raises(ValueError, match=r"r\.jsonl:2: prompt: found 'another', expected that of"):
        read(path, tokenizer)


def test_a_peer_that_failed_is_refused(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = write(tmp_path / "r.jsonl", {**LINE, "correct": False}, {**LINE, "peer": 0})
    with pytest.raises(ValueError, match=r"r\.jsonl:2: peer: found 0"):
        read(path, tokenizer)


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_records_survive_the_file(ending: str, tmp_path: Path) -> None:
    if ending == "parquet":
        pytest.importorskip("pyarrow", reason="Python 3.10 has no pinned pyarrow")
    text = 'a "quoted" \u2028 </script> é\ud800'
    rollout = make_rollout(6, text=text, divergence=2, answer=None)
    rollout.entropy[3] = float("nan")
    path = tmp_path / f"credit.{ending}"
    if ending == "parquet":  # which holds whole characters only
        text = text.replace("\ud800", "?")
    assert len(list(write_records(path, [rollout] * 2, contexts=CONTEXTS))) == 2
    for read_back in read_records(path):
        assert (read_back.text, read_back.answer, read_back.divergence) == (text, None, 2)
        assert read_back.tokens == rollout.tokens
        assert abs(read_back.logprob - rollout.logprob).max() <= 5e-7
        assert read_back.weight.tolist() == pytest.approx(rollout.weight.tolist(), rel=1e-6)
        assert [i for i, h in enumerate(read_back.entropy) if h != h] == [3]
        top = read_back.contexts["answer"].top
        assert (top.token_ids == rollout.contexts["answer"].top.token_ids).all()


def test_a_line_that_is_no_record_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"found no record of a rollout"):
        from_record({"step": 1})
    path = tmp_path / "credit.jsonl"
    list(write_records(path, [make_rollout(2)], contexts=CONTEXTS))
    path.write_text(path.read_text(encoding="utf-8") + "[]\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"credit\.jsonl:2: "):
        list(read_records(path))
