"""What the engine asks of vLLM servers, and what it makes of their answers."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fake_vllm import STOP, Server
from vllm_cases import PROMPTS, Start, behave, require_current, sample

from hsd.rollout.protocol import EngineError, Sampling

MakeModel = Callable[..., Any]


def test_rollouts_come_in_order_with_log_probs_and_the_way_they_ended(
    server: Server, start: Start, tmp_path: Path
) -> None:
    groups = sample(start(urls=(server.url,)))
    require_current(groups, tmp_path, 0)
    rollouts = [rollout for group in groups for rollout in group]
    assert {rollout.finish_reason for rollout in rollouts} == {"stop", "length"}
    for rollout in rollouts:
        assert (rollout.finish_reason == "stop") == (rollout.token_ids[-1] == STOP)
        assert len(rollout.token_ids) == len(rollout.logprobs) == len(rollout.loss_mask)
    # The stand-in's first token names seed and place in the group.
    assert len({rollout.token_ids[:2] for rollout in rollouts if len(rollout.token_ids) > 2}) > 6


def test_requests_carry_prompt_and_seed_and_switch_the_server_s_own_defaults_off(
    server: Server, start: Start
) -> None:
    engine = start(urls=(server.url,))
    first, again = sample(engine), sample(engine)
    assert first == again
    sent = {tuple(body["token_ids"]): body["sampling_params"] for body in server.requests}
    assert {prompt: options["seed"] for prompt, options in sent.items()} == {
        tuple(prompt): 100 * n for n, prompt in enumerate(PROMPTS)
    }
    for options in sent.values():
        assert (options["n"], options["max_tokens"], options["stop_token_ids"]) == (3, 6, [STOP])
        assert (options["top_k"], options["min_p"], options["repetition_penalty"]) == (0, 0, 1)


def test_requests_are_spread_over_the_servers(start: Start) -> None:
    servers = [Server().start() for _ in range(2)]
    for each in servers:
        each.behaviour = {"at": "/inference/v1/generate", "hang": 1.0}
    sample(start(urls=tuple(each.url for each in servers)))
    assert [len(each.requests) for each in servers] == [2, 2]
    for each in servers:
        each.shutdown()


def test_ranks_of_a_machine_share_its_servers(
    server: Server, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    start(urls=(server.url,))
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(EngineError, match=r"engine\.urls: found 1 for 2 ranks"):
        start(urls=(server.url,))


def test_new_weights_are_loaded_and_the_prefix_cache_is_reset_before_they_are_named(
    server: Server, start: Start, make_model: MakeModel, tmp_path: Path
) -> None:
    engine = start(urls=(server.url,))
    old = sample(engine)
    del server.called[:]
    engine.update_weights(make_model(seed=1), version=7)
    loading = [path for path in server.called if path not in ("health", "weight_info")]
    assert loading == ["collective_rpc", "reset_prefix_cache", "update_weight_version"]
    groups = sample(engine)
    require_current(groups, tmp_path, 7)
    assert groups[0][0].logprobs[0] != old[0][0].logprobs[0]


def test_a_server_that_sleeps_is_woken_in_two_parts_around_the_new_weights(
    server: Server, start: Start, make_model: MakeModel
) -> None:
    engine = start(urls=(server.url,), sleep=True)
    engine.sleep()
    del server.called[:]
    engine.update_weights(make_model(seed=1), version=1)
    engine.update_weights(make_model(seed=2), version=2)
    first = server.called.index("update_weight_version")
    assert [
        path for path in server.called[: first + 1] if path not in ("health", "weight_info")
    ] == [
        "wake_up?tags=weights",
        "collective_rpc",
        "wake_up?tags=kv_cache",
        "reset_prefix_cache",
        "update_weight_version",
    ]
    assert "wake_up?tags=weights" not in server.called[first:]


def test_a_server_with_other_weights_is_given_the_current_ones(
    server: Server, start: Start, tmp_path: Path
) -> None:
    engine = start(urls=(server.url,))
    server.label, server.weights = "default", 0.5  # as after a restart that nobody told us of
    require_current(sample(engine), tmp_path, 0)
    assert engine.health()["engine_retries"] > 0


@pytest.mark.parametrize("status", [500, 503])
def test_a_request_that_fails_at_the_server_is_repeated(
    status: int, server: Server, start: Start, tmp_path: Path
) -> None:
    engine = start(urls=(server.url,))
    behave(engine, at="/inference/v1/generate", status=status, once=True)
    require_current(sample(engine), tmp_path, 0)
    assert engine.health() == {"engine_retries": 1.0}


def test_a_request_that_keeps_failing_is_given_up(server: Server, start: Start) -> None:
    engine = start(urls=(server.url,))
    behave(engine, at="/inference/v1/generate", status=500)
    with pytest.raises(EngineError, match=r"4 attempts at a group failed, .* 500: .*as told"):
        sample(engine)


def answer(**changes: Any) -> dict[str, Any]:
    """A right answer to a request for one rollout, but for `changes` in its only choice."""
    choice = {
        "index": 0,
        "token_ids": [3, STOP],
        "finish_reason": "stop",
        "logprobs": {"content": [{"token_id": t, "logprob": -0.5} for t in (3, STOP)]},
        "weight_versions": [],
        **changes,
    }
    return {"choices": [choice]}


def content(*pairs: tuple[Any, Any]) -> dict[str, Any]:
    return {"content": [{"token_id": token, "logprob": value} for token, value in pairs]}


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        pytest.param("<html>", "JSON", id="no JSON"),
        pytest.param([], "choices of type list", id="no object"),
        pytest.param({"choices": []}, "1 choices", id="too few"),
        pytest.param(answer(index=1), "1 choices", id="another index"),
        pytest.param(answer(token_ids=None), "token_ids of type list", id="no tokens"),
        pytest.param(answer(token_ids=[]), "1 to 6 tokens", id="empty"),
        pytest.param(answer(token_ids=[4, STOP]), "tokens with log-probs", id="of other tokens"),
        pytest.param(answer(logprobs=None), "logprobs of type dict", id="no log-probs"),
        pytest.param(
            answer(logprobs=content((3, None), (STOP, -1))), "a finite logprob", id="null"
        ),
        pytest.param(
            answer(logprobs=content((3, math.nan), (STOP, -1))), "a finite logprob", id="NaN"
        ),
        pytest.param(answer(finish_reason="length"), "stop at a stop token", id="wrong end"),
        pytest.param(answer(finish_reason="tool_calls"), "stop at a stop token", id="other end"),
        pytest.param(answer(weight_versions=None), "weight_versions of type list", id="no version"),
    ],
)
def test_a_malformed_answer_is_one_clear_error(
    found: Any, expected: str, server: Server, start: Start
) -> None:
    engine = start(urls=(server.url,))
    if (
        isinstance(found, dict)
        and found["choices"]
        and found["choices"][0]["weight_versions"] == []
    ):
        found["choices"][0]["weight_versions"] = [{"version": server.label, "start": 0, "end": 2}]
    server.behaviour = {"answer": found}
    with pytest.raises(EngineError) as caught:
        sample(engine, group_size=1)
    message = str(caught.value)
    assert message.startswith(f"engine: {server.url} answered ")
    assert expected in message and "\n" not in message


def test_a_server_without_the_endpoints_is_refused_with_the_remedy(
    server: Server, start: Start
) -> None:
    server.behaviour = {"at": "/weight_info", "status": 404}
    with pytest.raises(EngineError, match=r"status 404: .*VLLM_SERVER_DEV_MODE=1 and --enable"):
        start(urls=(server.url,))


@pytest.mark.parametrize(
    ("mode", "temperature", "top_p", "needed"),
    [
        ("raw_logprobs", 0.7, 1.0, "processed_logprobs"),
        ("processed_logprobs", 0.7, 1.0, None),
        ("raw_logprobs", 1.0, 0.9, None),
        ("processed_logprobs", 1.0, 0.9, "raw_logprobs"),
        ("raw_logprobs", 1.0, 1.0, None),
        ("processed_logprobs", 1.0, 1.0, None),
    ],
)
def test_a_server_that_reports_log_probs_of_another_policy_is_refused(
    mode: str, temperature: float, top_p: float, needed: str | None, server: Server, start: Start
) -> None:
    server.mode = mode
    sampling = Sampling(max_new_tokens=6, temperature=temperature, top_p=top_p)
    if needed is None:
        start(urls=(server.url,), sampling=sampling)
    else:
        with pytest.raises(EngineError, match=f"reports {mode}, expected .* {needed} at temp"):
            start(urls=(server.url,), sampling=sampling)
