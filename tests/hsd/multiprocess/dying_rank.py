"""`hsd train` whose rank 1 ends in its third step, by kill -9 or by an error."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from hsd.run import loop

how, run, *words = sys.argv[1:]
original = loop.train_step


def dying(trainer: Any, stream: Any, step: int, **options: Any) -> Any:
    if step == 2 and trainer.world.rank == 1:
        while not (Path(run) / "resume" / "step-00000002").exists():
            time.sleep(0.05)
        (Path(run) / "died").write_text(str(time.time()))
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        raise RuntimeError("rank 1 is broken")
    return original(trainer, stream, step, **options)


loop.train_step = dying
sys.exit(loop.run([*words, "--run-dir", run]))
