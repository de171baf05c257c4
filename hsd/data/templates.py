"""The wording of privileged contexts, read from templates.toml and split at its placeholders.

Texts are split once and joined by concatenation, never formatted: braces in a question or in model
text mean nothing here.
"""

from __future__ import annotations

import difflib
import sys
from dataclasses import dataclass, fields
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

TEMPLATE_FILE = Path(__file__).with_name("templates.toml")


@dataclass(frozen=True, kw_only=True)
class Template:
    """One named template; pairs are the texts before and after a placeholder.

    Args:
        answer: around the correct final answer.
        peer: around a successful peer's text.
        failed: around the text of a failed rollout.
        demonstration: around a worked solution.
        closing: the end of a user turn that shows at least one block.
        peer_open: delimiter in front of the peer's text.
        peer_close: delimiter behind the peer's text.
        truncation_mark: stands where a long peer was cut.
        plain: around the user turn, for models without a chat template.
    """

    answer: tuple[str, str]
    peer: tuple[str, str]
    failed: tuple[str, str]
    demonstration: tuple[str, str]
    closing: str
    peer_open: str
    peer_close: str
    truncation_mark: str
    plain: tuple[str, str]


_PLACEHOLDERS = {
    "answer": "{answer}",
    "peer": "{peer}",
    "failed": "{peer}",
    "demonstration": "{demonstration}",
    "plain": "{turn}",
}
_DELIMITED = ("peer", "failed", "demonstration")
_KEYS = tuple(field.name for field in fields(Template))


def load_template(name: str, path: Path = TEMPLATE_FILE) -> Template:
    """Reads one named template.

    Raises:
        ValueError: there is no template of this name, or it lacks a text or a placeholder; the
            message names the key.
    """
    with path.open("rb") as file:
        tables = tomllib.load(file)
    if name not in tables:
        close = difflib.get_close_matches(name, tables) or sorted(tables)
        raise ValueError(f"context.template: found {name!r}, expected {' or '.join(close)}")
    table = tables[name]
    unknown = [key for key in table if key not in _KEYS]
    if unknown:
        where = f"{path.name}: {name}.{unknown[0]}"
        raise ValueError(f"{where}: found an unknown key, expected one of {', '.join(_KEYS)}")
    texts = {key: _text(table, key, where=f"{path.name}: {name}.{key}") for key in _KEYS}
    pairs = {
        key: _split(texts[key], placeholder, where=f"{path.name}: {name}.{key}")
        for key, placeholder in _PLACEHOLDERS.items()
    }
    for key, side in (("peer_open", 0), ("peer_close", 1)):
        for block in _DELIMITED:
            if texts[key] not in pairs[block][side]:
                where = f"{path.name}: {name}.{key}"
                raise ValueError(
                    f"{where}: found {texts[key]!r}, expected a text of {name}.{block}"
                )
    return Template(
        answer=pairs["answer"],
        peer=pairs["peer"],
        failed=pairs["failed"],
        demonstration=pairs["demonstration"],
        closing=texts["closing"],
        peer_open=texts["peer_open"],
        peer_close=texts["peer_close"],
        truncation_mark=texts["truncation_mark"],
        plain=pairs["plain"],
    )


def _text(table: dict[str, object], key: str, *, where: str) -> str:
    text = table.get(key)
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"{where}: found {text!r}, expected a text")
    return text


def _split(text: str, placeholder: str, *, where: str) -> tuple[str, str]:
    parts = text.split(placeholder)
    if len(parts) != 2:
        found = f"{placeholder} {len(parts) - 1} times"
        raise ValueError(f"{where}: found {found}, expected it exactly once")
    return parts[0], parts[1]
