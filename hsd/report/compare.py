"""The parts of the page that compares runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from hsd.report.alarms import RULES, alarms
from hsd.report.document import Heading, Items, Paragraph, Part, Table
from hsd.report.numbers import Estimate, accuracy, change, ends, series, step_seconds
from hsd.report.runs import Run, RunGroup, differences

_GIB = 1024**3
_NONE = "-"


def comparison(groups: Sequence[RunGroup]) -> list[Part]:
    """Tables of accuracy, course and alarms, and where the configurations differ."""
    runs = [run for group in groups for run in group.runs]
    parts: list[Part] = [
        Heading(text="Accuracy"),
        Paragraph(
            text="Means over seeds; ± is the 95 % interval over questions of that mean, sd the "
            "standard deviation over seeds. Changes are paired by question and seed. "
            "Only finished runs count."
        ),
        _accuracy(groups),
    ]
    table = _pass_at(groups)
    if table.rows:
        parts += [Heading(text="pass@k after training", level=3), table]
    parts += [Heading(text="Alarms"), *_alarms(runs)]
    parts += [
        Heading(text="Course"),
        Paragraph(
            text="a -> b are means over the first and the last quarter of the steps (1 to 10 of "
            "them); KL from the start is that of the last step; coverage is the share of "
            "rollouts that fail and have a successful peer; columns kept and gradient dropped are "
            "shares in the backward of the head, of runs where it is sparse; memory is the largest "
            "resident size of a process."
        ),
        _course(runs),
    ]
    different = differences(groups)
    if different:
        parts += [
            Heading(text="Where the configurations differ"),
            Table(
                columns=["key", *(group.label for group in groups)],
                rows=[[key, *values] for key, values in different],
            ),
        ]
    return parts


def shown(estimate: Estimate, *, signed: bool = False) -> str:
    """mean ± half width, and the spread over seeds."""
    mean = f"{estimate.mean:+.3f}" if signed else f"{estimate.mean:.3f}"
    spread = "" if estimate.spread is None else f" (sd {estimate.spread:.3f})"
    return f"{mean} ± {estimate.half_width:.3f}{spread}"


def _samples(group: RunGroup) -> int:
    return min(int(each["samples"]) for run in group.finished for each in run.evaluations)


def _accuracy(groups: Sequence[RunGroup]) -> Table:
    columns = ["recipe", "seeds", "avg@k before", "after", "change"]
    columns += ["pass@k before", "after", "change", "k", "questions"]
    rows = []
    for group in groups:
        runs = group.finished
        seeds = ", ".join(str(run.seed) for run in runs) or "none finished"
        if not runs:
            rows.append([group.label, seeds, *[_NONE] * 8])
            continue
        before = [run.evaluations[0] for run in runs]
        after = [run.evaluations[-1] for run in runs]
        k = _samples(group)
        cells = [group.label, seeds]
        for samples in (1, k):
            cells += [shown(accuracy(before, samples)), shown(accuracy(after, samples))]
            cells.append(shown(change(before, after, samples), signed=True))
        rows.append([*cells, str(k), str(len(before[0]["correct_per_question"]))])
    return Table(columns=columns, rows=rows)


def _pass_at(groups: Sequence[RunGroup]) -> Table:
    finished = [group for group in groups if group.finished]
    largest = max((_samples(group) for group in finished), default=1)
    powers = sorted({2**power for power in range(largest.bit_length())} | {largest})
    rows = []
    for group in finished:
        after = [run.evaluations[-1] for run in group.finished]
        own = _samples(group)
        cells = [shown(accuracy(after, k)) if k <= own else _NONE for k in powers]
        rows.append([group.label, *cells])
    return Table(columns=["recipe", *(f"pass@{k}" for k in powers)], rows=rows)


def _alarms(runs: Sequence[Run]) -> list[Part]:
    rows = [[run.name, name, seen] for run in runs for name, seen in alarms(run).items()]
    rules = Items(texts=[f"{name}: {rule}" for name, rule in RULES.items()])
    if not rows:
        return [Paragraph(text="None went off. The rules:"), rules]
    return [
        Table(columns=["run", "alarm", "seen"], rows=rows),
        Paragraph(text="The rules:"),
        rules,
    ]


def _course(runs: Sequence[Run]) -> Table:
    cells: list[tuple[str, Callable[[Run], str]]] = [
        ("steps", lambda run: f"{len(run.steps)} of {run.config['steps']}"),
        ("KL from the start", lambda run: _last(run, "ref_kl")),
        ("entropy", lambda run: _ends(run, "entropy", ".3f")),
        ("length", lambda run: _ends(run, "response_length", ".1f")),
        ("repeated 4-grams", lambda run: _ends(run, "repetition", ".1%")),
        ("coverage", lambda run: _mean(run, "failed_with_peer_share", ".1%")),
        ("gradient norm, largest", lambda run: _largest(run, "grad_norm", ".3g")),
        ("seconds a step", _step_seconds),
        ("memory, GiB", lambda run: _largest(run, "peak_memory_bytes", ".2f", unit=_GIB)),
    ]
    if any(_values(run, "columns_kept") for run in runs):
        cells += [
            ("columns kept", lambda run: _mean(run, "columns_kept", ".2%")),
            ("gradient dropped", lambda run: _mean(run, "mass_dropped", ".2%")),
        ]
    return Table(
        columns=["run", *(name for name, _ in cells)],
        rows=[[run.name, *(cell(run) for _, cell in cells)] for run in runs],
    )


def _values(run: Run, key: str) -> list[float]:
    return [value for _, value in series(run.steps, key)]


def _last(run: Run, key: str) -> str:
    values = _values(run, key)
    return f"{values[-1]:.4f}" if values else _NONE


def _mean(run: Run, key: str, spec: str) -> str:
    values = _values(run, key)
    return format(sum(values) / len(values), spec) if values else _NONE


def _largest(run: Run, key: str, spec: str, *, unit: float = 1.0) -> str:
    values = _values(run, key)
    return format(max(values) / unit, spec) if values else _NONE


def _ends(run: Run, key: str, spec: str) -> str:
    both = ends(run.steps, key)
    return _NONE if both is None else f"{both[0]:{spec}} -> {both[1]:{spec}}"


def _step_seconds(run: Run) -> str:
    seconds = step_seconds(run)
    return _NONE if seconds is None else f"{seconds:.1f}"
