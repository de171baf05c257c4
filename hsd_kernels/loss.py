"""The public losses: what a user reads and calls."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from hsd_kernels import reference
from hsd_kernels.arguments import check
from hsd_kernels.ops import solved
from hsd_kernels.outputs import LossOutput, output
from hsd_kernels.plan import Plan, record
from hsd_kernels.problem import Problem
from hsd_kernels.statistics import STATISTICS
from hsd_kernels.token_losses import Divergence
from hsd_kernels.workspace import Wanted

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

BackendChoice = Literal["auto", "triton", "cpu", "reference"]
PrecisionChoice = Literal["auto", "fp32_logits", "difference", "bf16_logits"]


def fused_hsd_loss(
    student_hidden: Tensor,
    teacher_hidden: Tensor | None,
    weight: Tensor,
    *,
    bias: Tensor | None = None,
    teacher_weight: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    ref_hidden: Tensor | None = None,
    ref_weight: Tensor | None = None,
    ref_bias: Tensor | None = None,
    ref_coef: float = 0.0,
    targets: Tensor | None = None,
    token_weights: Tensor | None = None,
    kl_weights: Tensor | None = None,
    pg_weights: Tensor | None = None,
    ref_weights: Tensor | None = None,
    divergence: Divergence = "forward_kl",
    jsd_beta: float = 0.5,
    jsd_convention: Literal["gkd", "interior", "scaled"] = "gkd",
    kl_coef: float = 1.0,
    token_kl_cap: float | None = None,
    advantages: Tensor | None = None,
    old_logprobs: Tensor | None = None,
    clip_range: tuple[float, float] = (0.2, 0.2),
    pg_coef: float = 1.0,
    entropy_coef: float = 0.0,
    temperature: float | Tensor = 1.0,
    kl_temperature: float | Tensor | None = None,
    teacher_temperature: float | Tensor | None = None,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    vocab_size: int | None = None,
    precision: PrecisionChoice = "auto",
    sparse_tolerance: float | None = None,
    sparse_max_columns: int | None = None,
    top_k: int = 0,
    weight_grad_out: Tensor | None = None,
    max_chunk_bytes: int | None = None,
    process_group: ProcessGroup | None = None,
    validate: bool = False,
    backend: BackendChoice = "auto",
) -> LossOutput:
    """Hindsight self-distillation loss from hidden states, without N x V logits.

    The sum over tokens of

        token_weights * (kl_coef * kl_weights * KL + ref_coef * ref_weights * KL(p || r)
                         + pg_coef * pg_weights * pg - entropy_coef * H)

    with p, q, r the softmaxes of student, teacher and reference over the vocabulary, logits
    softcap * tanh(logit_scale * (x W^T + bias) / softcap) / temperature, all in nats
    (arXiv 2606.15576, equations 10 and 13: KL is forward, teacher first). Gradients go to
    `student_hidden`, `weight` and `bias`; they are formed during forward, in chunks.

    Args:
        student_hidden: (..., D) fp32, bf16, fp16 or fp64.
        teacher_hidden: (..., Dt), detached; None where no term needs a teacher.
        weight: (V, D) output head, a plain unsharded tensor of the same dtype.
        bias: (V,).
        teacher_weight, teacher_bias: the teacher's own head (Vt >= vocab_size); default: the
            student's, detached.
        ref_hidden, ref_weight, ref_bias: the reference's, likewise. With ref_coef 0 its KL is
            computed and reported, with no share in the loss.
        targets: (...,) int64 sampled tokens; needed for log-probs and the policy gradient.
        token_weights: (...,) default 1/N. A row of weight 0 enters no GEMM.
        kl_weights, pg_weights, ref_weights: (...,) further factors of one term; default 1.
        divergence: forward_kl KL(q||p), reverse_kl KL(p||q), or jsd, the generalised
            Jensen-Shannon divergence b KL(q||m) + (1-b) KL(p||m), m = b q + (1-b) p.
        jsd_beta: b, the teacher's share of m.
        jsd_convention: at b = 0 and 1 "gkd" (arXiv 2306.13649) is the forward and reverse KL;
            "interior" refuses them; "scaled" divides by b(1-b), whose limits they are.
        token_kl_cap: nats; a token's KL is multiplied by min(1, cap / KL), held constant.
        advantages: (...,) A of pg = -min(rho A, clip(rho, 1 - low, 1 + high) A).
        old_logprobs: (...,) of rho = exp(logprob - old_logprobs); default: the policy's own.
        temperature: > 0, float or (...,); of log-probs, entropy and policy gradient, and of the
            KLs unless `kl_temperature` (student and reference) or `teacher_temperature` is given.
        vocab_size: columns in use; the head's rows beyond them are padding.
        precision: "fp32_logits" is what "auto" runs, except for bf16 inputs on the CPU:
            "difference" holds bf16 logits, and refines them until gradient and KLs are within 1 %.
            It needs one head without bias for all sides, no softcap, one temperature, no top_k and
            no process_group, and a gradient to form or, on the CPU, a second side; else logits
            are fp32, and the plan says so.
            "bf16_logits" rounds them, for comparison.
        sparse_tolerance: largest share of a chunk's gradient, as L1 mass, that the backward may
            drop; its GEMMs then run on the few columns that hold the rest. None: exact.
        sparse_max_columns: a chunk that needs more columns runs dense; default: half of them.
        top_k: ids and log-probs of the k most likely tokens of both sides, in `stats`.
        weight_grad_out: (V, D) fp32 accumulator that the head's gradient is added to during
            forward, in place of weight.grad; the upstream gradient must then be 1. Nothing is
            added where weight does not require grad.
        max_chunk_bytes: cap of all logits held at a time; default 512 MiB.
        process_group: its ranks hold consecutive rows of every head; all are given the same
            tokens. The loss and the gradient of student_hidden are the same on every rank.
        validate: check values (targets, weights) off the CPU too; on it they always are.
        backend: "cpu" (the default for CPU tensors), "triton" or "reference" (dense, any device).

    Raises:
        ValueError, TypeError: bad input; names the argument, what was found and expected.
    """
    arguments = dict(locals())
    return run(check(arguments), student_hidden, weight, bias)


def run(
    problem: Problem, student_hidden: Tensor, weight: Tensor, bias: Tensor | None
) -> LossOutput:
    """Solves a checked problem on its backend; the tensors are the caller's own."""
    lead = student_hidden.shape[:-1]
    if problem.settings.backend == "reference":
        loss, named = reference.solve(problem)
        return output(problem, lead, loss, named, record(_dense_plan(problem)), mass=None)
    wanted = wanted_gradients(student_hidden, weight, bias)
    out = solved(problem, wanted)
    return output(
        problem,
        lead,
        out["loss"],
        dict(zip(STATISTICS, out["statistics"], strict=True)),
        out["plan"].detach(),
        mass=out["mass"].detach() if any(wanted) else None,
        top_ids=out["top_ids"],
        top_logprobs=out["top_logprobs"].detach(),
    )


def wanted_gradients(student_hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Wanted:
    """Those that autograd will ask for."""
    needs = [t is not None and t.requires_grad for t in (student_hidden, weight, bias)]
    return Wanted(*(torch.is_grad_enabled() and need for need in needs))


def _dense_plan(problem: Problem) -> Plan:
    rows, vocab_size = len(problem.student), problem.settings.vocab_size
    sides = 1 + (problem.teacher is not None) + (problem.reference is not None)
    return Plan(
        backend="reference",
        precision=problem.settings.precision,
        fused=False,
        rows=rows,
        rows_per_chunk=rows,
        chunks=1,
        gemms=float(sides + 2),
        synchronisations=0,
        workspace_bytes=6 * sides * rows * vocab_size * problem.compute_dtype.itemsize,
        traffic_bytes=12 * sides * rows * vocab_size * problem.compute_dtype.itemsize,
    )
