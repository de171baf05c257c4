"""A server as a child process: started with a free port, ended with all that it started."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from hsd.rollout import guard

_OF_TORCHRUN = (
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "GROUP_RANK",
    "GROUP_WORLD_SIZE",
    "ROLE_RANK",
    "ROLE_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
)


class ServerProcess:
    """A running server in a process group of its own, which ends with this process.

    Args:
        command: words, no shell.
        environment: variables over this process's own; those of torchrun are left out, since the
            server is no rank of the trainer's.
        log: the file that its output goes to.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], log: Path) -> None:
        inherited = {
            name: value
            for name, value in os.environ.items()
            if name not in _OF_TORCHRUN and not name.startswith("TORCHELASTIC_")
        }
        self._log = log
        with log.open("ab") as output:
            self._guard = subprocess.Popen(
                # Isolated: the environment is the server's and may not suit this Python.
                [sys.executable, "-I", guard.__file__, *command],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**inherited, **environment},
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        """Of the leader of its process group."""
        return self._guard.pid

    @property
    def running(self) -> bool:
        return self._guard.poll() is None

    def last_output(self, lines: int = 12) -> str:
        """The end of its log."""
        text = self._log.read_text(encoding="utf-8", errors="replace")
        return "\n".join(text.splitlines()[-lines:])

    def close(self) -> None:
        """Ends the process group, and waits until its leader is reaped."""
        if self._guard.stdin:
            with contextlib.suppress(BrokenPipeError):
                self._guard.stdin.close()
        try:
            self._guard.wait(guard.GRACE_SECONDS + 5)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._guard.pid, signal.SIGKILL)
            self._guard.wait()


def free_port() -> int:
    """A port of the loopback interface that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
