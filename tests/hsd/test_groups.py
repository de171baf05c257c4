"""Groups of a step: rounds of sampling until it is full."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from hsd.config import Config, OptimizerConfig, RolloutConfig
from hsd.data.contexts import ContextBuilder
from hsd.data.questions import Question
from hsd.data.verify import Outcome
from hsd.distributed.process import World
from hsd.metrics import read_json_lines
from hsd.rollout.groups import Group, GroupSampler, step_totals, too_old
from hsd.rollout.protocol import Rollout, Sampling


class HalfEngine:
    """Half of a group is right on every third question; the others are all wrong."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, versions: Sequence[int]) -> None:
        self.versions = versions  # of each round
        self._tokenizer = tokenizer
        self.rounds: list[int] = []

    def generate(
        self, prompts: Sequence[Sequence[int]], *, seeds: Any, group_size: int, sampling: Sampling
    ) -> list[list[Rollout]]:
        self.rounds.append(len(prompts))
        return [self._group(prompt, group_size) for prompt in prompts]

    def _group(self, prompt: Sequence[int], size: int) -> list[Rollout]:
        number = int("".join(filter(str.isdigit, self._tokenizer.decode(prompt))))
        texts = ["right" if number % 3 == 0 and i % 2 else "wrong, and longer" for i in range(size)]
        return [self._rollout(tuple(self._tokenizer(text)["input_ids"])) for text in texts]

    def _rollout(self, ids: tuple[int, ...]) -> Rollout:
        return Rollout(
            token_ids=ids,
            logprobs=(0.0,) * len(ids),
            loss_mask=(False,) + (True,) * (len(ids) - 1),
            finish_reason="stop",
            policy_version=self.versions[len(self.rounds) - 1],
        )

    def update_weights(self, model: Any, *, version: int) -> None:
        raise NotImplementedError


def sample(
    tokenizer: PreTrainedTokenizerFast,
    *,
    group_filter: str,
    rounds: int,
    step: int = 0,
    versions: Sequence[int] = (0,) * 9,
    **changes: int,
) -> tuple[list[Group], list[int]]:
    config = Config(rollout=RolloutConfig(questions_per_step=4, group_size=4, **changes))
    objective = replace(config.objective, group_filter=group_filter)
    rollout = replace(config.rollout, sampling_rounds=rounds)
    engine = HalfEngine(tokenizer, versions)
    sampler = GroupSampler(
        config=replace(config, objective=objective, rollout=rollout),
        engine=engine,
        tokenizer=tokenizer,
        contexts=ContextBuilder(tokenizer, config.context),
        judge=lambda items: [
            Outcome.CORRECT if text == "right" else Outcome.WRONG for _, text in items
        ],
        sampling=Sampling(max_new_tokens=32),
        world=World(rank=0, size=1),
    )
    stream = (Question(id=f"q{n}", prompt=f"Say {n}.", answer="") for n in itertools.count())
    return sampler.sample(stream, step=step), engine.rounds


def test_without_a_filter_one_round_is_the_step(tokenizer: PreTrainedTokenizerFast) -> None:
    groups, rounds = sample(tokenizer, group_filter="all", rounds=1)
    assert rounds == [4]
    assert [(group.question.id, group.place) for group in groups] == [
        (f"q{n}", n) for n in range(4)
    ]


def test_rounds_draw_what_is_missing_until_the_step_is_full(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    groups, rounds = sample(tokenizer, group_filter="mixed", rounds=9)
    # 0 and 3 of the first four questions are mixed, none of 4 and 5, then 6, and at last 9.
    assert rounds == [4, 2, 2, 1, 1]
    assert [g.question.id for g in groups if g.place >= 0] == ["q0", "q3", "q6", "q9"]
    assert [g.place for g in groups if g.place >= 0] == [0, 1, 2, 3]
    assert len(groups) == sum(rounds)


def test_rounds_end_at_their_limit(tokenizer: PreTrainedTokenizerFast) -> None:
    groups, rounds = sample(tokenizer, group_filter="mixed", rounds=3)
    assert rounds == [4, 2, 2]
    kept = [group for group in groups if group.place >= 0]
    assert [group.question.id for group in kept] == ["q0", "q3", "q6"]
    totals = step_totals(kept, Config(), World(rank=0, size=1))
    own = 2 * (len("right") - 1) + 2 * (len("wrong, and longer") - 1)
    assert (totals.questions, totals.tokens) == (3, 3 * own)


def test_groups_of_weights_too_far_behind_are_left_out_and_drawn_anew(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    kept, rounds = sample(
        tokenizer,
        group_filter="all",
        rounds=3,
        step=7,
        versions=[4, 5, 7],  # 3, 2 and 0 steps behind
        max_policy_age=2,
    )
    assert rounds == [4, 4]
    assert [group.question.id for group in kept if group.place >= 0] == ["q4", "q5", "q6", "q7"]
    assert [group.place for group in kept[:4]] == [-1] * 4
    (group, *_), _ = sample(tokenizer, group_filter="all", rounds=1, step=3)
    limits = {
        (age, updates): too_old(
            group,
            Config(
                rollout=RolloutConfig(max_policy_age=age),
                optimizer=OptimizerConfig(updates_per_step=updates),
            ),
        )
        for age in (None, 2, 3, 5, 6)
        for updates in (1, 2)
    }
    assert [each for each, found in limits.items() if found] == [(2, 1), (2, 2), (3, 2), (5, 2)]


def test_a_run_counts_what_was_too_old(
    tmp_path: Path,
    make_recipe: Callable[..., Path],
    run_hsd: Callable[..., int],
    trained_run: Path,
) -> None:
    records = read_json_lines(trained_run / "rollouts.jsonl")
    for record in records:
        record["policy_version"] = 0  # as if no weights had ever reached the engine
    rollouts = tmp_path / "rollouts.jsonl"
    rollouts.write_text("".join(json.dumps(record) + "\n" for record in records))
    recipe = make_recipe(tmp_path, {"rollout": {"max_policy_age": 1}})
    assert run_hsd("train", recipe, "--run-dir", tmp_path / "run", "--replay", rollouts) == 0
    steps = read_json_lines(tmp_path / "run" / "metrics.jsonl")
    assert [step["too_old_rollouts"] for step in steps] == [0, 0, 8]
    assert [step["trained_tokens"] > 0 for step in steps] == [True, True, False]
    assert steps[2]["grad_norm"] == 0


@pytest.mark.parametrize("index", range(4))
def test_attempts_are_the_rollouts_in_their_places(
    index: int, tokenizer: PreTrainedTokenizerFast
) -> None:
    group = sample(tokenizer, group_filter="all", rounds=1)[0][0]
    attempt = group.attempts[index]
    assert (attempt.index, attempt.question_id, attempt.step) == (index, "q0", 0)
    assert attempt.token_ids == group.rollouts[index].token_ids
    assert attempt.correct == (attempt.text == "right") == (index % 2 == 1)
