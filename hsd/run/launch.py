"""The arguments of `hsd train`: a recipe with overrides, or a run to resume."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hsd.config import Config
from hsd.distributed.checkpoint import read_json
from hsd.recipe import config_from_dict, fail, parse_arguments
from hsd.run.folder import STATES

_OPTIONS = "[--dry-run] [--replay FILE] [--profile], or --resume RUN"


@dataclass(frozen=True, kw_only=True)
class Launch:
    """What to do.

    Attributes:
        dry_run: only show the configuration.
        resume: go on with the run in config.run_dir.
        replay: rollouts of an earlier run, in place of an engine.
        profile: trace one step.
    """

    config: Config
    dry_run: bool = False
    resume: bool = False
    replay: Path | None = None
    profile: bool = False


def parse_launch(argv: Sequence[str], *, prog: str) -> Launch:
    """RECIPE [--dry-run] [--replay FILE] [--profile] [overrides], or --resume RUN_DIR [...].

    Exits with code 2 and one line on stderr where the arguments are wrong.
    """
    words = list(argv)
    resume, replay = _take(words, "--resume"), _take(words, "--replay")
    dry_run, profile = "--dry-run" in words, "--profile" in words
    words = [word for word in words if word not in ("--dry-run", "--profile")]
    if replay is not None and not replay.is_file():
        fail(f"--replay: found no file {replay}, expected a rollouts.jsonl")
    if resume is None:
        config = parse_arguments(words, prog=prog, options=_OPTIONS)
    else:
        if words:
            fail(f"--resume: found {words[0]!r} beside it, expected no change of a run under way")
        try:
            config = _recorded(resume)
        except ValueError as error:
            fail(f"--resume: {error}")
    return Launch(
        config=config,
        dry_run=dry_run,
        resume=resume is not None,
        replay=replay,
        profile=profile,
    )


def _take(words: list[str], option: str) -> Path | None:
    """Removes an option and its value, `--name value` or `--name=value`."""
    for place, word in enumerate(words):
        if word == option:
            if place + 1 == len(words) or words[place + 1].startswith("--"):
                fail(f"{option}: found no value, expected a path")
            value = words[place + 1]
            del words[place : place + 2]
            return Path(value)
        if word.startswith(f"{option}="):
            del words[place]
            return Path(word.partition("=")[2])
    return None


def _recorded(path: Path) -> Config:
    if not (path / "config.json").is_file():
        raise ValueError(f"found no config.json in {path}, expected the folder of a run")
    if not (path / STATES).is_dir():
        raise ValueError(f"found no {STATES}/ in {path}, expected an unfinished run")
    source = str(path / "config.json")
    recorded = read_json(path / "config.json").get("config")
    if not isinstance(recorded, dict):
        raise ValueError(f"{source}: found no config, expected one")
    return dataclasses.replace(config_from_dict(recorded, source=source), run_dir=path)
