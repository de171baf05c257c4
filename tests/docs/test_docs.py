"""The code of README.md and docs/ runs, prints what it says, and links and figures hold."""

from __future__ import annotations

import importlib.util
import io
import re
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCED = re.compile(r"^```(\w*)\n(.*?)^```\n(?:```text\n(.*?)^```$)?", re.MULTILINE | re.DOTALL)


class Block(NamedTuple):
    page: Path
    line: int  # of its first line of code
    code: str
    output: str | None  # a block of text right after it is what it prints


def python_blocks(page: Path) -> Iterator[Block]:
    text = page.read_text()
    for found in FENCED.finditer(text):
        language, code, output = found.groups()
        if language == "python":
            line = text[: found.start(2)].count("\n") + 1
            yield Block(page, line, code, output)


BLOCKS = [block for page in PAGES for block in python_blocks(page)]


def names(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("block", BLOCKS, ids=[f"{names(b.page)}:{b.line}" for b in BLOCKS])
def test_code_runs_by_itself_and_prints_what_follows_it(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    # Blank lines ahead: a traceback then names the line of the page.
    source = "\n" * (block.line - 1) + block.code
    printed = io.StringIO()
    with redirect_stdout(printed):
        exec(compile(source, str(block.page), "exec"), {"__name__": "__main__"})
    if block.output is not None:
        assert printed.getvalue() == block.output


def test_every_page_that_explains_how_has_code():
    assert {names(block.page) for block in BLOCKS} >= {
        "README.md",
        "docs/extending.md",
        "docs/loss.md",
        "docs/memory.md",
    }


def anchors(page: Path) -> set[str]:
    """Of the headings, as GitHub names them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=names)
def test_links_and_named_files_exist(page):
    text = page.read_text()
    for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", text):
        path, _, anchor = target.partition("#")
        linked = page.parent / path if path else page
        assert linked.exists(), target
        assert not anchor or anchor in anchors(linked), target
    for named in re.findall(
        r"\b(?:examples|benchmarks|tests|recipes|hsd|hsd_kernels)/[\w./]+", text
    ):
        assert (ROOT / named.rstrip(".")).exists(), named


def errors(text: str) -> dict[tuple[str, ...], list[float]]:
    """The rows of the tables of errors, by their first two cells."""
    rows = [
        line.strip("|").split("|") for line in text.splitlines() if "e-0" in line or "e+0" in line
    ]
    wide = [[cell.strip() for cell in row] for row in rows if len(row) == 8]
    return {tuple(row[:2]): [float(cell) for cell in row[2:]] for row in wide}


def test_the_tables_of_errors_are_what_its_command_prints():
    spec = importlib.util.spec_from_file_location("precision", ROOT / "benchmarks" / "precision.py")
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    written = errors((ROOT / "docs" / "precision.md").read_text())
    found = errors(benchmark.tables())
    assert found.keys() == written.keys()
    assert len(found) == 18
    for row, numbers in found.items():
        for ours, theirs in zip(numbers, written[row], strict=True):
            # Rounding errors differ between machines, by less than this factor.
            assert ours <= 3 * theirs, row
            # What rounded logits cost is a claim too, in the other direction.
            assert "bf16" not in row[0] or ours >= theirs / 3, row
