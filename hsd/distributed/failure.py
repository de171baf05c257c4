"""The end of a job of several ranks when one of them fails."""

from __future__ import annotations

import os
import sys
from typing import NoReturn

import torch.distributed as dist

_KEY = "hsd/failed"


def is_first_to_fail() -> bool:
    """Whether no other rank has asked this before; then this one's error is the one to show.

    When a rank ends, the others lose their connection to it, in the middle of a collective. That
    is an error too, but no news.
    """
    if not dist.is_initialized():
        return True
    own = str(dist.get_rank())
    try:
        store = dist.distributed_c10d._get_default_store()
        return bool(store.compare_set(_KEY, "", own).decode() == own)
    except RuntimeError:  # whoever kept the store is gone, and has had its say
        return False


def lost_another_rank(error: BaseException) -> bool:
    """Whether an error only says that another rank is gone; torchrun names it and its end."""
    lost = ("Connection closed by peer", "Connection reset by peer", "Broken pipe")
    return isinstance(error, RuntimeError) and any(text in str(error) for text in lost)


def leave_at_once(code: int) -> NoReturn:
    """Ends the process without closing anything in order, which could wait for ever for a rank.

    torchrun then ends the other ranks.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
