"""The fused loss in a plain training loop: a model learns to answer as if it had seen a hint.

The teacher is the same live model, with the hint in front of the question. Run it:

    python examples/plain_loop.py
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from hsd_kernels import fused_hsd_loss

STEPS, LENGTH = 40, 12  # of training; of a response in tokens


def make_model() -> LlamaForCausalLM:
    """A random model: nothing is downloaded."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=512,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            initializer_range=0.15,  # far enough from uniform that a hint changes the prediction
        )
    )


def hidden_states(model: LlamaForCausalLM, context: Tensor, response: Tensor) -> Tensor:
    """(B, LENGTH, D), at the positions that predict the response's tokens."""
    return model.model(torch.cat([context, response], 1)).last_hidden_state[:, -LENGTH - 1 : -1]


def train(steps: int = STEPS) -> list[float]:
    """Returns the loss of each step: the mean KL per response token, in nats."""
    torch.manual_seed(0)
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    questions, hints = torch.randint(3, 512, (32, 6)), torch.randint(3, 512, (32, 4))
    losses = []
    for step in range(steps):
        rollout = model.generate(
            questions, do_sample=True, max_new_tokens=LENGTH, eos_token_id=None, pad_token_id=0
        )
        response = rollout[:, questions.shape[1] :]  # token ids, never decoded and encoded again
        student = hidden_states(model, questions, response)
        with torch.no_grad():
            teacher = hidden_states(model, torch.cat([hints, questions], 1), response)
        out = fused_hsd_loss(student, teacher, model.lm_head.weight, targets=response)
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(out.loss.item())
        agree = out.stats.top1_agree.mean().item()
        print(f"step {step:2d}  KL {losses[-1]:.4f} nats  most likely token agrees {agree:.0%}")
    return losses


if __name__ == "__main__":
    train()
