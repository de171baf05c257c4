"""Two ranks that share one tensor-parallel server get what one process gets."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fake_vllm
import pytest

pytestmark = pytest.mark.slow

RANK = Path(__file__).with_name("sharing_rank.py")
PASSES = ("first", "second", "one prompt", "lost", "after")


@pytest.fixture(scope="module")
def found(
    tmp_path_factory: pytest.TempPathFactory, make_model: Callable[..., Any], tokenizer: Any
) -> dict[int, list[Any]]:
    """What each rank wrote, by the number of ranks; the servers' calls under 0."""
    folder = tmp_path_factory.mktemp("sharing")
    make_model().save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    module = folder / "vllm" / "entrypoints" / "cli"
    module.mkdir(parents=True)
    source = Path(fake_vllm.__file__).read_text(encoding="utf-8")
    (module / "main.py").write_text(source, encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    results: dict[int, list[Any]] = {}
    for ranks in (1, 2):
        (folder / "calls").unlink(missing_ok=True)
        command = [sys.executable, str(RANK), str(folder), str(ranks)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr
        results[ranks] = [
            json.loads((folder / f"{ranks}-{rank}.json").read_text()) for rank in range(ranks)
        ]
        assert not list((folder / f"sync-{ranks}").iterdir())
    results[0] = (folder / "calls").read_text(encoding="utf-8").splitlines()
    return results


@pytest.mark.parametrize("name", PASSES)
def test_two_ranks_get_the_rollouts_of_one_process(name: str, found: dict[int, list[Any]]) -> None:
    (alone,), (first, second) = found[1], found[2]
    assert first[name][0] == alone[name][0]
    dealt = [each for rank in (first[name], second[name]) for each in rank]
    assert sorted(dealt) == sorted(alone[name]) and dealt
    assert len(second[name]) == (0 if name == "one prompt" else 1)


def test_one_rank_has_the_server_and_its_death_costs_no_sample(
    found: dict[int, list[Any]],
) -> None:
    first, second = found[2]
    assert (first["servers"], second["servers"]) == (1, 0)
    assert first["lost"] == first["second"] and second["lost"] == second["second"]
    assert first["retries"] > 0


def test_new_weights_are_loaded_once_a_step_between_sleep_and_waking_the_cache(
    found: dict[int, list[Any]],
) -> None:
    words = found[0]
    starts = [place for place, word in enumerate(words) if word.startswith("serve ")]
    assert len(starts) == 2  # at first, and after its death
    assert all("--tensor-parallel-size 2 --enable-sleep-mode" in words[at] for at in starts)
    steps = [word for word in words if word.startswith(("sleep", "wake", "collective", "reset"))]
    update = ["sleep?level=2", "wake_up?tags=weights", "collective_rpc", "wake_up?tags=kv_cache"]
    naming = ["reset_prefix_cache"]
    # Named at the start, after the first update, after the restart, after the second update.
    assert steps == [*naming, *update, *naming, *naming, *update, *naming]
    asleep = words[words.index("sleep?level=2") : words.index("wake_up?tags=kv_cache")]
    assert not [word for word in asleep if "generate" in word]


def test_what_fails_on_the_rank_with_the_server_fails_on_all(found: dict[int, list[Any]]) -> None:
    for rank in found[2]:
        assert "refused /inference/v1/generate: status 400" in rank["error"]
