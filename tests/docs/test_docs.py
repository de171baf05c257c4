"""The code of README.md and docs/ runs, prints what it says, and links and figures hold."""

from __future__ import annotations

import importlib.util
import io
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from hsd.config import Config
from hsd.credit.command import CreditArguments
from hsd.distributed.budget.command import BudgetArguments
from hsd.evaluate_command import EvalArguments
from hsd.recipe import (
    config_from_dict,
    parse_arguments,
    parse_flags,
    take_engine_flags,
    with_engine_flags,
)
from hsd.report.command import ReportArguments
from hsd.run.launch import parse_launch

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

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
    prose = re.sub(r"\]\([^)]*\)", "]", text)
    for named in re.findall(
        r"\b(?:examples|benchmarks|tests|recipes|hsd|hsd_kernels)/[\w./]+", prose
    ):
        assert (ROOT / named.rstrip(".")).exists(), named


def parse_with_engine(arguments: type, words: list[str], *, prog: str) -> None:
    flags, others = take_engine_flags(words)
    parse_flags(arguments, others, prog=prog)
    with_engine_flags(Config(), flags, prog=prog)


PARSERS: dict[str, Callable[[list[str]], object]] = {
    "train": lambda words: parse_launch(words, prog="hsd train"),
    "overlap": lambda words: parse_arguments(words, prog="hsd overlap"),
    "eval": lambda words: parse_with_engine(EvalArguments, words, prog="hsd eval"),
    "credit": lambda words: parse_with_engine(CreditArguments, words, prog="hsd credit"),
    "report": lambda words: parse_flags(ReportArguments, words, prog="hsd report"),
    "budget": lambda words: parse_flags(BudgetArguments, words, prog="hsd budget"),
}
# The other one names every run of its plan in a line.
WRITTEN_BY_HAND = [page for page in PAGES if page.name != "evidence.md"]


def command_lines(page: Path) -> Iterator[tuple[str, list[str]]]:
    """The `hsd` commands of a page's blocks, and flags with their values in its text."""
    text = page.read_text()
    for command, rest in re.findall(r"^(?: {4})?hsd (\w+) (.+)$", text, re.MULTILINE):
        words = [word for word in shlex.split(rest, comments=True) if word != "..."]
        if not {"--resume", "--replay"} & set(words):  # of files that only a run leaves
            yield command, words
    for flags in re.findall(r"`(--\w+\.[^` ]+ [^`]+)`", text):
        yield "train", ["recipes/own_data.toml", *shlex.split(flags)]


def test_command_lines_parse(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    lines = [line for page in WRITTEN_BY_HAND for line in command_lines(page)]
    assert {command for command, _ in lines} == PARSERS.keys()
    for command, words in lines:
        PARSERS[command](words)  # exits where it does not parse


def test_tables_of_recipes_load() -> None:
    loaded = 0
    for page in PAGES:
        fenced = re.findall(r"^```toml\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)
        indented = re.findall(r"(?:^    .*\n|^\n)+", page.read_text(), re.MULTILINE)
        blocks = [re.sub("^    ", "", block, flags=re.MULTILINE) for block in indented]
        for block in (*fenced, *(each for each in blocks if each.lstrip().startswith("["))):
            config_from_dict(tomllib.loads(block), source=names(page))
            loaded += 1
    assert loaded >= 8


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
