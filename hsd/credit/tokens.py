"""The text of single tokens, and the class of what they say."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TokenClass = Literal["digits", "operators", "words", "style", "punctuation", "other"]
TOKEN_CLASSES: tuple[TokenClass, ...] = (
    "digits",
    "operators",
    "words",
    "style",
    "punctuation",
    "other",
)

_OPERATORS = frozenset("+-*/=<>^%×÷·±√≤≥≠≈−∗")
_STYLE_WORDS = """
    so therefore thus hence then now first second third next finally lastly also however but
    because since wait hmm okay ok well let let's lets we need note notice recall alternatively
    actually maybe perhaps check step answer solution final result here this that means
"""
_STYLE = frozenset(_STYLE_WORDS.split())


def token_texts(tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int]) -> tuple[str, ...]:
    """The text of each token on its own, special tokens by their names.

    A token that is no whole character of UTF-8 shows as the vocabulary spells it.
    """
    tools: Any = tokenizer
    texts = []
    for token_id in token_ids:
        spelled = tools.convert_ids_to_tokens(int(token_id))
        text = str(tokenizer.decode([int(token_id)], skip_special_tokens=False))
        if spelled is None:  # a row of the head beyond the tokenizer's vocabulary
            text = f"<{token_id}>"
        elif "\ufffd" in text or not text:
            text = str(spelled)
        elif str(spelled).startswith("\u2581") and not text.startswith(" "):
            text = f" {text}"  # SentencePiece drops the space in front of a lone word
        texts.append(text)
    return tuple(texts)


def token_class(text: str) -> TokenClass:
    """What kind of token it is; the first class that fits.

    digits: has a decimal digit. operators: signs of arithmetic and comparison only. style: a word
    of discourse ("so", "therefore", "wait", ...). words: has a letter. punctuation: has a mark of
    punctuation or a symbol. other: white space, special tokens, parts of characters.
    """
    stripped = text.strip()
    if not stripped or (stripped.startswith("<|") and stripped.endswith("|>")):
        return "other"
    if any(character.isdecimal() for character in stripped):
        return "digits"
    if all(character in _OPERATORS for character in stripped):
        return "operators"
    if stripped.lower() in _STYLE:
        return "style"
    if any(character.isalpha() for character in stripped):
        return "words"
    if any(unicodedata.category(character)[0] in "PS" for character in stripped):
        return "punctuation"
    return "other"
