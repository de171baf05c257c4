"""Leaving between two steps when asked to: SIGTERM and SIGINT."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any

import torch

from hsd.distributed.process import World

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(KeyboardInterrupt):
    """A signal that ends the run.

    Attributes:
        exit_code: 128 and the signal's number.
        agreed: every rank stops here.
    """

    def __init__(self, number: int, *, agreed: bool) -> None:
        super().__init__(signal.Signals(number).name)
        self.exit_code = 128 + number
        self.agreed = agreed


class Stopping:
    """Turns the signals into `Stopped`: at once, or where they are held back, between steps.

    Inside `with stopping:` the handlers are in place. A second signal is never held back.

    Attributes:
        hold: a signal waits for `check`.
    """

    def __init__(self) -> None:
        self.hold = False
        self._received: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Stopping:
        for number in SIGNALS:
            self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.hold and self._received is None:
            self._received = number
            return
        raise Stopped(number, agreed=False)

    def check(self, world: World) -> None:
        """Every rank calls it; if any has been sent a signal, all leave here together.

        Raises:
            Stopped: one was.
        """
        counts = world.sum_(torch.tensor([int(self._received == each) for each in SIGNALS]))
        for number, count in zip(SIGNALS, counts.tolist(), strict=True):
            if count:
                raise Stopped(number, agreed=True)
