"""Large CPU buffers in huge pages, which Linux gives where it is asked for them."""

from __future__ import annotations

import ctypes
import functools
import mmap
import sys
from collections.abc import Callable

from torch import Tensor

_LEAST = 32 << 20  # bytes: what glibc maps on its own, and gives back when it is freed


def in_huge_pages(new: Tensor) -> Tensor:
    """The tensor itself, not yet written: the system then clears 2 MiB at a time, not 4 KiB.

    A call's memory is new to it, and where it is large a first write costs more than a later one
    by a fault per page. Advice, which changes no value and may come to nothing.
    """
    # Simulated tensors, of a class of their own, have no memory.
    if type(new) is Tensor and new.device.type == "cpu" and new.nbytes >= _LEAST:
        start = -(-new.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        end = (new.data_ptr() + new.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
        _advise()(start, end - start)
    return new


@functools.cache
def _advise() -> Callable[[int, int], None]:
    if sys.platform != "linux":
        return lambda start, size: None
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]

    def advise(start: int, size: int) -> None:
        madvise(start, size, mmap.MADV_HUGEPAGE)

    return advise
