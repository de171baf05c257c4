"""Runs a command that does not outlive the process that started it.

    python guard.py COMMAND ARGUMENT ...

Standard input is a pipe that the parent holds open. When it ends, because the parent closed it or
died, however that came about, the command is asked to end. Whenever the command has ended, or does
not within the grace, the whole process group is killed, this process with it.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress

GRACE_SECONDS = 5.0


def main(command: Sequence[str]) -> None:
    """Never returns: the end of the process group is the end of this process."""
    if os.getpgrp() != os.getpid():
        raise SystemExit("guard: expected to lead its own process group, whose end it is")
    # A handler, since an ignored signal would stay ignored in the command.
    signal.signal(signal.SIGTERM, lambda *_: None)
    child = subprocess.Popen(list(command), stdin=subprocess.DEVNULL)
    threading.Thread(target=_end_with_parent, args=(child,), daemon=True).start()
    child.wait()
    os.killpg(0, signal.SIGKILL)  # what the command left behind, too


def _end_with_parent(child: subprocess.Popen[bytes]) -> None:
    while os.read(0, 4096):
        pass
    os.killpg(0, signal.SIGTERM)
    with suppress(subprocess.TimeoutExpired):
        child.wait(GRACE_SECONDS)
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    main(sys.argv[1:])
