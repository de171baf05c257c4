"""Verifiers in processes that can be killed: no response can hang, crash or bloat the trainer."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from multiprocessing import Pipe
from multiprocessing.connection import Connection

from hsd.data.questions import Question
from hsd.data.verify import Outcome, Verifier

OUTCOMES = tuple(Outcome)
"""An outcome travels as its index here: what comes back from untrusted text is never unpickled."""

_ATTEMPTS = 3


class VerifierPool:
    """Judges responses in parallel, each within a deadline.

    One supervisor process loads the verifier once and forks the workers. A worker that passes the
    deadline or dies is replaced by another fork; the supervisor itself, which runs no verifier, is
    started anew if it dies. The supervisor is a fresh interpreter that imports neither torch nor
    the caller's __main__, so the pool may be made after threads and CUDA have started.

    Args:
        verify: a function that pickles (top level of an importable module, or a partial of one).
        workers: processes; default: the cores this process may use.
        timeout: seconds for one response.

    Attributes:
        counts: outcomes of all responses so far.
        last_error: what the last verifier that raised said.

    Raises:
        ValueError: an argument is out of range, or the verifier does not pickle or load.
    """

    def __init__(
        self, verify: Verifier, *, workers: int | None = None, timeout: float = 15.0
    ) -> None:
        workers = len(os.sched_getaffinity(0)) if workers is None else workers
        if workers < 1:
            raise ValueError(f"workers: found {workers}, expected at least 1")
        if not timeout > 0:
            raise ValueError(f"timeout: found {timeout}, expected a number of seconds above 0")
        try:
            self._setup = pickle.dumps((verify, workers, timeout))
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            found = f"{verify!r} ({error})"
            raise ValueError(f"verify: found {found}, expected one that pickles") from None
        self.counts: Counter[Outcome] = Counter()
        self.last_error: str | None = None
        self._start()

    def judge(self, items: Sequence[tuple[Question, str]]) -> list[Outcome]:
        """Outcomes of (question, response text) pairs, in their order.

        Takes at most about ceil(items / workers) * timeout seconds.

        Raises:
            RuntimeError: the supervisor died three times over these items.
        """
        batch = pickle.dumps(list(items))
        for _ in range(_ATTEMPTS):
            try:
                self._connection.send_bytes(batch)
                codes = self._connection.recv_bytes()
                error = self._connection.recv_bytes().decode("utf-8", "replace")
            except (EOFError, OSError):
                self.close()
                self._start()
                continue
            outcomes = [OUTCOMES[code] for code in codes]
            self.counts.update(outcomes)
            self.last_error = error or self.last_error
            return outcomes
        raise RuntimeError(
            f"the verifiers' supervisor died {_ATTEMPTS} times over {len(items)} responses, "
            "expected it to live; is there memory left?"
        )

    def close(self) -> None:
        """Ends the processes; the supervisor kills its workers when its connection closes."""
        self._connection.close()
        try:
            self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def __enter__(self) -> VerifierPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start(self) -> None:
        ours, theirs = Pipe()
        # One core a worker: the workers are the parallelism.
        threads = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        path = {"PYTHONPATH": os.pathsep.join(entry or os.getcwd() for entry in sys.path)}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "hsd.data.verify.supervisor", str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            env=os.environ | threads | path,
            start_new_session=True,  # an interrupt from the keyboard is the trainer's to handle
        )
        theirs.close()
        self._connection: Connection = ours
        try:
            ours.send_bytes(self._setup)
            message = ours.recv_bytes().decode("utf-8", "replace")
        except (EOFError, OSError):
            message = "its process died"
        if message:
            self.close()
            raise ValueError(f"verify: found one that does not load in a new process: {message}")
