"""Packed micro-batches: sequences in one row, each of which attends to itself alone."""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import Any, Literal

import torch
from transformers.utils.import_utils import is_flash_attn_2_available

from hsd.distributed.fsdp import gathered_heads
from hsd.policy.head import response_hidden
from hsd.policy.teachers import Policy

_VARLEN = "flash_attention_2"
_PROMPTS, _RESPONSES = ((1, 2, 3), (4, 5)), ((6, 7, 8, 9), (10, 11, 12))


def with_packing(policy: Policy, packing: Literal["auto", "packed", "padded"]) -> Policy:
    """The policy, told whether to pack; where it does, its models run varlen kernels if they can.

    Elsewhere attention of a packed row of T tokens reads a mask of T x T: right, and not fast.

    Args:
        packing: see `hsd.config.Config`.

    Raises:
        ValueError: "packed", and hidden states are not those of padded sequences: attention or
            positions of the model go across sequences.
    """
    with gathered_heads(policy.model):
        varlen = _runs_varlen(policy)
        if packing == "padded" or (packing == "auto" and not varlen):
            return policy
        models = {id(each): each for each in (policy.model, policy.teacher, policy.initial) if each}
        for model in models.values() if varlen else ():
            model.set_attn_implementation(_VARLEN)
        fault = _fault(policy)
    if fault and packing == "packed":
        raise ValueError(f"packing: found 'packed', expected 'padded' or 'auto': {fault}")
    return replace(policy, packed=not fault)


def _runs_varlen(policy: Policy) -> bool:
    model: Any = policy.model
    return bool(
        policy.head.weight.is_cuda
        and is_flash_attn_2_available()
        and model._supports_flash_attn
        and policy.compute_dtype == torch.bfloat16  # the kernels have no float32
    )


@torch.no_grad()
def _fault(policy: Policy) -> str:
    """Why the model may not be packed; empty if it may."""
    base = policy.model.base_model
    parameters = inspect.signature(base.forward).parameters
    further = any(each.kind is inspect.Parameter.VAR_KEYWORD for each in parameters.values())
    if "position_ids" not in parameters or not further:
        return f"{type(base).__name__} takes no positions"
    vocab_size = len(policy.head.weight)
    prompts, responses = (
        [[token % vocab_size for token in part] for part in parts]
        for parts in (_PROMPTS, _RESPONSES)
    )
    padded, packed = (
        response_hidden(
            policy.model, prompts, responses, compute_dtype=policy.compute_dtype, packed=packed
        )[len(responses[0]) :].float()  # of the second: what is before it must not change it
        for packed in (False, True)
    )
    difference = float((packed - padded).norm() / padded.norm())
    tolerance = 1e-3 if policy.compute_dtype == torch.float32 else 5e-2
    if difference <= tolerance:
        return ""
    return (
        f"hidden states of {type(base).__name__} differ by {difference:.1%} between packed and "
        "padded sequences"
    )
