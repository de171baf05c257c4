"""What the figures of `hsd credit` draw, against dense float64 logits of a small model."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import credit_records
import numpy as np
import pytest
import torch
import transformers
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from transformers import PreTrainedTokenizerFast

from hsd.config import Config
from hsd.credit.contexts import CreditContexts, OtherSuccesses
from hsd.credit.figures import FIGURES
from hsd.credit.measure import measure
from hsd.credit.model import CreditModel
from hsd.credit.source import CreditGroup
from hsd.data.contexts import ContextBuilder, ContextConfig
from hsd.data.questions import Question
from hsd.policy.head import output_head

CONTEXTS = ("answer_peer", "answer")
CLOSE = {"rtol": 0, "atol": 1e-4}
CLASSES = {"digits": "0123456789", "operators": "+-*/=", "words": "abcdefg", "punctuation": ".,;"}
SIZE = 4  # rollouts of a group; their pass rates fall into every part of the difficulty split


@dataclass(frozen=True, kw_only=True)
class Exact:
    """One rollout: A and KL per context, entropy, (n,) float64; tau where it failed with a peer."""

    credit: dict[str, Any]
    kl: dict[str, Any]
    entropy: Any
    tau: int | None
    pass_rate: float
    text: str


def made_groups(tokenizer: PreTrainedTokenizerFast) -> list[CreditGroup]:
    """Peers shared for different numbers of tokens, once for the whole rollout."""
    rng = np.random.default_rng(0)
    letters = "".join([*CLASSES.values(), " "])
    groups = []
    for number in range(12):
        correct = 1 + number % 3
        peer = "".join(rng.choice(list(letters), 100))
        texts = [peer]
        for _ in range(1, SIZE):
            shared = int(rng.integers(0, 70))
            other = "".join(rng.choice(list(letters), int(rng.integers(20, 40))))
            texts.append(peer[:shared] + other)
        if number == 0:
            texts[SIZE - 1] = peer[:30]
        ids = [tuple(tokenizer(text, add_special_tokens=False).input_ids) for text in texts]
        groups.append(
            CreditGroup(
                question=Question(id=str(number), prompt=f"Draw {number}.", answer=str(number)),
                step=number % 2,
                token_ids=ids,
                loss_masks=[(True,) * len(each) for each in ids],
                finish_reasons=["stop"] * SIZE,
                texts=texts,
                rewards=[index < correct for index in range(SIZE)],
                peers=[None, *(0,) * (SIZE - 1)],
            )
        )
    return groups


def dense(
    model: Any, tokenizer: PreTrainedTokenizerFast, groups: Sequence[CreditGroup]
) -> list[Exact]:
    """Of all rollouts, from the model's own logits."""
    both = ContextBuilder(tokenizer, ContextConfig())
    answer = ContextBuilder(tokenizer, ContextConfig(show_peer=False))

    def log_probs(prompt: Sequence[int], response: Sequence[int]) -> torch.Tensor:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([[*prompt, *response]])).logits[0]
        return logits[len(prompt) - 1 : -1].double().log_softmax(-1)

    found = []
    for group in groups:
        for index, response in enumerate(group.token_ids):
            peer = group.peers[index]
            shown = [] if peer is None else [group.texts[peer]]
            prompts = {
                "answer_peer": both.teacher(group.question, peers=shown).token_ids,
                "answer": answer.teacher(group.question, peers=[]).token_ids,
            }
            log_p = log_probs(both.student(group.question), response)
            credit, kl = {}, {}
            for name, prompt in prompts.items():
                log_q = log_probs(prompt, response)
                credit[name] = (log_q - log_p)[range(len(response)), response].numpy()
                kl[name] = (log_q.exp() * (log_q - log_p)).sum(-1).numpy()
            tau = None
            if peer is not None and not group.rewards[index]:
                pairs = zip(response, group.token_ids[peer], strict=False)
                same = [a == b for a, b in pairs]
                tau = same.index(False) if False in same else len(same)
            found.append(
                Exact(
                    credit=credit,
                    kl=kl,
                    entropy=-(log_p.exp() * log_p).sum(-1).numpy(),
                    tau=tau,
                    pass_rate=sum(group.rewards) / SIZE,
                    text=group.texts[index],
                )
            )
    return found


@pytest.fixture(scope="module")
def both(
    make_model: Callable[..., transformers.PreTrainedModel], tokenizer: PreTrainedTokenizerFast
) -> tuple[dict[str, Any], list[Exact]]:
    """The summary that figures are drawn from, and the dense numbers."""
    model, groups = make_model(), made_groups(tokenizer)
    credit_model = CreditModel(
        model=model,
        head=output_head(model),
        tokenizer=tokenizer,
        compute_dtype=torch.float32,
        temperature=1.0,
        micro_batch_tokens=2048,
    )
    contexts = CreditContexts(tokenizer, ContextConfig(), CONTEXTS)
    measured = measure(groups, OtherSuccesses(groups), credit_model, contexts, Config())
    summary = credit_records.summarise(measured)
    return summary, dense(make_model().double(), tokenizer, groups)


@pytest.fixture
def draw(both: tuple[dict[str, Any], list[Exact]]) -> Callable[[str], Axes]:
    def drawn(name: str) -> Axes:
        axes = Figure().subplots()
        FIGURES[name](axes, both[0])
        return axes

    return drawn


@pytest.fixture
def exact(both: tuple[dict[str, Any], list[Exact]]) -> list[Exact]:
    return both[1]


@pytest.fixture
def failing(exact: list[Exact]) -> list[tuple[int, Exact]]:
    """(tau, rollout) of those that failed and have a peer; one is a prefix of it."""
    found = [(each.tau, each) for each in exact if each.tau is not None]
    assert len(found) > 15 and any(tau == len(each.text) for tau, each in found)
    return found


def half_width(values: Sequence[float]) -> float:
    return float(1.96 * np.std(values, ddof=1) / math.sqrt(len(values)))


def ratio(parts: Any, wholes: Any) -> tuple[float, float]:
    """Of the sums, and its 95 % half width, linearised."""
    parts, wholes = np.array(parts), np.array(wholes)
    value = parts.sum() / wholes.sum()
    spread = ((parts - value * wholes) ** 2).sum() * len(parts) / (len(parts) - 1)
    return float(value), float(1.96 * math.sqrt(spread) / wholes.sum())


def within(size: Any, tau: int, width: int) -> float:
    return float(size[max(0, tau - width) : tau + width + 1].sum())


def bar_ends(container: Any) -> tuple[Any, Any]:
    """Values and half widths of an errorbar."""
    line, _, (bars,) = container
    ends = [path.vertices[:, 1] for path in bars.get_paths()]
    return line.get_ydata(orig=False), [(top - low) / 2 for low, top in ends]


def test_the_profile_and_its_bands(
    draw: Callable[[str], Axes], failing: list[tuple[int, Exact]]
) -> None:
    axes = draw("profile")
    for place, name in enumerate(CONTEXTS):
        values = {
            d: [abs(e.credit[name][t + d]) for t, e in failing if 0 <= t + d < len(e.text)]
            for d in range(-40, 41)
        }
        most = max(map(len, values.values()))
        kept = [d for d, each in values.items() if 10 * len(each) >= most and each]
        line = axes.lines[place]
        assert line.get_xdata().tolist() == kept
        np.testing.assert_allclose(line.get_ydata(), [np.mean(values[d]) for d in kept], **CLOSE)
        outline = axes.collections[place].get_paths()[0].vertices
        for d in kept:
            ends = outline[outline[:, 0] == d, 1]
            half = half_width(values[d]) if len(values[d]) > 1 else 0.0
            expected = np.mean(values[d]) + np.array([-half, half])
            np.testing.assert_allclose([ends.min(), ends.max()], expected, **CLOSE)


def test_the_share_within_w(draw: Callable[[str], Axes], failing: list[tuple[int, Exact]]) -> None:
    axes = draw("shares")
    for container, name in zip(axes.containers, CONTEXTS, strict=True):
        sizes = [(t, np.abs(e.credit[name])) for t, e in failing]
        wholes = [within(size, t, 40) for t, size in sizes]
        expected = [ratio([within(s, t, w) for t, s in sizes], wholes) for w in (2, 4, 8, 16, 32)]
        shown, halves = bar_ends(container)
        np.testing.assert_allclose(shown / 100, [share for share, _ in expected], **CLOSE)
        np.testing.assert_allclose(np.array(halves) / 100, [h for _, h in expected], **CLOSE)
    ones = [(t, np.ones(len(e.text))) for t, e in failing]
    counts = [sum(within(one, t, w) for t, one in ones) for w in (2, 4, 8, 16, 32, 40)]
    dotted = axes.lines[-1].get_ydata(orig=False) / 100
    np.testing.assert_allclose(dotted, np.array(counts[:-1]) / counts[-1], **CLOSE)


def test_peak_before_and_floor(
    draw: Callable[[str], Axes], failing: list[tuple[int, Exact]]
) -> None:
    bars = [bar.get_height() for bar in draw("peak_and_floor").patches]
    for place, name in enumerate(CONTEXTS):
        peak, before, floor = [], [], []
        for tau, each in failing:
            size, distance = np.abs(each.credit[name]), np.arange(len(each.text)) - tau
            peak += size[distance == 0].tolist()
            before += [size[(distance < 0) & (distance >= -40)].mean()] if tau else []
            far = (np.abs(distance) > 20) & (np.abs(distance) <= 40)
            floor += [size[far].mean()] if far.any() else []
        means = [np.mean(peak), np.mean(before), np.mean(floor)]
        np.testing.assert_allclose(bars[3 * place : 3 * place + 3], means, **CLOSE)


def test_prefix_lengths(draw: Callable[[str], Axes], failing: list[tuple[int, Exact]]) -> None:
    axes = draw("prefix_length")
    for bar in axes.patches:
        low, high = bar.get_x(), bar.get_x() + bar.get_width()
        assert bar.get_height() == sum(low < tau < high for tau, _ in failing)
    assert sum(bar.get_height() for bar in axes.patches) == len(failing)
    share = np.mean([tau / len(each.text) for tau, each in failing])
    assert f"mean {share:.0%}" in axes.get_title()


def test_coverage_against_f_of_p(draw: Callable[[str], Axes], exact: list[Exact]) -> None:
    axes = draw("coverage")
    rate, curve = axes.lines[0].get_data()
    np.testing.assert_allclose(curve, (1 - rate) * (1 - (1 - rate) ** (SIZE - 1)), **CLOSE)
    points = axes.collections[0].get_offsets()
    steps = [[e for i, e in enumerate(exact) if i // SIZE % 2 == step] for step in (0, 1)]
    for point, own in zip(points, steps, strict=True):
        expected = [np.mean([e.pass_rate for e in own]), np.mean([e.tau is not None for e in own])]
        np.testing.assert_allclose(point, expected, **CLOSE)


def test_information_per_token(draw: Callable[[str], Axes], exact: list[Exact]) -> None:
    axes = draw("information")
    bars = [bar.get_width() for bar in axes.patches][::-1]
    p = np.mean([e.pass_rate for e in exact])
    ceiling = -(p * math.log(p) + (1 - p) * math.log(1 - p)) / np.mean([len(e.text) for e in exact])
    kls = [np.mean([e.kl[name].mean() for e in exact]) for name in CONTEXTS]
    entropy = np.mean([e.entropy.mean() for e in exact])
    np.testing.assert_allclose(bars, [ceiling, *kls, entropy], **CLOSE)


def test_classes_of_tokens(draw: Callable[[str], Axes], failing: list[tuple[int, Exact]]) -> None:
    axes = draw("token_classes")
    names = [label.get_text() for label in axes.get_xticklabels()]
    bars = [bar.get_height() / 100 for bar in axes.patches]
    for place, context in enumerate(CONTEXTS):
        total = dict.fromkeys(names, 0.0)
        for _, each in failing:
            for character, value in zip(each.text, np.abs(each.credit[context]), strict=True):
                kind = next((k for k, own in CLASSES.items() if character in own), "other")
                total[kind] += float(value)
        expected = [total[name] / sum(total.values()) for name in names]
        found = bars[len(names) * place : len(names) * (place + 1)]
        np.testing.assert_allclose(found, expected, **CLOSE)


def test_the_difficulty_split(
    draw: Callable[[str], Axes], failing: list[tuple[int, Exact]]
) -> None:
    axes = draw("difficulty")
    for container, name in zip(axes.containers, CONTEXTS, strict=True):
        shown, halves = bar_ends(container)
        for place, rate in enumerate((0.25, 0.5, 0.75, 1.0)):
            values = [
                abs(e.credit[name][t])
                for t, e in failing
                if e.pass_rate == rate and t < len(e.text)
            ]
            if not values:
                assert np.isnan(shown[place])
                continue
            assert shown[place] == pytest.approx(np.mean(values), abs=1e-4)
            assert halves[place] == pytest.approx(half_width(values), abs=1e-4)
