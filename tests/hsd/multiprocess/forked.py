"""Ranks without torchrun: children of one process, which has imported everything once.

As a program, `forked.py RANKS ARGUMENT ...` is `hsd train ARGUMENT ...` on so many ranks.
"""

from __future__ import annotations

import os
import socket
import sys
import traceback
from collections.abc import Callable


def run_ranks(ranks: int, action: Callable[[], int]) -> None:
    """Runs a function on each rank, and ends the program if it does not return 0 everywhere."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(ranks):
        child = os.fork()
        if child == 0:
            os.environ |= {
                "RANK": str(rank),
                "WORLD_SIZE": str(ranks),
                "LOCAL_WORLD_SIZE": str(ranks),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            }
            try:
                code = action()
            except BaseException:
                traceback.print_exc()
                code = 1
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        children.append(child)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    if any(codes):
        sys.exit(f"ranks ended with {codes}")


if __name__ == "__main__":
    from hsd.run import loop

    run_ranks(int(sys.argv[1]), lambda: loop.run(sys.argv[2:]))
