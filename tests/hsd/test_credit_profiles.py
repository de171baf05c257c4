"""Profiles, shares, means and the rest of the summary against cases worked out by hand."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from credit_records import make_groups, make_rollout, summarise
from matplotlib.figure import Figure

from hsd.credit.contexts import OtherSuccesses
from hsd.credit.figures import FIGURES, write_figures
from hsd.credit.moments import Mean, Ratio
from hsd.credit.profiles import WINDOW, ContextProfile, bars
from hsd.credit.source import CreditGroup
from hsd.credit.summary import binary_entropy
from hsd.credit.tokens import token_class
from hsd.data.questions import Question


def profile_of(*rollouts: tuple[list[float], int]) -> dict[str, Any]:
    """Of rollouts given as their credits and their tau."""
    profile = ContextProfile()
    for credit, tau in rollouts:
        profile.add(
            np.array(credit, dtype=np.float64),
            divergence=tau,
            tokens=("x",) * len(credit),
            pass_rate=0.5,
        )
    return profile.to_dict()


def means(found: dict[str, Any]) -> dict[int, tuple[int, float]]:
    return {p["distance"]: (p["count"], p["mean"]) for p in found["profile"]}


def test_the_profile_is_aligned_at_tau() -> None:
    found = profile_of(([0.0, -2.0, 1.0], 1), ([0.5, 0.0, 4.0], 2))
    assert means(found) == {-2: (1, 0.5), -1: (2, 0.0), 0: (2, 3.0), 1: (1, 1.0)}
    assert found["peak"]["mean"] == 3.0
    assert found["peak"]["half_width"] == pytest.approx(1.96 * np.std([2, 4], ddof=1) / 2**0.5)
    assert found["before"]["mean"] == pytest.approx((0.0 + 0.25) / 2)


def test_a_rollout_that_is_a_prefix_of_its_peer_has_no_token_at_tau() -> None:
    found = profile_of(([1.0, -3.0], 2))
    assert means(found) == {-2: (1, 1.0), -1: (1, 3.0)}
    assert found["peak"]["mean"] is None
    assert found["shares"][0]["share"] == 1.0
    assert found["difficulty"][1]["rollouts"] == 1
    assert found["difficulty"][1]["peak"]["count"] == 0


def test_rollouts_that_part_at_the_first_token() -> None:
    assert means(profile_of(([2.0, 1.0], 0))) == {0: (1, 2.0), 1: (1, 1.0)}


def test_shares_are_of_the_window_and_not_of_the_rollout() -> None:
    found = profile_of(([1.0] * 201, 100), ([-1.0] * 201, 100))
    for share in found["shares"]:
        expected = (2 * share["within"] + 1) / (2 * WINDOW + 1)
        assert share["share"] == pytest.approx(expected)
        assert share["token_share"] == pytest.approx(expected)
        assert share["half_width"] == pytest.approx(0.0, abs=1e-7)
    assert [share["within"] for share in found["shares"]] == [2, 4, 8, 16, 32]
    assert len(found["profile"]) == 2 * WINDOW + 1


def test_shares_pool_rollouts_by_their_credit() -> None:
    near, far = [0.0] * 20, [0.0] * 20
    near[10], far[19] = 3.0, 1.0
    assert profile_of((near, 10), (far, 10))["shares"][0]["share"] == pytest.approx(0.75)


def test_floor_and_decay() -> None:
    credit = [0.1] * 100
    credit[50:54] = [2.1, 1.0, 0.35, 0.25]
    credit[5] = 50.0  # further from tau than the window
    found = profile_of((credit, 50), (credit, 50))
    assert found["floor"] == {
        "count": 2,
        "mean": pytest.approx(0.1),
        "half_width": pytest.approx(0.0, abs=1e-7),
        "beyond": 20,
    }
    assert found["decay"] == 3  # the first at or below 0.1 + (2.1 - 0.1) / 10


def test_without_a_token_far_away_there_is_no_floor() -> None:
    found = profile_of(([0.0, 1.0, 0.0], 1))
    assert (found["floor"]["mean"], found["decay"]) == (None, None)


@pytest.mark.parametrize(
    ("correct", "size", "place"), [(1, 8, 0), (1, 4, 0), (2, 4, 1), (3, 4, 2), (7, 8, 3)]
)
def test_difficulty_bins_hold_their_upper_edge(correct: int, size: int, place: int) -> None:
    profile = ContextProfile()
    profile.add(np.ones(3), divergence=1, tokens=("x",) * 3, pass_rate=correct / size)
    counts = [split["rollouts"] for split in profile.to_dict()["difficulty"]]
    assert counts == [int(i == place) for i in range(4)]


def test_classes_share_the_credit() -> None:
    profile = ContextProfile()
    tokens = (" 12", " +", "so", "the", ".", "\n")
    profile.add(np.arange(6.0) - 3, divergence=0, tokens=tokens, pass_rate=0.5)
    classes = profile.to_dict()["classes"]
    found = {kind: (c["tokens"], c["mean"]) for kind, c in classes.items()}
    assert found == {
        "digits": (1, 3.0),
        "operators": (1, 2.0),
        "style": (1, 1.0),
        "words": (1, 0.0),
        "punctuation": (1, 1.0),
        "other": (1, 2.0),
    }
    assert classes["digits"]["share"] == pytest.approx(3 / 9)


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("7", "digits"),
        ("x2", "digits"),
        ("==", "operators"),
        (" ×", "operators"),
        (" Therefore", "style"),
        ("thereby", "words"),
        ("é", "words"),
        ("\\", "punctuation"),
        (").", "punctuation"),
        (" \n", "other"),
        ("<|im_end|>", "other"),
        ("", "other"),
    ],
)
def test_token_classes(text: str, kind: str) -> None:
    assert token_class(text) == kind


def test_running_moments_equal_those_of_the_whole() -> None:
    rng = np.random.default_rng(0)
    parts, wholes = rng.random(50), 1 + rng.random(50)
    mean, ratio = Mean(), Ratio()
    for part, whole in zip(parts, wholes, strict=True):
        mean.add(part)
        ratio.add(part, whole)
    assert mean.mean == pytest.approx(parts.mean())
    assert mean.half_width == pytest.approx(1.96 * parts.std(ddof=1) / math.sqrt(50))
    assert ratio.ratio == pytest.approx(parts.sum() / wholes.sum())
    residual = parts - parts.sum() / wholes.sum() * wholes
    assert ratio.half_width == pytest.approx(
        1.96 * math.sqrt(50 * (residual**2).sum() / 49) / wholes.sum()
    )


def test_few_observations_have_no_interval() -> None:
    assert (Mean().mean, Mean().half_width) == (None, None)
    one, ratio = Mean(), Ratio()
    one.add(2.0)
    ratio.add(0.0, 0.0)
    assert (one.mean, one.half_width, ratio.ratio, ratio.half_width) == (2.0, None, None, None)


def test_the_summary_counts() -> None:
    found = summarise(make_groups(groups=3, group_size=4, length=10))
    assert (found["rollouts"], found["correct"], found["failed_with_peer"]) == (12, 3, 9)
    assert found["prefix_length"]["counts"] == [(5, 9)]
    assert found["prefix_length"]["share_of_rollout"]["mean"] == 0.5
    (coverage,) = found["coverage"]
    assert (coverage["group_size"], coverage["pass_rate"]) == (4, 0.25)
    assert coverage["observed"] == 0.75
    assert coverage["expected"] == pytest.approx(0.75 * (1 - 0.75**3))
    information = found["information"]
    entropy = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75))
    assert information["reward_ceiling"] == pytest.approx(entropy / 10)


def test_binary_entropy_ends_at_zero() -> None:
    assert [binary_entropy(p) for p in (0.0, 1.0)] == [0.0, 0.0]
    assert binary_entropy(0.5) == pytest.approx(math.log(2))


def test_correct_rollouts_are_not_in_the_profile() -> None:
    found = summarise(iter([make_rollout(5, correct=True, peer=1, divergence=2)]))
    assert found["failed_with_peer"] == 0
    assert found["contexts"]["answer"]["profile"] == []


def test_lone_distances_are_not_drawn() -> None:
    rollouts = [([1.0, 1.0], 1)] * 10 + [([1.0, 1.0, 9.0], 1)]
    assert [distance for distance, _, _ in bars(profile_of(*rollouts))] == [-1, 0]


def test_figures_draw_the_numbers_of_the_summary(tmp_path: Path) -> None:
    summary = summarise(make_groups(groups=4, group_size=3, length=12))
    axes = Figure().subplots()
    FIGURES["profile"](axes, summary)
    points = summary["contexts"]["answer_peer"]["profile"]
    drawn = axes.lines[0]
    np.testing.assert_array_equal(drawn.get_xdata(), [p["distance"] for p in points])
    np.testing.assert_allclose(drawn.get_ydata(), [p["mean"] for p in points])
    write_figures(tmp_path, summary)
    for name in FIGURES:
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert ElementTree.parse(tmp_path / f"{name}.svg").getroot().tag.endswith("svg")


@pytest.mark.parametrize("contexts", [("answer",), ()])
def test_figures_of_rollouts_without_a_profile(tmp_path: Path, contexts: tuple[str, ...]) -> None:
    rollout = make_rollout(5, correct=True, peer=None, contexts=contexts)
    write_figures(tmp_path, summarise(iter([rollout])))
    assert len(list(tmp_path.iterdir())) == 2 * len(FIGURES)


def group(question: str, *outcomes: bool) -> CreditGroup:
    count = len(outcomes)
    return CreditGroup(
        question=Question(id=question, prompt=question, answer="1"),
        step=1,
        token_ids=[(1,)] * count,
        loss_masks=[(True,)] * count,
        finish_reasons=["stop"] * count,
        texts=[f"{question}{i}" for i in range(count)],
        rewards=list(outcomes),
        peers=[None] * count,
    )


def test_other_successes_are_the_latest_of_another_question() -> None:
    groups = [group("a", False, True), group("b", True), group("c", False), group("b", True)]
    others = OtherSuccesses(groups)
    seen = []
    for each in groups:
        seen.append(others.for_question(each.question.id))
        others.add(each)
    assert seen == ["b0", "a1", "b0", "a1"]
    assert OtherSuccesses([group("a", True)]).for_question("a") is None
