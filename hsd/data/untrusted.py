"""Forbidden strings are taken out of untrusted text."""

from __future__ import annotations

from collections.abc import Iterable


def drop_strings(
    text: str, strings: Iterable[str], *, uncounted: Iterable[str] = ()
) -> tuple[str, int]:
    """Drops strings from a text until none is left, also those that dropping others brings about.

    Args:
        text: any text.
        strings: what to drop, counted.
        uncounted: what to drop as well, not counted.

    Returns:
        the text without them, and how many of strings were dropped.
    """
    counted = {string for string in strings if string}
    forbidden = counted | {string for string in uncounted if string}
    if not any(string in text for string in forbidden):
        return text, 0
    by_last: dict[str, list[str]] = {}
    for string in sorted(forbidden, key=len, reverse=True):
        by_last.setdefault(string[-1], []).append(string)
    # One pass over a stack, linear in the text: repeated replacement is quadratic in the nesting.
    kept: list[str] = []
    removed = 0
    for character in text:
        kept.append(character)
        for string in by_last.get(character, ()):
            if len(kept) >= len(string) and "".join(kept[-len(string) :]) == string:
                del kept[-len(string) :]
                removed += string in counted
                break
    return "".join(kept), removed
