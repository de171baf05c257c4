"""New weights reach a real server; one that was skipped, or half done, does not pass for done."""

from __future__ import annotations

import torch

from hsd.objective.config import ObjectiveConfig
from hsd.policy.teachers import make_policy
from hsd.rollout.engines import check_engine
from hsd.rollout.protocol import EngineError, Sampling, stream_seed
from hsd.rollout.vllm_client import VllmClient

TOLERANCE = 0.002  # nats, in the mean, between two float32 implementations
SAMPLING = Sampling(max_new_tokens=16, temperature=0.7)


@torch.no_grad()
def perturb(model: torch.nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter += 0.05 * parameter.std() * noise


def test_a_server_samples_from_the_weights_it_was_given_last(policy, start_engine, monkeypatch):
    engine = start_engine(SAMPLING, dtype=torch.float32)
    model = policy.model
    trained = make_policy(model, ObjectiveConfig(), compute_dtype=torch.float32)
    prompt = policy.tokenizer("The river rose for three days, and then the")["input_ids"]

    def gap(tolerance: float) -> float:
        return check_engine(engine, trained, prompt, sampling=SAMPLING, tolerance=tolerance)

    def sample() -> list:
        (group,) = engine.generate(
            [prompt], seeds=[stream_seed("repeat")], group_size=4, sampling=SAMPLING
        )
        return group

    gap(TOLERANCE)
    before = sample()
    assert [one.token_ids for one in sample()] == [one.token_ids for one in before]
    assert len({one.token_ids for one in before}) > 1

    perturb(model, seed=1)
    assert gap(tolerance=10.0) > 100 * TOLERANCE  # the old weights are told from the new ones
    engine.update_weights(model, version=1)
    gap(TOLERANCE)
    assert {one.policy_version for one in sample()} == {1}

    # An update that never reaches the server shows in the label of what it samples.
    perturb(model, seed=2)
    with monkeypatch.context() as patch:
        patch.setattr("hsd.rollout.replica.Replica.synchronise", lambda *_: None)
        engine.update_weights(model, version=2)
    gap(TOLERANCE)
    assert engine.health()["engine_retries"] > 0

    # One that labels without loading shows in the log-probs.
    perturb(model, seed=3)
    with monkeypatch.context() as patch:
        patch.setattr(VllmClient, "load", lambda *_: None)
        engine.update_weights(model, version=3)
    try:
        gap(TOLERANCE)
    except EngineError as error:
        assert "engine.tolerance" in str(error)
    else:
        raise AssertionError("weights that were not loaded passed the check")
