import subprocess
import sys

import pytest

from hsd.data.peers import divergence_position, expected_coverage, uniform_peers


def draw(rewards: list[bool], step: int, **changes: object) -> list[int | None]:
    return uniform_peers(rewards, **{"seed": 0, "step": step, "question_id": "q"} | changes)


def test_a_peer_is_another_success_or_nothing() -> None:
    rewards = [True, False, True, False, False]
    for step in range(50):
        peers = draw(rewards, step)
        assert peers[0] == 2
        assert peers[2] == 0
        assert all(peer in (0, 2) for peer in peers)
    assert draw([True, False, False], 0) == [None, 0, 0]
    assert draw([False] * 4, 0) == [None] * 4
    assert draw([], 0) == []


def test_draws_are_uniform() -> None:
    # Chi-square with 3 degrees of freedom: 16.3 is the .999 quantile.
    rewards = [True, True, False, True, True]
    draws = 4000
    counts = {0: 0, 1: 0, 3: 0, 4: 0}
    for step in range(draws):
        peer = draw(rewards, step)[2]
        assert peer is not None
        counts[peer] += 1
    expected = draws / 4
    assert sum((count - expected) ** 2 / expected for count in counts.values()) < 16.3


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
        "from hsd.data.peers import uniform_peers\n"
        "print(uniform_peers([True] * 8, seed=0, step=0, question_id='q'))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == str(draw([True] * 8, 0))


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
