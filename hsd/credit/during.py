"""Credit of some groups of a training step, before its update: the weights that sampled them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from hsd.credit.contexts import CreditContexts, OtherSuccesses
from hsd.credit.export import write_export
from hsd.credit.measure import measure
from hsd.credit.model import CreditModel
from hsd.credit.source import CreditGroup
from hsd.data.peers import Peers
from hsd.rollout.groups import Group

if TYPE_CHECKING:
    from hsd.trainer import Trainer


def watch_credit(
    trainer: Trainer, groups: Sequence[Group], peers: Sequence[Sequence[Peers]], step: int
) -> None:
    """Writes credit/step-N of the run folder, where `credit.every` has a measurement due.

    Draws nothing at random and leaves weights and gradients alone: the run goes on as without it.
    The main rank measures groups of its own share.

    Args:
        groups: those that the step keeps.
        peers: of their rollouts.
        step: from 0; N is one more.
    """
    config = trainer.config
    due = config.credit.every and (step + 1) % config.credit.every == 0
    if not due or not trainer.world.is_main or not groups:
        return
    chosen = [
        _credit_group(group, own)
        for group, own in list(zip(groups, peers, strict=True))[: config.credit.groups]
    ]
    model = CreditModel(
        model=trainer.policy.model,
        head=trainer.policy.head,
        tokenizer=trainer.tokenizer,
        compute_dtype=trainer.policy.compute_dtype,
        temperature=config.rollout.temperature,
        micro_batch_tokens=config.micro_batch_tokens,
        max_chunk_bytes=config.objective.max_chunk_bytes,
    )
    contexts = CreditContexts(trainer.tokenizer, config.context, config.credit.contexts)
    run = config.run_dir or Path("runs") / "run"
    write_export(
        run / "credit" / f"step-{step + 1}",
        measure(chosen, OtherSuccesses(chosen), model, contexts, config),
        about={
            "title": f"{run.name}, step {step + 1}",
            "source": str(run),
            "model": f"the policy before the update of step {step + 1}",
            "temperature": config.rollout.temperature,
            "compute_dtype": str(trainer.policy.compute_dtype).removeprefix("torch."),
            "contexts": list(config.credit.contexts),
        },
        tokenizer=trainer.tokenizer,
        console=Console(quiet=True),
    )


def _credit_group(group: Group, peers: Sequence[Peers]) -> CreditGroup:
    """A sampled group with the first peer of each rollout, if that is of its own group."""
    rollouts = group.rollouts
    firsts = [each.successes[0] if each.successes else None for each in peers]
    return CreditGroup(
        question=group.question,
        step=group.step + 1,
        token_ids=[rollout.token_ids for rollout in rollouts],
        loss_masks=[rollout.loss_mask for rollout in rollouts],
        finish_reasons=[rollout.finish_reason for rollout in rollouts],
        texts=group.texts,
        rewards=group.rewards,
        peers=[
            first.index
            if first and (first.question_id, first.step) == (group.question.id, group.step)
            else None
            for first in firsts
        ],
    )
