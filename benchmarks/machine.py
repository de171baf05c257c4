"""What a number was measured on."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("torch", "hsd-kernels", "liger-kernel", "trl", "cut-cross-entropy", "transformers")


def described() -> dict[str, Any]:
    """CPU model, cores, threads, memory, load and versions."""
    return {
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "load": os.getloadavg()[0],  # processes that wanted a core over the last minute
        "capability": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        **{name: found for name in PACKAGES if (found := _version(name))},
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def line(machine: dict[str, Any]) -> str:
    """One line for a table's caption."""
    versions = ", ".join(f"{name} {machine[name]}" for name in PACKAGES if name in machine)
    return (
        f"{machine['cpu']} ({machine['capability']}), {machine['cores']} cores, "
        f"{machine['threads']} threads, {machine['memory_gib']} GiB; {versions}"
    )
