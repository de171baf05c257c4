"""The process behind a VerifierPool: hands responses to forked workers and kills those that hang.

Started as `python -m hsd.data.verify.supervisor FD`, with FD one end of the pool's connection:
(verifier, workers, timeout) comes in, an empty message or an error goes out; then for each batch of
(question, text) one byte an item and the last error go out. Runs no verifier itself and has one
thread, so that it neither hangs nor forks in the wrong state.
"""

from __future__ import annotations

import contextlib
import gc
import os
import pickle
import resource
import signal
import sys
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from typing import Any, NoReturn

from hsd.data.questions import Question
from hsd.data.verify import Outcome, Verifier
from hsd.data.verify.pool import OUTCOMES

_WORKER_BYTES = 4 << 30
"""Private memory of one worker: far more than a verifier needs, less than 9**9**9 takes."""

_ORPHAN_SECONDS = 5.0
"""A worker ends itself so long after its deadline: its supervisor must be dead."""

Item = tuple[Question, str]


@dataclass(kw_only=True)
class _Worker:
    pid: int
    connection: Connection
    index: int | None = None  # of the item it is at
    deadline: float = 0.0

    def kill(self) -> None:
        """Kills the worker, which leads a process group, with what it started; reaps it."""
        self.connection.close()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self.pid, 0)


class Supervisor:
    """Workers and the items they are at."""

    def __init__(
        self, parent: Connection, verify: Verifier, *, workers: int, timeout: float
    ) -> None:
        self._parent = parent
        self._verify = verify
        self._timeout = timeout
        self._workers: list[_Worker] = []
        gc.collect()
        gc.freeze()  # forks then share the verifier's memory
        for _ in range(workers):
            self._workers.append(self._fork())

    def judge(self, items: Sequence[Item]) -> tuple[bytes, str]:
        """One code an item, and what the last verifier that raised said.

        Raises:
            EOFError: the pool has gone.
        """
        codes = bytearray(len(items))
        waiting = deque(range(len(items)))
        last_error = ""
        while waiting or any(worker.index is not None for worker in self._workers):
            for worker in self._workers:
                if worker.index is None and waiting:
                    worker.index = waiting.popleft()
                    worker.deadline = time.monotonic() + self._timeout
                    with contextlib.suppress(OSError):  # a dead worker shows as end of file below
                        worker.connection.send(items[worker.index])
            busy = [worker for worker in self._workers if worker.index is not None]
            left = min(worker.deadline for worker in busy) - time.monotonic()
            ready = wait([self._parent, *(w.connection for w in busy)], timeout=max(left, 0.0))
            if self._parent in ready:
                raise EOFError  # a pool sends nothing while it waits: it has closed
            for worker in busy:
                index = worker.index
                if index is not None and worker.connection in ready:
                    codes[index], error = self._answer(worker)
                    last_error = error or last_error
                elif index is not None and time.monotonic() >= worker.deadline:
                    codes[index] = OUTCOMES.index(Outcome.TIMEOUT)
                    self._replace(worker)
        return bytes(codes), last_error

    def close(self) -> None:
        for worker in self._workers:
            worker.kill()

    def _answer(self, worker: _Worker) -> tuple[int, str]:
        try:
            message = worker.connection.recv_bytes()
        except (EOFError, OSError):
            self._replace(worker)
            return OUTCOMES.index(Outcome.ERROR), "the verifier's process died"
        worker.index = None
        return message[0], message[1:].decode("utf-8", "replace")

    def _replace(self, worker: _Worker) -> None:
        worker.kill()
        self._workers[self._workers.index(worker)] = self._fork()

    def _fork(self) -> _Worker:
        ours, theirs = Pipe()
        pid = os.fork()
        if pid == 0:
            self._parent.close()
            ours.close()
            for worker in self._workers:
                worker.connection.close()
            _work(theirs, self._verify, self._timeout)
        theirs.close()
        with contextlib.suppress(OSError):
            os.setpgid(pid, pid)  # by both, so that neither waits for the other
        return _Worker(pid=pid, connection=ours)


def _work(connection: Connection, verify: Verifier, timeout: float) -> NoReturn:
    """A worker's life: judges what comes, until it is killed or its supervisor has gone."""
    with contextlib.suppress(BaseException):
        with contextlib.suppress(OSError):
            os.setpgid(0, 0)
        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        limit = _WORKER_BYTES if hard == resource.RLIM_INFINITY else min(_WORKER_BYTES, hard)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))
        while True:
            question, text = connection.recv()
            # The default action ends the process in the kernel, also within one long operation.
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.setitimer(signal.ITIMER_REAL, timeout + _ORPHAN_SECONDS)
            outcome, error = _outcome(verify, question, text)
            signal.setitimer(signal.ITIMER_REAL, 0)
            connection.send_bytes(bytes([OUTCOMES.index(outcome)]) + error.encode()[:500])
    os._exit(0)


def _outcome(verify: Verifier, question: Question, text: str) -> tuple[Outcome, str]:
    try:
        correct: Any = verify(question, text)
    except TimeoutError:
        return Outcome.TIMEOUT, ""
    except BaseException as error:  # SystemExit, too, is no verdict
        return Outcome.ERROR, f"{question.id}: {type(error).__name__}: {error}"
    if not isinstance(correct, bool):
        found = f"found {type(correct).__name__} from the verifier, expected bool"
        return Outcome.ERROR, f"{question.id}: {found}"
    return (Outcome.CORRECT if correct else Outcome.WRONG), ""


def main(descriptor: int) -> None:
    """Serves one pool until its connection closes."""
    parent = Connection(descriptor)
    try:
        verify, workers, timeout = pickle.loads(parent.recv_bytes())
    except EOFError:
        return
    except Exception as error:  # whatever the verifier's module raises on import
        parent.send_bytes(f"{type(error).__name__}: {error}".encode())
        return
    supervisor = Supervisor(parent, verify, workers=workers, timeout=timeout)
    with contextlib.suppress(EOFError, OSError):
        parent.send_bytes(b"")
        while True:
            codes, last_error = supervisor.judge(pickle.loads(parent.recv_bytes()))
            parent.send_bytes(codes)
            parent.send_bytes(last_error.encode())
    supervisor.close()


if __name__ == "__main__":
    main(int(sys.argv[1]))
