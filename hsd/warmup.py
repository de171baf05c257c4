"""Supervised steps on worked solutions, for base models that cannot use a hint yet.

The result is cached by everything that determines it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import random
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from torch.nn.functional import cross_entropy, linear
from transformers import AutoModelForCausalLM

from hsd import __version__
from hsd.config import Config, OptimizerConfig
from hsd.data.contexts import ContextBuilder, ContextConfig
from hsd.data.questions import Question, require_solutions
from hsd.data.templates import load_template
from hsd.metrics import StepProgress
from hsd.policy.head import OutputHead, response_hidden
from hsd.policy.load import cache_directory, model_identity, save_policy
from hsd.policy.optimizer import adamw, clipped_step, learning_rate

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_RATE_WARMUP_STEPS = 3


def warm_up(
    config: Config,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    head: OutputHead,
    questions: Sequence[Question],
    *,
    compute_dtype: torch.dtype,
    console: Console,
) -> None:
    """Trains `model` in place, or takes the weights of an earlier run with the same settings.

    Hints are shown in the run's template, whatever the run's teacher sees: runs that differ in
    their objective alone start from the same weights.

    Raises:
        ValueError: a question has no worked solution.
    """
    require_solutions(questions, option="warmup.steps")
    path = cache_directory() / "warmup" / _key(config, questions, compute_dtype)
    if path.exists():
        console.print(f"warm-up: cached weights of {config.warmup.steps} steps")
        cached: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        model.load_state_dict(cached.state_dict())
        return
    _train(config, model, tokenizer, head, questions, compute_dtype, console)
    save_policy(model, tokenizer, path)


def _train(
    config: Config,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    head: OutputHead,
    questions: Sequence[Question],
    compute_dtype: torch.dtype,
    console: Console,
) -> None:
    warmup = config.warmup
    contexts = ContextBuilder(tokenizer, ContextConfig(**_prompt_options(config)))
    rate = OptimizerConfig(learning_rate=warmup.learning_rate, warmup_steps=_RATE_WARMUP_STEPS)
    optimizer = adamw(model.parameters(), rate.learning_rate)
    rng = random.Random(f"warmup/{config.seed}")
    order = rng.sample(range(len(questions)), len(questions))
    with StepProgress(console, steps=warmup.steps, label="warm-up") as progress:
        for step in range(warmup.steps):
            places = range(step * warmup.batch_size, (step + 1) * warmup.batch_size)
            chosen = [questions[order[place % len(order)]] for place in places]
            loss = _supervised_loss(
                model, tokenizer, head, contexts, chosen, warmup.hint_share, compute_dtype
            )
            loss.backward()  # type: ignore[no-untyped-call]
            clipped_step(
                optimizer,
                model.parameters(),
                learning_rate=learning_rate(rate, step=step, steps=warmup.steps),
                max_grad_norm=config.optimizer.max_grad_norm,
            )
            progress.advance({"loss": float(loss.detach())}, step=step + 1)


def _supervised_loss(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    head: OutputHead,
    contexts: ContextBuilder,
    questions: Sequence[Question],
    hint_share: float,
    compute_dtype: torch.dtype,
) -> torch.Tensor:
    """Mean cross-entropy of the solutions; hints are in turn the answer, and answer and peer."""
    prompts, responses = [], []
    hinted = 0
    for position, question in enumerate(questions, start=1):
        solution = question.solution or ""
        hint = None
        if hinted < round(position * hint_share):
            hint = contexts.teacher(question, peers=[solution] if hinted % 2 else [])
            hinted += 1
        prompts.append(hint.token_ids if hint else contexts.student(question))
        encoded: list[int] = tokenizer(solution, add_special_tokens=False)["input_ids"]
        responses.append([*encoded, tokenizer.eos_token_id])
    hidden = response_hidden(model, prompts, responses, compute_dtype=compute_dtype)
    logits = linear(hidden, head.weight, head.bias) * head.logit_scale
    if head.logit_softcap is not None:
        logits = head.logit_softcap * torch.tanh(logits / head.logit_softcap)
    targets = torch.tensor([token for response in responses for token in response])
    return cross_entropy(logits, targets.to(logits.device))


def _key(config: Config, questions: Sequence[Question], compute_dtype: torch.dtype) -> str:
    """Everything that the warmed-up weights depend on, hashed."""
    parts = {
        "version": __version__,
        "torch": torch.__version__,
        "model": model_identity(config.model.name),
        "compute_dtype": str(compute_dtype),
        "warmup": dataclasses.asdict(config.warmup),
        "template": _hint_template(config.context.template),
        **{name: value for name, value in _prompt_options(config).items() if name != "template"},
        "max_grad_norm": config.optimizer.max_grad_norm,
        "seed": config.seed,
        "questions": [[q.prompt, q.answer, q.solution] for q in questions],
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:24]


def _prompt_options(config: Config) -> dict[str, Any]:
    """What of the contexts' configuration the prompts of the warm-up depend on."""
    names = ("template", "system", "student_thinking", "teacher_thinking")
    return {name: getattr(config.context, name) for name in names}


def _hint_template(name: str) -> dict[str, Any]:
    """A template but for the blocks that no hint shows."""
    texts = dataclasses.asdict(load_template(name))
    return {key: text for key, text in texts.items() if key not in ("failed", "demonstration")}
