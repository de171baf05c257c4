"""Sharded models from safetensors files, without any rank ever holding a whole one."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from hsd.distributed.config import ShardingConfig
from hsd.distributed.fsdp import local_part, shard_policy

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"


def load_sharded(
    directory: Path,
    config: ShardingConfig,
    mesh: DeviceMesh,
    *,
    compute_dtype: torch.dtype,
    frozen: bool = False,
    dtype: torch.dtype = torch.float32,
) -> PreTrainedModel:
    """A sharded causal language model in evaluation mode, dropout off.

    Each rank reads its rows of each weight, one weight at a time: host memory peaks at its share
    of the model and its share of the largest weight as the file has it.

    Args:
        directory: config.json, and safetensors whose names are those of the model's weights.
        mesh: see `shard_policy`.
        frozen: a reference or a teacher.
        dtype: of the shards; float32 for whatever moves.

    Raises:
        ValueError: no such files; a weight is missing, has another shape, or is unknown.
    """
    model = empty_model(directory, dtype=dtype)
    shard_policy(model, config, mesh, compute_dtype=compute_dtype, frozen=frozen)
    in_host_memory = config.offload_reference if frozen else config.offload == "all"
    device = torch.device("cpu" if in_host_memory else mesh.device_type)
    _fill(model, _files_of_weights(directory), mesh, device)
    return model


def empty_model(directory: Path, *, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A causal language model whose weights are on the meta device; its buffers are real."""
    auto: Any = AutoModelForCausalLM
    with _parameters_on_meta(dtype):
        model: Any = auto.from_config(AutoConfig.from_pretrained(directory), dtype=torch.float32)
    if (directory / "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(directory)
    empty: PreTrainedModel = model.eval()
    return empty


@contextmanager
def _parameters_on_meta(dtype: torch.dtype) -> Iterator[None]:
    """Parameters that modules register inside have no storage.

    Not `torch.device("meta")`: buffers that no file holds (rotary frequencies) must have values.
    """
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:  # a tied one stays what it is
            parameter = nn.Parameter(torch.empty_like(parameter, device="meta", dtype=dtype))
        register(module, name, parameter)

    patched: Any = nn.Module
    patched.register_parameter = on_meta
    try:
        yield
    finally:
        patched.register_parameter = register


def _files_of_weights(directory: Path) -> dict[str, Path]:
    """The file of each weight, by its name."""
    if (directory / _INDEX).exists():
        found: Any = json.loads((directory / _INDEX).read_text(encoding="utf-8"))
        files = found.get("weight_map") if isinstance(found, dict) else None
        # The index is data: it may not lead out of the directory.
        if not isinstance(files, dict) or any(Path(f).name != f for f in files.values()):
            raise ValueError(
                f"model.name: found no map of weights to files in {directory / _INDEX}"
            )
        return {name: directory / file for name, file in files.items()}
    if (directory / _SINGLE).exists():
        with safe_open(directory / _SINGLE, "pt") as file:
            return dict.fromkeys(file.keys(), directory / _SINGLE)
    raise ValueError(f"model.name: found no {_INDEX} or {_SINGLE} in {directory}, expected one")


@torch.no_grad()
def _fill(
    model: PreTrainedModel, files: Mapping[str, Path], mesh: DeviceMesh, device: torch.device
) -> None:
    names: dict[nn.Parameter, list[str]] = {}  # of tied weights, several
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    unknown = set(files) - {name for aliases in names.values() for name in aliases}
    for parameter, aliases in names.items():
        stored = next((name for name in aliases if name in files), None)
        if stored is None:
            raise ValueError(f"model.name: found no weight {aliases[0]} in the files, expected one")
        whole = torch.empty_like(parameter, device=device)
        filled = nn.Parameter(whole, requires_grad=parameter.requires_grad)
        _read_rows(files[stored], stored, filled, mesh)
        for name in aliases:
            owner, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(owner), attribute, filled)
    for name, buffer in model.named_buffers():
        if name in unknown:
            with safe_open(files[name], "pt") as file:
                buffer.copy_(file.get_tensor(name))
            unknown.remove(name)
    if unknown:
        raise ValueError(f"model.name: found weight {min(unknown)}, expected none of that name")


def _read_rows(path: Path, name: str, parameter: Tensor, mesh: DeviceMesh) -> None:
    """Fills the rank's rows of a (possibly sharded) parameter."""
    local = local_part(parameter)
    # Opened for each weight anew: what was read is no longer mapped.
    with safe_open(path, "pt") as file:
        stored = file.get_slice(name)
        if tuple(stored.get_shape()) != tuple(parameter.shape):
            raise ValueError(
                f"model.name: found {name} of shape {tuple(stored.get_shape())}, "
                f"expected {tuple(parameter.shape)}"
            )
        if isinstance(parameter, DTensor) and len(local):
            rows = -(-parameter.shape[0] // mesh.size())  # as torch.chunk divides them
            start = mesh.get_local_rank() * rows
            local.copy_(stored[start : start + len(local)])
        elif not isinstance(parameter, DTensor):
            local.copy_(stored[:])
