"""Files beside a page: scripts that hand it the packed blocks of one context of some groups."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from hsd.credit.packing import pack_context
from hsd.credit.records import RolloutCredit

PART_BYTES = 4_000_000
"""A part of the groups is as many of them as fill a file of this size; at least one."""


class Sidecars:
    """Writes CONTEXT-PART.js for every context, part after part.

    Args:
        folder: emptied first.
        contexts: those that are not in the page; names of files.
    """

    def __init__(self, folder: Path, contexts: Sequence[str]) -> None:
        self.contexts = tuple(contexts)
        self._folder = folder
        for old in folder.iterdir():
            old.unlink()
        self._part = 0
        self._blocks: dict[str, dict[str, str]] = {name: {} for name in contexts}
        self._bytes = 0

    def add(self, group: int, rollouts: Sequence[RolloutCredit], top_share: float) -> int:
        """Takes the blocks of a group in; returns the part they are in."""
        sizes = []
        for name, blocks in self._blocks.items():
            new = {
                f"b{group}-{place}": pack_context(rollout, name, top_share=top_share)
                for place, rollout in enumerate(rollouts)
                if name in rollout.contexts
            }
            blocks |= new
            sizes.append(sum(map(len, new.values())))
        self._bytes += max(sizes, default=0)
        part = self._part
        if self._bytes >= PART_BYTES:
            self.close()
        return part

    def close(self) -> None:
        """Writes what the current part has."""
        for name, blocks in self._blocks.items():
            # Block names and base64: nothing in it is a rollout's own text.
            script = f"creditSidecar({json.dumps(name)}, {json.dumps(blocks)});\n"
            (self._folder / f"{name}-{self._part}.js").write_text(script, encoding="ascii")
        self._blocks = {name: {} for name in self.contexts}
        self._part += 1
        self._bytes = 0
