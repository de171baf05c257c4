"""A page of headings, text, tables and figures, as Markdown and as one self-contained HTML file.

Names of runs are data: both forms show them as text. The HTML has no script, and its
Content-Security-Policy allows its own style, by hash, and embedded images.
"""

from __future__ import annotations

import base64
import hashlib
import html
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias


@dataclass(frozen=True, kw_only=True)
class Heading:
    """level 1 is the page's title."""

    text: str
    level: int = 2


@dataclass(frozen=True, kw_only=True)
class Paragraph:
    text: str


@dataclass(frozen=True, kw_only=True)
class Items:
    """A list."""

    texts: Sequence[str]


@dataclass(frozen=True, kw_only=True)
class Table:
    """The first column names the rows."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True, kw_only=True)
class Code:
    """A command, or other text as it is."""

    text: str


@dataclass(frozen=True, kw_only=True)
class Figure:
    """path: without its ending; a .png and a .svg are there."""

    path: Path
    alt: str


Part: TypeAlias = Heading | Paragraph | Items | Table | Code | Figure

_STYLE = """
:root { color-scheme: light dark; --line: #c9ced3; --quiet: #5b646c; --back: #fff;
  --text: #16191c; }
@media (prefers-color-scheme: dark) {
  :root { --line: #3a4149; --quiet: #9aa3ab; --back: #14171a; --text: #e6e9ec; }
  img { background: #fff; border-radius: 4px; }
}
body { font: 15px/1.5 system-ui, sans-serif; margin: 0 auto; padding: 1rem; max-width: 1200px;
  background: var(--back); color: var(--text); overflow-wrap: anywhere; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 13px; }
th, td { padding: 0.3rem 0.6rem; border-bottom: 1px solid var(--line); text-align: right;
  overflow-wrap: normal; }
th:first-child { text-align: left; }
td:first-child { text-align: left; }
figure { margin: 1rem 0; }
img { max-width: 100%; height: auto; }
figcaption { color: var(--quiet); }
pre { overflow-x: auto; border: 1px solid var(--line); padding: 0.6rem; }
"""


def to_html(parts: Sequence[Part]) -> str:
    """The whole file, images embedded as SVG."""
    digest = base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; img-src data:; style-src 'sha256-{digest}'; "
        "base-uri 'none'; form-action 'none'"
    )
    title = next((part.text for part in parts if isinstance(part, Heading)), "")
    body = "\n".join(_html(part) for part in parts)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n"
        f"{body}\n</main>\n</body>\n</html>\n"
    )


def _html(part: Part) -> str:
    if isinstance(part, Heading):
        return f"<h{part.level}>{html.escape(part.text)}</h{part.level}>"
    if isinstance(part, Paragraph):
        return f"<p>{html.escape(part.text)}</p>"
    if isinstance(part, Items):
        return "<ul>" + "".join(f"<li>{html.escape(text)}</li>" for text in part.texts) + "</ul>"
    if isinstance(part, Code):
        return f'<pre tabindex="0">{html.escape(part.text)}</pre>'
    if isinstance(part, Table):
        head = "".join(f'<th scope="col">{html.escape(text)}</th>' for text in part.columns)
        rows = "\n".join(
            "<tr>" + "".join(f"<td>{html.escape(text)}</td>" for text in row) + "</tr>"
            for row in part.rows
        )
        return (
            f'<div class="wide" tabindex="0"><table><thead><tr>{head}</tr></thead>\n'
            f"<tbody>{rows}</tbody></table></div>"
        )
    image = base64.b64encode(part.path.with_suffix(".svg").read_bytes()).decode()
    alt = html.escape(part.alt)
    return (
        f'<figure><img alt="{alt}" src="data:image/svg+xml;base64,{image}">'
        f"<figcaption>{alt}</figcaption></figure>"
    )


def to_markdown(parts: Sequence[Part], *, folder: Path) -> str:
    """The whole file; figures are linked as PNG files, relative to its folder."""
    return "\n\n".join(_markdown(part, folder) for part in parts) + "\n"


def _markdown(part: Part, folder: Path) -> str:
    if isinstance(part, Heading):
        return f"{'#' * part.level} {escape_markdown(part.text)}"
    if isinstance(part, Paragraph):
        return escape_markdown(part.text)
    if isinstance(part, Items):
        return "\n".join(f"- {escape_markdown(text)}" for text in part.texts)
    if isinstance(part, Code):
        return "".join(f"    {line}\n" for line in part.text.splitlines()).rstrip()
    if isinstance(part, Table):
        rows = [part.columns, ["---"] * len(part.columns), *part.rows]
        return "\n".join(
            "| " + " | ".join(text if i == 1 else escape_markdown(text) for text in row) + " |"
            for i, row in enumerate(rows)
        )
    path = part.path.with_suffix(".png").relative_to(folder).as_posix()
    return f"![{escape_markdown(part.alt)}]({path})"


def escape_markdown(text: str) -> str:
    """Text that Markdown shows as it is, in one line."""
    plain = re.sub(r"\s+", " ", text)
    quoted = re.sub(r"([\\`*_\[\]|])", r"\\\1", plain)
    return quoted.replace("&", "&amp;").replace("<", "&lt;")
