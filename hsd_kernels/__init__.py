"""Fused vocabulary-wide losses for on-policy self-distillation."""

from hsd_kernels import reference
from hsd_kernels.loss import LossOutput, TokenStatistics, fused_hsd_loss
from hsd_kernels.plan import Plan, plan

__all__ = ["LossOutput", "Plan", "TokenStatistics", "fused_hsd_loss", "plan", "reference"]
