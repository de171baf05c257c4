"""Sharded models are read from several files, no rank holding more than its share."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers.core_model_loading import Concatenate, WeightConverter

from hsd.distributed import names
from hsd.distributed.budget.architecture import load_architecture
from hsd.distributed.config import ShardingConfig
from hsd.distributed.fsdp import local_part
from hsd.distributed.load import load_sharded
from hsd.policy.adapters import Adapters, add_adapters
from hsd.policy.config import AdapterConfig

SHARDED = ShardingConfig(mode="full")
RANKS = 3

MeshOf = Callable[[int], DeviceMesh]


@pytest.fixture
def mesh_of() -> Iterator[MeshOf]:
    """What one rank of three sees, the others imagined. Only the first would save a model."""

    def make(rank: int) -> DeviceMesh:
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=RANKS)
        return init_device_mesh("cpu", (RANKS,))

    yield make
    dist.destroy_process_group()


def load(path: Path, mesh: DeviceMesh, **options: Any) -> torch.nn.Module:
    return load_sharded(path, SHARDED, mesh, compute_dtype=torch.float32, **options)


@pytest.mark.parametrize("rank", range(RANKS))
@pytest.mark.parametrize(
    "kind", ["llama", "llama-tied", "phi-bias", "gpt2-positions", "qwen3-moe", "mixtral"]
)
def test_a_rank_has_its_rows_of_every_weight(
    kind: str, rank: int, mesh_of: MeshOf, make_model: Callable[..., Any], tmp_path: Path
) -> None:
    whole = make_model(kind)
    whole.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    sharded = load(tmp_path, mesh_of(rank))
    names = [name for name, _ in whole.named_parameters()]
    assert [name for name, _ in sharded.named_parameters()] == names
    for weight, part in zip(whole.parameters(), sharded.parameters(), strict=True):
        chunks = weight.chunk(RANKS)
        expected = chunks[rank] if rank < len(chunks) else weight[:0]
        assert torch.equal(local_part(part), expected)
    for name, buffer in whole.named_buffers():  # those too that no file holds
        assert torch.equal(sharded.get_buffer(name), buffer), name
    assert not sharded.training


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_frozen_model_is_of_the_dtype_asked_for(
    dtype: torch.dtype, mesh_of: MeshOf, model_directory: Path
) -> None:
    frozen = load(model_directory, mesh_of(0), frozen=True, dtype=dtype)
    assert {each.dtype for each in frozen.parameters()} == {dtype}
    assert not any(each.requires_grad for each in frozen.parameters())


@pytest.mark.parametrize("rank", range(RANKS))
def test_a_rank_has_its_rows_of_adapters(
    rank: int, mesh_of: MeshOf, make_model: Callable[..., Any], tmp_path: Path
) -> None:
    whole = make_model("llama-tied")
    whole.save_pretrained(tmp_path, max_shard_size="20KB")
    adapters = Adapters(config=AdapterConfig(rank=2), seed=3, names=("policy", "teacher"))
    sharded = load(tmp_path, mesh_of(rank), adapters=adapters)
    add_adapters(whole, adapters)
    expected = dict(whole.named_parameters())
    found = dict(sharded.named_parameters())
    assert found.keys() == expected.keys()
    for name, part in found.items():
        chunks = expected[name].chunk(RANKS)
        own = chunks[rank] if rank < len(chunks) else expected[name][:0]
        assert torch.equal(local_part(part), own), name
        assert part.requires_grad == expected[name].requires_grad, name


def joined(weights: dict[str, torch.Tensor]) -> None:
    """As other files hold experts: as the model does."""
    for layer in range(2):
        prefix = f"model.layers.{layer}.mlp.experts."
        parts = {
            part: torch.stack([weights.pop(f"{prefix}{n}.{part}_proj.weight") for n in range(4)])
            for part in ("gate", "up", "down")
        }
        weights[f"{prefix}gate_up_proj"] = torch.cat((parts["gate"], parts["up"]), dim=1)
        weights[f"{prefix}down_proj"] = parts["down"]


def test_experts_that_files_hold_as_one_weight_are_read_too(
    mesh_of: MeshOf, make_model: Callable[..., Any], tmp_path: Path
) -> None:
    whole = make_model("qwen3-moe")
    whole.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    joined(weights)
    save_file(weights, tmp_path / "model.safetensors")
    sharded = load(tmp_path, mesh_of(1))
    for name in ("gate_up_proj", "down_proj"):
        own = sharded.get_parameter(f"model.layers.1.mlp.experts.{name}")
        assert torch.equal(
            local_part(own), whole.get_parameter(f"model.layers.1.mlp.experts.{name}")[2:4]
        )


def drop_expert(weights: dict[str, torch.Tensor]) -> None:
    del weights["model.layers.0.mlp.experts.2.up_proj.weight"]


def drop_experts(weights: dict[str, torch.Tensor]) -> None:
    for number in range(4):
        del weights[f"model.layers.0.mlp.experts.{number}.down_proj.weight"]


def renumber_expert(weights: dict[str, torch.Tensor]) -> None:
    for part in ("gate", "up"):
        name = "model.layers.0.mlp.experts.{}.{}_proj.weight".format
        weights[name(7, part)] = weights.pop(name(2, part))


def reshape_expert(weights: dict[str, torch.Tensor]) -> None:
    weights["model.layers.0.mlp.experts.0.down_proj.weight"] = torch.ones(32, 23)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop_expert, "found 7 weights of experts for model.layers.0.mlp.experts.gate_up_proj"),
        (drop_experts, "found no weight model.layers.0.mlp.experts.down_proj in the files"),
        (renumber_expert, r"found experts 0, 1, 3, 7 for model.layers.0.mlp.experts.gate_up_proj"),
        (reshape_expert, r"found model.layers.0.mlp.experts.down_proj of shape \(4, 32, 23\)"),
    ],
)
def test_files_of_other_experts_are_refused(
    change: Callable[[dict[str, torch.Tensor]], None],
    message: str,
    mesh_of: MeshOf,
    make_model: Callable[..., Any],
    tmp_path: Path,
) -> None:
    make_model("qwen3-moe").save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    change(weights)
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=message):
        load(tmp_path, mesh_of(0))


def drop(weights: dict[str, torch.Tensor]) -> None:
    del weights["model.norm.weight"]


def reshape(weights: dict[str, torch.Tensor]) -> None:
    weights["model.norm.weight"] = torch.ones(7)


def add(weights: dict[str, torch.Tensor]) -> None:
    weights["model.extra.weight"] = torch.ones(7)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop, "found no weight model.norm.weight in the files"),
        (reshape, r"found model.norm.weight of shape \(7,\), expected \(32,\)"),
        (add, "found weight model.extra.weight, expected none"),
    ],
)
def test_files_of_another_model_are_refused(
    change: Callable[[dict[str, torch.Tensor]], None],
    message: str,
    mesh_of: MeshOf,
    make_model: Callable[..., Any],
    tmp_path: Path,
) -> None:
    make_model("llama").save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    change(weights)
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=message):
        load(tmp_path, mesh_of(0))


def test_weights_that_would_be_computed_from_those_of_the_files_are_refused(
    make_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each rank reads its rows of a weight alone: what joins several files' weights cannot be."""
    halves = ["mlp.gate_proj.weight", "mlp.up_proj.weight"]
    joins = WeightConverter(halves, "mlp.gate_up_proj.weight", operations=[Concatenate(dim=0)])
    monkeypatch.setattr(names, "get_model_conversion_mapping", lambda model: [joins])
    layer = "model.layers.0."
    with pytest.raises(
        ValueError,
        match=r"sharding\.mode: found weight model\.layers\.0\.mlp\.gate_proj\.weight, which "
        r"transformers makes model\.layers\.0\.mlp\.gate_up_proj\.weight of by Concatenate",
    ):
        names.stored_weights(
            make_model(), {f"{layer}mlp.gate_up_proj.weight"}, [layer + half for half in halves]
        )


@pytest.mark.parametrize("damage", ["cut", "empty", "missing"])
def test_a_damaged_file_is_named(
    damage: str, mesh_of: MeshOf, make_model: Callable[..., Any], tmp_path: Path
) -> None:
    mesh = mesh_of(0)
    for size, count in (("50KB", 4), ("1GB", 1)):
        folder = tmp_path / size
        make_model("llama").save_pretrained(folder, max_shard_size=size)
        files = sorted(folder.glob("*.safetensors"))
        assert len(files) == count
        if damage == "missing" and count > 1:
            files[-1].unlink()
        else:
            os.truncate(files[-1], 5000 if damage == "cut" else 0)
        with pytest.raises(ValueError, match=f"model.name: found a damaged file {files[-1]}"):
            load(folder, mesh)


@pytest.mark.parametrize("content", ["{", '{"model_type": "llama", "hidden_size": -1}'])
def test_a_damaged_configuration_is_one_line(
    content: str, mesh_of: MeshOf, make_model: Callable[..., Any], tmp_path: Path
) -> None:
    make_model("llama").save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(content)
    mesh = mesh_of(0)
    for read in (lambda: load(tmp_path, mesh), lambda: load_architecture(str(tmp_path))):
        with pytest.raises(ValueError, match=f"model.name: found '{tmp_path}', expected"):
            read()


@pytest.mark.parametrize("index", [{"weight_map": {"a": "../b.safetensors"}}, [], {}])
def test_an_index_that_is_none_is_refused(
    index: object, mesh_of: MeshOf, make_model: Callable[..., Any], tmp_path: Path
) -> None:
    make_model("llama").save_pretrained(tmp_path)
    file, mesh = tmp_path / "model.safetensors.index.json", mesh_of(0)
    for content in (json.dumps(index), "{"):
        file.write_text(content)
        with pytest.raises(ValueError, match="found no map of weights to files"):
            load(tmp_path, mesh)


def test_a_directory_without_weights_is_refused(
    mesh_of: MeshOf, model_directory: Path, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text((model_directory / "config.json").read_text())
    with pytest.raises(ValueError, match=r"found no model\.safetensors\.index\.json or"):
        load(tmp_path, mesh_of(0))


LOADS_AND_REPORTS = """
import sys, torch, torch.distributed as dist
from pathlib import Path
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore
from hsd.distributed.config import ShardingConfig
from hsd.distributed.load import load_sharded

def resident(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))

dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=4)
mesh = init_device_mesh("cpu", (4,))
load = lambda path: load_sharded(
    Path(path), ShardingConfig(mode="full"), mesh, compute_dtype=torch.float32
)
load(sys.argv[1])  # a tiny one: what libraries take at first use
before = resident("VmRSS")
Path("/proc/self/clear_refs").write_text("5")  # the peak starts here
model = load(sys.argv[2])
print(resident("VmHWM") - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "sizes_of_kind"),
    [
        ("llama", {"intermediate_size": 2048}),
        ("qwen3-moe", {"moe_intermediate_size": 128, "num_experts": 16}),
    ],
)
def test_host_memory_peaks_at_the_share_and_one_weight(
    kind: str,
    sizes_of_kind: dict[str, int],
    make_model: Callable[..., Any],
    tmp_path: Path,
    model_directory: Path,
) -> None:
    shape = {"hidden_size": 512, "num_hidden_layers": 8, "vocab_size": 16_000}
    model = make_model(kind, **shape, **sizes_of_kind)
    sizes = [each.nbytes for each in model.parameters()]
    model.save_pretrained(tmp_path, max_shard_size="20MB")
    del model
    assert len(list(tmp_path.glob("*.safetensors"))) > 5
    done = subprocess.run(
        [sys.executable, "-c", LOADS_AND_REPORTS, str(model_directory), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    peak, share = int(done.stdout), sum(sizes) / 4
    assert peak < share + max(sizes)
    assert peak > 0.5 * share  # it measures what was loaded
