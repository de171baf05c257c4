"""Which tokens the divergence window keeps."""

from __future__ import annotations

from typing import Literal

import pytest

from hsd.objective.weights import window_mask


@pytest.mark.parametrize(
    ("correct", "divergence", "window", "kept"),
    [
        pytest.param(False, 2, 0, 3, id="up to and with the divergence"),
        pytest.param(False, 2, 1, 4, id="and the tokens of the window behind it"),
        pytest.param(False, 0, 0, 1, id="divergence at the first token"),
        pytest.param(False, 4, 100, 5, id="window beyond the end"),
        pytest.param(False, 5, 0, 5, id="a prefix of its peer"),
        pytest.param(False, None, 3, 0, id="failed without a peer: nothing"),
        pytest.param(True, 1, 0, 5, id="correct: all"),
        pytest.param(True, None, 0, 5, id="correct without a peer: all"),
        pytest.param(False, 2, "none", 5, id="no window: all"),
        pytest.param(False, None, "none", 5, id="no window and no peer: all"),
    ],
)
def test_window_mask(
    correct: bool, divergence: int | None, window: int | Literal["none"], kept: int
) -> None:
    mask = window_mask(5, correct=correct, divergence=divergence, window=window)
    assert mask == [True] * kept + [False] * (5 - kept)
