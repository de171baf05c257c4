"""The built-in task family: integer arithmetic with worked solutions, at a chosen difficulty."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Literal

from hsd.data.questions import Question

ArithmeticKind = Literal["sum", "multiply_add", "difference_sum"]


def generate(
    *, kind: ArithmeticKind, terms: int, digits: int, seed: int, count: int
) -> list[Question]:
    """Draws distinct questions; a longer draw with the same seed begins with the shorter one.

    Args:
        kind: "sum" is a + b + c; "multiply_add" is a x b + c, with b from 2 to 9; "difference_sum"
            mixes + and - and has at least one minus, so that results may be negative.
        terms: how many terms are added (the product counts as one), at least 2.
        digits: decimal digits of every number but b, at least 1; there is no leading zero.
        seed: fixes the draw.
        count: how many questions.

    Raises:
        ValueError: there are fewer than count distinct questions of this difficulty.
    """
    size = space_size(kind=kind, terms=terms, digits=digits)
    if count > size:
        raise ValueError(
            f"count: found {count}, expected at most {size}: there are no more distinct questions "
            f"of kind {kind!r} with {terms} terms of {digits} digits"
        )
    rng = random.Random(f"arithmetic/{kind}/{terms}/{digits}/{seed}")
    chosen: dict[int, None] = {}  # an ordered set: the order of the draw is the order of questions
    while len(chosen) < count:
        chosen[rng.randrange(size)] = None
    return [_BUILDERS[kind](index, terms, digits) for index in chosen]


def space_size(*, kind: ArithmeticKind, terms: int, digits: int) -> int:
    """How many distinct questions there are of this difficulty (arguments as in generate)."""
    operands: int = _operand_count(digits) ** terms
    if kind == "multiply_add":
        return operands * _FACTORS
    if kind == "difference_sum":
        signs: int = 2 ** (terms - 1) - 1
        return operands * signs
    return operands


_FACTORS = 8  # the one-digit factors 2..9


def _operand_count(digits: int) -> int:
    return 9 * _lowest_operand(digits)


def _lowest_operand(digits: int) -> int:
    lowest: int = 10 ** (digits - 1)
    return lowest


def _operands(index: int, terms: int, digits: int) -> tuple[list[int], int]:
    """Reads index as numbers in mixed radix: the operands, and what is left of index."""
    operands = []
    for _ in range(terms):
        index, digit = divmod(index, _operand_count(digits))
        operands.append(digit + _lowest_operand(digits))
    return operands, index


def _sum(index: int, terms: int, digits: int) -> Question:
    operands, _ = _operands(index, terms, digits)
    steps = [("+", operand) for operand in operands[1:]]
    return _chain("sum", str(operands[0]), operands[0], steps)


def _multiply_add(index: int, terms: int, digits: int) -> Question:
    operands, rest = _operands(index, terms, digits)
    product = f"{operands[0]} x {rest + 2}"
    steps = [("+", operand) for operand in operands[1:]]
    return _chain("multiply_add", product, operands[0] * (rest + 2), steps)


def _difference_sum(index: int, terms: int, digits: int) -> Question:
    operands, rest = _operands(index, terms, digits)
    minus = rest + 1  # one bit a sign; 0, a plain sum, is left out
    steps = [
        ("-" if minus >> position & 1 else "+", operand)
        for position, operand in enumerate(operands[1:])
    ]
    return _chain("difference_sum", str(operands[0]), operands[0], steps)


def _chain(kind: str, first: str, value: int, steps: list[tuple[str, int]]) -> Question:
    expression = first
    worked = [] if first == str(value) else [f"{first} = {value}"]
    for sign, operand in steps:
        result = value + operand if sign == "+" else value - operand
        worked.append(f"{value} {sign} {operand} = {result}")
        expression += f" {sign} {operand}"
        value = result
    return Question(
        id=f"{kind}:{expression.replace(' ', '')}",
        prompt=f"Compute {expression}.",
        answer=str(value),
        solution=f"{', '.join(worked)}.",
    )


_BUILDERS: dict[ArithmeticKind, Callable[[int, int, int], Question]] = {
    "sum": _sum,
    "multiply_add": _multiply_add,
    "difference_sum": _difference_sum,
}
