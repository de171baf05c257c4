import os
import time

from math_pairs import PAIRS

from hsd.data.questions import Question
from hsd.data.verify import Outcome
from hsd.data.verify.math_answer import equivalent, last_boxed
from hsd.data.verify.pool import VerifierPool

EXPECTED = {
    "c": {Outcome.CORRECT},
    "w": {Outcome.WRONG},
    "b": {Outcome.WRONG, Outcome.TIMEOUT, Outcome.ERROR},
}


def test_pairs_of_answers_have_the_outcome_of_a_mathematician() -> None:
    assert len(set(PAIRS)) >= 200
    items = [
        (
            Question(id=str(number), prompt="p", answer=answer),
            text[1:] if text.startswith("~") else f"\\boxed{{{text}}}",
        )
        for number, (answer, text, _) in enumerate(PAIRS)
    ]
    with VerifierPool(equivalent, workers=2, timeout=1.5) as pool:
        outcomes = pool.judge(items)
    odd = [
        (pair, outcome)
        for pair, outcome in zip(PAIRS, outcomes, strict=True)
        if outcome not in EXPECTED[pair[2]]
    ]
    assert odd == []
    assert pool.counts[Outcome.TIMEOUT] >= 5  # the powers do hang, and the others still finished


def test_a_thousand_answers_with_five_percent_hangs_in_bounded_time() -> None:
    hang, limit, workers = r"\boxed{9^{9^{9^{9}}}}", 2.0, 4
    texts = [hang if n % 20 == 7 else rf"\boxed{{\frac{{{2 * n}}}{{2}}}}" for n in range(1000)]
    items = [
        (Question(id=str(n), prompt="p", answer=str(n + n % 2)), text)
        for n, text in enumerate(texts)
    ]
    with VerifierPool(equivalent, workers=workers, timeout=limit) as pool:
        started = time.monotonic()
        outcomes = pool.judge(items)
        assert time.monotonic() - started < 50 * limit / workers + 60
    for n, (text, outcome) in enumerate(zip(texts, outcomes, strict=True)):
        right = Outcome.WRONG if n % 2 else Outcome.CORRECT
        assert outcome is not Outcome.CORRECT if text == hang else outcome is right, n
    assert pool.counts[Outcome.TIMEOUT] + pool.counts[Outcome.ERROR] >= 40


def test_the_last_box_counts_with_its_braces() -> None:
    assert last_boxed(r"\boxed{1} and \boxed{\frac{a}{b}} end") == r"\frac{a}{b}"
    assert last_boxed(r"\boxed{\{1,2\}}") == r"\{1,2\}"
    assert last_boxed("none") is None
    assert last_boxed(r"\boxed{1} \boxed{2") == ""


def test_text_is_never_run_as_python(tmp_path: object) -> None:
    marker = f"{tmp_path}/marker"
    question = Question(id="q", prompt="p", answer="5")
    for attack in (f"__import__('os').mkdir('{marker}')", f"exec(\"open('{marker}','w')\")"):
        with VerifierPool(equivalent, workers=1, timeout=3) as pool:
            assert pool.judge([(question, f"\\boxed{{{attack}}}")]) == [Outcome.WRONG]
    assert not os.path.exists(marker)
