"""Tokens per second of vLLM beside the transformers engine, on the same prompts.

    python -m benchmarks.rollouts --vllm-python .venv-vllm/bin/python

Two works: the rows of one step of the quickstart; and 256 rows in groups of 8 under one long
prefix, of which one group in eight writes until it is cut and the others a few words. The model
decides the lengths, as in a run, so both engines sample alike but not the same.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

import torch

from hsd.data.contexts import ContextBuilder
from hsd.data.tasks import load_task
from hsd.distributed.process import World
from hsd.policy.load import load_policy
from hsd.policy.precision import compute_dtype
from hsd.recipe import load_recipe
from hsd.rollout.config import EngineConfig
from hsd.rollout.hf import HfEngine
from hsd.rollout.protocol import Rollout, RolloutEngine, Sampling, stream_seed
from hsd.rollout.vllm_server import VllmServerEngine

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_QUICKSTART = Path(__file__).parents[1] / "recipes" / "quickstart.toml"
_GROUPS, _GROUP_SIZE, _LONG = 32, 8, 256
_ROWS = 256  # of one batch of the transformers engine, rollout.batch_rows by default


@dataclass(frozen=True, kw_only=True)
class Work:
    """Prompts to sample groups for."""

    name: str
    prompts: list[list[int]]
    group_size: int
    max_new_tokens: int


def quickstart(tokenizer: PreTrainedTokenizerBase) -> Work:
    """One step of the recipe."""
    config = load_recipe(_QUICKSTART)
    contexts = ContextBuilder(tokenizer, config.context)
    questions = load_task(config.task).train[: config.rollout.questions_per_step]
    return Work(
        name="quickstart",
        prompts=[contexts.student(question) for question in questions],
        group_size=config.rollout.group_size,
        max_new_tokens=config.rollout.max_new_tokens,
    )


def uneven(tokenizer: PreTrainedTokenizerBase) -> Work:
    """Few long responses among short ones, under a prefix that all prompts share."""
    examples = "\n".join(
        f"Question: What is {n} plus {n + 3}? Answer: {2 * n + 3}." for n in range(10, 34)
    )
    prefix = f"You answer questions. These are examples.\n{examples}\n"

    def prompt(number: int) -> list[int]:
        long = number % 8 == 0
        question = (
            f"Write a long story about a town with {number + 40} towers, in many paragraphs."
            if long
            else f"Question: What is {number} plus {number + 5}? Say the number alone."
        )
        ids: list[int] = tokenizer.apply_chat_template(
            [{"role": "user", "content": prefix + question}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=False,
        )
        return ids

    return Work(
        name="uneven",
        prompts=[prompt(number) for number in range(_GROUPS)],
        group_size=_GROUP_SIZE,
        max_new_tokens=_LONG,
    )


def measure(engine: RolloutEngine, work: Work, repeats: int) -> tuple[float, list[int]]:
    """Tokens per second, the median; and the lengths of the last repeat."""
    _sample(engine, work, 0, max_new_tokens=2)  # what is done once only
    rates, lengths = [], [0]
    for repeat in range(1, repeats + 1):
        started = time.perf_counter()
        groups = _sample(engine, work, repeat, max_new_tokens=work.max_new_tokens)
        seconds = time.perf_counter() - started
        lengths = sorted(len(rollout.token_ids) for group in groups for rollout in group)
        rates.append(sum(lengths) / seconds)
    return median(rates), lengths


def _sample(
    engine: RolloutEngine, work: Work, repeat: int, *, max_new_tokens: int
) -> list[list[Rollout]]:
    return engine.generate(
        work.prompts,
        seeds=[stream_seed("throughput", repeat, n) for n in range(len(work.prompts))],
        group_size=work.group_size,
        sampling=Sampling(max_new_tokens=max_new_tokens),
    )


def start_vllm(
    python: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    threads: int,
    dtype: torch.dtype,
) -> VllmServerEngine:
    """A server that computes on as many cores as the trainer has threads."""
    cores = sorted(os.sched_getaffinity(0))[:threads]
    config = EngineConfig(
        kind="vllm",
        python=python,
        arguments=("--max-model-len", "2048", "--enforce-eager", "--max-num-seqs", "256"),
        environment={
            "VLLM_CPU_KVCACHE_SPACE": "3",
            "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)),
            "OMP_NUM_THREADS": str(threads),
            "HF_HUB_OFFLINE": "1",
        },
    )
    return VllmServerEngine(
        config,
        model,
        tokenizer,
        compute_dtype=dtype,
        sampling=Sampling(max_new_tokens=_LONG),
        concurrent=64,
        world=World(rank=0, size=1),
    )


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Tokens per second of both engines, and the sorted lengths of what they sampled."""

    work: Work
    vllm: float
    vllm_lengths: list[int]
    hf: float
    hf_lengths: list[int]

    @property
    def ratio(self) -> float:
        return self.vllm / self.hf

    def line(self) -> str:
        rows, longest = len(self.vllm_lengths), max(map(len, self.work.prompts))
        return (
            f"{self.work.name}: {rows} rows, prompts of {longest} tokens; "
            f"vllm {self.vllm:.0f} tokens/s ({_spread(self.vllm_lengths)}), "
            f"hf {self.hf:.0f} tokens/s ({_spread(self.hf_lengths)}); ratio {self.ratio:.2f}"
        )


def _spread(lengths: list[int]) -> str:
    return f"median length {median(lengths):.0f}, longest {lengths[-1]}"


def compare(
    python: Path, names: Sequence[str], *, threads: int, repeats: int
) -> Iterator[Comparison]:
    """Each work with both engines, one engine at a time: it has the cores for itself.

    Args:
        python: of an environment with vLLM.
        names: of works.
        threads: of each engine.
    """
    torch.set_num_threads(threads)
    model, tokenizer = load_policy("smollm2-135m-instruct")
    dtype = compute_dtype("auto")
    works = [_WORKS[name](tokenizer) for name in names]
    server = start_vllm(python, model, tokenizer, threads=threads, dtype=dtype)
    with closing(server):
        served = [measure(server, work, repeats) for work in works]
    local = HfEngine(model, tokenizer, compute_dtype=dtype, batch_rows=_ROWS)
    for work, (rate, lengths) in zip(works, served, strict=True):
        beside, others = measure(local, work, repeats)
        yield Comparison(work=work, vllm=rate, vllm_lengths=lengths, hf=beside, hf_lengths=others)


_WORKS = {"quickstart": quickstart, "uneven": uneven}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vllm-python", type=Path, required=True, help="of make test-vllm")
    parser.add_argument("--threads", type=int, default=2, help="of each engine")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--works", nargs="+", choices=_WORKS, default=list(_WORKS))
    arguments = parser.parse_args()
    # Absolute, not resolved: a link to the Python of an environment is what makes it that one.
    found = compare(
        arguments.vllm_python.absolute(),
        arguments.works,
        threads=arguments.threads,
        repeats=arguments.repeats,
    )
    for comparison in found:
        print(comparison.line(), flush=True)


if __name__ == "__main__":
    main()
