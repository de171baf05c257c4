"""Fused vocabulary-wide losses for on-policy self-distillation."""

from hsd_kernels import reference
from hsd_kernels.loss import fused_hsd_loss
from hsd_kernels.outputs import LossOutput, TokenStatistics
from hsd_kernels.own_losses import VocabStatistics, fused_token_loss, vocab_statistics
from hsd_kernels.plan import Plan, plan
from hsd_kernels.token_losses import register_token_loss

__all__ = [
    "LossOutput",
    "Plan",
    "TokenStatistics",
    "VocabStatistics",
    "fused_hsd_loss",
    "fused_token_loss",
    "plan",
    "reference",
    "register_token_loss",
    "vocab_statistics",
]
