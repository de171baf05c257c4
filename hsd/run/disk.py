"""A disk that is full: no fault of the code, whatever wrote last."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def disk_full(error: BaseException) -> str | None:
    """What the system said, where an error comes of a disk without room; None for any other."""
    for each in _causes(error):
        for number in _FULL:
            # safetensors and tokenizers have errors of their own, with Rust's text.
            if (isinstance(each, OSError) and each.errno == number) or (
                f"(os error {number})" in str(each)
            ):
                return os.strerror(number)
    return None


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error, and those that it was raised from or while handling."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
