"""What test_sharding.py trains, and on which rows; its ranks read it too."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from hsd.config import Config, ObjectiveConfig
from hsd.distributed.config import ShardingConfig
from hsd.policy.config import AdapterConfig
from hsd.policy.packing import TrainingRow

STEPS = 5
Groups = Sequence[Sequence[TrainingRow]]  # of each question, its rollouts


@dataclass(frozen=True, kw_only=True)
class Case:
    """What a training of a few steps is.

    Attributes:
        model: of conftest's architectures.
        shares: of each rank, the questions.
        max_grad_norm: by default below that of every gradient here: the clipped step needs the norm
            of the whole.
        eps: AdamW's, which divides by a gradient's size down to it; here 3 to 10 % of the clipped
            gradients' root mean square. Sums in another order differ by the same amount in large
            gradients and in those of almost nothing, and AdamW's step is the same for both: at the
            trainer's 1e-8 another order of micro-batches in one process changed the parameters
            by up to 1.5e-4 of the step's norm, at these by 3.5e-6 (largest of all cases).
            A factor in the gradient shows no less: eps is what AdamW sees it by.
        divide_factor: what FSDP divides gradients by; 1 is right.
    """

    model: Literal["llama", "llama-tied", "qwen3-moe"]
    shares: tuple[tuple[int, ...], ...]
    optimizer: Literal["sgd", "adamw"] = "sgd"
    normalisation: str = "sequence"
    micro_batch_tokens: int = 40
    teacher: str = "live"
    token_loss: str = "divergence"
    compute_dtype: str = "float32"
    max_grad_norm: float = 0.05
    eps: float = 1e-5
    divide_factor: float = 1.0
    packed: bool = False
    adapter_rank: int = 0
    sharding: ShardingConfig = field(default_factory=lambda: ShardingConfig(mode="full"))

    @property
    def config(self) -> Config:
        return Config(adapter=AdapterConfig(rank=self.adapter_rank), objective=self.objective)

    @property
    def objective(self) -> ObjectiveConfig:
        refresh = 2 if self.teacher == "ema" else 0
        return ObjectiveConfig(
            ref_coef=0.3,
            teacher=self.teacher,  # type: ignore[arg-type]
            normalisation=self.normalisation,  # type: ignore[arg-type]
            token_loss=self.token_loss,  # type: ignore[arg-type]
            advantage="none" if self.token_loss == "divergence" else "centred",
            ref_refresh_every=refresh,
            ref_refresh_decay=0.5 if refresh else 0.99,
        )


CHECKPOINTED = ShardingConfig(mode="full", activation_checkpointing=True)
EVEN = ((0, 1), (2, 3))
ADAPTERS_EPS = 1e-4  # few parameters share the clipped norm: their gradients are larger
UNEVEN = ((0, 1, 3), (2,))
IDLE = ((), (0, 1, 2, 3))
TWO_RANKS = {
    "tied": Case(model="llama-tied", shares=UNEVEN, normalisation="token"),
    "untied": Case(model="llama", shares=UNEVEN, normalisation="token_global"),
    "tied-adamw": Case(model="llama-tied", shares=IDLE, optimizer="adamw", sharding=CHECKPOINTED),
    "untied-adamw": Case(
        model="llama",
        shares=EVEN,
        optimizer="adamw",
        normalisation="token_global",
        micro_batch_tokens=10_000,
    ),
    "checkpointed": Case(model="llama", shares=IDLE, sharding=CHECKPOINTED),
    "one micro-batch": Case(model="llama-tied", shares=EVEN, micro_batch_tokens=10_000),
    "packed": Case(model="llama", shares=IDLE, packed=True, micro_batch_tokens=60),
    "packed-tied": Case(
        model="llama-tied", shares=UNEVEN, packed=True, teacher="ema", sharding=CHECKPOINTED
    ),
    "moving teachers": Case(
        model="llama-tied",
        shares=UNEVEN,
        teacher="ema",
        sharding=ShardingConfig(mode="full", offload_reference=True),
    ),
    "sequence ratio": Case(model="llama", shares=IDLE, token_loss="sequence_ratio"),
    "teacher-weighted": Case(model="llama-tied", shares=IDLE, token_loss="teacher_weighted"),
    "optimizer on host": Case(
        model="llama",
        shares=UNEVEN,
        optimizer="adamw",
        sharding=ShardingConfig(mode="full", offload="optimizer"),
    ),
    "all on host": Case(
        model="llama-tied",
        shares=EVEN,
        optimizer="adamw",
        sharding=ShardingConfig(mode="full", offload="all"),
    ),
    "adapter": Case(model="llama", shares=UNEVEN, adapter_rank=4, sharding=CHECKPOINTED),
    "adapter-adamw": Case(
        model="llama-tied",
        shares=IDLE,
        optimizer="adamw",
        normalisation="token",
        teacher="initial",
        adapter_rank=3,
        eps=ADAPTERS_EPS,
    ),
    "adapter-averages": Case(
        model="llama-tied",
        shares=EVEN,
        optimizer="adamw",
        teacher="ema",
        adapter_rank=2,
        eps=ADAPTERS_EPS,
        sharding=ShardingConfig(mode="full", offload="optimizer"),
    ),
    "experts": Case(model="qwen3-moe", shares=UNEVEN, teacher="ema", sharding=CHECKPOINTED),
    "experts-adamw": Case(
        model="qwen3-moe", shares=IDLE, optimizer="adamw", normalisation="token_global"
    ),
    "experts-adapter": Case(model="qwen3-moe", shares=UNEVEN, adapter_rank=2, packed=True),
}
THREE_RANKS = {
    "tied": Case(model="llama-tied", shares=((0,), (1, 2, 3), ()), sharding=CHECKPOINTED),
    "untied": Case(
        model="llama", shares=((0, 3), (1,), (2,)), normalisation="token", micro_batch_tokens=25
    ),
    "adamw": Case(
        model="llama", shares=((0,), (1,), (2, 3)), optimizer="adamw", normalisation="token_global"
    ),
    "adapter": Case(  # of its factors A, a rank has one row or none
        model="llama",
        shares=((0,), (1, 2, 3), ()),
        optimizer="adamw",
        adapter_rank=2,
        eps=ADAPTERS_EPS,
    ),
    "experts": Case(model="qwen3-moe", shares=((0, 3), (1,), (2,))),
}
WRONG = {  # by the number of ranks; clipping would hide it from the change of the parameters
    "averaged": Case(model="llama-tied", shares=EVEN, divide_factor=2.0, max_grad_norm=1e6),
    "averaged-adamw": Case(
        model="llama-tied", shares=EVEN, optimizer="adamw", divide_factor=2.0, max_grad_norm=1e6
    ),
}
ROUNDED = {
    f"bfloat16-{model}": Case(model=model, shares=((0, 1, 2, 3), ()), compute_dtype="bfloat16")  # type: ignore[arg-type]
    for model in ("llama", "llama-tied")
}
OFFLOADS: tuple[Literal["none", "optimizer", "all"], ...] = ("none", "optimizer", "all")
ALL = {2: {**TWO_RANKS, **WRONG, **ROUNDED}, 3: THREE_RANKS}
EQUAL = [(2, name) for name in TWO_RANKS] + [(3, name) for name in THREE_RANKS]


def rows_of_steps() -> list[Groups]:
    """In every step four questions of two rollouts; lengths differ within and between them."""
    draw = random.Random(0)

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(draw.randrange(256) for _ in range(count))

    def row(question: tuple[int, ...], context: int, length: int, advantage: float) -> TrainingRow:
        return TrainingRow(
            student_prompt=question,
            teacher_prompt=(*tokens(context), *question),
            response=tokens(length),
            weights=(1.0,) * length,
            logprobs=(-5.0,) * length,
            advantage=advantage,
        )

    return [
        [
            [row(question, 3 + q, 2 + q + 2 * i, 1.0 - 2 * i) for i in range(2)]
            for q, question in enumerate([tokens(5) for _ in range(4)])
        ]
        for _ in range(STEPS)
    ]
