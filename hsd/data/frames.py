"""What a model's chat template writes around a user turn."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_TURN = "HSDUSERTURN"
# Chat templates call their thinking switch one of these; each ignores the other.
_SWITCHES = ("enable_thinking", "thinking")


@dataclass(frozen=True, kw_only=True)
class Frame:
    """The texts around a user turn.

    Attributes:
        head: before it, the system message in it.
        tail: behind it, up to where the response begins.
    """

    head: str
    tail: str


def chat_frame(
    tokenizer: PreTrainedTokenizerBase,
    *,
    system: str | None,
    thinking: bool | None = None,
    option: str = "thinking",
) -> Frame:
    """The frame of the tokenizer's chat template.

    It is rendered around a stand-in, so no question can steer the template's conditions.

    Args:
        system: the system message; None leaves it to the template.
        thinking: sets the template's thinking switch; None leaves it alone.
        option: what an error calls that argument.

    Raises:
        ValueError: the template does not show the user's turn exactly once, or thinking is given
            and the template writes the same for both values of enable_thinking.
    """
    if thinking is None:
        return _rendered(tokenizer, system, {})
    frames = {value: _rendered(tokenizer, system, _switched(value)) for value in (True, False)}
    if frames[True] == frames[False]:
        found = f"{thinking} for a chat template without a thinking switch"
        raise ValueError(f"{option}: found {found} ({' or '.join(_SWITCHES)}), expected none")
    return frames[thinking]


def _switched(value: bool) -> dict[str, Any]:
    return dict.fromkeys(_SWITCHES, value)


def _rendered(
    tokenizer: PreTrainedTokenizerBase, system: str | None, switches: dict[str, Any]
) -> Frame:
    messages = [] if system is None else [{"role": "system", "content": system}]
    rendered: Any = tokenizer.apply_chat_template(
        [*messages, {"role": "user", "content": _TURN}],
        add_generation_prompt=True,
        tokenize=False,
        **switches,
    )
    parts = str(rendered).split(_TURN)
    if len(parts) != 2:
        found = f"the user's turn {len(parts) - 1} times"
        raise ValueError(f"tokenizer.chat_template: found {found}, expected it exactly once")
    return Frame(head=parts[0], tail=parts[1])
