"""The files through which servers get weights: what vLLM reads in them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers import PreTrainedTokenizerFast as Tokenizer

from hsd.rollout.weight_sync import WeightFiles

MakeModel = Callable[..., PreTrainedModel]


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
    path = WeightFiles(tokenizer, dtype=torch.float32, parent=tmp_path).write(model, 4)
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
    files = WeightFiles(tokenizer, dtype=torch.bfloat16, parent=tmp_path)
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


def test_files_that_cannot_be_written_leave_the_former_ones(
    make_model: MakeModel, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = WeightFiles(tokenizer, dtype=torch.float32, parent=tmp_path)
    model = make_model()
    first = files.write(model, 1)

    def fail(*_: object, **__: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(type(model), "save_pretrained", fail)
    with pytest.raises(OSError, match="no space left"):
        files.write(model, 2)
    assert files.current == first and list(files.folder.iterdir()) == [first]


def test_every_rank_writes_the_weights_of_its_servers(
    make_model: MakeModel, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    model = make_model()
    dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=2)
    try:
        path = WeightFiles(tokenizer, dtype=torch.float32, parent=tmp_path).write(model, 1)
    finally:
        dist.destroy_process_group()
    assert (path / "model.safetensors").exists()
    assert (path / "config.json").exists()
