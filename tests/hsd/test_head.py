"""The output head of any causal model, and the hidden states that enter it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import transformers
from transformers import PreTrainedModel

from hsd.policy.head import output_head, response_hidden

MakeModel = Callable[..., PreTrainedModel]


def test_scale_softcap_and_bias_are_found(make_model: MakeModel) -> None:
    plain, softcap, cohere, granite, phi = (
        output_head(make_model(kind))
        for kind in ("llama", "gemma2-softcap", "cohere-scale", "granite-scale", "phi-bias")
    )
    assert (plain.logit_scale, plain.logit_softcap, plain.bias) == (1.0, None, None)
    assert softcap.logit_softcap == 2.0
    assert cohere.logit_scale == 0.25
    assert granite.logit_scale == pytest.approx(1 / 3)
    assert phi.bias is not None and phi.bias.any()


def test_a_tied_head_is_the_embedding_itself(make_model: MakeModel) -> None:
    model = make_model("llama-tied")
    assert output_head(model).weight is model.get_input_embeddings().weight


def test_a_model_without_a_head_is_refused() -> None:
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    with pytest.raises(ValueError, match="found LlamaModel without an output head"):
        output_head(transformers.LlamaModel(config))


def test_a_model_that_does_more_than_its_head_is_refused(make_model: MakeModel) -> None:
    model = make_model()
    model.lm_head.register_forward_hook(lambda module, args, logits: logits.abs())
    with pytest.raises(ValueError, match="differ from its head times its hidden states by"):
        output_head(model)


def test_a_scale_that_the_configuration_does_not_tell_is_refused(make_model: MakeModel) -> None:
    model = make_model("cohere-scale")
    model.logit_scale *= 1.01
    with pytest.raises(ValueError, match="expected a plain linear head"):
        output_head(model)


@pytest.mark.parametrize("kind", ["llama", "gemma2-softcap", "gpt2-positions", "opt-positions"])
def test_response_hidden_predicts_each_response_token_whatever_stands_beside_it(
    kind: str, make_model: MakeModel
) -> None:
    model = make_model(kind)
    prompts, responses = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10, 11, 12]], [[13, 14], [15], [16] * 5]
    with torch.no_grad():
        together = response_hidden(model, prompts, responses, compute_dtype=torch.float32)
        logits = torch.cat(
            [
                model(input_ids=torch.tensor([p + r])).logits[0, len(p) - 1 : -1]
                for p, r in zip(prompts, responses, strict=True)
            ]
        )
        head = output_head(model)
        found = together @ head.weight.T * head.logit_scale
        if head.logit_softcap is not None:
            found = head.logit_softcap * torch.tanh(found / head.logit_softcap)
    assert together.dtype == torch.float32
    torch.testing.assert_close(found, logits, rtol=1e-4, atol=1e-5)
