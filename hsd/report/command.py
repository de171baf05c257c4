"""`hsd report`: one page that compares runs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from hsd.checks import require_folder
from hsd.recipe import fail, parse_flags
from hsd.report.compare import comparison
from hsd.report.curves import write_curves
from hsd.report.document import Figure, Heading, Paragraph, Part, to_html, to_markdown
from hsd.report.runs import group_runs, read_run


@dataclass(frozen=True, kw_only=True)
class ReportArguments:
    """Compare runs: accuracy, drift, entropy, length, repetition, coverage, time, memory, alarms.

    Args:
        runs: run folders; those that differ in their seed alone are one recipe.
        out: folder of report.html, report.md and curves.png and .svg; what it holds of them is
            replaced.
    """

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    out: Path = Path("report")


def main(argv: list[str]) -> int:
    """`hsd report RUN...`; returns the exit code."""
    arguments = parse_flags(ReportArguments, argv, prog="hsd report")
    console = Console()
    try:
        paths = write_report(arguments.runs, arguments.out)
    except (ValueError, OSError) as error:
        fail(str(error))
    for path in paths:
        console.print(str(path), highlight=False, markup=False, soft_wrap=True)
    return 0


def write_report(folders: tuple[Path, ...], out: Path) -> list[Path]:
    """Writes the page of these run folders; returns its files.

    Raises:
        ValueError: there is no run, one twice, or one that cannot be read; or `out` cannot be made.
        FileNotFoundError: a folder is no run.
    """
    if not folders:
        raise ValueError("runs: found none, expected run folders")
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise ValueError("runs: found a folder twice, expected different ones")
    require_folder("--out", out)
    groups = group_runs([read_run(folder) for folder in folders])
    runs = [run for group in groups for run in group.runs]
    counted = "1 run" if len(runs) == 1 else f"{len(runs)} runs"
    recipes = "1 recipe" if len(groups) == 1 else f"{len(groups)} recipes"
    unfinished = [run.name for run in runs if not run.finished]
    parts: list[Part] = [
        Heading(text="Runs compared", level=1),
        Paragraph(
            text=f"{counted} of {recipes}."
            + (f" Not finished: {', '.join(unfinished)}." if unfinished else "")
        ),
        *comparison(groups),
        Heading(text="Training curves"),
        Figure(
            path=out / "curves",
            alt="Training curves: a line per recipe, the mean over its seeds; "
            "the band is from the lowest to the highest seed",
        ),
    ]
    out.mkdir(parents=True, exist_ok=True)
    write_curves(out / "curves", groups)
    html, markdown = out / "report.html", out / "report.md"
    html.write_text(to_html(parts), encoding="utf-8")
    markdown.write_text(to_markdown(parts, folder=out), encoding="utf-8")
    return [html, markdown, out / "curves.png", out / "curves.svg"]
