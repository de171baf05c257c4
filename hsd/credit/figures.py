"""The figures of an export, PNG and SVG, from the numbers of its summary."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from hsd.credit.profiles import FLOOR_BEYOND, WINDOW, bars
from hsd.credit.tokens import TOKEN_CLASSES
from hsd.data.peers import expected_coverage

# Okabe-Ito: told apart with any colour vision.
COLOURS = {
    "answer_peer": "#0072B2",
    "answer": "#D55E00",
    "peer": "#009E73",
    "other_prompt": "#CC79A7",
    "none": "#666666",
}
LABELS = {
    "answer_peer": "answer + peer",
    "answer": "answer",
    "peer": "peer",
    "other_prompt": "other prompt",
    "none": "none",
}

Summary = Mapping[str, Any]


def write_figures(folder: Path, summary: Summary) -> None:
    """One PNG and one SVG for each of FIGURES that the summary has numbers for."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    folder.mkdir(parents=True, exist_ok=True)
    # A fixed salt and no date: equal numbers give equal files.
    with matplotlib.rc_context({"svg.hashsalt": "hsd", "font.size": 9}):
        for name, draw in FIGURES.items():
            figure = Figure(figsize=(6, 3.8), layout="constrained")
            FigureCanvasAgg(figure)
            axes = figure.subplots()
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(alpha=0.25)
            draw(axes, summary)
            figure.savefig(folder / f"{name}.png", dpi=150)
            figure.savefig(folder / f"{name}.svg", metadata={"Date": None})


def _contexts(summary: Summary) -> list[tuple[str, Mapping[str, Any]]]:
    """Contexts with at least one failing rollout that has a peer, in one order everywhere."""
    found = summary["contexts"]
    return [(name, found[name]) for name in COLOURS if name in found and found[name]["profile"]]


def _profile(axes: Any, summary: Summary) -> None:
    for name, context in _contexts(summary):
        distance, mean, half = np.array(bars(context)).T
        axes.plot(distance, mean, color=COLOURS[name], label=LABELS[name])
        axes.fill_between(distance, mean - half, mean + half, color=COLOURS[name], alpha=0.2, lw=0)
    axes.axvline(0, color="#888888", lw=0.8, ls=":")
    axes.set(
        xlabel="tokens from the divergence",
        ylabel="mean |A|, nats",
        title=f"Credit around the divergence, {summary['failed_with_peer']} failing rollouts",
    )
    axes.set_ylim(bottom=0)
    _legend(axes)


def _shares(axes: Any, summary: Summary) -> None:
    flat = None
    for name, context in _contexts(summary):
        shares = [s for s in context["shares"] if s["share"] is not None]
        axes.errorbar(
            [s["within"] for s in shares],
            [100 * s["share"] for s in shares],
            [100 * (s["half_width"] or 0) for s in shares],
            color=COLOURS[name],
            label=LABELS[name],
            marker="o",
            capsize=3,
        )
        flat = context["shares"]
    if flat:
        tokens = [100 * (s["token_share"] or 0) for s in flat]
        axes.plot([s["within"] for s in flat], tokens, "k:", label="share of the tokens")
    axes.set_xscale("log", base=2)
    axes.set_xticks([2, 4, 8, 16, 32], ["2", "4", "8", "16", "32"])
    axes.set(
        xlabel="w",
        ylabel="% of |A|",
        ylim=(0, 104),
        title=f"Share of |A| within ±w of the divergence (of ±{WINDOW} tokens)",
    )
    _legend(axes)


def _peak_and_floor(axes: Any, summary: Summary) -> None:
    kinds = ("peak", "before", "floor")
    width = 0.8 / max(1, len(_contexts(summary)))
    for i, (name, context) in enumerate(_contexts(summary)):
        values = [context[kind]["mean"] or 0.0 for kind in kinds]
        halves = [context[kind]["half_width"] or 0.0 for kind in kinds]
        where = np.arange(3) - 0.4 + (i + 0.5) * width
        axes.bar(where, values, width, color=COLOURS[name], label=LABELS[name])
        axes.errorbar(where, values, halves, fmt="none", ecolor="#222222", capsize=3)
        for x, kind in zip(where, kinds, strict=True):
            if context[kind]["mean"] is None:
                axes.text(x, 0, "no token", rotation=90, ha="center", va="bottom", fontsize=7)
    axes.set_xticks(range(3), ["at tau", "before tau", f"more than {FLOOR_BEYOND} from tau"])
    axes.set(ylabel="mean |A|, nats", title="Peak and floor of the credit")
    _legend(axes)


def _prefix_length(axes: Any, summary: Summary) -> None:
    counts = summary["prefix_length"]["counts"]
    if counts:
        lengths, numbers = np.array(counts).T
        width = int(lengths.max()) // 40 + 1
        bins = np.arange(0, lengths.max() + 2 * width, width) - 0.5
        axes.hist(lengths, bins=bins, weights=numbers, color="#0072B2")
    share = summary["prefix_length"]["share_of_rollout"]["mean"]
    note = "" if share is None else f" (mean {share:.0%} of the rollout)"
    axes.set(
        xlabel="tokens before the divergence",
        ylabel="failing rollouts",
        title=f"Prefix shared with the peer{note}",
    )


def _coverage(axes: Any, summary: Summary) -> None:
    rate = np.linspace(0, 1, 201)
    sizes = sorted({point["group_size"] for point in summary["coverage"]})
    for size, style in zip(sizes, ("-", "--", ":", "-."), strict=False):
        curve = [expected_coverage(float(p), size) for p in rate]
        axes.plot(rate, curve, style, color="#444444", label=f"f(p, {size})")
    axes.scatter(
        [point["pass_rate"] for point in summary["coverage"]],
        [point["observed"] for point in summary["coverage"]],
        color="#D55E00",
        zorder=3,
        label="each step",
    )
    axes.set(
        xlabel="pass rate p",
        ylabel="share of rollouts",
        title="Rollouts that fail and have a successful peer",
        xlim=(0, 1),
    )
    axes.set_ylim(bottom=0)
    _legend(axes)


def _information(axes: Any, summary: Summary) -> None:
    information = summary["information"]
    rows = [("reward, at most", information["reward_ceiling"] or 0.0, 0.0, "#666666")]
    for name in [name for name in COLOURS if name in summary["contexts"]]:
        kl = summary["contexts"][name]["kl"]
        rows.append((LABELS[name], kl["mean"] or 0.0, kl["half_width"] or 0.0, COLOURS[name]))
    entropy = information["entropy"]
    rows.append(("entropy of p", entropy["mean"] or 0.0, entropy["half_width"] or 0.0, "#BBBBBB"))
    for place, (_, value, half, colour) in enumerate(reversed(rows)):
        axes.barh(place, value, color=colour, xerr=half, capsize=3)
        axes.text(value + half, place, f"  {value:.2g}", va="center", fontsize=8)
    axes.set_yticks(range(len(rows)), [row[0] for row in reversed(rows)])
    axes.margins(x=0.15)
    axes.set(xlabel="nats per token", title="Information per token: reward, KL(q || p), entropy")


def _classes(axes: Any, summary: Summary) -> None:
    width = 0.8 / max(1, len(_contexts(summary)))
    for i, (name, context) in enumerate(_contexts(summary)):
        shares = [100 * (context["classes"][kind]["share"] or 0.0) for kind in TOKEN_CLASSES]
        where = np.arange(len(TOKEN_CLASSES)) - 0.4 + (i + 0.5) * width
        axes.bar(where, shares, width, color=COLOURS[name], label=LABELS[name])
        if i == 0:
            counts = [context["classes"][kind]["tokens"] for kind in TOKEN_CLASSES]
            tokens = [100 * count / max(1, sum(counts)) for count in counts]
            places = np.arange(len(TOKEN_CLASSES))
            axes.hlines(
                tokens, places - 0.45, places + 0.45, color="black", label="share of the tokens"
            )
    axes.set_xticks(range(len(TOKEN_CLASSES)), TOKEN_CLASSES)
    axes.set(ylabel="% of |A|", title="Credit by class of token, failing rollouts")
    _legend(axes)


def _difficulty(axes: Any, summary: Summary) -> None:
    labels = []
    for name, context in _contexts(summary):
        bins = context["difficulty"]
        axes.errorbar(
            range(len(bins)),
            [np.nan if b["peak"]["mean"] is None else b["peak"]["mean"] for b in bins],
            [b["peak"]["half_width"] or 0.0 for b in bins],
            color=COLOURS[name],
            label=LABELS[name],
            marker="o",
            capsize=3,
        )
        labels = [f"{b['above']:g} < p ≤ {b['up_to']:g}\nn = {b['rollouts']}" for b in bins]
    axes.set_xticks(range(len(labels)), labels)
    axes.margins(x=0.12)
    axes.set(
        xlabel="pass rate of the group",
        ylabel="mean |A| at the divergence, nats",
        title="Credit by difficulty",
    )
    axes.set_ylim(bottom=0)
    _legend(axes)


def _legend(axes: Any) -> None:
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8, frameon=False)


FIGURES: Mapping[str, Callable[[Any, Summary], None]] = {
    "profile": _profile,
    "shares": _shares,
    "peak_and_floor": _peak_and_floor,
    "prefix_length": _prefix_length,
    "coverage": _coverage,
    "information": _information,
    "token_classes": _classes,
    "difficulty": _difficulty,
}
"""Name of the files -> what draws them."""
