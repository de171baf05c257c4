"""How new weights of the policy come to vLLM: as files, or from GPU to GPU."""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers.core_model_loading import revert_weight_conversion

from hsd.distributed.process import World
from hsd.policy.adapters import merged
from hsd.policy.load import write_directory
from hsd.rollout.server_process import free_port

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_FILE_BYTES = 2**32


class WeightFiles:
    """A directory per version of the weights, of which the newest stays.

    Args:
        tokenizer: a server that starts from the directory reads its special tokens.
        dtype: of floating-point weights in the files; the engine's own.
        parent: where the directories go; None for a temporary directory.
        world: the first rank of a machine writes for all of it.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        dtype: torch.dtype,
        parent: Path | None,
        world: World,
    ) -> None:
        self._tokenizer = tokenizer
        self._dtype = dtype
        # Once for all: a server that started with a head of its own has to be given one each time.
        self._untie = not torch.cuda.is_available()
        self._world = world
        self._writes = world.local_rank == 0
        own = ""
        if self._writes:
            if parent is not None:
                parent.mkdir(parents=True, exist_ok=True)
            # One of its own in any case: runs may share the parent.
            own = tempfile.mkdtemp(prefix="hsd-weights-", dir=parent)
        folders = world.gather([own])
        self.folder = Path(folders[world.rank - world.local_rank]).resolve()
        self.current: Path | None = None

    def write(self, model: PreTrainedModel, version: int) -> Path:
        """Writes the weights after `version` updates, and removes those before them.

        All ranks call it together, and find the files when it returns. A sharded model is gathered
        weight by weight; the rank that writes holds one file's worth of it in host memory.
        """
        path = self.folder / f"version-{version}"
        untied = self._untie and model.config.tie_word_embeddings
        tensors = whole_tensors(model, self._dtype, keep_head=untied)

        def write(directory: Path) -> None:
            self._save_without_weights(model, directory)
            if untied:
                _untie(directory)
            for number, held in enumerate(_files_of_layers(tensors)):
                name = f"model-{number}.safetensors" if number else "model.safetensors"
                stored = revert_weight_conversion(model, held)  # names that a checkpoint has
                save_file(stored, directory / name, metadata={"format": "pt"})

        if self._writes:
            write_directory(path, write)
        else:
            for _ in tensors:
                pass
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # an engine on this GPU wakes next
        self._world.barrier()
        if self._writes and self.current is not None and self.current != path:
            shutil.rmtree(self.current, ignore_errors=True)
        self.current = path
        return path

    def _save_without_weights(self, model: PreTrainedModel, directory: Path) -> None:
        causal: Any = model
        # Else transformers writes on the first rank alone, and each machine has servers of its own.
        causal.should_save_on_this_rank = lambda is_main_process: is_main_process
        model.save_pretrained(directory, state_dict={})
        self._tokenizer.save_pretrained(directory)

    def close(self) -> None:
        if self._writes:
            shutil.rmtree(self.folder, ignore_errors=True)


@torch.no_grad()
def whole_tensors(
    model: PreTrainedModel, dtype: torch.dtype, *, keep_head: bool
) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor in host memory) of a model, one at a time; floating-point ones in `dtype`.

    Adapters are merged into the weights that they adapt. Gathering a sharded model is a collective:
    every rank must go through all.

    Args:
        keep_head: a tied output head comes too; else only the first name of a tied weight does.
    """
    causal: Any = model
    head = causal.get_output_embeddings()
    seen: set[int] = set()
    tied: set[str] = set()
    for owner, module in causal.named_modules(remove_duplicate=False):
        for attribute, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen and not (keep_head and module is head):
                tied.add(f"{owner}.{attribute}")
            seen.add(id(parameter))
    for name, value in merged(model, model.state_dict().items()):
        if name not in tied:
            # A copy: the head that is no longer tied shares memory with the embedding.
            yield name, _whole(value, dtype).cpu().clone()


def _whole(value: Tensor, dtype: torch.dtype) -> Tensor:
    value = value.detach()
    value = value.to(dtype) if value.is_floating_point() else value
    gather = getattr(value, "full_tensor", None)  # of a DTensor, in what the engine computes with
    whole: Tensor = gather() if gather else value
    return whole


def _files_of_layers(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
    """What goes into a file, name -> tensor: whole layers, until they are _FILE_BYTES."""
    held: dict[str, Tensor] = {}
    layer = ""
    for name, tensor in tensors:
        number = re.search(r"\.\d+\.", name)
        found = number[0] if number else ""
        if found != layer and sum(each.nbytes for each in held.values()) >= _FILE_BYTES:
            yield held
            held = {}
        layer = found
        held[name] = tensor.contiguous()
    yield held


def _untie(directory: Path) -> None:
    """Says of a model that its output head is a weight of its own, equal to the embeddings.

    On a CPU, vLLM computes with a packed copy of the head, which a reload renews only where the
    head is loaded: a tied one would stay as it was at the start (seen with vLLM 0.32).
    """
    path = directory / "config.json"
    config = {**json.loads(path.read_text(encoding="utf-8")), "tie_word_embeddings": False}
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


class NcclTransfer:
    """vLLM's native weight transfer over NCCL, to one server.

    Written against the documented interface of vLLM 0.32; it has not been tried on hardware.
    The trainer's environment needs vLLM, its GPU must be none of the server's.

    Args:
        url: of a server that was started with --weight-transfer-config '{"backend": "nccl"}'.
        workers: GPUs of the server.
    """

    def __init__(
        self, model: PreTrainedModel, *, url: str, workers: int, dtype: torch.dtype
    ) -> None:
        from vllm.distributed.weight_transfer import (
            HTTPVLLMWeightSyncClient,
            WeightTransferTrainerFactory,
        )
        from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

        self._engine: Any = WeightTransferTrainerFactory.trainer_init(
            NCCLTrainerInitInfo(
                master_address="127.0.0.1", master_port=free_port(), world_size=1 + workers, rank=0
            ),
            client=HTTPVLLMWeightSyncClient(url),
            source=_Source(model, dtype),
        )

    def send(self) -> None:
        """The weights of the model as they are now."""
        self._engine.send_weights()

    def close(self) -> None:
        self._engine.shutdown()


class _Source:
    """What vLLM's transfer calls a weight source: the parameters, in the engine's dtype."""

    def __init__(self, model: PreTrainedModel, dtype: torch.dtype) -> None:
        self._model = model
        self._dtype = dtype

    def metadata(self) -> list[Any]:
        from vllm.distributed.weight_transfer import ParamMeta

        return [
            ParamMeta(name, self._dtype, tuple(value.shape))
            for name, value in merged(self._model, self._model.named_parameters())
        ]

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for name, value in merged(self._model, self._model.named_parameters()):
            yield name, _whole(value, self._dtype)
