"""Each recipe's loss and gradient against the formula of its paper."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import paper_losses as paper
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from hsd.config import Config
from hsd.data.contexts import ContextBuilder
from hsd.data.peers import Attempt, PeerPolicy
from hsd.data.questions import Question
from hsd.data.verify import Outcome
from hsd.objective.batch import JudgedRollout, judge
from hsd.objective.group_filter import GROUP_FILTERS
from hsd.objective.normalisation import StepTotals
from hsd.objective.step import SUMS, accumulate_gradients
from hsd.policy.teachers import Policy, move_toward
from hsd.recipe import load_recipe
from hsd.rollout.groups import Group
from hsd.rollout.protocol import Rollout

RECIPES = Path(__file__).parents[2] / "recipes"
BETA, LONGEST, CACHE = 1e-3, 16, 3

# Each question with its rollouts; those that end in "!" are correct.
TEXTS = {
    "Compute 1 + 2.": ["it is 4", "it is 3!", "a much longer 5", "3!"],
    "Compute 2 + 2.": ["it is 5", "no", "it was 5 once ", "x"],
    "Compute 3 + 3.": ["it is 6!", "six!", "6!", "it is 7"],
    "Compute 4 + 4.": ["8!", "it is 8!", "eight!", "8 it is!"],
}
EXPECTED: dict[str, Callable[[paper.Groups], Tensor]] = {
    "hsd": lambda groups: paper.hsd(groups, BETA),
    "hsd_window": lambda groups: paper.hsd_window(groups, BETA, window=0),
    "hsd_other_prompt": lambda groups: paper.hsd(groups, BETA),
    "opsd": lambda groups: paper.hsd(groups, BETA),
    "sdpo": paper.sdpo,
    "sdft": paper.sdft,
    "grpo": lambda groups: paper.grpo(groups, BETA),
    "dr_grpo": lambda groups: paper.dr_grpo(groups, LONGEST),
    "gspo": paper.gspo,
    "dapo": lambda groups: paper.dapo(groups, LONGEST, CACHE),
    "grpo_opsd": lambda groups: paper.grpo_opsd(groups, BETA),
    "rlsd": lambda groups: paper.rlsd(groups, BETA),
}
# What the teacher is shown: answer, peer, demonstration.
SHOWN = {
    "hsd": (True, True, False),
    "hsd_window": (True, True, False),
    "hsd_other_prompt": (True, True, False),
    "opsd": (True, False, False),
    "sdpo": (False, True, False),
    "sdft": (False, False, True),
    "grpo_opsd": (True, False, False),
    "rlsd": (True, False, False),
}
TEACHERS = {"sdpo": "ema", "sdft": "ema"}


def log_probs(model: Any, prompt: Sequence[int], response: Sequence[int]) -> Tensor:
    logits = model(input_ids=torch.tensor([[*prompt, *response]])).logits[0]
    return logits[len(prompt) - 1 : -1].log_softmax(-1)


@dataclass(frozen=True)
class Scene:
    """Fixed rollouts of a policy that has moved away from where it started and from its teacher."""

    policy: Policy
    tokenizer: PreTrainedTokenizerFast
    groups: list[Group]
    config: Config
    name: str
    formula: Callable[[paper.Groups], Tensor]

    def judged(self, part: Sequence[Group] | None = None) -> list[list[JudgedRollout]]:
        passes = GROUP_FILTERS[self.config.objective.group_filter]
        groups = [g for g in (self.groups if part is None else part) if passes(g.rewards)]
        kept = [group for group in self.groups if passes(group.rewards)]
        totals = StepTotals(
            questions=len(kept),
            tokens=sum(sum(group.own_tokens) for group in kept),
            max_new_tokens=LONGEST,
        )
        contexts = ContextBuilder(self.tokenizer, self.config.context)
        policy = PeerPolicy(self.config.peers, seed=0)
        others = [attempt for group in kept for attempt in group.attempts]
        return [
            judge(group, policy.choose(group.attempts, others), contexts, self.config, totals)
            for group in groups
        ]

    def found(self, micro_batch_tokens: int = 10_000) -> tuple[float, Tensor]:
        """Loss and gradient of the trainer."""
        self.policy.model.zero_grad(set_to_none=True)
        rows = [outcome.row for each in self.judged() for outcome in each if outcome.row]
        sums, _ = accumulate_gradients(
            self.policy,
            rows,
            self.config.objective,
            micro_batch_tokens=micro_batch_tokens,
            temperature=1.0,
        )
        gradients = [p.grad.flatten() for p in self.policy.model.parameters() if p.grad is not None]
        return float(sums[SUMS.index("loss")]), torch.cat(gradients)

    def expected(self) -> tuple[float, Tensor]:
        """The same by the paper's formula on dense float64 log-probs."""
        student = copy.deepcopy(self.policy.model).double()
        teacher = copy.deepcopy(self.policy.teacher or self.policy.model).double()
        initial = copy.deepcopy(self.policy.initial).double()
        groups = []
        passes = GROUP_FILTERS[self.config.objective.group_filter]
        judged = iter(self.judged())
        for group in self.groups:
            if not passes(group.rewards):
                none = [self._sampled(group, i, None, student, teacher, initial) for i in range(4)]
                groups.append(none)
                continue
            outcomes = next(judged)
            groups.append(
                [
                    self._sampled(group, i, outcomes[i], student, teacher, initial)
                    for i in range(len(outcomes))
                ]
            )
        loss = self.formula(groups)
        parameters = list(student.parameters())
        gradients = torch.autograd.grad(loss, parameters, materialize_grads=True)
        return float(loss.detach()), torch.cat([each.flatten() for each in gradients])

    def _sampled(
        self,
        group: Group,
        index: int,
        outcome: JudgedRollout | None,
        student: Any,
        teacher: Any,
        initial: Any,
    ) -> paper.Sampled:
        rollout = group.rollouts[index]
        prompt = self.tokenizer.apply_chat_template(
            [
                {"role": "system", "content": ""},
                {"role": "user", "content": group.question.prompt},
            ],
            add_generation_prompt=True,
        )["input_ids"]
        context = None if outcome is None else self._context(group, outcome)
        with torch.no_grad():
            log_r = log_probs(initial, prompt, rollout.token_ids)
            log_q = None if context is None else log_probs(teacher, context, rollout.token_ids)
        return paper.Sampled(
            log_p=log_probs(student, prompt, rollout.token_ids),
            log_q=log_q,
            log_r=log_r,
            tokens=torch.tensor(rollout.token_ids),
            old=torch.tensor(rollout.logprobs, dtype=torch.float64),
            correct=group.rewards[index],
            tau=self._tau(rollout, outcome),
        )

    def _tau(self, rollout: Rollout, outcome: JudgedRollout | None) -> int | None:
        if outcome is None or not outcome.peers.successes:
            return None
        other = outcome.peers.successes[0].token_ids
        same = [a == b for a, b in zip(rollout.token_ids, other, strict=False)]
        return same.index(False) if False in same else len(same)

    def _context(self, group: Group, outcome: JudgedRollout) -> list[int] | None:
        """The teacher's prompt, written out; None without a teacher."""
        if self.name not in SHOWN:
            return None
        answer, peer, demonstration = SHOWN[self.name]
        turn = group.question.prompt
        if answer:
            turn += f"\n\nCorrect final answer: {group.question.answer}"
        if demonstration:
            turn += f"\n\nA worked solution:\n<<<\n{group.question.solution}\n>>>"
        if peer and outcome.peers.successes:
            turn += f"\n\nA successful solution:\n<<<\n{outcome.peers.successes[0].text}\n>>>"
        elif peer and self.config.context.fallback != "answer":
            return None
        turn += "\n\nNow solve the problem again in your own words."
        ids: list[int] = self.tokenizer.apply_chat_template(
            [{"role": "system", "content": ""}, {"role": "user", "content": turn}],
            add_generation_prompt=True,
        )["input_ids"]
        return ids


@pytest.fixture
def scene(
    make_model: Callable[..., Any],
    make_policy: Callable[..., Policy],
    tokenizer: PreTrainedTokenizerFast,
) -> Callable[[str], Scene]:
    def make(name: str) -> Scene:
        config = load_recipe(RECIPES / f"{name}.toml")
        policy = make_policy()
        parts = make_policy(teacher="initial")
        if config.objective.teacher == "ema":
            policy = replace(policy, teacher=parts.teacher, teacher_head=parts.teacher_head)
            move_toward(policy.teacher, policy.model, decay=0.5)
        if config.objective.teacher == "none":
            policy = replace(policy, teacher=None, teacher_head=None)
        generator = torch.Generator().manual_seed(0)
        groups = []
        for number, (prompt, texts) in enumerate(TEXTS.items()):
            question = Question(
                id=f"q{number}", prompt=prompt, answer=str(2 * number), solution=f"so {number}"
            )
            ids = tokenizer.apply_chat_template(
                [{"role": "system", "content": ""}, {"role": "user", "content": prompt}],
                add_generation_prompt=True,
            )["input_ids"]
            rollouts = []
            for text in texts:
                tokens = (*tokenizer(text)["input_ids"], tokenizer.eos_token_id)
                with torch.no_grad():
                    own = log_probs(policy.model, ids, tokens)
                own = own[torch.arange(len(tokens)), torch.tensor(tokens)]
                # The policy that sampled: ratios on both sides of every clipping bound.
                old = own + 0.3 * torch.randn(len(tokens), generator=generator)
                rollouts.append(
                    Rollout(
                        token_ids=tokens,
                        logprobs=tuple(old.tolist()),
                        loss_mask=(True,) * len(tokens),
                        finish_reason="stop",
                        policy_version=0,
                    )
                )
            groups.append(
                Group(
                    question=question,
                    rollouts=rollouts,
                    texts=texts,
                    outcomes=[
                        Outcome.CORRECT if text.endswith("!") else Outcome.WRONG for text in texts
                    ],
                    place=number,
                )
            )
        return Scene(policy, tokenizer, groups, config, name, EXPECTED[name])

    return make


def error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


@pytest.mark.gradient
@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_loss_and_gradient_are_those_of_the_paper(name: str, scene: Callable[..., Scene]) -> None:
    fixed = scene(name)
    (loss, gradient), (expected_loss, expected) = fixed.found(), fixed.expected()
    assert loss == pytest.approx(expected_loss, rel=1e-5, abs=1e-7)
    assert error(gradient, expected) <= 1e-5


@pytest.mark.gradient
@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_micro_batches_do_not_change_the_gradient(name: str, scene: Callable[..., Scene]) -> None:
    fixed = scene(name)
    _, expected = fixed.expected()
    assert error(fixed.found(micro_batch_tokens=1)[1], expected) <= 1e-5


def only(chosen: Callable[[paper.Sampled], bool], of: Callable[..., Tensor]) -> Any:
    """Token losses `of` of the rollouts that are chosen, nothing of the others."""
    return lambda o: of(o) if chosen(o) else torch.zeros(o.length, dtype=torch.float64)


def distil(o: paper.Sampled) -> Tensor:
    assert o.log_q is not None
    return paper.kl(o.log_q, o.log_p)


def taught_or_rewarded(groups: paper.Groups) -> Tensor:
    """Divergence where there is a peer, policy gradient where there is none."""
    total = 0.5 * paper.mean_of_means(groups, only(lambda o: o.log_q is not None, distil))
    for group in groups:
        advantages = paper.standardised(paper.rewards_of(group))
        for o, advantage in zip(group, advantages, strict=True):
            if o.log_q is None:
                tokens = paper.clipped((o.logprob - o.old).exp(), advantage, 0.2, 0.2)
                total = total + 0.5 * tokens.mean() / (len(group) * len(groups))
    return total + BETA * paper.reference(groups)


def mix_on_failures(groups: paper.Groups) -> Tensor:
    """Policy gradient for all, divergence for failures alone."""
    pull = paper.mean_of_means(groups, only(lambda o: not o.correct, distil))
    return 0.5 * paper.grpo(groups, 0.0) + 0.5 * pull + BETA * paper.reference(groups)


def over_all_tokens(groups: paper.Groups) -> Tensor:
    every = [o for group in groups for o in group]
    tokens = [distil(o) + BETA * paper.kl(o.log_p, o.log_r) for o in every]
    return torch.cat(tokens).mean()


VARIANTS: dict[str, tuple[str, dict[str, dict[str, Any]], Callable[[paper.Groups], Tensor]]] = {
    "fallback policy_gradient": (
        "grpo_opsd",
        {"context": {"show_peer": True, "fallback": "policy_gradient"}},
        taught_or_rewarded,
    ),
    "mask failures": ("grpo_opsd", {"objective": {"mask": "failures"}}, mix_on_failures),
    "token_global": ("hsd", {"objective": {"normalisation": "token_global"}}, over_all_tokens),
    "half of the teacher's weight": (
        "rlsd",
        {"objective": {"teacher_mix": 0.5}},
        lambda groups: paper.rlsd(groups, BETA, mix=0.5),
    ),
}


@pytest.mark.gradient
@pytest.mark.parametrize("variant", VARIANTS)
def test_parts_that_no_recipe_names(
    variant: str, scene: Callable[..., Scene], monkeypatch: pytest.MonkeyPatch
) -> None:
    name, changes, formula = VARIANTS[variant]
    fixed = scene(name)
    config = fixed.config
    for section, values in changes.items():
        config = replace(config, **{section: replace(getattr(config, section), **values)})
    if "show_peer" in changes.get("context", {}):
        monkeypatch.setitem(SHOWN, name, (True, True, False))
    fixed = replace(fixed, config=config, formula=formula)
    (loss, gradient), (expected_loss, expected) = fixed.found(), fixed.expected()
    assert loss == pytest.approx(expected_loss, rel=1e-5, abs=1e-7)
    assert error(gradient, expected) <= 1e-5


def test_every_recipe_is_tested_against_a_formula() -> None:
    # Those of a task or of a large model are of another method's.
    others = {"human_eval", "math_style", "own_data"}
    others |= {path.stem for name in ("quickstart*", "qwen3*") for path in RECIPES.glob(name)}
    assert {path.stem for path in RECIPES.glob("*.toml")} == {*EXPECTED, *others}


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_the_scene_tells_the_teachers_apart(name: str, scene: Callable[..., Scene]) -> None:
    teacher = scene(name).config.objective.teacher
    assert teacher == (TEACHERS.get(name, "live") if name in SHOWN else "none")


def test_ratios_are_clipped_in_the_scene(scene: Callable[..., Scene]) -> None:
    for name in ("grpo", "gspo", "dapo", "rlsd"):
        fixed = scene(name)
        rows = [outcome.row for each in fixed.judged() for outcome in each if outcome.row]
        sums, _ = accumulate_gradients(
            fixed.policy,
            rows,
            fixed.config.objective,
            micro_batch_tokens=10_000,
            temperature=1.0,
        )
        total = dict(zip(SUMS, sums.tolist(), strict=True))
        assert 0.05 * total["tokens"] < total["clipped"] < 0.95 * total["tokens"]


def test_fallback_policy_gradient_teaches_or_rewards_and_never_both(
    scene: Callable[..., Scene],
) -> None:
    fixed = scene("grpo_opsd")
    config = replace(
        fixed.config,
        context=replace(fixed.config.context, show_peer=True, fallback="policy_gradient"),
    )
    judged = replace(fixed, config=config).judged()
    lone: list[Attempt] = []
    for group, outcomes in zip(fixed.groups, judged, strict=True):
        for attempt, outcome in zip(group.attempts, outcomes, strict=True):
            if outcome.peers.successes:
                assert outcome.advantage == 0
                assert outcome.row is not None and all(outcome.row.distilled or ())
            else:
                assert outcome.row is None or not any(outcome.row.distilled or ())
                lone.append(attempt)
    assert lone
