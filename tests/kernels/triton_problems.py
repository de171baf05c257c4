"""Rows of logits for the Triton kernels, and the fp64 truth for the same logits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from kernel_problems import Draw, likely_token, scale_and_height, step
from torch import Tensor

from hsd_kernels.reference import divergences, kl_divergence
from hsd_kernels.rows import RowInputs, RowSpec, known_difference, triton_rows
from hsd_kernels.rows.buffers import row_buffer
from hsd_kernels.rows.mixture import finish_mixture
from hsd_kernels.rows.partials import finish
from hsd_kernels.rows.triton_tile import Biases
from hsd_kernels.statistics import coefficients

SOFTCAP, SCALE = 20.0, 0.8
SIDES = ("student", "teacher", "reference")


def pitched(values: Tensor, dtype: torch.dtype) -> Tensor:
    """`values` (C, V) in rows of the kernels' pitch; NaN in between, where it must not matter."""
    buffer = row_buffer(*values.shape, dtype=dtype, device=values.device)
    torch.as_strided(buffer, (len(buffer), buffer.stride(0)), buffer.stride()).fill_(torch.nan)
    return buffer.copy_(values)


@dataclass(frozen=True, kw_only=True)
class Rows:
    """One chunk: logits as stored, and what becomes of them.

    The logits of `raw` are on all sides those that go through scale, softcap and temperature,
    whether the kernel gets them as they are or as a difference.
    """

    spec: RowSpec
    stored: dict[str, Tensor]  # side -> (C, V) of the kernel's dtype
    targets: Tensor  # (C,)
    temperature: Tensor  # (C,)
    teacher_temperature: Tensor  # (C,)
    scale: float = 1.0
    beta: float = 0.5
    biases: dict[str, Tensor]  # side -> (V,)

    @property
    def inputs(self) -> RowInputs:
        return RowInputs(
            student=self.stored["student"],
            teacher=self.stored.get("teacher"),
            reference=self.stored.get("reference"),
            targets=self.targets if self.spec.target else None,
            inverse_temperature=self.temperature.reciprocal(),
            teacher_inverse_temperature=self.teacher_temperature.reciprocal(),
            logit_scale=torch.tensor(self.scale),
            softcap=torch.tensor(SOFTCAP),
            jsd_beta=torch.tensor(self.beta),
            jsd_complement=torch.tensor(1 - self.beta),
        )

    def kernel_biases(self) -> Biases:
        return Biases(**{name: pitched(b[None], b.dtype)[0] for name, b in self.biases.items()})

    def statistics(self, tiles_per_program: int = 1) -> Tensor:
        """(len(Row), C) by the Triton kernels and what all backends share."""
        x = self.inputs
        options = {"biases": self.kernel_biases(), "tiles_per_program": tiles_per_program}
        parts = triton_rows.row_partials(self.spec, x, **options)
        rows = finish(self.spec, triton_rows.merge_tiles(self.spec, parts)[0], x)
        if not self.spec.jsd:
            return rows
        return finish_mixture(rows, triton_rows.row_mixture(self.spec, x, rows, **options), x)

    def gradient(
        self, rows: Tensor, name: str, dtype: torch.dtype = torch.float32, **options: int
    ) -> tuple[Tensor, Tensor]:
        """d statistic / d raw student logits (C, V) in `dtype`, and the kernel's masses (C,)."""
        x, one = self.inputs, torch.ones(rows.shape[1])
        along = coefficients({name: one}, rows, jsd_complement=x.jsd_complement)
        out = pitched(torch.zeros(x.student.shape), dtype)
        biases = self.kernel_biases()
        mass = triton_rows.row_grad(self.spec, x, rows, along, out, biases=biases, **options)
        return out, mass

    def truth(self, name: str, *, rounded: bool = False) -> tuple[Tensor, Tensor]:
        """Values (C,) and gradients (C, V) in fp64.

        `rounded`: each side's logits, or its difference to the student's, go through fp32 once,
        after scale, softcap and temperature. What that alone moves is no fault of a kernel.
        """
        raw = self._raw()
        leaf = raw["student"].clone().requires_grad_()
        exact = self._logits(leaf, self.temperature)
        z = exact + (exact.float() - exact).detach() if rounded else exact
        log_p = z.log_softmax(-1)

        def other(side: str, temperature: Tensor) -> Tensor:
            logits = self._logits(raw[side], temperature)
            teacher = side == "teacher"
            known = known_difference(self.spec, getattr(self.spec, side), of_teacher=teacher)
            if rounded and known:
                logits = z.detach() - (exact.detach() - logits).float()
            elif rounded:
                logits = logits.float().double()
            return logits.log_softmax(-1)

        if name in ("forward_kl", "reverse_kl", "jsd"):
            log_q = other("teacher", self.teacher_temperature)
            value = divergences(log_p, log_q, beta=self.beta)[name]
        elif name == "ref_kl":
            value = kl_divergence(log_p, other("reference", self.temperature))
        elif name == "logprob":
            value = log_p.gather(-1, self.targets[:, None])[:, 0]
        elif name == "entropy":
            value = -(log_p.exp() * log_p).sum(-1)
        else:
            value = z.logsumexp(-1)
        return value.detach(), torch.autograd.grad(value.sum(), leaf)[0]

    def _raw(self) -> dict[str, Tensor]:
        raw = {}
        for name, stored in self.stored.items():
            raw[name] = stored.double()
            if name in self.biases:
                raw[name] += self.biases[name].double()
            if name != "student" and getattr(self.spec, name) == "difference":
                raw[name] = raw["student"] - raw[name]
        return raw

    def _logits(self, raw: Tensor, temperature: Tensor) -> Tensor:
        # Scale and temperature are inputs, and exact as the kernel gets them.
        logits = raw * torch.tensor(self.scale).double()
        if self.spec.softcap:
            logits = SOFTCAP * torch.tanh(logits / SOFTCAP)
        return logits * temperature.reciprocal().double()[:, None]


def spec_of(name: str, source: str, **flags: bool) -> RowSpec:
    if name == "ref_kl":
        return RowSpec(reference=source, **flags)
    return RowSpec(teacher=source, **{name: True}, **flags)


def plain_rows(spec: RowSpec, logits: dict[str, Tensor], **options: object) -> Rows:
    """fp32 storage of fp64 logits (C, V) at temperature 1; differences of the stored student."""
    return stored_rows(spec, logits, dtype=torch.float32, **options)


def stored_rows(
    spec: RowSpec, logits: dict[str, Tensor], *, dtype: torch.dtype, **options: object
) -> Rows:
    student = logits["student"].to(dtype)
    stored = {"student": pitched(student, dtype)}
    for name in SIDES[1:]:
        source = getattr(spec, name)
        if source != "absent":
            given = student.double() - logits[name] if source == "difference" else logits[name]
            stored[name] = pitched(given, dtype)
    one = torch.ones(len(student))
    defaults = {
        "targets": torch.zeros(len(student), dtype=torch.int64),
        "temperature": one,
        "teacher_temperature": one,
        "biases": {},
    }
    return Rows(spec=spec, stored=stored, **{**defaults, **options})


def regime_logits(
    kind: str, rows: int, columns: int, *, kl: float, entropy: float, offset: float, seed: int
) -> dict[str, Tensor]:
    """fp64 logits of three sides: KLs to the student of `kl`, its entropy at most `entropy`."""
    draw = Draw((rows,), vocab=columns, seed=seed)
    noise = draw.normal(rows, columns)
    if kind == "wide":  # values to +-80
        student = 80 * torch.tanh(noise)
        return {"student": student, **{s: 80 * torch.tanh(draw.normal(rows, columns))
                                       for s in SIDES[1:]}}  # fmt: skip
    reachable = min(entropy, 0.7 * torch.tensor(float(columns)).log().item())
    scale, height = scale_and_height(reachable, noise)
    student = scale * noise + height * likely_token(noise) + offset
    if kind == "one-hot":  # the teacher is sure
        hot = torch.zeros(rows, columns, dtype=torch.float64)
        hot.scatter_(1, noise.argmin(-1, keepdim=True), 60.0)
        return {"student": student, "teacher": hot, "reference": hot - offset}
    others = {}
    for name in SIDES[1:]:
        direction = draw.normal(rows, columns)
        size = 0.0 if kind == "identical" else step(kl, student, direction)
        others[name] = student + size * direction + (offset if kind == "shifted" else 0.0)
    return {"student": student, **others}
