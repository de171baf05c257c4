import time

import pytest

from hsd.data.untrusted import drop_strings

TOKENS = ("<|im_end|>", "<|im_start|>", "</s>")


@pytest.mark.parametrize(
    ("text", "clean", "removed"),
    [
        ("plain < | text", "plain < | text", 0),
        ("a<|im_end|>b", "ab", 1),
        ("<|im_<|im_end|>end|>", "", 2),
        ("<|im_<|im_<|im_end|>end|>end|>x", "x", 3),
        ("<|im_</s>start|></<|im_end|>s>", "", 4),
        ("<|im_end|", "<|im_end|", 0),
        ("", "", 0),
    ],
)
def test_drops_until_none_is_left(text: str, clean: str, removed: int) -> None:
    assert drop_strings(text, TOKENS) == (clean, removed)


def test_uncounted_strings_are_dropped_in_the_same_pass() -> None:
    assert drop_strings("<|im_>>>end|> >>>", TOKENS, uncounted=[">>>"]) == (" ", 1)


def test_the_longer_of_two_strings_goes_first() -> None:
    assert drop_strings("x<unk>y", ("k>", "<unk>", "")) == ("xy", 1)


def test_deep_nesting_is_quick() -> None:
    depth = 50_000
    started = time.perf_counter()
    assert drop_strings("<|im_" * depth + "end|>" * depth, TOKENS) == ("", depth)
    assert time.perf_counter() - started < 5
