"""Whose attempt the teacher is shown beside the question: the policies that choose peers.

A policy has two parts: a source, the successes to choose from, and a choice among them. Every draw
of rollout i of a question has a random stream of its own, from (seed, step, question, i), so it
depends neither on other draws nor on the number of processes.
"""

from __future__ import annotations

import random
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import Any, Literal, get_args

Source = Literal["group", "other_prompt", "buffer"]
Choice = Literal[
    "uniform",
    "shortest",
    "lowest_perplexity",
    "highest_perplexity",
    "first",
    "longest_prefix",
]


@dataclass(frozen=True, kw_only=True)
class PeerConfig:
    """Which successes of the policy the teacher is shown (arXiv 2606.15576).

    Args:
        source: "group", the other rollouts of the question, as published; "other_prompt", a
            success on another question of the step: the control; "buffer", the group, and where
            it has no other success, successes on the question from earlier steps.
        choice: "uniform" as published, or the first by length, by the engine's perplexity, by
            index, or by the longest prefix in common with the rollout.
        count: k, peers that are shown; fewer where there are fewer.
        show_failed: beside the peers, show another rollout of the group that failed.
        buffer_size: successes that are kept per question; the oldest leave.
    """

    source: Source = "group"
    choice: Choice = "uniform"
    count: int = 1
    show_failed: bool = False
    buffer_size: int = 8

    def __post_init__(self) -> None:
        for name, value, known in (
            ("source", self.source, get_args(Source)),
            ("choice", self.choice, get_args(Choice)),
        ):
            if value not in known:
                raise ValueError(f"peers.{name}: found {value!r}, expected {' or '.join(known)}")
        for name, number in (("count", self.count), ("buffer_size", self.buffer_size)):
            if isinstance(number, bool) or not isinstance(number, int) or number < 1:
                raise ValueError(f"peers.{name}: found {number!r}, expected an integer >= 1")
        if self.buffer_size != 8 and self.source != "buffer":
            found = f"found {self.buffer_size}, expected peers.source = 'buffer' beside it"
            raise ValueError(f"peers.buffer_size: {found}")


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """One judged rollout, as a peer policy sees it.

    Attributes:
        question_id, step, index: where it stems from: the question, the training step, and its
            place in the group.
        text: what a teacher reads.
        logprobs: the engine's, of the tokens, nats.
    """

    question_id: str
    step: int
    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    correct: bool

    @property
    def log_perplexity(self) -> float:
        """Mean surprise of a token under the policy that sampled it, nats."""
        return -sum(self.logprobs) / max(len(self.logprobs), 1)


@dataclass(frozen=True, kw_only=True)
class Peers:
    """What is shown for one rollout: successes, and a failure of its group if one is asked for."""

    successes: tuple[Attempt, ...] = ()
    failed: Attempt | None = None


class PeerPolicy:
    """Chooses the peers of a run; holds the successes of earlier steps where the source does.

    Args:
        config: the policy.
        seed: the run's.
    """

    def __init__(self, config: PeerConfig, *, seed: int) -> None:
        self._config = config
        self._seed = seed
        self._past: defaultdict[str, deque[Attempt]] = defaultdict(
            lambda: deque(maxlen=config.buffer_size)
        )

    @property
    def needs_other_groups(self) -> bool:
        """Whether `choose` reads the other questions of the step."""
        return self._config.source == "other_prompt"

    def choose(self, group: Sequence[Attempt], others: Iterable[Attempt] = ()) -> list[Peers]:
        """The peers of each attempt of a group, never the attempt itself.

        Args:
            group: all attempts at one question in one step.
            others: attempts at the other questions of the step, over all processes, in an order
                that does not depend on these; read for the source "other_prompt" alone.
        """
        elsewhere = []
        if self.needs_other_groups and group:
            own = group[0].question_id
            elsewhere = [a for a in others if a.correct and a.question_id != own]
        return [self._peers(attempt, group, elsewhere) for attempt in group]

    def remember(self, attempts: Iterable[Attempt]) -> None:
        """Keeps the successes of a step that is done, if the source is the buffer."""
        if self._config.source == "buffer":
            for attempt in attempts:
                if attempt.correct:
                    self._past[attempt.question_id].append(attempt)

    def state(self) -> list[dict[str, Any]]:
        """The successes that are kept, as JSON, oldest first for each question."""
        return [asdict(attempt) for kept in self._past.values() for attempt in kept]

    def restore(self, state: Any, *, source: str) -> None:
        """Takes the place of what is kept.

        Raises:
            ValueError: it is no `state()`; names `source`.
        """
        try:
            lists = ("token_ids", "logprobs")
            attempts = [
                Attempt(**{**values, **{name: tuple(values[name]) for name in lists}})
                for values in state
            ]
        except (TypeError, KeyError) as error:
            raise ValueError(f"{source}: found no successes of peers ({error!r})") from None
        self._past.clear()
        self.remember(attempts)

    def _peers(
        self, attempt: Attempt, group: Sequence[Attempt], elsewhere: Sequence[Attempt]
    ) -> Peers:
        others = [other for other in group if other.index != attempt.index]
        candidates: Sequence[Attempt] = [other for other in others if other.correct]
        if self._config.source == "other_prompt":
            candidates = elsewhere
        elif self._config.source == "buffer" and not candidates:
            candidates = list(self._past.get(attempt.question_id, ()))
        if not candidates:
            return Peers()
        count = min(self._config.count, len(candidates))
        rng = self._stream("peer", attempt)
        successes = _CHOICES[self._config.choice](attempt, candidates, rng)[:count]
        failures = [other for other in others if not other.correct]
        failed = None
        if self._config.show_failed and failures:
            failed = self._stream("failed-peer", attempt).choice(failures)
        return Peers(successes=tuple(successes), failed=failed)

    def _stream(self, name: str, attempt: Attempt) -> random.Random:
        place = f"{attempt.step}/{attempt.index}/{attempt.question_id}"
        return random.Random(f"{name}/{self._seed}/{place}")


def _uniform(_: Attempt, candidates: Sequence[Attempt], rng: random.Random) -> list[Attempt]:
    return rng.sample(candidates, len(candidates))


def _shortest(_: Attempt, candidates: Sequence[Attempt], __: random.Random) -> list[Attempt]:
    return sorted(candidates, key=lambda candidate: len(candidate.token_ids))


def _lowest_perplexity(
    _: Attempt, candidates: Sequence[Attempt], __: random.Random
) -> list[Attempt]:
    return sorted(candidates, key=lambda candidate: candidate.log_perplexity)


def _highest_perplexity(
    _: Attempt, candidates: Sequence[Attempt], __: random.Random
) -> list[Attempt]:
    return sorted(candidates, key=lambda candidate: -candidate.log_perplexity)


def _first(_: Attempt, candidates: Sequence[Attempt], __: random.Random) -> list[Attempt]:
    return list(candidates)


def _longest_prefix(
    attempt: Attempt, candidates: Sequence[Attempt], _: random.Random
) -> list[Attempt]:
    return sorted(
        candidates,
        key=lambda candidate: -divergence_position(attempt.token_ids, candidate.token_ids),
    )


_CHOICES: Mapping[str, Callable[[Attempt, Sequence[Attempt], random.Random], list[Attempt]]] = (
    MappingProxyType(
        {
            "uniform": _uniform,
            "shortest": _shortest,
            "lowest_perplexity": _lowest_perplexity,
            "highest_perplexity": _highest_perplexity,
            "first": _first,
            "longest_prefix": _longest_prefix,
        }
    )
)
"""The candidates in order of preference; sorting is stable, so ties go to the lower index."""


def uniform_peers(
    rewards: Sequence[bool], *, seed: int, step: int, question_id: str
) -> list[int | None]:
    """The published policy's draw for a group of which only the outcomes are at hand.

    Returns:
        the index of one peer per rollout, None where no other rollout succeeded.
    """
    attempts = [
        Attempt(
            question_id=question_id,
            step=step,
            index=index,
            text="",
            token_ids=(),
            logprobs=(),
            correct=bool(reward),
        )
        for index, reward in enumerate(rewards)
    ]
    chosen = PeerPolicy(PeerConfig(), seed=seed).choose(attempts)
    return [peers.successes[0].index if peers.successes else None for peers in chosen]


def divergence_position(rollout_ids: Sequence[int], peer_ids: Sequence[int]) -> int:
    """tau: the first index, from 0, where the token ids differ.

    If one is a prefix of the other, the length of the shorter.
    """
    for position, (rollout_id, peer_id) in enumerate(zip(rollout_ids, peer_ids, strict=False)):
        if rollout_id != peer_id:
            return position
    return min(len(rollout_ids), len(peer_ids))


def expected_coverage(pass_rate: float, group_size: int) -> float:
    """The expected share of rollouts that fail and have a successful peer.

    f(p, G) = (1 - p) (1 - (1 - p)^(G - 1)), largest at p = 1 - G^(-1 / (G - 1)).

    Args:
        pass_rate: p, from 0 to 1.
        group_size: G, rollouts per question, at least 1.

    Raises:
        ValueError: an argument is out of its range.
    """
    if not 0.0 <= pass_rate <= 1.0:
        raise ValueError(f"pass_rate: found {pass_rate}, expected a number from 0 to 1")
    if group_size < 1:
        raise ValueError(f"group_size: found {group_size}, expected at least 1")
    failure_rate = 1.0 - pass_rate
    return failure_rate * (1.0 - failure_rate ** (group_size - 1))
