"""The losses of the recipes as their papers write them: loops over questions, rollouts and tokens.

Plain torch, and nothing of the trainer or of its kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampled:
    """One rollout o of a group.

    Attributes:
        log_p, log_q, log_r: (T, V) of the policy, of the teacher (None without one), and of the
            initial policy, at every position of o.
        tokens: (T,) o itself.
        old: (T,) log-probs under the policy that sampled.
        tau: where it leaves its peer, None without one.
    """

    log_p: Tensor
    log_q: Tensor | None
    log_r: Tensor
    tokens: Tensor
    old: Tensor
    correct: bool
    tau: int | None

    @property
    def length(self) -> int:
        return len(self.tokens)

    @property
    def logprob(self) -> Tensor:
        return self.log_p[torch.arange(self.length), self.tokens]

    @property
    def teacher_logprob(self) -> Tensor:
        assert self.log_q is not None
        return self.log_q[torch.arange(self.length), self.tokens]


Groups = Sequence[Sequence[Sampled]]


def kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    return (log_a.exp() * (log_a - log_b)).sum(-1)


def mean_of_means(groups: Groups, token_losses: Callable[[Sampled], Tensor]) -> Tensor:
    """1/Q sum over questions, 1/G over rollouts, 1/|o| over tokens."""
    total = torch.zeros((), dtype=torch.float64)
    for group in groups:
        for rollout in group:
            total = total + token_losses(rollout).sum() / (
                rollout.length * len(group) * len(groups)
            )
    return total


def hsd(groups: Groups, beta: float) -> Tensor:
    """2606.15576, (10) and (13): KL(q || p) + beta KL(p || pi_0)."""

    def tokens(o: Sampled) -> Tensor:
        assert o.log_q is not None
        return kl(o.log_q, o.log_p) + beta * kl(o.log_p, o.log_r)

    return mean_of_means(groups, tokens)


def hsd_window(groups: Groups, beta: float, window: int) -> Tensor:
    def tokens(o: Sampled) -> Tensor:
        assert o.log_q is not None
        last = o.length if o.correct else (-1 if o.tau is None else o.tau + window)
        inside = torch.arange(o.length) <= last
        return (kl(o.log_q, o.log_p) + beta * kl(o.log_p, o.log_r)) * inside

    return mean_of_means(groups, tokens)


def sdpo(groups: Groups) -> Tensor:
    """2601.20802: JSD with the mean of both, nothing where there is no peer."""

    def tokens(o: Sampled) -> Tensor:
        if o.log_q is None:
            return torch.zeros(o.length, dtype=torch.float64)
        log_m = (o.log_q.exp() / 2 + o.log_p.exp() / 2).log()
        return kl(o.log_q, log_m) / 2 + kl(o.log_p, log_m) / 2

    return mean_of_means(groups, tokens)


def sdft(groups: Groups) -> Tensor:
    """2601.19897: KL(p || q)."""

    def tokens(o: Sampled) -> Tensor:
        assert o.log_q is not None
        return kl(o.log_p, o.log_q)

    return mean_of_means(groups, tokens)


def rewards_of(group: Sequence[Sampled]) -> Tensor:
    return torch.tensor([float(o.correct) for o in group], dtype=torch.float64)


def standardised(rewards: Tensor) -> Tensor:
    return (rewards - rewards.mean()) / (rewards.std() + 1e-6)


def clipped(ratio: Tensor, advantage: Tensor, low: float, high: float) -> Tensor:
    return -torch.min(ratio * advantage, ratio.clamp(1 - low, 1 + high) * advantage)


def grpo(groups: Groups, beta: float) -> Tensor:
    """2402.03300, (3): clipped ratios, A = (R - mean) / std, beta KL(p || pi_0)."""
    total = torch.zeros((), dtype=torch.float64)
    for group in groups:
        for o, advantage in zip(group, standardised(rewards_of(group)), strict=True):
            ratio = (o.logprob - o.old).exp()
            tokens = clipped(ratio, advantage, 0.2, 0.2) + beta * kl(o.log_p, o.log_r)
            total = total + tokens.mean() / (len(group) * len(groups))
    return total


def dr_grpo(groups: Groups, longest: int) -> Tensor:
    """2503.20783: A = R - mean, sums over tokens divided by a constant."""
    total = torch.zeros((), dtype=torch.float64)
    for group in groups:
        rewards = rewards_of(group)
        for o, advantage in zip(group, rewards - rewards.mean(), strict=True):
            tokens = clipped((o.logprob - o.old).exp(), advantage, 0.2, 0.2)
            total = total + tokens.sum() / longest / (len(group) * len(groups))
    return total


def gspo(groups: Groups) -> Tensor:
    """2507.18071, (5) and (7)."""
    total = torch.zeros((), dtype=torch.float64)
    for group in groups:
        for o, advantage in zip(group, standardised(rewards_of(group)), strict=True):
            ratio = ((o.logprob - o.old).sum() / o.length).exp()
            sequence = clipped(ratio, advantage, 3e-4, 4e-4)
            total = total + sequence / (len(group) * len(groups))
    return total


def dapo(groups: Groups, longest: int, cache: int) -> Tensor:
    """2503.14476, (8) and (13): mixed groups only, rewards 1 and -1, mean over a group's tokens."""
    mixed = [group for group in groups if 0 < sum(o.correct for o in group) < len(group)]
    total = torch.zeros((), dtype=torch.float64)
    for group in mixed:
        rewards = []
        for o in group:
            late = (longest - cache - o.length) / cache if o.length > longest - cache else 0.0
            rewards.append((1.0 if o.correct else -1.0) + late)
        # The deviation of rewards on 0 and 1 is half as large as that on -1 and 1.
        values = torch.tensor(rewards, dtype=torch.float64)
        advantages = (values - values.mean()) / (values.std() + 2e-6)
        tokens = [
            clipped((o.logprob - o.old).exp(), advantage, 0.2, 0.28)
            for o, advantage in zip(group, advantages, strict=True)
        ]
        total = total + torch.cat(tokens).sum() / sum(o.length for o in group) / len(mixed)
    return total


def grpo_opsd(groups: Groups, beta: float) -> Tensor:
    """Half of each, and one reference KL."""
    return 0.5 * grpo(groups, 0.0) + 0.5 * hsd(groups, 0.0) + beta * reference(groups)


def reference(groups: Groups) -> Tensor:
    return mean_of_means(groups, lambda o: kl(o.log_p, o.log_r))


def rlsd(groups: Groups, beta: float, mix: float = 1.0) -> Tensor:
    """2604.03128: A' = A ((1 - l) + l clip(exp(sign(A) (log q - log p)), .8, 1.2))."""
    total = torch.zeros((), dtype=torch.float64)
    for group in groups:
        for o, advantage in zip(group, standardised(rewards_of(group)), strict=True):
            gap = (o.teacher_logprob - o.logprob).detach()
            weight = (advantage.sign() * gap).exp().clamp(0.8, 1.2)
            weighted = advantage * ((1 - mix) + mix * weight)
            tokens = clipped((o.logprob - o.old).exp(), weighted, 0.2, 0.2)
            total = total + tokens.mean() / (len(group) * len(groups))
    return total + beta * reference(groups)
