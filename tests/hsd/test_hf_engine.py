"""The transformers engine: what it samples, and that it is the policy's own distribution."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from itertools import pairwise

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from hsd.rollout.hf import HfEngine
from hsd.rollout.protocol import Rollout, Sampling, response_text, stream_seed

MakeModel = Callable[..., PreTrainedModel]
MakeEngine = Callable[..., HfEngine]

ARCHITECTURES = ("llama", "gemma2-softcap", "cohere-scale", "gpt2-positions", "opt-positions")
PROMPTS = {
    "different lengths": [[5, 6, 7, 8, 9, 10, 11], [12], [13, 14, 15], [16] * 9],
    "at least two tokens, with a shared prefix": [[5, 6, 7, 8], [5, 6, 9], [10, 11, 12, 13, 14]],
    "one": [[5, 6, 7]],
}
EOS = 256


@pytest.fixture
def make_engine(tokenizer: PreTrainedTokenizerFast) -> MakeEngine:
    def make(model: PreTrainedModel, *, batch_rows: int = 4096) -> HfEngine:
        return HfEngine(model, tokenizer, compute_dtype=torch.float32, batch_rows=batch_rows)

    return make


def generate(
    engine: HfEngine,
    prompts: Sequence[Sequence[int]],
    *,
    group_size: int = 1,
    seed: int = 0,
    **sampling: float,
) -> list[list[Rollout]]:
    return engine.generate(
        prompts,
        seeds=[stream_seed(seed, *prompt) for prompt in prompts],
        group_size=group_size,
        sampling=Sampling(**{"max_new_tokens": 12, **sampling}),  # type: ignore[arg-type]
    )


@torch.no_grad()
def next_log_probs(
    model: PreTrainedModel, prompt: Sequence[int], response: Sequence[int], temperature: float
) -> Tensor:
    """(response, V) by one forward pass over the whole sequence."""
    logits = model(input_ids=torch.tensor([[*prompt, *response]])).logits[0]
    return (logits[len(prompt) - 1 : -1] / temperature).log_softmax(-1)


@pytest.mark.parametrize("prompts", PROMPTS.values(), ids=PROMPTS)
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_greedy_is_what_transformers_generates_prompt_by_prompt(
    kind: str, prompts: list[list[int]], make_model: MakeModel, make_engine: MakeEngine
) -> None:
    model = make_model(kind)
    groups = generate(make_engine(model), prompts, temperature=0)
    for prompt, (rollout,) in zip(prompts, groups, strict=True):
        expected = model.generate(
            torch.tensor([prompt]), do_sample=False, max_new_tokens=12, eos_token_id=EOS
        )
        assert list(rollout.token_ids) == expected[0, len(prompt) :].tolist()


@pytest.mark.parametrize("temperature", [1.0, 0.6, 1.7])
@pytest.mark.parametrize("prompts", PROMPTS.values(), ids=PROMPTS)
@pytest.mark.parametrize("kind", [*ARCHITECTURES, "qwen3-moe"])
def test_logprobs_are_those_of_a_forward_pass_at_the_sampling_temperature(
    kind: str,
    prompts: list[list[int]],
    temperature: float,
    make_model: MakeModel,
    make_engine: MakeEngine,
) -> None:
    model = make_model(kind)
    groups = generate(make_engine(model), prompts, group_size=3, temperature=temperature)
    for prompt, group in zip(prompts, groups, strict=True):
        for rollout in group:
            log_p = next_log_probs(model, prompt, rollout.token_ids, temperature)
            expected = log_p.gather(-1, torch.tensor(rollout.token_ids)[:, None])[:, 0]
            found = torch.tensor(rollout.logprobs)
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def draws(
    model: PreTrainedModel, make_engine: MakeEngine, count: int, **sampling: float
) -> tuple[Tensor, Tensor]:
    """How often each token came first, (V,), and its probability, (V,)."""
    prompt = [5, 6, 7]
    (group,) = generate(
        make_engine(model), [prompt], group_size=count, max_new_tokens=1, **sampling
    )
    tokens = torch.tensor([rollout.token_ids[0] for rollout in group])
    log_p = next_log_probs(model, prompt, [0], sampling.get("temperature", 1.0))[0]
    return tokens.bincount(minlength=len(log_p)), log_p.exp()


def chi_square(counts: Tensor, probabilities: Tensor) -> tuple[float, int]:
    """Pearson's statistic, over tokens expected at least five times and all others together."""
    expected = probabilities * counts.sum()
    often = expected >= 5
    found = torch.cat([counts[often], counts[~often].sum()[None]]).double()
    wanted = torch.cat([expected[often], expected[~often].sum()[None]]).double()
    possible = wanted > 0
    terms = (found - wanted)[possible] ** 2 / wanted[possible]
    return float(terms.sum()), int(often.sum())


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_tokens_come_as_often_as_the_model_says(
    temperature: float, make_model: MakeModel, make_engine: MakeEngine
) -> None:
    counts, probabilities = draws(make_model(), make_engine, 6000, temperature=temperature)
    statistic, freedom = chi_square(counts, probabilities)
    limit = freedom + 4 * (2 * freedom) ** 0.5
    assert freedom > 20
    assert statistic < limit
    flatter, _ = chi_square(counts, (probabilities.log() * 0.8).softmax(-1))
    assert flatter > limit  # the test would see a wrong temperature


@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.9])
def test_top_p_draws_from_the_nucleus_only_and_from_all_of_it(
    top_p: float, make_model: MakeModel, make_engine: MakeEngine
) -> None:
    counts, probabilities = draws(make_model(), make_engine, 6000, top_p=top_p)
    ordered = probabilities.sort(descending=True)
    size = int((ordered.values.cumsum(0) < top_p).sum()) + 1
    inside = torch.zeros_like(probabilities).scatter_(0, ordered.indices[:size], 1.0)
    assert not counts[inside == 0].any()
    kept = probabilities * inside
    statistic, freedom = chi_square(counts, kept / kept.sum())
    assert statistic < freedom + 4 * (2 * freedom) ** 0.5 + 1


def test_top_p_leaves_the_logprobs_of_the_whole_distribution(
    make_model: MakeModel, make_engine: MakeEngine
) -> None:
    model = make_model()
    ((rollout,),) = generate(make_engine(model), [[5, 6, 7]], top_p=0.3)
    log_p = next_log_probs(model, [5, 6, 7], rollout.token_ids, 1.0)
    expected = log_p.gather(-1, torch.tensor(rollout.token_ids)[:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(rollout.logprobs), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("batch_rows", [1, 3, 7, 1000])
@pytest.mark.parametrize("kind", ["llama", "gpt2-positions"])
def test_a_rollout_depends_on_its_own_seed_and_nothing_beside_it(
    kind: str, batch_rows: int, make_model: MakeModel, make_engine: MakeEngine
) -> None:
    model, prompts = make_model(kind), PROMPTS["different lengths"]
    alone = [generate(make_engine(model), [prompt], group_size=3)[0] for prompt in prompts]
    engine = make_engine(model, batch_rows=batch_rows)
    together = generate(engine, prompts, group_size=3)
    turned = generate(engine, prompts[::-1], group_size=3)[::-1]
    for groups in (together, turned):
        assert [[r.token_ids for r in g] for g in groups] == [
            [r.token_ids for r in g] for g in alone
        ]


def test_the_rollouts_of_a_group_differ_and_another_seed_gives_others(
    make_model: MakeModel, make_engine: MakeEngine
) -> None:
    engine = make_engine(make_model())
    first, again, other = (
        [r.token_ids for r in generate(engine, [[5, 6, 7]], group_size=4, seed=seed)[0]]
        for seed in (0, 0, 1)
    )
    assert first == again
    assert len({*first, *other}) == 8


def test_generation_ends_at_each_stop_token_of_model_and_tokenizer(
    make_model: MakeModel, make_engine: MakeEngine
) -> None:
    model = make_model()
    model.generation_config.eos_token_id = list(range(40, 70))
    stops = {*range(40, 70), EOS}
    groups = generate(make_engine(model), PROMPTS["different lengths"], group_size=8)
    rollouts = [rollout for group in groups for rollout in group]
    for rollout in rollouts:
        assert not stops & set(rollout.token_ids[:-1])
        stopped = rollout.token_ids[-1] in stops
        assert rollout.finish_reason == ("stop" if stopped else "length")
        assert stopped or len(rollout.token_ids) == 12
        assert len(rollout.token_ids) == len(rollout.logprobs) == len(rollout.loss_mask)
        assert all(rollout.loss_mask)
    assert {rollout.finish_reason for rollout in rollouts} == {"stop", "length"}
    assert len({len(rollout.token_ids) for rollout in rollouts}) > 3


def test_the_generation_settings_of_a_model_do_not_change_the_policy(
    make_model: MakeModel, make_engine: MakeEngine
) -> None:
    model = make_model()
    plain = generate(make_engine(model), [[5, 6, 7]], group_size=4)
    for name, value in (("top_k", 2), ("repetition_penalty", 5.0), ("temperature", 0.1)):
        setattr(model.generation_config, name, value)
    model.generation_config.do_sample = True
    assert generate(make_engine(model), [[5, 6, 7]], group_size=4) == plain


def test_new_weights_are_sampled_from_once_they_are_given(
    make_model: MakeModel, make_engine: MakeEngine
) -> None:
    model, new = make_model(), make_model(seed=1)
    engine = make_engine(model)
    before = generate(engine, [[5, 6, 7]], group_size=4)
    with torch.no_grad():
        for parameter, other in zip(model.parameters(), new.parameters(), strict=True):
            parameter.copy_(other)
    assert generate(engine, [[5, 6, 7]], group_size=4) == before
    engine.update_weights(model, version=3)
    ((after, *_),) = generate(engine, [[5, 6, 7]], group_size=4)
    ((expected, *_),) = generate(make_engine(new), [[5, 6, 7]], group_size=4)
    assert after.token_ids == expected.token_ids != before[0][0].token_ids
    assert (before[0][0].policy_version, after.policy_version) == (0, 3)


def test_bfloat16_weights_are_a_copy(
    make_model: MakeModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    model = make_model()
    before = copy.deepcopy(model.state_dict())
    engine = HfEngine(model, tokenizer, compute_dtype=torch.bfloat16, batch_rows=8)
    engine.update_weights(model, version=1)
    generate(engine, [[5, 6, 7]])
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_no_prompt_gives_no_group(make_model: MakeModel, make_engine: MakeEngine) -> None:
    assert generate(make_engine(make_model()), []) == []


def test_a_text_holds_no_special_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    token_ids = (*tokenizer("it is 3")["input_ids"], EOS)
    rollout = Rollout(
        token_ids=token_ids,
        logprobs=(0.0,) * len(token_ids),
        loss_mask=(True,) * len(token_ids),
        finish_reason="stop",
        policy_version=0,
    )
    assert response_text(tokenizer, rollout) == "it is 3"


def test_seeds_of_different_streams_differ_and_last_over_processes() -> None:
    seeds = [stream_seed("rollout", 0, 1, "q"), stream_seed("rollout", 0, 11, "q"), stream_seed(0)]
    assert all(a != b for a, b in pairwise(sorted(seeds)))
    assert stream_seed("rollout", 0, 1, "q") == 2076688826564551254
    assert all(0 <= seed < 2**63 for seed in seeds)
