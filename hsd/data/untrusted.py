"""Which strings of a tokenizer untrusted text must not hold, and taking strings out of text."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BRACKETED = re.compile(r"<\|.+\|>|<｜.+｜>")


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    """The tokens that the tokenizer calls special, by id."""
    added = tokenizer.added_tokens_decoder.items()
    special = {token_id: str(token) for token_id, token in added if token.special}
    return special | dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))


def marker_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    """The other tokens that structure a conversation, by id.

    Qwen3's <think> and <tool_call> are not special to its tokenizer. Added tokens that the chat
    template writes, and those of the form <|...|>, are taken for such; not every added token is:
    some tokenizers have runs of spaces and HTML tags among theirs.
    """
    template: Any = tokenizer.chat_template
    special = special_tokens(tokenizer)
    return {
        token_id: str(token)
        for token_id, token in tokenizer.added_tokens_decoder.items()
        if token_id not in special
        and str(token).strip()
        and (_BRACKETED.fullmatch(str(token)) or str(token) in str(template or ""))
    }


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
