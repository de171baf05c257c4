"""Runs and resumes a recipe in children that kill themselves; prints how often they were killed.

A child ends at a random moment after a random step began, or after one of its saves did. The last
one is left alone.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

from hsd.distributed.checkpoint import whole_checkpoints
from hsd.run import loop
from hsd.run.resume import read_position

recipe, run, kills = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
rng = random.Random(0)


def kill_later(seconds: float) -> None:
    def kill() -> None:
        time.sleep(seconds)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=kill, daemon=True).start()


def armed(owner: Any, name: str, call: int, seconds: float) -> None:
    """A call of a function, from 1, starts the clock."""
    original, calls = getattr(owner, name), 0

    def counting(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            kill_later(seconds)
        return original(*args, **kwargs)

    setattr(owner, name, counting)


def child(*, killed: bool, saving: bool, call: int, seconds: float) -> int:
    """Exit status of one process that trains."""
    pid = os.fork()
    if pid == 0:
        if killed:
            armed(
                loop.Session if saving else loop, "save" if saving else "train_step", call, seconds
            )
        started = (run / "config.json").exists()
        words = ["--resume", str(run)] if started else [recipe, "--run-dir", str(run)]
        os._exit(loop.run(words))
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


count = 0
for attempt in range(kills):
    saving = attempt % 2 == 0
    status = child(
        killed=True,
        saving=saving,
        call=rng.choice([1, 2]),
        seconds=rng.uniform(0, 0.06 if saving else 0.3),
    )
    if status == 0:
        break
    if status != -signal.SIGKILL:
        sys.exit(f"a run ended with {status}")
    count += 1
    for step, path in whole_checkpoints(run / "resume"):
        if read_position(path).step != step:
            sys.exit(f"{path} is not of its step")
else:
    if child(killed=False, saving=False, call=0, seconds=0):
        sys.exit("the last run failed")
print(count)
