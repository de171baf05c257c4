import random
import subprocess
import sys
from collections.abc import Sequence
from typing import Any, get_args

import pytest

from hsd.data.peers import (
    Attempt,
    Choice,
    PeerConfig,
    PeerPolicy,
    Peers,
    divergence_position,
    expected_coverage,
    uniform_peers,
)


def group(
    rewards: Sequence[bool],
    step: int = 0,
    question_id: str = "q",
    tokens: Sequence[Sequence[int]] | None = None,
    surprise: Sequence[float] | None = None,
) -> list[Attempt]:
    return [
        Attempt(
            question_id=question_id,
            step=step,
            index=i,
            text=f"text {i}",
            token_ids=tuple(tokens[i]) if tokens else (i,),
            logprobs=(-surprise[i],) * 2 if surprise else (-1.0,),
            correct=reward,
        )
        for i, reward in enumerate(rewards)
    ]


def indices(peers: Sequence[Peers]) -> list[int | None]:
    return [each.successes[0].index if each.successes else None for each in peers]


def draw(
    rewards: Sequence[bool], step: int, *, seed: int = 0, question_id: str = "q", **config: Any
) -> list[int | None]:
    policy = PeerPolicy(PeerConfig(**config), seed=seed)
    return indices(policy.choose(group(rewards, step, question_id)))


@pytest.mark.parametrize("choice", get_args(Choice))
def test_a_peer_is_another_success_or_nothing(choice: str) -> None:
    rewards = [True, False, True, False, False]
    for step in range(50):
        peers = draw(rewards, step, choice=choice)
        assert peers[0] == 2
        assert peers[2] == 0
        assert all(peer in (0, 2) for peer in peers)
    assert draw([True, False, False], 0, choice=choice) == [None, 0, 0]
    assert draw([False] * 4, 0, choice=choice) == [None] * 4
    assert draw([], 0, choice=choice) == []


@pytest.mark.parametrize("count", [1, 2])
def test_draws_are_uniform(count: int) -> None:
    # Chi-square with 3 degrees of freedom: 16.3 is the .999 quantile.
    policy = PeerPolicy(PeerConfig(count=count), seed=0)
    draws = 4000
    counts = {0: 0, 1: 0, 3: 0, 4: 0}
    for step in range(draws):
        peers = policy.choose(group([True, True, False, True, True], step))[2]
        assert len({peer.index for peer in peers.successes}) == count
        counts[peers.successes[-1].index] += 1
    expected = draws / 4
    assert sum((n - expected) ** 2 / expected for n in counts.values()) < 16.3


def test_each_rollout_draws_afresh() -> None:
    # Rollouts 2 and 3 choose from {0, 1}: independent draws agree half of the time.
    agreements = sum(
        peers[2] == peers[3]
        for peers in (draw([True, True, False, False], step) for step in range(1000))
    )
    assert 430 < agreements < 570


def test_seed_step_and_question_each_change_the_draw() -> None:
    rewards = [True] * 8
    first = draw(rewards, 0)
    assert first == draw(rewards, 0)
    assert first != draw(rewards, 1)
    assert first != draw(rewards, 0, seed=1)
    assert first != draw(rewards, 0, question_id="r")


def test_a_draw_does_not_depend_on_the_draws_of_others() -> None:
    # Whether rollout 3 succeeds changes what the others choose from, not what it chooses from.
    for step in range(100):
        failed = draw([True, True, True, False], step)
        succeeded = draw([True, True, True, True], step)
        assert failed[3] == succeeded[3]


def test_draws_are_the_same_in_another_process() -> None:
    code = (
        "from hsd.data.peers import *\n"
        "attempts = [Attempt(question_id='q', step=0, index=i, text='', token_ids=(i,), "
        "logprobs=(), correct=True) for i in range(8)]\n"
        "peers = PeerPolicy(PeerConfig(), seed=0).choose(attempts)\n"
        "print([each.successes[0].index for each in peers])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == str(draw([True] * 8, 0))


def test_outcomes_alone_give_the_draw_of_the_run() -> None:
    rewards = [True, False, True, True, False, True]
    for step in range(30):
        found = uniform_peers(rewards, seed=3, step=step, question_id="r")
        assert found == draw(rewards, step, seed=3, question_id="r")
    assert uniform_peers([True, False], seed=3, step=0, question_id="r") == [None, 0]


TOKENS = [[1, 2, 3, 9], [1, 2], [1, 5, 6], [7], [1, 2, 3, 4, 5]]


@pytest.mark.parametrize(
    ("choice", "order"),
    [
        ("shortest", [3, 1, 2]),
        ("lowest_perplexity", [2, 1, 3]),
        ("highest_perplexity", [3, 1, 2]),
        ("first", [1, 2, 3]),
        ("longest_prefix", [1, 2, 3]),
    ],
)
def test_choices_are_in_order_of_preference(choice: Choice, order: list[int]) -> None:
    attempts = group(
        [False, True, True, True, False], tokens=TOKENS, surprise=[9.0, 0.5, 0.1, 0.7, 0.0]
    )
    for count in (1, 2, 3, 5):
        policy = PeerPolicy(PeerConfig(choice=choice, count=count), seed=0)
        chosen = policy.choose(attempts)[0].successes
        assert [peer.index for peer in chosen] == order[:count]


def test_the_longest_prefix_is_the_rollouts_own() -> None:
    attempts = group([True] * 5, tokens=TOKENS)
    policy = PeerPolicy(PeerConfig(choice="longest_prefix"), seed=0)
    assert indices(policy.choose(attempts)) == [4, 0, 0, 0, 0]


def test_a_failed_peer_is_another_failure_of_the_group() -> None:
    policy = PeerPolicy(PeerConfig(show_failed=True), seed=0)
    seen = set()
    for step in range(50):
        peers = policy.choose(group([True, False, False, True], step))
        for i, each in enumerate(peers):
            assert each.failed is not None
            assert each.failed.index in {1, 2} - {i}
        seen.add(peers[0].failed.index if peers[0].failed else None)
    assert seen == {1, 2}
    alone = policy.choose(group([True, False, True]))
    assert alone[1].failed is None and alone[0].failed is not None
    assert all(each.failed is None for each in policy.choose(group([False] * 3)))


def test_other_prompt_takes_successes_on_other_questions_alone() -> None:
    policy = PeerPolicy(PeerConfig(source="other_prompt"), seed=0)
    groups = [group([True, False], question_id=name) for name in "abc"]
    others = [attempt for each in groups for attempt in each]
    seen = set()
    for step in range(100):
        peers = policy.choose(group([True, False], step, question_id="a"), others)
        for each in peers:
            assert each.successes[0].correct
            seen.add(each.successes[0].question_id)
    assert seen == {"b", "c"}
    assert indices(policy.choose(groups[0], groups[0])) == [None, None]


def test_the_buffer_helps_where_the_group_has_no_success() -> None:
    policy = PeerPolicy(PeerConfig(source="buffer", buffer_size=2), seed=0)
    policy.remember(group([True, False, True, True], step=0))
    policy.remember(group([True], step=0, question_id="other"))
    for step in range(1, 20):
        for each in policy.choose(group([False, False], step)):
            assert each.successes[0].question_id == "q"
            assert each.successes[0].index in (2, 3)  # the oldest left
        assert indices(policy.choose(group([False, True], step)))[0] == 1
    assert indices(policy.choose(group([False], 1, question_id="new"))) == [None]


def test_other_sources_remember_nothing() -> None:
    policy = PeerPolicy(PeerConfig(), seed=0)
    policy.remember(group([True], step=0))
    assert indices(policy.choose(group([False], 1))) == [None]


@pytest.mark.parametrize("pass_rate", [0.1, 0.3, 0.7])
def test_coverage_of_simulated_groups_is_the_expected_one(pass_rate: float) -> None:
    size, groups, covered = 8, 2000, 0
    rng = random.Random(0)
    for step in range(groups):
        rewards = [rng.random() < pass_rate for _ in range(size)]
        peers = draw(rewards, step)
        covered += sum(not r and p is not None for r, p in zip(rewards, peers, strict=True))
    share = covered / (groups * size)
    # Rollouts of a group hang together: the error is at most that of independent groups.
    assert share == pytest.approx(
        (1 - pass_rate) * (1 - (1 - pass_rate) ** (size - 1)), abs=4 * 0.5 / groups**0.5
    )
    assert share == pytest.approx(expected_coverage(pass_rate, size), abs=0.02)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"source": "elsewhere"}, r"peers\.source: found 'elsewhere'"),
        ({"choice": "best"}, r"peers\.choice: found 'best'"),
        ({"count": 0}, r"peers\.count: found 0"),
        ({"buffer_size": 3}, r"peers\.buffer_size: found 3, expected peers\.source"),
    ],
)
def test_impossible_policies_are_refused(options: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        PeerConfig(**options)


@pytest.mark.parametrize(
    ("rollout", "peer", "tau"),
    [
        ([1, 2, 3], [1, 2, 4], 2),
        ([5, 2], [1, 2], 0),
        ([1, 2], [1, 2, 3], 2),
        ([1, 2, 3], [1], 1),
        ([1, 2], [1, 2], 2),
        ([], [1], 0),
    ],
)
def test_divergence_position(rollout: list[int], peer: list[int], tau: int) -> None:
    assert divergence_position(rollout, peer) == tau


@pytest.mark.parametrize("group_size", [2, 4, 8, 16])
def test_coverage_is_largest_at_the_published_pass_rate(group_size: int) -> None:
    best = 1 - group_size ** (-1 / (group_size - 1))
    grid = [index / 1000 for index in range(1001)]
    assert max(grid, key=lambda p: expected_coverage(p, group_size)) == pytest.approx(
        best, abs=6e-4
    )


def test_coverage_by_hand_and_by_enumeration() -> None:
    assert expected_coverage(0.5, 2) == 0.25
    assert expected_coverage(0.0, 8) == expected_coverage(1.0, 8) == 0
    assert expected_coverage(0.3, 1) == 0
    p, size, expected = 0.3, 4, 0.0
    for outcome in range(2**size):
        rewards = [bool(outcome >> i & 1) for i in range(size)]
        peers = draw(rewards, 0)
        covered = sum(not r and j is not None for r, j in zip(rewards, peers, strict=True))
        expected += p ** sum(rewards) * (1 - p) ** (size - sum(rewards)) * covered / size
    assert expected_coverage(p, size) == pytest.approx(expected)


@pytest.mark.parametrize(("rate", "size"), [(-0.1, 4), (1.1, 4), (float("nan"), 4), (0.5, 0)])
def test_coverage_refuses_impossible_arguments(rate: float, size: int) -> None:
    with pytest.raises(ValueError, match="expected"):
        expected_coverage(rate, size)
