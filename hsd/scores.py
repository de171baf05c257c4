"""What an evaluation says: avg@k, pass@k, majority and greedy accuracy, with their intervals."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hsd.data.verify.match import last_number

_NGRAM = 4  # tokens


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Outcomes of n samples on each of Q questions.

    Attributes:
        correct: (Q, n) bool.
        majority: (Q,) bool, whether the most frequent final answer is correct.
        lengths: (Q, n) tokens.
        truncated: (Q, n) bool, cut at the longest length.
        errors: (Q, n) bool, samples that the verifier could not judge; they are not correct.
        repetition: (Q, n) share of 4-grams of tokens that occurred before in the sample.
        samples: (prompt, answer, response, correct) of the first completion of some questions.
    """

    correct: Tensor
    majority: Tensor
    lengths: Tensor
    truncated: Tensor
    errors: Tensor
    repetition: Tensor
    samples: Sequence[tuple[str, str, str, bool]]

    @property
    def average(self) -> float:
        """avg@n: the expected accuracy of one sample."""
        return float(self.correct.double().mean())

    @property
    def average_interval(self) -> float:
        """Half width of avg@n's 95 % interval, over questions."""
        return half_width(self.correct.double().mean(1))

    def pass_at(self, k: int) -> tuple[float, float]:
        """pass@k for any k <= n, and the half width of its 95 % interval, over questions."""
        each = pass_at_k(self.correct, k)
        return float(each.mean()), half_width(each)

    @property
    def majority_accuracy(self) -> tuple[float, float]:
        """Accuracy of the most frequent answer, and the half width of its interval."""
        each = self.majority.double()
        return float(each.mean()), half_width(each)

    def record(self) -> dict[str, Any]:
        """Every number for a line of JSON; pass@k at the powers of two up to n, and at n."""
        samples = self.correct.shape[1]
        powers = {2**power for power in range(samples.bit_length())} | {samples}
        majority, majority_interval = self.majority_accuracy
        passed, pass_interval = self.pass_at(samples)
        return {
            "samples": samples,
            "questions": len(self.correct),
            "avg": self.average,
            "avg_interval": self.average_interval,
            "pass": passed,
            "pass_interval": pass_interval,
            "pass_at": {str(k): self.pass_at(k)[0] for k in sorted(powers)},
            "majority": majority,
            "majority_interval": majority_interval,
            "length": float(self.lengths.double().mean()),
            "truncated_share": float(self.truncated.double().mean()),
            "error_share": float(self.errors.double().mean()),
            "repetition": float(self.repetition.double().mean()),
            "correct_per_question": self.correct.sum(1).tolist(),
        }


def pass_at_k(correct: Tensor, k: int) -> Tensor:
    """(Q,) unbiased estimate of the chance that one of k samples is correct, from n >= k.

    1 - C(n - c, k) / C(n, k), c of n correct (arXiv 2107.03374, equation 1).

    Args:
        correct: (Q, n) bool.

    Raises:
        ValueError: k is not from 1 to n.
    """
    samples = correct.shape[1]
    if not 1 <= k <= samples:
        raise ValueError(f"k: found {k}, expected 1 to {samples}, the samples of a question")
    whole = math.comb(samples, k)
    values = [1 - math.comb(samples - int(c), k) / whole for c in correct.sum(1)]
    return torch.tensor(values, dtype=torch.float64)


def majority_correct(answers: Sequence[Hashable], correct: Sequence[bool]) -> bool:
    """Whether the most frequent answer is correct; of equally frequent ones the first to come.

    Args:
        answers: final answers of a question's samples; equal ones vote together.
        correct: of each sample. The verdict of the first sample with the answer counts.
    """
    winner, _ = Counter(answers).most_common(1)[0]
    return bool(correct[list(answers).index(winner)])


def final_answer(text: str) -> str:
    r"""What a response votes for: its last \boxed{...}, else its last number, else all of it."""
    boxed = _last_boxed(text)
    if boxed is not None:
        return "".join(boxed.split())
    number = last_number(text)
    return " ".join(text.split()) if number is None else str(number)


def _last_boxed(text: str) -> str | None:
    """The content of the last \\boxed{...} whose braces are balanced."""
    for match in reversed(list(re.finditer(r"\\boxed\s*\{", text))):
        depth = 1
        for end in range(match.end(), len(text)):
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            if depth == 0:
                return text[match.end() : end]
    return None


def repetition(token_ids: Sequence[int]) -> float:
    """The share of 4-grams that occurred before in the same response; 0 if it is shorter."""
    grams = [tuple(token_ids[i : i + _NGRAM]) for i in range(len(token_ids) - _NGRAM + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def half_width(per_question: Tensor) -> float:
    """Half width of the normal 95 % interval of a mean over questions, (Q,) -> float."""
    count = per_question.numel()
    return 1.96 * float(per_question.std()) / math.sqrt(count) if count > 1 else math.inf


def gain(before: Evaluation, after: Evaluation) -> tuple[float, float]:
    """Change of avg@n and the half width of its 95 % interval, paired by question."""
    difference = after.correct.double().mean(1) - before.correct.double().mean(1)
    return float(difference.mean()), half_width(difference)
