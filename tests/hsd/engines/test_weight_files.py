"""The files through which servers get weights: what vLLM reads in them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers import PreTrainedTokenizerFast as Tokenizer

from hsd.distributed.process import World
from hsd.rollout.weight_sync import WeightFiles

MakeModel = Callable[..., PreTrainedModel]
ALONE = World(rank=0, size=1)


@pytest.mark.parametrize("kind", ["llama", "llama-tied", "gemma2-softcap", "opt-positions"])
@pytest.mark.parametrize("gpu", [False, True])
def test_the_files_are_the_model(
    kind: str,
    gpu: bool,
    make_model: MakeModel,
    tokenizer: Tokenizer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: gpu)
    model = make_model(kind)
    tied = model.config.tie_word_embeddings
    path = WeightFiles(tokenizer, dtype=torch.float32, parent=tmp_path, world=ALONE).write(model, 4)
    # All files of the directory, as vLLM reads them; what they lack may only be a tied head.
    tensors = {k: v for file in path.glob("*.safetensors") for k, v in load_file(file).items()}
    read = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path)).eval()
    missing, unexpected = read.load_state_dict(tensors, strict=False)
    read.tie_weights()
    separate = not tied or not gpu
    assert (missing, unexpected) == ([] if separate else ["lm_head.weight"], [])
    assert read.config.tie_word_embeddings == (not separate)
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        torch.testing.assert_close(read(ids).logits, model(ids).logits)
    assert AutoTokenizer.from_pretrained(path)("abc") == tokenizer("abc")


def test_the_newest_files_stay_in_the_engine_s_dtype(
    make_model: MakeModel, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    files = WeightFiles(tokenizer, dtype=torch.bfloat16, parent=tmp_path, world=ALONE)
    for version in range(3):
        newest = files.write(make_model(seed=version), version)
        assert list(files.folder.iterdir()) == [newest] == [files.current]
    tensors = load_file(newest / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    expected = make_model(seed=2).state_dict()
    for name, tensor in tensors.items():
        assert torch.equal(tensor, expected[name].bfloat16())
    files.close()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["llama", "gemma2-softcap"])
def test_a_large_model_is_written_layer_by_layer(
    kind: str,
    make_model: MakeModel,
    tokenizer: Tokenizer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("hsd.rollout.weight_sync._FILE_BYTES", 1)
    model = make_model(kind)
    path = WeightFiles(tokenizer, dtype=torch.float32, parent=tmp_path, world=ALONE).write(model, 0)
    files = [load_file(file) for file in path.glob("*.safetensors")]
    assert len(files) >= model.config.num_hidden_layers
    for layer in range(model.config.num_hidden_layers):
        assert sum(any(f".layers.{layer}." in name for name in file) for file in files) == 1
    names = [name for file in files for name in file]
    assert sorted(names) == sorted(model.state_dict())
    for file in files:
        for name, tensor in file.items():
            assert torch.equal(tensor, model.state_dict()[name])


def test_files_that_cannot_be_written_leave_the_former_ones(
    make_model: MakeModel, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = WeightFiles(tokenizer, dtype=torch.float32, parent=tmp_path, world=ALONE)
    model = make_model()
    first = files.write(model, 1)

    def fail(*_: object, **__: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(type(model), "save_pretrained", fail)
    with pytest.raises(OSError, match="no space left"):
        files.write(model, 2)
    assert files.current == first and list(files.folder.iterdir()) == [first]


def test_the_first_rank_of_a_machine_writes_for_the_others(
    make_model: MakeModel, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = WeightFiles(tokenizer, dtype=torch.float32, parent=tmp_path, world=ALONE)
    monkeypatch.setattr(World, "gather", lambda self, items: [str(first.folder), *items])
    monkeypatch.setattr(World, "barrier", lambda self: None)
    second = WeightFiles(
        tokenizer, dtype=torch.float32, parent=tmp_path, world=World(rank=1, size=2)
    )
    assert second.write(make_model(), 3) == first.folder / "version-3"
    assert list(tmp_path.iterdir()) == [first.folder] and not list(first.folder.iterdir())
    assert first.write(make_model(), 3) == second.current
    second.close()
    assert first.folder.exists()
