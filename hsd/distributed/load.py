"""Sharded models from safetensors files, without any rank ever holding a whole one."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from hsd.distributed.config import ShardingConfig
from hsd.distributed.fsdp import local_part, shard_policy
from hsd.distributed.names import Stored, stored_weights
from hsd.policy.adapters import Adapters, add_adapters, initial_factor, is_factor, name_in_files
from hsd.policy.load import named_faults

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
    adapters: Adapters | None = None,
) -> PreTrainedModel:
    """A sharded causal language model in evaluation mode, dropout off.

    Each rank reads its rows of each weight, one weight at a time: host memory peaks at its share
    of the model and its share of the largest weight as the file has it.

    Args:
        directory: config.json, and safetensors whose names are those of the model's weights, or
            which hold the experts one by one that it has in one weight.
        mesh: see `shard_policy`.
        frozen: a reference or a teacher.
        dtype: of the shards; float32 for whatever moves.
        adapters: are put into the model, and its own weights frozen.

    Raises:
        ValueError: no such files; a weight is missing, has another shape, or is unknown; or the
            adapters do not fit.
    """
    model = empty_model(directory, dtype=dtype)
    if adapters is not None:
        add_adapters(model, adapters)
    shard_policy(model, config, mesh, compute_dtype=compute_dtype, frozen=frozen)
    in_host_memory = config.offload_reference if frozen else config.offload == "all"
    device = torch.device("cpu" if in_host_memory else mesh.device_type)
    files = _files_of_weights(directory)
    _fill(model, files, mesh, device, seed=0 if adapters is None else adapters.seed)
    return model


def empty_model(directory: Path, *, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A causal language model whose weights are on the meta device; its buffers are real."""
    auto: Any = AutoModelForCausalLM
    with named_faults(str(directory)):
        config = AutoConfig.from_pretrained(directory)
    with _parameters_on_meta(dtype):
        model: Any = auto.from_config(config, dtype=torch.float32)
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
    """The file of each weight, by its name; all of them can be opened."""
    if (directory / _INDEX).exists():
        try:
            found: Any = json.loads((directory / _INDEX).read_text(encoding="utf-8"))
        except ValueError:
            found = None
        files = found.get("weight_map") if isinstance(found, dict) else None
        # The index is data: it may not lead out of the directory.
        if not isinstance(files, dict) or any(Path(f).name != f for f in files.values()):
            raise ValueError(
                f"model.name: found no map of weights to files in {directory / _INDEX}"
            )
        for file in sorted({*files.values()}):
            _names_in(directory / file)
        return {name: directory / file for name, file in files.items()}
    if (directory / _SINGLE).exists():
        return dict.fromkeys(_names_in(directory / _SINGLE), directory / _SINGLE)
    raise ValueError(f"model.name: found no {_INDEX} or {_SINGLE} in {directory}, expected one")


def _names_in(file: Path) -> list[str]:
    try:
        with safe_open(file, "pt") as opened:  # a file that was cut short does not open
            return list(opened.keys())
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"model.name: found a damaged file {file}, expected safetensors ({error})"
        ) from None


@torch.no_grad()
def _fill(
    model: PreTrainedModel,
    files: Mapping[str, Path],
    mesh: DeviceMesh,
    device: torch.device,
    *,
    seed: int,
) -> None:
    names: dict[nn.Parameter, list[str]] = {}  # of tied weights, several
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    buffers = dict(model.named_buffers())
    weights = (name_in_files(name) for aliases in names.values() for name in aliases)
    found = stored_weights(model, {*weights, *buffers}, files)
    for parameter, aliases in names.items():
        whole = torch.empty_like(parameter, device=device)
        filled = nn.Parameter(whole, requires_grad=parameter.requires_grad)
        if is_factor(aliases[0]):
            _copy_rows(initial_factor(aliases[0], parameter.shape, seed=seed), filled, mesh)
        else:
            own = next((name for name in map(name_in_files, aliases) if name in found), None)
            if own is None:
                missing = name_in_files(aliases[0])
                raise ValueError(
                    f"model.name: found no weight {missing} in the files, expected one"
                )
            _read_rows(model, own, found[own], files, filled, mesh)
        for name in aliases:
            owner, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(owner), attribute, filled)
    for name in buffers.keys() & found.keys():
        (stored,) = found[name].all_names()
        with safe_open(files[stored], "pt") as file:
            buffers[name].copy_(file.get_tensor(stored))


def _read_rows(
    model: PreTrainedModel,
    name: str,
    stored: Stored,
    files: Mapping[str, Path],
    parameter: Tensor,
    mesh: DeviceMesh,
) -> None:
    """Fills the rank's rows of a (possibly sharded) parameter."""
    # Opened for each weight anew: what was read is no longer mapped.
    with ExitStack() as stack:
        paths = {files[each] for each in stored.all_names()}
        opened = {path: stack.enter_context(safe_open(path, "pt")) for path in paths}
        if stored.experts is None:
            (own,) = stored.all_names()
            rows = opened[files[own]].get_slice(own)
            _check_shape(own, rows.get_shape(), parameter.shape)
            _copy_rows(rows, parameter, mesh)
            return
        stored.require_experts(name, parameter.shape[0])
        local, start = local_part(parameter), _first_row(parameter, mesh)
        for row in range(len(local)):
            expert = stored.expert(
                name, start + row, model, lambda each: opened[files[each]].get_tensor(each)
            )
            _check_shape(name, (parameter.shape[0], *expert.shape[1:]), parameter.shape)
            local[row].copy_(expert[0])


def _check_shape(name: str, found: Sequence[int], expected: torch.Size) -> None:
    if tuple(found) != tuple(expected):
        raise ValueError(
            f"model.name: found {name} of shape {tuple(found)}, expected {tuple(expected)}"
        )


def _copy_rows(rows: Any, parameter: Tensor, mesh: DeviceMesh) -> None:
    """Fills the rank's rows of a parameter from what can be sliced as the whole."""
    local, start = local_part(parameter), _first_row(parameter, mesh)
    if len(local):
        local.copy_(rows[start : start + len(local)])


def _first_row(parameter: Tensor, mesh: DeviceMesh) -> int:
    if not isinstance(parameter, DTensor):
        return 0
    return mesh.get_local_rank() * -(-parameter.shape[0] // mesh.size())  # as torch.chunk divides
