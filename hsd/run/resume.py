"""What decides the rest of a run, taken from a trainer and put back into one."""

from __future__ import annotations

import base64
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from hsd.data.questions import Question, question_stream
from hsd.distributed.checkpoint import STILL, load_tensors, read_json
from hsd.policy.adapters import has_adapters, is_factor
from hsd.scores import Evaluation
from hsd.trainer import Trainer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_OPTIONS = StateDictOptions(flatten_optimizer_state_dict=True)


class Questions:
    """The question stream of a run, which knows where it is.

    Args:
        drawn: questions that an earlier process drew.
    """

    def __init__(self, questions: Sequence[Question], seed: int, *, drawn: int = 0) -> None:
        self._stream = question_stream(questions, seed)
        self.drawn = 0
        for _ in range(drawn):
            next(self)

    def __iter__(self) -> Iterator[Question]:
        return self

    def __next__(self) -> Question:
        self.drawn += 1
        return next(self._stream)


@dataclass(kw_only=True)
class Position:
    """Where a run is between two steps.

    Attributes:
        step: steps that are done.
        drawn: questions that they drew.
        skipped: updates in a row, up to now, whose loss or gradient was not finite.
        files: bytes of metrics.jsonl and rollouts.jsonl.
        evaluations: (name, result) so far.
    """

    step: int = 0
    drawn: int = 0
    skipped: int = 0
    files: tuple[int, int] = (0, 0)
    evaluations: list[tuple[str, Evaluation]] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        results = [
            [name, result.correct.tolist(), result.majority.tolist()]
            for name, result in self.evaluations
        ]
        return {
            "step": self.step,
            "drawn": self.drawn,
            "skipped": self.skipped,
            "files": list(self.files),
            "evaluations": results,
        }


def read_position(path: Path) -> Position:
    """The position of a checkpoint.

    Raises:
        ValueError: its state.json is not one.
    """
    values = read_json(path / "state.json")
    try:
        metrics, rollouts = values["files"]
        return Position(
            step=int(values["step"]),
            drawn=int(values["drawn"]),
            skipped=int(values["skipped"]),
            files=(int(metrics), int(rollouts)),
            evaluations=[(str(name), _evaluation(*rest)) for name, *rest in values["evaluations"]],
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path / 'state.json'}: found no state of a run, expected one ({error!r})"
        ) from None


def _evaluation(correct: Any, majority: Any) -> Evaluation:
    """What the last table compares; its other numbers are in metrics.jsonl."""
    outcomes = torch.tensor(correct, dtype=torch.bool)
    none = torch.zeros(0)
    return Evaluation(
        correct=outcomes,
        majority=torch.tensor(majority, dtype=torch.bool),
        lengths=none,
        truncated=none,
        errors=none,
        repetition=none,
        samples=(),
    )


def tensors_of(trainer: Trainer) -> tuple[dict[str, Any], dict[str, Any]]:
    """Weights, optimiser states, reference and teacher, by name; sharded where they are.

    Where adapters make one model of them, its weights are all.

    Returns:
        those that move from step to step; and those that never do, which are not what a model's
        files hold where a warm-up came between.
    """
    policy, objective = trainer.policy, trainer.config.objective
    moving: dict[str, Any] = {"model": _weights(policy.model)}
    still: dict[str, Any] = {}
    if has_adapters(policy.model):
        weights = moving["model"].items()
        moving["model"] = {name: value for name, value in weights if is_factor(name)}
        still["model"] = {name: value for name, value in weights if not is_factor(name)}
    if policy.initial is not policy.model:
        place = moving if objective.ref_refresh_every else still
        place["reference"] = _weights(policy.initial)
    if policy.teacher is not None and policy.teacher not in (policy.model, policy.initial):
        place = moving if objective.teacher == "ema" else still
        place["teacher"] = _weights(policy.teacher)
    if trainer.optimizer.state:  # without a step it has none, and asking for them would take one
        moving["optimizer"] = _states(_optimizer_state(trainer))
    return moving, still


def shared_state(trainer: Trainer, position: Position) -> dict[str, Any]:
    """What is the same on every rank, as JSON."""
    return {
        **position.to_json(),
        "optimizer": bool(trainer.optimizer.state),
        "peers": trainer.peers.state(),
    }


def own_state() -> dict[str, Any]:
    """The random number generators of this process. Those of rollouts are seeded anew by step."""
    version, words, gauss = random.getstate()
    kind, keys, place, has_gauss, cached = np.random.get_state(legacy=True)
    devices = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {
        "torch": _text(torch.get_rng_state()),
        "devices": [_text(each) for each in devices],
        "python": [version, list(words), gauss],
        "numpy": [str(kind), np.asarray(keys).tolist(), place, has_gauss, cached],
    }


def restore(trainer: Trainer, path: Path) -> None:
    """Puts a checkpoint into a trainer that was built from the same configuration.

    Raises:
        ValueError: it does not fit.
    """
    world, policy = trainer.world, trainer.policy
    shared = read_json(path / "state.json")
    target, still = tensors_of(trainer)
    full: dict[str, Any] = {}
    if shared.get("optimizer"):
        full = _optimizer_state(trainer)
        target["optimizer"] = _states(full)
    load_tensors(path, target, world)
    if still:
        load_tensors(path.parent / STILL, still, world)
    models = {"model": policy.model, "reference": policy.initial, "teacher": policy.teacher}
    for name, model in models.items():
        weights = {**target.get(name, {}), **still.get(name, {})}
        if weights and model is not None:
            set_model_state_dict(model, weights)
    if full:
        set_optimizer_state_dict(
            policy.model, trainer.optimizer, {**full, **target["optimizer"]}, options=_OPTIONS
        )
    trainer.peers.restore(shared.get("peers"), source=str(path / "state.json"))
    trainer.engine.update_weights(policy.model, version=int(shared["step"]))
    own = path / f"rank-{world.rank:05d}.json"
    if own.exists():  # ranks beyond those that wrote keep the state they started with
        _restore_own(read_json(own), source=str(own))


def _weights(model: PreTrainedModel) -> dict[str, Any]:
    return dict(get_model_state_dict(model))


def _optimizer_state(trainer: Trainer) -> dict[str, Any]:
    return dict(get_optimizer_state_dict(trainer.policy.model, trainer.optimizer, options=_OPTIONS))


def _states(flat: dict[str, Any]) -> dict[str, Any]:
    """Moments and counts; the settings beside them are the configuration's."""
    return {name: value for name, value in flat.items() if isinstance(value, Tensor)}


def _restore_own(values: dict[str, Any], *, source: str) -> None:
    try:
        torch.set_rng_state(_bytes(values["torch"]))
        if torch.cuda.is_available() and len(values["devices"]) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all([_bytes(each) for each in values["devices"]])
        version, words, gauss = values["python"]
        random.setstate((version, tuple(words), gauss))
        kind, keys, place, has_gauss, cached = values["numpy"]
        np.random.set_state((kind, np.array(keys, dtype=np.uint32), place, has_gauss, cached))
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{source}: found no states of generators ({error!r})") from None


def _text(state: Tensor) -> str:
    return base64.b64encode(state.numpy().tobytes()).decode("ascii")


def _bytes(text: str) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
