"""Writes measured rollouts as a folder: records, summary, figures and the page."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from hsd.credit.figures import write_figures
from hsd.credit.files import Format, read_records, write_records
from hsd.credit.html import sidecar_folder, write_page
from hsd.credit.records import RolloutCredit
from hsd.credit.summary import CreditSummary

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True)
class Exported:
    """What an export came to.

    Attributes:
        numbers: of summary.json.
        shown: rollouts that the page has room for.
        names: of the files and folders.
    """

    numbers: Mapping[str, Any]
    shown: int
    names: tuple[str, ...]


def write_export(
    out: Path,
    rollouts: Iterable[RolloutCredit],
    *,
    about: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    console: Console,
    file_format: Format = "jsonl",
    sidecars: bool = False,
) -> Exported:
    """Everything into the folder `out`, which is made; rollouts are held a few dozen at a time.

    Args:
        about: title, source, model, temperature, compute_dtype and contexts.
        sidecars: keep all contexts but the first beside the page, however small it is.

    Raises:
        ValueError: there is no rollout.
    """
    out.mkdir(parents=True, exist_ok=True)
    records = out / f"credit.{file_format}"
    try:
        numbers = _records(records, rollouts, about, console)
    except BaseException:  # half a file would look like a whole one
        records.unlink(missing_ok=True)
        if not any(out.iterdir()):
            out.rmdir()
        raise
    (out / "summary.json").write_text(
        json.dumps({"about": about, **numbers}, indent=1, allow_nan=False) + "\n", encoding="utf-8"
    )
    write_figures(out / "figures", numbers)
    shown = write_page(
        out / "credit.html",
        lambda: read_records(records),
        about=about,
        summary=numbers,
        tokenizer=tokenizer,
        sidecars=sidecars,
    )
    names = ["credit.html", records.name, "summary.json", "figures"]
    beside = sidecar_folder(out / "credit.html")
    if beside.exists():
        names.append(beside.name)
    return Exported(numbers=numbers, shown=shown, names=tuple(names))


def _records(
    path: Path, rollouts: Iterable[RolloutCredit], about: Mapping[str, Any], console: Console
) -> dict[str, Any]:
    """The file of records, and what its rollouts come to."""
    summary = CreditSummary()
    with console.status("") as status:
        written = write_records(path, rollouts, contexts=about["contexts"])
        for count, rollout in enumerate(written, start=1):
            summary.add(rollout)
            status.update(f"{count} rollouts")
    if not summary.steps:
        raise ValueError(f"{about['source']}: found no rollout to look at, expected some")
    return summary.to_dict()
