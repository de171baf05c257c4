"""Tiny random models, their tokenizers, and a task that they can be trained on in seconds."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from hsd.cli import main as hsd_main
from hsd.policy.head import output_head
from hsd.policy.packing import TrainingRow
from hsd.policy.teachers import Policy

CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL_TOKENS = ["<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
VOCAB_SIZE = 256 + len(SPECIAL_TOKENS)

# What each does beside the plain linear head of llama.
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"tie_word_embeddings": False}),
    "llama-tied": ("Llama", {"tie_word_embeddings": True}),
    "gemma2-softcap": (
        "Gemma2",
        {"head_dim": 16, "final_logit_softcapping": 2.0, "sliding_window": 6},
    ),
    "cohere-scale": ("Cohere", {"logit_scale": 0.25}),
    "granite-scale": ("Granite", {"logits_scaling": 3.0, "tie_word_embeddings": False}),
    "phi-bias": ("Phi", {}),
    "gpt2-positions": ("GPT2", {"n_inner": 64, "resid_pdrop": 0.0}),
    "qwen3-moe": (
        "Qwen3Moe",
        {
            "head_dim": 16,
            "moe_intermediate_size": 24,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "output_router_logits": True,
            "router_aux_loss_coef": 0.1,
        },
    ),
    "mixtral": ("Mixtral", {"num_local_experts": 4}),
    "opt-positions": ("OPT", {"ffn_dim": 64, "word_embed_proj_dim": 32}),
}

MakeModel = Callable[..., transformers.PreTrainedModel]
MakePolicy = Callable[..., Policy]
MakeRow = Callable[..., TrainingRow]
MakeRecipe = Callable[..., Path]
RunHsd = Callable[..., int]


@pytest.fixture(autouse=True)
def sandbox(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No network, a cache of its own, and no minutes of C++ compilation for 32 dimensions."""
    _sandbox(tmp_path, monkeypatch)


def _sandbox(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HSD_CACHE", str(path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("hsd_kernels.workspace.compiler_found", lambda: False)


def _tokenizer(*, chat: bool) -> PreTrainedTokenizerFast:
    vocabulary = {text: i for i, text in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|end|>",
        extra_special_tokens=SPECIAL_TOKENS[1:],
        clean_up_tokenization_spaces=False,
    )
    if chat:
        fast.chat_template = CHAT_TEMPLATE
    return fast


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, with a chat template."""
    return _tokenizer(chat=True)


@pytest.fixture(scope="session")
def plain_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, without a chat template."""
    return _tokenizer(chat=False)


@pytest.fixture(scope="session")
def make_model() -> MakeModel:
    """A random model with every parameter off its initial value, biases and norms too."""

    def make(kind: str = "llama", *, seed: int = 0, **changes: Any) -> transformers.PreTrainedModel:
        family, options = ARCHITECTURES[kind]
        config = getattr(transformers, f"{family}Config")(
            **{
                "vocab_size": VOCAB_SIZE,
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "num_key_value_heads": 1 if family != "OPT" else 2,
                "max_position_embeddings": 512,
                "initializer_range": 0.15,
                "bos_token_id": None,
                "eos_token_id": 256,
                "pad_token_id": 256,
                **options,
                **changes,
            }
        )
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = AutoModelForCausalLM.from_config(config).eval()
            _shake(model, 0.05)
        return model

    return make


@torch.no_grad()
def _shake(model: torch.nn.Module, size: float) -> None:
    for parameter in model.parameters():
        parameter += size * torch.randn_like(parameter)


@pytest.fixture(scope="session")
def make_policy(make_model: MakeModel) -> MakePolicy:
    """A policy some way from its initial weights, in float32."""

    def make(kind: str = "llama", *, teacher: str = "live", **changes: Any) -> Policy:
        initial = make_model(kind).requires_grad_(False)
        model = copy.deepcopy(initial).requires_grad_(True)
        with torch.random.fork_rng():
            torch.manual_seed(1)
            _shake(model, 0.03)
        judge = model if teacher == "live" else initial
        parts = {
            "model": model,
            "head": output_head(model),
            "teacher": judge,
            "teacher_head": output_head(judge),
            "initial": initial,
            "initial_head": output_head(initial),
            "compute_dtype": torch.float32,
        }
        return Policy(**{**parts, **changes})

    return make


@pytest.fixture(scope="session")
def make_row() -> MakeRow:
    """A row of random tokens; equal seeds give equal rows."""

    def make(
        seed: int,
        *,
        prompt: int = 5,
        context: int = 9,
        response: int = 4,
        weights: tuple[float, ...] | None = None,
    ) -> TrainingRow:
        generator = torch.Generator().manual_seed(seed)

        def tokens(count: int) -> tuple[int, ...]:
            return tuple(torch.randint(256, (count,), generator=generator).tolist())

        student = tokens(prompt)
        return TrainingRow(
            student_prompt=student,
            teacher_prompt=tokens(context) + student,
            response=tokens(response),
            weights=weights or tuple((0.1 + torch.rand(response, generator=generator)).tolist()),
            logprobs=(-5.0,) * response,
        )

    return make


@pytest.fixture(scope="session")
def model_directory(
    tmp_path_factory: pytest.TempPathFactory,
    make_model: MakeModel,
    tokenizer: PreTrainedTokenizerFast,
) -> Path:
    """A model and its tokenizer as from_pretrained takes them."""
    path = tmp_path_factory.mktemp("models") / "tiny"
    make_model().save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def write_questions(path: Path, numbers: range) -> None:
    """Questions whose answer, 1 or 2, is a matter of luck: groups have both outcomes."""
    records = [
        {"prompt": f"Draw {n}.", "answer": str(1 + n % 2), "solution": str(1 + n % 2)}
        for n in numbers
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


@pytest.fixture(scope="session")
def make_recipe(model_directory: Path) -> MakeRecipe:
    """A recipe for a run of seconds in a folder; `changes` are tables over its own."""

    def make(folder: Path, changes: Mapping[str, Any] | None = None) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        write_questions(folder / "train.jsonl", range(16))
        write_questions(folder / "heldout.jsonl", range(16, 20))
        recipe: dict[str, Any] = {
            "steps": 3,
            "micro_batch_tokens": 256,
            "show_samples": 1,
            "model": {"name": str(model_directory), "compute_dtype": "float32"},
            "task": {
                "source": "jsonl",
                "train": str(folder / "train.jsonl"),
                "heldout": str(folder / "heldout.jsonl"),
            },
            "warmup": {"steps": 12, "batch_size": 8, "learning_rate": 1e-2},
            "rollout": {"questions_per_step": 2, "group_size": 4, "max_new_tokens": 4},
            "optimizer": {"learning_rate": 1e-3},
            "evaluation": {"samples": 2},
        }
        for key, value in (changes or {}).items():
            recipe[key] = {**recipe.get(key, {}), **value} if isinstance(value, dict) else value
        path = folder / "tiny.toml"
        path.write_text(_toml(recipe), encoding="utf-8")
        return path

    return make


def _toml(tables: Mapping[str, Any]) -> str:
    plain = [f"{k} = {json.dumps(v)}" for k, v in tables.items() if not isinstance(v, dict)]
    for name, table in tables.items():
        if isinstance(table, dict):
            plain += [f"[{name}]", *(f"{k} = {json.dumps(v)}" for k, v in table.items())]
    return "\n".join(plain) + "\n"


@pytest.fixture(scope="session")
def run_hsd() -> RunHsd:
    """`hsd ARGUMENT ...` in this process; its exit code."""

    def run(*arguments: object) -> int:
        try:
            return hsd_main([str(argument) for argument in arguments])
        except SystemExit as end:
            return int(end.code or 0)

    return run


@pytest.fixture(scope="session")
def trained_run(
    tmp_path_factory: pytest.TempPathFactory, make_recipe: MakeRecipe, run_hsd: RunHsd
) -> Path:
    """The folder of a whole run. Look, and leave it as it is."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as monkeypatch:
        _sandbox(folder, monkeypatch)
        status = run_hsd("train", make_recipe(folder), "--run-dir", folder / "run")
    assert status == 0
    return folder / "run"
