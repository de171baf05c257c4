"""One HTML file with every rollout of an export: no server, no network, at most 40 MB.

Where all contexts do not fit, those but the first go into files beside the page: scripts that
register packed blocks, because a page opened from a disk may load scripts but may not fetch. The
page's own script alone may add them ('strict-dynamic').

Rollouts are untrusted. Their text and numbers go into blocks that no browser runs: JSON in which
every "<" is escaped, and base64; the page's script writes text with textContent alone; and a
Content-Security-Policy allows this script and this style, by their hashes.
"""

from __future__ import annotations

import base64
import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from importlib.resources import files
from itertools import groupby
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from hsd.credit.figures import COLOURS, LABELS
from hsd.credit.packing import pack, top_positions
from hsd.credit.records import RolloutCredit
from hsd.credit.sidecars import Sidecars
from hsd.credit.tokens import token_texts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MOST_BYTES = 40_000_000
TOP_SHARES = (1.0, 0.05)
"""Tokens with top tokens, where all do not fit and then where they do not fit either."""
_SCRIPTS = (
    "data.js",
    "colours.js",
    "tokens.js",
    "inspector.js",
    "profile.js",
    "browse.js",
    "main.js",
)

Records = Callable[[], Iterator[RolloutCredit]]


def write_page(
    path: Path,
    records: Records,
    *,
    about: Mapping[str, Any],
    summary: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    most_bytes: int = MOST_BYTES,
    sidecars: bool = False,
) -> int:
    """Writes the page and returns how many rollouts it shows: the first whole groups that fit.

    Args:
        records: starts over at the first rollout; rollouts of one group are neighbours.
        about: title, source, model, temperature, compute_dtype and contexts.
        summary: of hsd.credit.summary.
        tokenizer: gives the text of top tokens.
        most_bytes: of the file.
        sidecars: keep all contexts but the first in the folder <name of the page>-contexts.

    Raises:
        ValueError: not even the first group fits.
    """
    contexts = list(about["contexts"])
    beside = sidecar_folder(path)
    if beside.exists():
        shutil.rmtree(beside)
    with (
        tempfile.TemporaryFile("w+", encoding="ascii") as blocks,
        tempfile.TemporaryDirectory(dir=path.parent) as folder,
    ):
        for share, split in _attempts(contexts, sidecars):
            head, tail = _frame(split)
            frame = len(head.encode()) + len(tail.encode())
            room = most_bytes - frame - len(_json({**about, **summary}))
            blocks.seek(0)
            blocks.truncate()
            files = Sidecars(Path(folder), contexts[1:] if split else [])
            body = _Body(contexts, tokenizer, share, room, blocks, files)
            body.fill(records())
            if body.complete:
                break
        if not body.groups:
            raise ValueError(f"page: the first group needs more than {most_bytes} bytes")
        if split:
            files.close()
            shutil.copytree(folder, beside)
        index = {
            **about,
            "labels": LABELS,
            "colours": COLOURS,
            "summary": summary,
            "groups": body.groups,
            "shown": body.shown,
            "top_share": share,
            "sidecars": beside.name if split else None,
        }
        blocks.seek(0)
        with path.open("w", encoding="utf-8", newline="\n") as page:
            page.write(head)
            page.write(_data_script("index", _json(index)))
            page.write(_data_script("tokens", _json(body.tokens)))
            shutil.copyfileobj(blocks, page)
            page.write(tail)
    return body.shown


def sidecar_folder(path: Path) -> Path:
    """Where the other contexts of a page are, if they are not in it."""
    return path.with_name(f"{path.stem}-contexts")


def _attempts(contexts: list[str], sidecars: bool) -> list[tuple[float, bool]]:
    """(share of tokens with top tokens, contexts in files of their own), until one fits."""
    several = len(contexts) > 1
    ways = [True] if sidecars and several else [False, True] if several else [False]
    return [(share, split) for split in ways for share in TOP_SHARES]


class _Body:
    """What the page says of the rollouts, as much of it as there is room for."""

    def __init__(
        self,
        contexts: list[str],
        tokenizer: PreTrainedTokenizerBase,
        top_share: float,
        room: int,
        blocks: IO[str],
        sidecars: Sidecars,
    ) -> None:
        self._contexts = contexts
        self._sidecars = sidecars
        self._tokenizer = tokenizer
        self._top_share = top_share
        self._room = room
        self._blocks = blocks
        self.groups: list[dict[str, Any]] = []
        self.tokens: dict[int, str] = {}
        self.shown = 0
        self.complete = True

    def fill(self, records: Iterator[RolloutCredit]) -> None:
        """Takes whole groups until there is no room; then `complete` is false."""
        for _, rollouts in groupby(records, key=lambda rollout: (rollout.step, rollout.question)):
            if not self._add(list(rollouts)):
                self.complete = False
                return

    def _add(self, rollouts: list[RolloutCredit]) -> bool:
        first = rollouts[0]
        group = {
            "step": first.step,
            "question": first.question,
            "prompt": first.prompt,
            "answer": first.answer,
            "rollouts": [self._entry(rollout) for rollout in rollouts],
        }
        number = len(self.groups)
        inside = [name for name in self._contexts if name not in self._sidecars.contexts]
        blocks = [
            _data_script(
                f"b{number}-{place}",
                pack(rollout, inside, top_share=self._top_share),
                kind="text/plain",
            )
            for place, rollout in enumerate(rollouts)
        ]
        tokens = self._new_tokens(rollouts)
        used = len(_json({**group, "part": 0})) + 8 + len(_json(tokens)) + sum(map(len, blocks)) + 2
        if used > self._room:
            return False
        self._room -= used
        group["part"] = self._sidecars.add(number, rollouts, self._top_share)
        self.groups.append(group)
        self.tokens |= tokens
        self.shown += len(rollouts)
        self._blocks.writelines(blocks)
        return True

    def _entry(self, rollout: RolloutCredit) -> dict[str, Any]:
        present = [rollout.contexts.get(name) for name in self._contexts]
        return {
            "index": rollout.index,
            "correct": rollout.correct,
            "peer": rollout.peer,
            "tau": rollout.divergence,
            "cut": rollout.finish_reason == "length",
            "n": len(rollout.token_ids),
            # mean |A|, and null where the context gives no teacher
            "credit": [c and round(float(np.abs(c.credit).mean()), 4) for c in present],
            "text": rollout.text,
        }

    def _new_tokens(self, rollouts: list[RolloutCredit]) -> dict[int, str]:
        """The texts of tokens that no earlier group has."""
        new: dict[int, str] = {}
        unknown: set[int] = set()
        for rollout in rollouts:
            new |= dict(zip(rollout.token_ids.tolist(), rollout.tokens, strict=True))
            positions = top_positions(rollout, self._top_share)
            for top in (rollout.top, *(c.top for c in rollout.contexts.values())):
                unknown |= set(np.unique(top.token_ids[positions]).tolist())
        listed = sorted(unknown - self.tokens.keys() - new.keys())
        new |= dict(zip(listed, token_texts(self._tokenizer, listed), strict=True))
        return {token: text for token, text in new.items() if token not in self.tokens}


def _frame(sidecars: bool) -> tuple[str, str]:
    """The page before and behind its data."""
    folder = files("hsd.credit") / "page"
    style = (folder / "style.css").read_text(encoding="utf-8")
    parts = [(folder / name).read_text(encoding="utf-8") for name in _SCRIPTS]
    script = '"use strict";\n{\n' + "\n".join(parts) + "}\n"
    template = (folder / "template.html").read_text(encoding="utf-8")
    trusted = " 'strict-dynamic'" if sidecars else ""
    policy = (
        f"default-src 'none'; script-src '{_hash(script)}'{trusted}; style-src '{_hash(style)}'; "
        "base-uri 'none'; form-action 'none'"
    )
    template = template.replace("{policy}", policy).replace("{style}", style)
    head, tail = template.split("{data}")
    return head, tail.replace("{script}", script)


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _data_script(name: str, content: str, *, kind: str = "application/json") -> str:
    return f'<script type="{kind}" id="{name}">{content}</script>\n'


def _json(value: object) -> str:
    """ASCII without "<": nothing in it can end its script element or open a comment."""
    return json.dumps(value, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
