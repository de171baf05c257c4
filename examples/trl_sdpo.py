"""The fused loss inside TRL's experimental SDPO trainer: the trainer stays, its logits go.

`compute_loss` is the hook of transformers' Trainer for a loss of one's own. TRL's full-vocabulary
divergence (`distillation_mode="full_logits"`) is the same function of the hidden states, so that
runs can be compared; it holds three (tokens x vocabulary) arrays or more, this one none. Needs
`pip install trl` (1.16, its API is experimental) and Python 3.11. Run it:

    python examples/trl_sdpo.py
"""

from __future__ import annotations

from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl.experimental.sdpo import SDPOConfig, SDPOTrainer

from hsd_kernels import fused_hsd_loss


class FusedSDPOTrainer(SDPOTrainer):
    """SDPO with the divergence of `full_logits`, formed from hidden states.

    distillation_alpha is jsd_beta of the convention "gkd": 0 forward KL, 1 reverse KL.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        expected = {"distillation_mode": "full_logits", "distillation_weight": 1.0}
        expected |= {"distillation_is_clip": None, "use_teacher_server": False}
        for name, value in expected.items():
            if (found := getattr(self.args, name)) != value:
                raise ValueError(f"{name}: found {found!r}, expected {value!r}")

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        student_ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
        student_mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
        length = inputs["completion_ids"].shape[1]
        student = last_hidden_states(model, student_ids, student_mask, length)
        with torch.no_grad(), self._get_teacher_context_for_self_distillation():
            teacher = last_hidden_states(
                self.teacher_model,
                inputs["teacher_input_ids"],
                inputs["teacher_attention_mask"],
                length,
            )
        live = self.args.teacher_model_kind == "live"
        mask = inputs["completion_mask"] * inputs["self_distillation_mask"].unsqueeze(1)
        per_sequence = mask.sum(1, keepdim=True).clamp(min=1) * len(mask)
        out = fused_hsd_loss(
            student,
            teacher,
            output_weight(model),
            teacher_weight=None if live else output_weight(self.teacher_model).detach(),
            token_weights=mask / per_sequence,
            divergence="jsd",
            jsd_beta=self.args.distillation_alpha,
            temperature=self.temperature,
        )
        mean = out.stats.kl[mask.bool()].mean().item() if mask.any() else 0.0
        self._log_self_distillation_metric("train" if model.training else "eval", mean)
        return out.loss / (self.current_gradient_accumulation_steps if model.training else 1)


def last_hidden_states(model: Any, ids: Tensor, mask: Tensor, length: int) -> Tensor:
    """(B, length, D) at the positions that predict the last `length` tokens.

    Through the model's own forward, which distributed wrappers need, with one row of logits.
    """
    output = model(
        input_ids=ids,
        attention_mask=mask,
        use_cache=False,
        logits_to_keep=1,
        output_hidden_states=True,
    )
    hidden = output.hidden_states[-1][:, -length - 1 : -1]
    return hidden.to(output_weight(model).dtype)  # autocast may have changed it


def output_weight(model: Any) -> Tensor:
    """(V, D)."""
    return getattr(model, "module", model).get_output_embeddings().weight


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte: nothing is downloaded."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={text: i for i, text in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")


def has_digit(completions: list[str], **_: Any) -> list[float]:
    """The reward: some of a random model's texts hold a digit, some do not."""
    return [float(any(letter.isdigit() for letter in text)) for text in completions]


def make_trainer(
    folder: str, trainer: type[SDPOTrainer] = FusedSDPOTrainer, **settings: Any
) -> SDPOTrainer:
    """A trainer of a tiny random model on the CPU; `settings` are those of SDPOConfig."""
    torch.manual_seed(0)
    tokenizer = byte_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        initializer_range=0.15,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(f"{folder}/model")  # the EMA teacher loads it again
    return trainer(
        model=f"{folder}/model",
        reward_funcs=has_digit,
        args=SDPOConfig(
            **{
                "output_dir": folder,
                "max_steps": 3,
                "per_device_train_batch_size": 8,
                "num_generations": 8,
                "max_completion_length": 16,
                "learning_rate": 1e-3,
                "distillation_mode": "full_logits",
                "distillation_alpha": 0.5,
                "distillation_is_clip": None,
                "logging_steps": 1,
                "report_to": "none",
                "save_strategy": "no",
                "use_cpu": True,
                "bf16": False,
                **settings,
            }
        ),
        train_dataset=Dataset.from_dict({"prompt": [f"Count to {n}: " for n in range(1, 9)]}),
        processing_class=tokenizer,
    )


if __name__ == "__main__":
    make_trainer("runs/trl-sdpo").train()
