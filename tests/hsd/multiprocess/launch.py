"""Starts several processes of a script by torchrun."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def launch(
    *arguments: object, cache: Path, processes: int = 2, timeout: int = 240
) -> subprocess.CompletedProcess[str]:
    """By torchrun, without a network and without a C++ compiler."""
    environment = {
        "HSD_CACHE": str(cache),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "CXX": "none",
    }
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return subprocess.run(
        [*command, f"--nproc-per-node={processes}", *map(str, arguments)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=timeout,
    )
