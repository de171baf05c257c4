"""Rollouts of an earlier run, in the place of an engine and of the verifiers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hsd.data.questions import Question
from hsd.data.verify import Outcome
from hsd.rollout.protocol import Rollout, Sampling, stream_seed

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_OUTCOMES = {outcome.value: outcome for outcome in Outcome}


class ReplayError(ValueError):
    """The recorded rollouts are not those that the run asks for."""


class Replay:
    """An engine that gives what was recorded, and a judge that says of it what was said.

    The file is read once to check it; afterwards a group is read when it is asked for.

    Args:
        path: a run's rollouts.jsonl.
        seed: of the run: a group is found by the seed that it was sampled with.
        vocab_size: of the model that will be trained.

    Attributes:
        last_error: of the verifiers, which do not run: None.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line is no rollout; names its number, what was found and what was expected.
    """

    def __init__(self, path: Path, *, seed: int, vocab_size: int) -> None:
        if not path.is_file():
            raise FileNotFoundError(f"replay: found no file {path}, expected a rollouts.jsonl")
        self.last_error: str | None = None
        self._path = path
        self._vocab_size = vocab_size
        self._places: dict[int, list[tuple[int, int]]] = {}  # seed: (line, byte) of each rollout
        self._outcomes: list[Outcome] = []
        offset = 0
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                record = self._parse(number, line)
                key = stream_seed("rollout", seed, record["step"] - 1, record["question"])
                self._add(self._places.setdefault(key, []), record, number, offset)
                offset += len(line)
        if not self._places:
            raise ValueError(f"{path}: found no rollout, expected at least one line")

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        seeds: Sequence[int],
        group_size: int,
        sampling: Sampling,
    ) -> list[list[Rollout]]:
        groups: list[list[Rollout]] = []
        self._outcomes = []
        for seed in seeds:
            places = self._places.get(seed, [])
            if len(places) != group_size:
                raise ReplayError(
                    f"{self._path}: found {len(places)} rollouts of a question of this step, "
                    f"expected {group_size}: those of a run of this recipe and seed"
                )
            records = [self._read(*place) for place in places]
            groups.append([_rollout(record) for record in records])
            self._outcomes += [_OUTCOMES[record["outcome"]] for record in records]
        return groups

    def update_weights(self, model: PreTrainedModel, *, version: int) -> None:
        """Nothing: what it gives does not depend on them."""

    def sleep(self) -> None:
        """Nothing to free."""

    def health(self) -> dict[str, float]:
        return {}

    def judge(self, items: Sequence[tuple[Question, str]]) -> list[Outcome]:
        """The recorded outcomes of the rollouts that `generate` gave last, in their order."""
        if len(items) != len(self._outcomes):
            found = f"found {len(items)}, expected the {len(self._outcomes)} given last"
            raise ValueError(f"items: {found}")
        return self._outcomes

    def close(self) -> None:
        """Nothing is open."""

    def _add(
        self, places: list[tuple[int, int]], record: Mapping[str, Any], number: int, offset: int
    ) -> None:
        """A rollout's place, once: a question that a step drew twice has the same ones twice."""
        where, index = f"{self._path}:{number}", record["index"]
        if index > len(places):
            found = f"index {index} of question {record['question']!r}"
            raise ValueError(f"{where}: found {found}, expected {len(places)}")
        if index == len(places):
            places.append((number, offset))
            return
        first = self._read(*places[index])
        if (_rollout(first), first["outcome"]) != (_rollout(record), record["outcome"]):
            line = places[index][0]
            raise ValueError(
                f"{where}: found another rollout than in line {line}, expected the same"
            )

    def _read(self, number: int, offset: int) -> Mapping[str, Any]:
        with self._path.open("rb") as file:
            file.seek(offset)
            return self._parse(number, file.readline())

    def _parse(self, number: int, line: bytes) -> Mapping[str, Any]:
        try:
            record = json.loads(line.decode("utf-8"))
            fault = "an object" if not isinstance(record, dict) else self._fault(record)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{self._path}:{number}: found no valid JSON ({error})") from None
        if fault:
            raise ValueError(f"{self._path}:{number}: found no rollout, expected {fault}")
        return dict(record)

    def _fault(self, record: Mapping[str, Any]) -> str:
        """What a line should have and has not; empty if nothing is wrong."""
        step, index, version = (record.get(key) for key in ("step", "index", "policy_version"))
        tokens, logprobs, mask = (record.get(key) for key in ("token_ids", "logprobs", "loss_mask"))
        checks = {
            "step: an integer >= 1": _whole(step, least=1),
            "question: a string": isinstance(record.get("question"), str),
            "index: an integer >= 0": _whole(index),
            "policy_version: an integer >= 0": _whole(version),
            f"token_ids: a list of integers from 0 to {self._vocab_size - 1}": isinstance(
                tokens, list
            )
            and all(_whole(each) and each < self._vocab_size for each in tokens),
            "logprobs: a list of finite numbers": isinstance(logprobs, list)
            and all(isinstance(each, float) and abs(each) < float("inf") for each in logprobs),
            "loss_mask: a list of true and false": isinstance(mask, list)
            and all(isinstance(each, bool) for each in mask),
            "finish_reason: stop or length": record.get("finish_reason") in ("stop", "length"),
            f"outcome: {', '.join(_OUTCOMES)}": record.get("outcome") in list(_OUTCOMES),
        }
        for expected, holds in checks.items():
            if not holds:
                return expected
        if not len(tokens or ()) == len(logprobs or ()) == len(mask or ()):
            return "token_ids, logprobs and loss_mask of one length"
        return ""


def _whole(value: Any, *, least: int = 0) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _rollout(record: Mapping[str, Any]) -> Rollout:
    return Rollout(
        token_ids=tuple(record["token_ids"]),
        logprobs=tuple(record["logprobs"]),
        loss_mask=tuple(record["loss_mask"]),
        finish_reason=record["finish_reason"],
        policy_version=record["policy_version"],
    )
