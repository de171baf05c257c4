"""From a TOML recipe and command-line arguments to a configuration.

A recipe may name another as its `base` and then holds only what differs from it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import io
import itertools
import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar, get_args

import pydantic
import tyro

from hsd.config import Config
from hsd.data.task_configs import TaskConfig
from hsd.rollout.config import EngineConfig

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Arguments = TypeVar("Arguments")


def load_recipe(path: Path, root: Path | None = None) -> Config:
    """A recipe and its bases as a configuration.

    Args:
        root: takes the place of the recipe that the chain of bases ends in; the base of a recipe
            that has none.

    Raises:
        FileNotFoundError: the recipe or a base of it does not exist.
        ValueError: one line per fault: an unknown key, a wrong type, an impossible value.
    """
    return config_from_dict(_read(path, (), root), source=str(path))


def recorded_config(path: Path) -> Config:
    """The configuration in the config.json of a run.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds no configuration.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file, expected a run folder of hsd train")
    try:
        return config_from_dict(json.loads(path.read_bytes())["config"], source=str(path))
    except (json.JSONDecodeError, UnicodeDecodeError, TypeError, KeyError):
        raise ValueError(f"{path}: found no configuration, expected hsd train's file") from None


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


def parse_arguments(argv: Sequence[str], *, prog: str, options: str = "") -> Config:
    """RECIPE and overrides, such as `--seed 1 --optimizer.learning-rate 1e-5`.

    `--base FILE` puts another recipe in the place of the one that RECIPE's chain of bases ends in:
    the same method with another model, task and sizes.

    Args:
        options: of the command itself, for its help.

    Exits with code 2 and one line on stderr where the arguments or the recipe are wrong.
    """
    words = list(argv)
    if words and words[0] in ("-h", "--help"):
        tyro.cli(Config, prog=f"{prog} RECIPE [--base RECIPE] {options}".rstrip(), args=["--help"])
    if not words or words[0].startswith("-"):
        found = repr(words[0]) if words else "none"
        fail(f"RECIPE: found {found}, expected the path of a recipe first ({prog} --help)")
    path, root = Path(words[0]), _take_base(words)
    try:
        recipe = load_recipe(path, root)
    except (ValueError, OSError) as error:
        fail(str(error))
    _require_source(words, recipe.task.source)
    config = parse_flags(Config, words[1:], prog=f"{prog} {path}", default=recipe)
    if config.run_dir is None:
        stem = path.stem if root is None else f"{path.stem}-{root.stem}"
        name = Path("runs") / f"{stem}-seed{config.seed}"
        config = dataclasses.replace(config, run_dir=_unused(name))
    return config


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
        fail(_fault_of_flags(said.getvalue()))
    return parsed


def _fault_of_flags(said: str) -> str:
    """The fault in tyro's box, which holds a title, the fault and help, with rules between them."""
    box = re.sub("[│╭╮╰╯]", " ", said)
    fault, *rest = re.split("[─-]{9,}", f"{box}{'-' * 9}")[1:]
    if "Unrecognized options" not in fault:
        return fault
    near = dict.fromkeys(re.findall(r"^ +(--[\w.-]+)", "\n".join(rest), flags=re.MULTILINE))
    near.pop("--help", None)  # the last line of the box, where it is broken
    return f"{fault.strip()}, expected {' or '.join(near) or 'options that --help shows'}"


def take_engine_flags(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Divides arguments into `--engine.NAME VALUE ...`, and the others."""
    flags: list[str] = []
    others: list[str] = []
    chosen = others
    for word in argv:
        if word.startswith("--"):
            chosen = flags if word.startswith("--engine.") else others
        chosen.append(word)
    return flags, others


def with_engine_flags(config: Config, flags: Sequence[str], *, prog: str) -> Config:
    """A configuration with an engine as the flags of `take_engine_flags` change it.

    Exits with code 2 and one line on stderr where they are wrong.
    """

    @dataclasses.dataclass(frozen=True)
    class Flags:
        engine: EngineConfig

    engine = parse_flags(Flags, flags, prog=prog, default=Flags(config.engine)).engine
    return dataclasses.replace(config, engine=engine)


def _take_base(words: list[str]) -> Path | None:
    """Takes `--base FILE` or `--base=FILE` out of the arguments."""
    for position, word in enumerate(words):
        if word.startswith("--base="):
            del words[position]
            return Path(word.removeprefix("--base="))
        if word == "--base":
            given = words[position + 1 : position + 2]
            if not given:
                fail("--base: found nothing behind it, expected the path of a recipe")
            del words[position : position + 2]
            return Path(given[0])
    return None


def _require_source(words: Sequence[str], source: str) -> None:
    """Fails where --task.source names another kind of task: flags cannot replace a table."""
    for word, value in zip(words, [*words[1:], ""], strict=True):
        if word == "--task.source" and value != source:
            fail(
                f"--task.source: found {value!r}, the recipe has {source!r}; expected a base with "
                "such a task, as in --base recipes/own_data.toml, or a recipe of your own"
            )


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


def _read(path: Path, seen: tuple[Path, ...], root: Path | None = None) -> dict[str, Any]:
    """The tables of a recipe, over those of its base; `root` as in load_recipe."""
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
        if root is None:
            return values
        replaced = _read(root, ())
        return replaced if seen else _merged(replaced, values)
    if not isinstance(base, str):
        raise ValueError(f"{path}: base: found {base!r}, expected the path of a recipe")
    return _merged(_read(path.parent / base, (*seen, path.resolve()), root), values)


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
    parts = [str(part) for part in error["loc"]]
    if parts[:1] == ["task"]:
        del parts[1:2]  # its source, which is no key
    key = ".".join(parts)
    if error["type"] == "value_error":
        return str(error["ctx"]["error"])
    if error["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        known = _keys(error["loc"][:-1])
        near = difflib.get_close_matches(parts[-1], known, n=1) or known
        return f"{key}: unknown key, expected {' or '.join(near)}"
    return f"{key}: found {error['input']!r}: {error['msg']}"


def _keys(table: Sequence[str | int]) -> list[str]:
    """The keys of a table of the configuration; () is the recipe itself."""
    kind: Any = Config
    if table:
        kind = Config.__dataclass_fields__[str(table[0])].default_factory
    if len(table) > 1:  # a task and its source
        kind = next(each for each in get_args(TaskConfig) if each.source == table[1])
    return [field.name for field in dataclasses.fields(kind)]
