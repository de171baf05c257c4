"""Verifiers that behave as their response says; workers import them by name."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path
from typing import Any

from hsd.data.questions import Question


def obedient(question: Question, text: str) -> Any:
    if text == "hang":
        while True:
            pass
    if text == "long operation":
        return 9**9**9 == 1
    if text == "sleep":
        time.sleep(60)
    if text == "exit":
        os._exit(0)
    if text == "raise":
        raise KeyError("no such thing")
    if text == "leave":
        raise SystemExit(0)
    if text == "own limit":
        raise TimeoutError
    if text == "no bool":
        return "yes"
    if text == "memory":
        return bytearray(10**11) == b""
    if text == "print":
        print("\0" * 1000, flush=True)
    if text.startswith("child "):
        process = subprocess.Popen(["sleep", "60"])
        Path(text.removeprefix("child ")).write_text(str(process.pid))
        process.wait()
    return text == question.answer
