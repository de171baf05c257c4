"""Groups of rollouts, one after another: from a file of rollouts, or sampled from a model."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hsd.data.peers import uniform_peers
from hsd.data.questions import Question
from hsd.rollout.protocol import RolloutEngine, Sampling, response_text, stream_seed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from hsd.data.verify import Verifier


@dataclass(frozen=True, kw_only=True)
class CreditGroup:
    """A question with its judged rollouts; sequences have one entry per rollout.

    Attributes:
        question: its answer is "" where it is not known.
        step: of training, from 1; 0 for rollouts of no training.
        peers: indices in the group, None where no other rollout succeeded.
    """

    question: Question
    step: int
    token_ids: Sequence[tuple[int, ...]]
    loss_masks: Sequence[tuple[bool, ...]]
    finish_reasons: Sequence[str]
    texts: Sequence[str]
    rewards: Sequence[bool]
    peers: Sequence[int | None]


def read_groups(
    path: Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    answers: Mapping[str, str],
    answer_needed: bool,
    vocab_size: int,
    seed: int,
    step: int | None = None,
) -> Iterator[CreditGroup]:
    """The groups of a rollouts.jsonl: neighbouring lines of one step and question.

    Args:
        path: one JSON object a line: prompt, token_ids and correct; optionally question (an id;
            default: the prompt), answer, step, text, loss_mask, finish_reason and peer (an index in
            the group; drawn as in training where the key is missing).
        answers: by question id, for lines without an answer.
        answer_needed: an answer that is not known is an error.
        vocab_size: of the model that will read the token ids.
        seed: of the draw of peers.
        step: leaves out the rollouts of other steps.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: names the line, what was found and what was expected.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file, expected a JSONL file of rollouts")
    for (at, _), lines in groupby(_lines(path), key=lambda line: (line.step, line.question)):
        group = list(lines)
        if step is None or at == step:
            yield _group(group, tokenizer, answers, answer_needed, vocab_size, seed)


@dataclass(frozen=True, kw_only=True)
class _Line:
    where: str
    record: Mapping[str, Any]
    step: int
    question: str


def _lines(path: Path) -> Iterator[_Line]:
    with path.open("rb") as file:
        for number, text in enumerate(file, start=1):
            where = f"{path}:{number}"
            if not text.strip():
                continue
            try:
                record = json.loads(text.decode("utf-8"))
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{where}: found no valid JSON ({error})") from None
            if not isinstance(record, dict):
                raise ValueError(f"{where}: found {record!r:.40}, expected a JSON object")
            prompt = _text(record, "prompt", where)
            yield _Line(
                where=where,
                record=record,
                step=_typed(record, "step", int, where, default=0),
                question=_text(record, "question", where, default=prompt),
            )


def _group(
    lines: Sequence[_Line],
    tokenizer: PreTrainedTokenizerBase,
    answers: Mapping[str, str],
    answer_needed: bool,
    vocab_size: int,
    seed: int,
) -> CreditGroup:
    first = lines[0]
    token_ids = [_token_ids(line, vocab_size) for line in lines]
    rewards = [_typed(line.record, "correct", bool, line.where) for line in lines]
    for line in lines:
        if line.record["prompt"] != first.record["prompt"]:
            raise ValueError(
                f"{line.where}: prompt: found {line.record['prompt']!r:.40}, expected that of the "
                f"question's other rollouts, {first.record['prompt']!r:.40}"
            )
    answer = _text(first.record, "answer", first.where, default=answers.get(first.question, ""))
    if answer_needed and not answer:
        raise ValueError(
            f"{first.where}: answer: found none for the question {first.question!r:.60}, expected "
            "one, or only contexts without it"
        )
    drawn = uniform_peers(rewards, seed=seed, step=first.step - 1, question_id=first.question)
    texts = [
        _typed(line.record, "text", str, line.where)
        if "text" in line.record
        else str(tokenizer.decode(list(ids), skip_special_tokens=True))
        for line, ids in zip(lines, token_ids, strict=True)
    ]
    return CreditGroup(
        question=Question(id=first.question, prompt=first.record["prompt"], answer=answer),
        step=first.step,
        token_ids=token_ids,
        loss_masks=[_loss_mask(line, len(i)) for line, i in zip(lines, token_ids, strict=True)],
        finish_reasons=[
            _typed(line.record, "finish_reason", str, line.where, default="stop") for line in lines
        ],
        texts=texts,
        rewards=rewards,
        peers=[_peer(line, i, rewards, drawn[i]) for i, line in enumerate(lines)],
    )


def _typed(
    record: Mapping[str, Any], key: str, kind: type, where: str, *, default: Any = None
) -> Any:
    value = record.get(key, default)
    right = isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
    if not right:
        names = {str: "a string", int: "an integer", bool: "true or false", list: "a list"}
        raise ValueError(f"{where}: {key}: found {value!r:.40}, expected {names[kind]}")
    return value


def _text(record: Mapping[str, Any], key: str, where: str, *, default: str | None = None) -> str:
    """A string that a tokenizer can read."""
    value: str = _typed(record, key, str, where, default=default)
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{where}: {key}: found a lone surrogate at character {error.start}, expected valid "
            "Unicode"
        ) from None
    return value


def _token_ids(line: _Line, vocab_size: int) -> tuple[int, ...]:
    ids = _typed(line.record, "token_ids", list, line.where)
    wrong = [i for i in ids if not (type(i) is int and 0 <= i < vocab_size)]
    if wrong or not ids:
        found = repr(wrong[0]) if wrong else "none"
        raise ValueError(
            f"{line.where}: token_ids: found {found:.40}, expected integers from 0 to "
            f"{vocab_size - 1}, at least one"
        )
    return tuple(ids)


def _loss_mask(line: _Line, length: int) -> tuple[bool, ...]:
    mask = _typed(line.record, "loss_mask", list, line.where, default=[True] * length)
    if len(mask) != length or not all(type(each) is bool for each in mask):
        raise ValueError(
            f"{line.where}: loss_mask: found {len(mask)} values, expected {length}, true or false"
        )
    return tuple(mask)


def _peer(line: _Line, index: int, rewards: Sequence[bool], drawn: int | None) -> int | None:
    if "peer" not in line.record:
        return drawn
    peer = line.record["peer"]
    if peer is None:
        return None
    fits = type(peer) is int and 0 <= peer < len(rewards) and peer != index and rewards[peer]
    if not fits:
        raise ValueError(
            f"{line.where}: peer: found {peer!r:.40}, expected null or the index of another "
            f"rollout of the group of {len(rewards)} that is correct"
        )
    return int(peer)


def sample_groups(
    questions: Sequence[Question],
    verify: Verifier,
    engine: RolloutEngine,
    tokenizer: PreTrainedTokenizerBase,
    *,
    prompt: Callable[[Question], Sequence[int]],
    sampling: Sampling,
    group_size: int,
    at_once: int,
    seed: int,
) -> Iterator[CreditGroup]:
    """A fresh group for each question, sampled when it is asked for.

    Args:
        prompt: from a question to the token ids of the student's prompt.
        at_once: groups that the engine is asked for together.
    """
    for start in range(0, len(questions), at_once):
        chosen = questions[start : start + at_once]
        groups = engine.generate(
            [prompt(question) for question in chosen],
            seeds=[stream_seed("credit", seed, question.id) for question in chosen],
            group_size=group_size,
            sampling=sampling,
        )
        for question, group in zip(chosen, groups, strict=True):
            texts = [response_text(tokenizer, rollout) for rollout in group]
            rewards = [verify(question, text) for text in texts]
            yield CreditGroup(
                question=question,
                step=0,
                token_ids=[rollout.token_ids for rollout in group],
                loss_masks=[rollout.loss_mask for rollout in group],
                finish_reasons=[rollout.finish_reason for rollout in group],
                texts=texts,
                rewards=rewards,
                peers=uniform_peers(rewards, seed=seed, step=-1, question_id=question.id),
            )
