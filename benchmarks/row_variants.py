"""The variants of the row kernels that the pipeline may ask their launcher for."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch

from hsd_kernels.rows import RowSpec, Source
from hsd_kernels.statistics import DIVERGENCES

STORAGE = {  # of logits and gradient
    "fp32": (torch.float32, torch.bfloat16),
    "fp32, fp16 gradient": (torch.float32, torch.float16),
    "fp32 all": (torch.float32, torch.float32),
    "bf16": (torch.bfloat16, torch.bfloat16),
}
SOURCES: dict[str, tuple[Source, ...]] = {  # of sides, with a head of their own or the student's
    "fp32": ("logits",),  # narrow operands cannot hold the difference of hidden states
    "fp32, fp16 gradient": ("logits",),
    "fp32 all": ("logits", "difference"),
    "bf16": ("difference",),
}


def variants(*, everything: bool) -> Iterator[tuple[str, RowSpec, str]]:
    """Description, specification and storage of what the pipeline may ask for.

    Of a loss with several divergences only the largest, with all three: the others lie between.
    """
    if not everything:
        yield "no teacher", RowSpec(target=True), "fp32"
        yield "reverse", RowSpec(teacher="logits", reverse_kl=True, target=True), "fp32"
        yield "statistics only", RowSpec(teacher="logits", reference="logits"), "fp32"
        capped = RowSpec(teacher="difference", forward_kl=True, softcap=True)
        yield "forward, softcap", capped, "fp32 all"
        largest = RowSpec(teacher="difference", reference="difference", jsd=True, target=True)
        yield "jsd, reference", largest, "bf16"
        return
    wanted = ((), *((name,) for name in DIVERGENCES), DIVERGENCES)
    for storage, sources in SOURCES.items():
        teachers = [("absent", ()), *itertools.product(sources, wanted)]
        softcaps = (False,) if storage == "bf16" else (False, True)
        choices = itertools.product(teachers, ("absent", *sources), softcaps, (False, True))
        for (teacher, names), reference, softcap, target in choices:
            own = storage == "fp32 all" and teacher == "difference" and not softcap
            for same_temperature in (True, False) if own else (True,):
                spec = RowSpec(
                    teacher=teacher,  # type: ignore[arg-type]
                    reference=reference,  # type: ignore[arg-type]
                    softcap=softcap,
                    target=target,
                    same_temperature=same_temperature,
                    **dict.fromkeys(names, True),
                )
                yield _description(spec), spec, storage


def _description(spec: RowSpec) -> str:
    parts = (
        f"{spec.teacher} {' '.join(n for n in DIVERGENCES if getattr(spec, n))}".strip(),
        f"reference {spec.reference}",
        "softcap" * spec.softcap,
        "target" * spec.target,
        "" if spec.same_temperature else "own temperature",
    )
    return ", ".join(part for part in parts if part)
