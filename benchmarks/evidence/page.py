"""The page: verdicts first, then the numbers, then the commands; from whatever is complete."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.evidence.plan import Job, Plan
from benchmarks.evidence.verdicts import (
    CREDIT_RULES,
    LEARNING_RULES,
    NOT_RUN,
    Verdict,
    credit_verdicts,
    learning_verdict,
)
from hsd.report.compare import comparison
from hsd.report.curves import write_curves
from hsd.report.document import (
    Code,
    Figure,
    Heading,
    Paragraph,
    Part,
    Table,
    to_markdown,
)
from hsd.report.runs import Run, RunGroup, read_run


def write_page(plan: Plan, plan_file: Path) -> None:
    """Writes plan.page, and its images beside it; `plan_file` is what the plan was read from."""
    summaries = {job.name: _summary(plan, job) for job in plan.jobs if job.kind == "credit"}
    runs = {job.name: _finished(plan, job) for job in plan.jobs if job.kind == "train"}
    plan.page.parent.mkdir(parents=True, exist_ok=True)
    parts: list[Part] = [
        Heading(text=plan.title, level=1),
        Paragraph(text=plan.about),
        *_verdicts(plan, summaries, runs),
    ]
    for name, summary in summaries.items():
        parts += _credit(plan, plan.job(name), summary)
    parts += _learning(plan, runs)
    parts += _commands(plan, plan_file)
    text = to_markdown(parts, folder=plan.page.parent)
    plan.page.write_text(text, encoding="utf-8")


def _summary(plan: Plan, job: Job) -> Mapping[str, Any] | None:
    seed = job.seeds[0]
    if not job.complete(plan.records, seed):
        return None
    path = plan.records / job.folder_name(seed) / "summary.json"
    summary: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return summary


def _finished(plan: Plan, job: Job) -> list[Run]:
    return [
        read_run(plan.records / job.folder_name(seed))
        for seed in job.seeds
        if job.complete(plan.records, seed)
    ]


def _verdicts(
    plan: Plan,
    summaries: Mapping[str, Mapping[str, Any] | None],
    runs: Mapping[str, Sequence[Run]],
) -> list[Part]:
    rows = [
        _row(f"{name}: ", verdict)
        for name, summary in summaries.items()
        for verdict in credit_verdicts(summary)
    ]
    rows += [_row("", learning_verdict(claim, runs, plan.seeds)) for claim in plan.claims]
    return [
        Heading(text="Verdicts"),
        Table(columns=["claim", "verdict", "numbers, 95 % intervals"], rows=rows),
        *([Paragraph(text=CREDIT_RULES)] if summaries else []),
        Paragraph(text=LEARNING_RULES),
    ]


def _row(prefix: str, verdict: Verdict) -> list[str]:
    return [prefix + verdict.claim, verdict.verdict, verdict.numbers]


def _credit(plan: Plan, job: Job, summary: Mapping[str, Any] | None) -> list[Part]:
    heading = Heading(text=f"Credit: {job.name}")
    if summary is None:
        return [heading, Paragraph(text=f"{NOT_RUN}.")]
    image = plan.page.parent / "images" / f"{plan.page.stem}-{job.name}"
    image.parent.mkdir(parents=True, exist_ok=True)
    record = plan.records / job.folder_name(job.seeds[0])
    shutil.copyfile(record / "profile.png", image.with_suffix(".png"))
    rows = []
    for name, context in summary["contexts"].items():
        within = {share["within"]: share for share in context["shares"]}
        cells = [_nats(context[key]) for key in ("peak", "before", "floor")]
        decay = context["decay"]
        cells.append("-" if decay is None else str(decay))
        cells += [_percent(within[w]) for w in (2, 8, 32)]
        rows.append([name, *cells])
    tokens = [f"{(within[w]['token_share'] or 0):.0%}" for w in (2, 8, 32)]
    rows.append(["share of the tokens", "", "", "", "", *tokens])
    return [
        heading,
        Paragraph(
            text=f"{summary['rollouts']} rollouts of {job.recipe.name}, seed {job.seeds[0]}: "
            f"{summary['correct']} correct, {summary['failed_with_peer']} failed with a peer. "
            "The table is over those. Mean absolute credit in nats; shares are of the credit "
            f"within ±{summary['window']} tokens of the divergence."
        ),
        Table(
            columns=["context", "peak", "before", "floor", "decay, tokens", "±2", "±8", "±32"],
            rows=rows,
        ),
        Figure(path=image, alt=f"Credit around the divergence, {job.name}"),
    ]


def _nats(value: Mapping[str, Any]) -> str:
    if value["mean"] is None:
        return "-"
    return f"{value['mean']:.3f} ± {value['half_width'] or 0:.3f}"


def _percent(share: Mapping[str, Any]) -> str:
    if share["share"] is None:
        return "-"
    return f"{100 * share['share']:.0f} ± {100 * (share['half_width'] or 0):.0f} %"


def _learning(plan: Plan, runs: Mapping[str, Sequence[Run]]) -> list[Part]:
    groups = [RunGroup(label=name, runs=each) for name, each in runs.items() if each]
    heading = Heading(text="Learning")
    if not groups:
        return [heading, Paragraph(text=f"{NOT_RUN}.")]
    image = plan.page.parent / "images" / f"{plan.page.stem}-curves"
    write_curves(image, groups)
    tables = [
        Heading(text=part.text, level=part.level + 1) if isinstance(part, Heading) else part
        for part in comparison(groups)
    ]
    alt = "Training curves: means over seeds, bands from the lowest to the highest"
    return [heading, *tables, Figure(path=image, alt=alt)]


def _commands(plan: Plan, plan_file: Path) -> list[Part]:
    path = plan.records / "minutes.json"
    minutes = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    rows, lines = [], []
    for job, seed in plan.order():
        name = job.folder_name(seed)
        if job.complete(plan.records, seed):
            status = f"{minutes[name]:.1f} min" if name in minutes else "complete"
        else:
            status = NOT_RUN
        rows.append([name, status])
        lines += [_shown(command) for command, _ in job.commands(plan.folder, seed)]
    return [
        Heading(text="Runs"),
        Paragraph(text="In the order of the plan; one command runs them all, and resumes:"),
        Code(text=f"python -m benchmarks.evidence {plan_file}"),
        Table(columns=["run", "time"], rows=rows),
        Heading(text="The command of each run", level=3),
        Code(text="\n".join(lines)),
    ]


def _shown(command: Sequence[str]) -> str:
    return " ".join(["hsd", *command])
