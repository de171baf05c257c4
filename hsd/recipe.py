"""From a TOML recipe and command-line arguments to a configuration.

A recipe may name another as its `base` and then holds only what differs from it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import itertools
import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import pydantic
import tyro

from hsd.config import Config

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

OWN_OPTIONS = "[--dry-run] [--replay FILE] [--profile]"

Arguments = TypeVar("Arguments")


def load_recipe(path: Path) -> Config:
    """A recipe and its bases as a configuration.

    Raises:
        FileNotFoundError: the recipe or a base of it does not exist.
        ValueError: one line per fault: an unknown key, a wrong type, an impossible value.
    """
    return config_from_dict(_read(path, ()), source=str(path))


def config_from_dict(values: Mapping[str, Any], *, source: str) -> Config:
    """A configuration from nested tables; what they leave out has its default."""
    values = dict(values)
    task = values.get("task", {})
    if isinstance(task, dict):
        values["task"] = {"source": "arithmetic", **task}
    adapter = pydantic.TypeAdapter(Config)
    try:
        # As JSON, strict validation still takes a string for a path and a list for a tuple.
        # A date of TOML, which no key takes, becomes a string.
        text = json.dumps(values, default=str)
        return adapter.validate_json(text, strict=True, extra="forbid")
    except pydantic.ValidationError as error:
        raise ValueError(f"{source}: {'; '.join(map(_fault, error.errors()))}") from None


def to_dict(config: Config) -> dict[str, Any]:
    """Nested tables of JSON values: the inverse of `config_from_dict`."""
    values: dict[str, Any] = json.loads(pydantic.TypeAdapter(Config).dump_json(config))
    return values


def parse_arguments(argv: Sequence[str], *, prog: str) -> tuple[Config, bool]:
    """RECIPE and overrides, such as `--seed 1 --optimizer.learning-rate 1e-5`.

    Returns:
        the configuration, and whether it is only to be shown (--dry-run).

    Exits with code 2 and one line on stderr where the arguments or the recipe are wrong.
    """
    words = list(argv)
    dry_run = "--dry-run" in words
    words = [word for word in words if word != "--dry-run"]
    if not words or words[0] in ("-h", "--help"):
        tyro.cli(Config, prog=f"{prog} RECIPE {OWN_OPTIONS}", args=["--help"])
    if words[0].startswith("-"):
        fail(f"RECIPE: found {words[0]!r}, expected the path of a recipe first")
    path = Path(words[0])
    try:
        recipe = load_recipe(path)
    except (ValueError, OSError) as error:
        fail(str(error))
    config = parse_flags(Config, words[1:], prog=f"{prog} {path}", default=recipe)
    if config.run_dir is None:
        name = Path("runs") / f"{path.stem}-seed{config.seed}"
        config = dataclasses.replace(config, run_dir=_unused(name))
    return config, dry_run


def parse_flags(
    kind: type[Arguments], words: Sequence[str], *, prog: str, default: Arguments | None = None
) -> Arguments:
    """Command-line arguments as a dataclass; `default` holds what they leave out.

    Exits with code 2 and one line on stderr where they are wrong, with 0 after --help.
    """
    options: Any = {"prog": prog, "args": words, "config": (tyro.conf.AvoidSubcommands,)}
    if default is not None:
        options["default"] = default
    if "-h" in words or "--help" in words:
        tyro.cli(kind, **options)
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            parsed: Arguments = tyro.cli(kind, **options)
    except SystemExit:
        # tyro's box holds a title, the fault and help, with rules between them.
        box = re.sub("[│╭╮╰╯]", " ", said.getvalue())
        fail(re.split("[─-]{9,}", f"{box}{'-' * 9}", maxsplit=2)[1])
    return parsed


def _unused(path: Path) -> Path:
    candidates = itertools.chain([path], (Path(f"{path}-{n}") for n in itertools.count(2)))
    return next(candidate for candidate in candidates if not candidate.exists())


def fail(message: str) -> NoReturn:
    """Ends the program: one line on stderr, exit code 2."""
    print_error(message)
    raise SystemExit(2)


def print_error(message: str) -> None:
    """One line on stderr."""
    print(f"hsd: error: {' '.join(message.split())}", file=sys.stderr)


def _read(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    """The tables of a recipe, over those of its base."""
    if path.resolve() in seen:
        raise ValueError(f"{path}: base: found a recipe that is its own base")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such recipe")
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: {error}") from None
    base = values.pop("base", None)
    if base is None:
        return values
    if not isinstance(base, str):
        raise ValueError(f"{path}: base: found {base!r}, expected the path of a recipe")
    return _merged(_read(path.parent / base, (*seen, path.resolve())), values)


def _merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        own = merged.get(key)
        if isinstance(value, dict) and isinstance(own, dict):
            # A table that names another source than its base is of another kind: nothing is kept.
            same_kind = value.get("source", own.get("source")) == own.get("source")
            value = _merged(own if same_kind else {}, value)
        merged[key] = value
    return merged


def _fault(error: Mapping[str, Any]) -> str:
    """One fault of a recipe as `key: found ..., expected ...`."""
    sources = ("arithmetic", "jsonl", "reasoning_gym")
    key = ".".join(str(part) for part in error["loc"] if part not in sources)
    if error["type"] == "value_error":
        return str(error["ctx"]["error"])
    if error["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        return f"{key}: unknown key"
    return f"{key}: found {error['input']!r}: {error['msg']}"
