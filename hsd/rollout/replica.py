"""One replica of the engine: a server with the current weights, brought back if it dies."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from hsd.rollout.protocol import EngineError
from hsd.rollout.server_process import ServerProcess, free_port
from hsd.rollout.vllm_client import ServerLost, VllmClient
from hsd.rollout.weight_sync import NcclTransfer

_ATTEMPTS = 3
"""To start a server, and to give it weights."""


class Replica:
    """A server, the trainer's own or one given by its URL.

    Args:
        connect: a client of a URL.
        url: of a server that runs already; None starts one.
        command: of a server that serves a directory on a port of 127.0.0.1.
        environment: variables of it, over the trainer's own.
        log: file of its output.
        start_timeout: seconds until it answers.
        transfer: to a URL and so many workers, NCCL instead of files; None for files.
    """

    def __init__(
        self,
        connect: Callable[[str], VllmClient],
        *,
        url: str | None,
        command: Callable[[Path, int], Sequence[str]],
        environment: dict[str, str],
        log: Path,
        start_timeout: float,
        transfer: Callable[[str, int], NcclTransfer] | None,
    ) -> None:
        self._connect = connect
        self._own = url is None
        self._command = command
        self._environment = environment
        self._log = log
        self._start_timeout = start_timeout
        self._make_transfer = transfer
        self._transfer: NcclTransfer | None = None
        self._lock = threading.Lock()
        self.process: ServerProcess | None = None
        self._client = None if url is None else connect(url)
        self._asleep = False
        self.lives = 0  # a failure is of the life in which its request was sent
        self.running = 0  # requests

    @property
    def client(self) -> VllmClient:
        if self._client is None:
            raise EngineError("engine: a server was used before it was started")
        return self._client

    def synchronise(self, files: Path, label: str) -> None:
        """Gives it the weights in `files`, whatever it takes.

        Raises:
            EngineError: it does not come up, or cannot load them.
        """
        with self._lock:
            self._synchronise(files, label, force=False)

    def recover(self, files: Path, label: str, *, life: int, hung: bool) -> None:
        """After a failure in one of its lives: brings it back with the current weights."""
        with self._lock:
            if life == self.lives:  # else another request has noticed before
                self._synchronise(files, label, force=hung)

    def sleep(self) -> None:
        """Frees its memory until the next weights."""
        with self._lock:
            try:
                self.client.sleep()
                self._asleep = True
            except ServerLost:
                self._asleep = False  # `synchronise` starts it again

    def close(self) -> None:
        if self._transfer:
            self._transfer.close()
            self._transfer = None
        if self._client:
            self._client.close()
        if self.process:
            self.process.close()
            self.process = None

    def _synchronise(self, files: Path, label: str, *, force: bool) -> None:
        reason = ""
        for _ in range(_ATTEMPTS):
            self.lives += 1
            try:
                fresh = self._bring_up(files, force=force)
                if fresh and self._make_transfer is None:
                    self.client.name_weights(label)  # it started from these files
                elif self.client.weights_label() != label:
                    self._load(files, label)
                return
            except ServerLost as error:
                reason, force = str(error), error.hung
            except EngineError as error:
                raise EngineError(f"{error}; before that: {reason}" if reason else error) from error
        raise EngineError(
            f"engine: {self._name()}: {_ATTEMPTS} attempts failed, the last: {reason}"
        )

    def _load(self, files: Path, label: str) -> None:
        client = self.client
        if self._asleep:
            client.wake("weights")
        if self._make_transfer is None:
            client.load(str(files))
        else:
            if self._transfer is None:
                self._transfer = self._make_transfer(client.url, client.workers())
            self._transfer.send()
        if self._asleep:
            client.wake("kv_cache")
            self._asleep = False
        client.name_weights(label)

    def _bring_up(self, files: Path, *, force: bool) -> bool:
        """Waits for a server that answers; whether it was started now, from `files`."""
        if not force and self._client and self._client.healthy():
            return False
        self._asleep = False
        if self._transfer:  # its peer is gone
            self._transfer.close()
            self._transfer = None
        if not self._own:
            self._wait()
            return False
        if self.process:
            self.process.close()
        # The former client stays open: requests in other threads end with its server's answer.
        port = free_port()
        self._client = self._connect(f"http://127.0.0.1:{port}")
        self.process = ServerProcess(self._command(files, port), self._environment, self._log)
        self._wait()
        return True

    def _wait(self) -> None:
        deadline = time.monotonic() + self._start_timeout
        while not self.client.healthy():
            if self.process and not self.process.running:
                raise ServerLost(f"it ended while it started:\n{self.process.last_output()}")
            if time.monotonic() > deadline:
                output = f":\n{self.process.last_output()}" if self.process else ""
                raise EngineError(
                    f"engine: {self._name()} does not answer after {self._start_timeout:g} s, "
                    f"engine.start_timeout{output}"
                )
            time.sleep(0.2)

    def _name(self) -> str:
        return f"the server at {self._client.url}" if self._client else "the server"
