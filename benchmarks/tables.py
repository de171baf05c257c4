"""The records of a run as Markdown, JSON and figures under docs/benchmarks/.

python -m benchmarks.tables [FOLDER] [--summary]      default: runs/benchmarks/targets
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import figures, machine, targets, timing

PUBLISHED = Path("docs/benchmarks")
SUMMARY = Path("docs/benchmarks.md")
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"
Record = dict[str, Any]


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _mib(value: int | None) -> str:
    return _number(None if value is None else value / 2**20, ",.0f")


def _table(columns: list[str], rows: list[list[str]]) -> str:
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def _time(record: Record) -> str:
    """Methods of one case: time, its ratio to this library's and to the floor, errors."""
    ours = next((r for r in record["rows"] if r["method"].startswith("hsd_kernels")), None)
    floor = next((r for r in record["rows"] if r["method"] == targets.FLOOR), None)
    rows = []
    for row in record["rows"]:
        label = f"{row['method']} ({row['package']} {row['version']})"
        if row["failure"]:
            rows.append([label, row["failure"], *[""] * 7])
            continue
        cells = [
            label,
            f"{row['chunk']} {row['unit']}" if row["chunk"] else "-",
            f"{statistics.median(row['seconds']):.3f}",
        ]
        for other in (floor, ours):
            known = other is not None and other["seconds"]
            cells.append(f"{timing.ratio(row['seconds'], other['seconds']):.2f}" if known else "-")
        errors = [row[name] for name in ("loss_error", "student_error", "head_error")]
        cells += [_number(error, ".1e") for error in errors]
        rows.append([*cells, f"{row['first_seconds']:.1f}"])
    tokens, hidden, vocab = record["shape"]
    caption = (
        f"N = {tokens:,}, D = {hidden:,}, V = {vocab:,}; {record['gemms']} GEMMs; median of "
        f"{len(ours['seconds']) if ours else 0} alternations; states: {record['source']}"
    )
    columns = ["method", "chunk", "s", "/ GEMMs", "/ ours", "loss error", "dX error", "dW error"]
    return f"{caption}\n\n{_table([*columns, 'first call, s'], rows)}"


def _sparse(record: Record) -> str:
    """Tolerances of the sparse backward."""
    rows = [
        [
            row["method"],
            f"{statistics.median(row['seconds']):.3f}",
            _number(row["columns_kept"], ".2%"),
            _number(row["mass_dropped"], ".2%"),
            _number(row["student_error"], ".2e"),
            _number(row["head_error"], ".2e"),
        ]
        for row in record["rows"]
        if not row["failure"]
    ]
    return _table(["", "s", "columns kept", "mass dropped", "dX error", "dW error"], rows)


def _memory(record: Record) -> str:
    rows = [
        [row["method"], row["failure"], ""]
        if row.get("failure")
        else [row["method"], _mib(row["allocated"]), _mib(row["resident"])]
        for row in record["rows"]
    ]
    tokens = record["shape"][0]
    caption = (
        f"N = {tokens:,}; gradients {_mib(record['gradient_bytes'])} MiB, chunk budget "
        f"{_mib(record['chunk_budget'])} MiB"
    )
    columns = ["method", "peak above inputs, allocations, MiB", "resident size, MiB"]
    return f"{caption}\n\n{_table(columns, rows)}"


def _growth(record: Record) -> str:
    rows = [
        [
            row["method"],
            f"{row['tokens']:,}",
            f"{row['vocabulary']:,}",
            f"{row['seconds']:.3f}",
            _mib(row["allocated"]),
        ]
        for row in record["rows"]
    ]
    return _table(["method", "N", "V", "s", "peak, MiB"], rows)


def _divergences(record: Record) -> str:
    rows = [
        [
            row["method"],
            f"{row['forward_kl']:.1e}",
            *(_number(row[name], ".1e") for name in ("loss_error", "student_error", "head_error")),
        ]
        for row in record["rows"]
    ]
    return _table(["method", "KL, nats", "loss error", "dX error", "dW error"], rows)


def _update(record: Record) -> str:
    seconds = {name: statistics.median(found) for name, found in record["seconds"].items()}
    bound = seconds["trl"] / (seconds["trl"] - seconds["plain_head"] + seconds["floor_head"])
    ratio = timing.ratio(record["seconds"]["trl"], record["seconds"]["ours"])
    padded = record["padded_tokens"]
    lines = [
        f"- {record['rollouts']} rollouts, {record['response_tokens']:,} response tokens, one "
        f"micro-batch; positions with padding: ours {padded['ours']:,}, TRL {padded['trl']:,}",
        f"- ours {seconds['ours']:.2f} s, TRL {seconds['trl']:.2f} s: {ratio:.2f} times as fast",
        f"- the head in plain torch is {seconds['plain_head'] / seconds['trl']:.0%} of TRL's "
        f"update; at the speed of its GEMMs the update would be {bound:.2f} times as fast "
        f"(Amdahl); {ratio / bound:.0%} of that is reached",
        f"- the fused loss is {record['head_seconds'] / seconds['ours']:.0%} of our update",
        f"- relative difference of the gradients {record['gradient_difference']:.1e}",
    ]
    return "\n".join(lines)


def _update_memory(record: Record) -> str:
    peaks = record["extra_bytes"]
    return (
        f"{record['rollouts']} rollouts, {record['response_tokens']:,} response tokens, one "
        "micro-batch; peak above parameters, gradients and optimiser state: ours "
        f"{_mib(peaks['ours'])} MiB, TRL {_mib(peaks['trl'])} MiB"
    )


SECTIONS: dict[str, Callable[[Record], str]] = {
    "time": _time,
    "sparse": _sparse,
    "memory": _memory,
    "growth": _growth,
    "divergences": _divergences,
    "update": _update,
    "update_memory": _update_memory,
}


def page(records: targets.Records, title: str) -> str:
    """All of a run as one page of Markdown."""
    machines = sorted({machine.line(record["machine"]) for record in records.values()})
    busiest = max(record["machine"]["load"] for record in records.values())
    lines = [
        f"# Benchmarks: {title}",
        "",
        *machines,
        "",
        f"Highest load before a benchmark: {busiest:.1f} processes.",
        "",
        "## Targets",
        "",
        targets.table(records),
    ]
    for name, record in records.items():
        lines += ["", f"## {name}", "", SECTIONS[record["kind"]](record)]
    return "\n".join(lines) + "\n"


def publish(folder: Path, out: Path = PUBLISHED, summary: Path | None = None) -> list[Path]:
    """Writes the page, the data behind it and its figures; returns their paths.

    Args:
        summary: a page between whose lines BEGIN and END the targets are shown, too.
    """
    records = targets.read(folder)
    if not records:
        return []
    out.mkdir(parents=True, exist_ok=True)
    text, data = (out / f"{folder.name}.{ending}" for ending in ("md", "json"))
    data.write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")
    drawn = figures.draw(records, out, folder.name)
    shown = "".join(f"\n![{path.stem}]({path.name})\n" for path in drawn)
    text.write_text(page(records, folder.name) + shown, encoding="utf-8")
    written = [text, data, *drawn]
    if summary is not None:
        summarise(records, summary, text)
        written.append(summary)
    for path in written:
        print(path)
    return written


def summarise(records: targets.Records, summary: Path, details: Path) -> None:
    """Replaces what stands between BEGIN and END.

    Raises:
        ValueError: the page has no such lines.
    """
    before, begin, rest = summary.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{summary}: found no lines {BEGIN} and {END}, expected one of each")
    machines = sorted({machine.line(record["machine"]) for record in records.values()})
    busiest = max(record["machine"]["load"] for record in records.values())
    link = os.path.relpath(details, summary.parent)
    shown = [
        *machines,
        f"Highest load before a benchmark: {busiest:.1f} processes.",
        targets.table(records),
        f"[All tables and figures]({link}), [the data]({Path(link).with_suffix('.json')}).",
    ]
    text = "\n\n".join([before + begin, *shown, end + after])
    summary.write_text(text, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?", default=Path("runs/benchmarks/targets"))
    parser.add_argument("--summary", action="store_true", help=f"show the targets in {SUMMARY} too")
    a = parser.parse_args()
    if not publish(a.folder, summary=SUMMARY if a.summary else None):
        parser.error(f"folder: found no record in {a.folder}; run python -m benchmarks.suite")


if __name__ == "__main__":
    main()
