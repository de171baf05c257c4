"""The configuration of the loss."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from hsd.checks import require
from hsd.objective.schedule import Scalar, reaches_zero, require_scalar, value_at


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """The loss of a step: parts by name, and the scalars between them.

    Loss of a token: kl_coef * divergence(teacher, student) + ref_coef * KL(student || reference)
    + pg_coef * policy gradient. A scalar is a number, or points (step, value) of a schedule.

    Args:
        group_filter: groups that enter the loss: "mixed", those with both outcomes.
        mask: "failures" leaves correct rollouts out of the divergence.
        advantage: of a rollout in its group: reward minus mean, "standardised" also by the
            standard deviation. Needed by a policy gradient.
        overlong_tokens: the reward falls linearly over the last tokens before
            rollout.max_new_tokens, by overlong_penalty in all; 0 for no such fall.
        overlong_penalty: on rewards of 0 and 1.
        teacher: whose weights see the context: the "live" policy's, as published; the "initial"
            ones, where training starts; their exponential moving average, "ema"; or "none".
        teacher_decay: of the moving average, per update; "ema" only.
        token_loss: "divergence" alone; or beside it a policy gradient, clipped per token
            ("token_ratio") or per rollout ("sequence_ratio"), or per token with the advantage
            weighted by the teacher's gap ("teacher_weighted").
        clip_range: (low, high), how far the importance ratio may leave 1; policy gradients only.
        teacher_mix: share of the teacher's weight in the advantage; "teacher_weighted" only.
        teacher_clip: how far that weight may leave 1; "teacher_weighted" only.
        divergence: forward_kl is the paper's KL(teacher || student).
        jsd_beta: the teacher's share of the mixture; jsd only.
        kl_coef: factor of the divergence.
        ref_coef: beta, the factor of KL(student || reference), which starts as the initial weights.
        measure_reference: KL(student || reference) is measured where ref_coef is 0 too, which takes
            a forward pass of the reference; ref_coef of 0 only.
        ref_refresh_every: updates between two moves of the reference toward the policy; 0 for none.
        ref_refresh_decay: what a move leaves of the reference as it was.
        pg_coef: factor of the policy gradient.
        router_aux_coef: factor of the load-balancing loss of a mixture of experts; None for the
            model's own (docs/experts.md), 0 for none.
        normalisation: "sequence" as published: mean over a rollout's tokens, its group, the
            questions; "token": over a group's tokens, the questions; "token_global": over the
            step's tokens; "constant": as "sequence" with rollout.max_new_tokens for the length.
        window: tokens past the divergence from the peer that keep the divergence in a failed
            rollout; one without a peer then has none. "none": the published form, all tokens.
        importance_cap: tokens are weighted by min(trainer's / engine's probability, cap), for the
            difference between the two; "none": they are not. A policy gradient has the ratio.
        sequence_mask: rollouts whose probability per token differs between trainer and engine by
            more than this factor, in the geometric mean, are left out; "none": they are not.
        max_chunk_bytes: of logits held at one time; None is the library's default.
        sparse_tolerance: share of a chunk's gradient, as L1 mass, that the backward may drop
            (docs/sparse.md); "none": it is exact.
    """

    group_filter: Literal["all", "mixed"] = "all"
    mask: Literal["all", "failures"] = "all"
    advantage: Literal["none", "centred", "standardised"] = "none"
    overlong_tokens: int = 0
    overlong_penalty: float = 0.5
    teacher: Literal["live", "initial", "ema", "none"] = "live"
    teacher_decay: float = 0.95
    token_loss: Literal["divergence", "token_ratio", "sequence_ratio", "teacher_weighted"] = (
        "divergence"
    )
    clip_range: tuple[float, float] = (0.2, 0.2)
    teacher_mix: Scalar = 1.0
    teacher_clip: float = 0.2
    divergence: Literal["forward_kl", "reverse_kl", "jsd"] = "forward_kl"
    jsd_beta: float = 0.5
    kl_coef: Scalar = 1.0
    ref_coef: Scalar = 1e-3
    measure_reference: bool = True
    ref_refresh_every: int = 0
    ref_refresh_decay: float = 0.99
    pg_coef: Scalar = 1.0
    router_aux_coef: float | None = None
    normalisation: Literal["sequence", "token", "token_global", "constant"] = "sequence"
    window: int | Literal["none"] = "none"
    importance_cap: float | Literal["none"] = "none"
    sequence_mask: float | Literal["none"] = "none"
    max_chunk_bytes: int | None = None
    sparse_tolerance: float | Literal["none"] = "none"

    @property
    def has_policy_gradient(self) -> bool:
        return self.token_loss != "divergence"

    @property
    def corrects_mismatch(self) -> bool:
        return self.importance_cap != "none" or self.sequence_mask != "none"

    def reads_reference(self, step: int) -> bool:
        """Whether a step runs the reference."""
        return self.measure_reference or value_at(self.ref_coef, step) != 0

    def __post_init__(self) -> None:
        for name in ("kl_coef", "ref_coef", "pg_coef"):
            require_scalar(f"objective.{name}", getattr(self, name))
        require_scalar("objective.teacher_mix", self.teacher_mix, highest=1.0)
        for name in ("jsd_beta", "teacher_decay", "ref_refresh_decay"):
            value = getattr(self, name)
            require(f"objective.{name}", value, 0 <= value <= 1, "0 to 1")
        for name in ("overlong_tokens", "ref_refresh_every"):
            require(f"objective.{name}", getattr(self, name), getattr(self, name) >= 0, ">= 0")
        low, high = self.clip_range
        inside = 0 <= low <= 1 and 0 <= high < math.inf
        require("objective.clip_range", self.clip_range, inside, "0 <= low <= 1 and high >= 0")
        for name in ("overlong_penalty", "teacher_clip"):
            require(f"objective.{name}", getattr(self, name), getattr(self, name) > 0, "> 0")
        window = self.window
        require("objective.window", window, window == "none" or window >= 0, ">= 0 or none")
        for name in ("importance_cap", "sequence_mask"):
            bound = getattr(self, name)
            require(f"objective.{name}", bound, bound == "none" or bound >= 1, ">= 1 or none")
        chunk = self.max_chunk_bytes
        require("objective.max_chunk_bytes", chunk, chunk is None or chunk >= 1, ">= 1")
        share = self.sparse_tolerance
        inside = share == "none" or 0 < share < 1
        require("objective.sparse_tolerance", share, inside, "above 0 and below 1, or none")
        router = self.router_aux_coef
        require("objective.router_aux_coef", router, router is None or router >= 0, ">= 0 or none")
        self._require_applicable()

    def _require_applicable(self) -> None:
        """Raises where an option is set that the chosen parts do not read."""
        gradient, teacher = self.has_policy_gradient, self.teacher != "none"
        weighted = self.token_loss == "teacher_weighted"
        groups: tuple[tuple[bool, str, tuple[str, ...]], ...] = (
            (self.divergence == "jsd", "objective.divergence = 'jsd'", ("jsd_beta",)),
            (self.teacher == "ema", "objective.teacher = 'ema'", ("teacher_decay",)),
            (teacher, "a teacher", ("divergence", "kl_coef", "mask", "window")),
            (
                gradient,
                "a policy gradient in objective.token_loss",
                ("advantage", "pg_coef", "clip_range", "overlong_tokens"),
            ),
            (
                weighted,
                "objective.token_loss = 'teacher_weighted'",
                ("teacher_mix", "teacher_clip"),
            ),
            (
                not gradient,
                "objective.token_loss = 'divergence'",
                ("importance_cap",),
            ),
            (self.overlong_tokens > 0, "objective.overlong_tokens", ("overlong_penalty",)),
            (reaches_zero(self.ref_coef), "an objective.ref_coef of 0", ("measure_reference",)),
            (self.ref_refresh_every > 0, "objective.ref_refresh_every", ("ref_refresh_decay",)),
        )
        for applicable, needed, names in groups:
            for name in names:
                value = getattr(self, name)
                default = self.__dataclass_fields__[name].default
                unset = applicable or value == default
                require(f"objective.{name}", value, unset, f"{needed} beside it")
        token_loss = self.token_loss
        require(
            "objective.token_loss",
            token_loss,
            not gradient or self.advantage != "none",
            "objective.advantage beside a policy gradient",
        )
        needs_teacher = token_loss in ("divergence", "teacher_weighted")
        require(
            "objective.teacher", self.teacher, teacher or not needs_teacher, f"one for {token_loss}"
        )
