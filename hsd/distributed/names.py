"""Which weights of a model's files make up which weight of the model.

Mostly one makes one, under its name. Where transformers has renamed a weight since its files were
written, or has joined experts that files hold one by one, its own table of conversions says so.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Read = Callable[[str], Tensor]
"""Gives a weight of the files by its name."""


@dataclass(frozen=True, kw_only=True)
class Stored:
    """What files hold of one weight of a model.

    Attributes:
        names: in the files, of each part of the weight; without `experts` one part of one name.
        experts: joins the parts of experts, of which each part has a name; or None.
    """

    names: dict[str, list[str]] = field(default_factory=dict)
    experts: WeightConverter | None = None

    def all_names(self) -> list[str]:
        return [name for names in self.names.values() for name in names]

    def require_experts(self, name: str, count: int) -> None:
        """Raises ValueError unless the files hold each part of experts 0 to count - 1."""
        parts: Any = self.experts
        found = len(self.all_names())
        if found != count * len(parts.source_patterns):
            raise ValueError(
                f"model.name: found {found} weights of experts for {name}, expected "
                f"{len(parts.source_patterns)} of each of {count}"
            )
        for names in self.names.values():
            numbers = [_number(each) for each in names]
            if numbers != list(range(count)):
                shown = ", ".join(map(str, numbers))
                raise ValueError(
                    f"model.name: found experts {shown} for {name}, expected 0 to {count - 1}"
                )

    def expert(self, name: str, index: int, model: PreTrainedModel, read: Read) -> Tensor:
        """One expert's part of the weight `name`, (1, ...), from its weights in the files."""
        converter: Any = copy.deepcopy(self.experts)
        for pattern, names in self.names.items():
            converter.add_tensor(name, names[index], pattern, read(names[index]))
        (joined,) = converter.convert(name, model=model, config=model.config).values()
        tensor: Tensor = joined
        return tensor


def stored_weights(
    model: PreTrainedModel, expected: Collection[str], stored: Iterable[str]
) -> dict[str, Stored]:
    """What the files hold of each weight, of those that they hold.

    Args:
        expected: names of weights and buffers of the model.
        stored: names in the files.

    Raises:
        ValueError: one is none of the model's; or it would be converted in another way.
    """
    conversions = get_model_conversion_mapping(model)
    renamings = [each for each in conversions if isinstance(each, WeightRenaming)]
    converters = [each for each in conversions if isinstance(each, WeightConverter)]
    of_pattern = {pattern: each for each in converters for pattern in each.source_patterns}
    prefix, known = model.base_model_prefix, dict.fromkeys(expected, True)
    found: dict[str, Stored] = {}
    for name in sorted(stored, key=dot_natural_key):  # experts by their numbers
        own, pattern = rename_source_key(name, renamings, converters, prefix, known)
        if own not in known and name in known:
            own, pattern = name, None
        if own not in known:
            raise ValueError(f"model.name: found weight {name}, expected none of that name")
        converter = None if pattern is None else of_pattern[pattern]
        if converter is not None and not _joins_experts(converter):
            operations = ", ".join(map(repr, converter.operations))
            raise ValueError(
                f"sharding.mode: found weight {name}, which transformers makes {own} of by "
                f"{operations}; expected weights as the model has them, or experts one by one"
            )
        entry = found.setdefault(own, Stored(experts=converter))
        entry.names.setdefault(pattern or name, []).append(name)
    return found


def _number(name: str) -> int:
    """Of an expert, by the name of one of its weights."""
    return [int(word) for word in name.split(".") if word.isdigit()][-1]


def _joins_experts(converter: WeightConverter) -> bool:
    """Whether the weight is its experts', one after the other: they can be read one by one."""
    first, *others = converter.operations
    return (
        isinstance(first, MergeModulelist)
        and first.dim == 0
        and len(converter.target_patterns) == 1
        and all(getattr(each, "dim", 0) > 0 for each in others)
    )
