"""The public names and signatures of hsd_kernels, frozen: what others build against."""

from __future__ import annotations

import dataclasses
import inspect
from pathlib import Path

import hsd_kernels

FROZEN = Path(__file__).with_name("public_api.txt")


def described(name: str) -> list[str]:
    """A name with its signature, or its fields and properties."""
    value = getattr(hsd_kernels, name)
    if inspect.ismodule(value):
        return [f"module {name}"]
    if dataclasses.is_dataclass(value):
        lines = [f"  {field.name}: {field.type}" for field in dataclasses.fields(value)]
        lines += [f"  {n} (property)" for n, v in vars(value).items() if isinstance(v, property)]
        return [f"class {name}", *lines]
    if inspect.isclass(value):
        return [f"class {name}"]
    signature = inspect.signature(value)
    parameters = [f"  {parameter}" for parameter in signature.parameters.values()]
    return [f"def {name}", *parameters, f"  -> {signature.return_annotation}"]


def test_names_and_signatures_are_those_on_file():
    found = "\n".join(line for name in sorted(hsd_kernels.__all__) for line in described(name))
    assert found + "\n" == FROZEN.read_text(encoding="utf-8"), (
        "the public API changed; if meant, write this to public_api.txt and the CHANGELOG:\n"
        + found
    )


def test_every_public_name_has_a_docstring():
    assert all(getattr(hsd_kernels, name).__doc__ for name in hsd_kernels.__all__)
