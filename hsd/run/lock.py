"""One job at a time trains in a run's folder."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import warnings
from pathlib import Path
from typing import TextIO

_NAME = "lock"


class FolderLock:
    """A lock on a folder, held by one process until it leaves `with lock:`, or ends in any way.

    It is the kernel's (flock) on a file in the folder, which names the holder: a file that a killed
    process left behind locks nothing. Whoever only reads the folder needs no lock.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._file: TextIO | None = None

    def take(self) -> None:
        """Locks the folder, which must exist.

        Raises:
            ValueError: another process holds it; nothing was changed.
        """
        while self._file is None:
            file = (self._folder / _NAME).open("a+", encoding="utf-8")
            try:
                _lock(file, self._folder)
                # Who held it before may have removed the file between our opening and locking it.
                if _is_at(file, self._folder / _NAME):
                    self._file = file
            finally:
                if self._file is None:
                    file.close()
        self._file.truncate(0)
        self._file.write(f"process {os.getpid()} on {socket.gethostname()}")
        self._file.flush()

    def release(self) -> None:
        """Removes the file; without effect where the lock is not held."""
        file, self._file = self._file, None
        if file is not None:
            (self._folder / _NAME).unlink(missing_ok=True)
            file.close()

    def __enter__(self) -> FolderLock:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def _lock(file: TextIO, folder: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        holder = file.read(200) or "another process"
        raise ValueError(
            f"run_dir: found {folder} in use by {holder}, expected a folder that nobody trains in"
        ) from None
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
            raise
        warnings.warn(
            f"{folder} is on a file system without locks: see that one job at a time trains in it",
            stacklevel=2,
        )


def _is_at(file: TextIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False
