"""avg@k, pass@k and their intervals; `hsd eval`."""

from __future__ import annotations

import itertools
import json
import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from hsd.completions import Completions
from hsd.data.contexts import ContextBuilder, ContextConfig
from hsd.data.questions import Question
from hsd.data.verify import Outcome
from hsd.distributed.process import World
from hsd.evaluate import accuracy_table, evaluate
from hsd.rollout.protocol import Rollout, Sampling
from hsd.scores import (
    Evaluation,
    final_answer,
    gain,
    half_width,
    majority_correct,
    pass_at_k,
    repetition,
)

RunHsd = Callable[..., int]


def outcome(correct: Sequence[Sequence[int]]) -> Evaluation:
    table = torch.tensor(correct).bool()
    nothing = torch.zeros(table.shape)
    return Evaluation(
        correct=table,
        majority=table.float().mean(1) > 0.5,
        lengths=nothing,
        truncated=nothing.bool(),
        errors=nothing.bool(),
        repetition=nothing,
        samples=[],
    )


def test_avg_and_pass_at_all_samples() -> None:
    result = outcome([[1, 1, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0]])
    assert result.average == pytest.approx((0.5 + 0.0 + 1.0 + 0.25) / 4)
    assert result.pass_at(4)[0] == pytest.approx(3 / 4)


def test_intervals_are_over_questions_not_samples() -> None:
    result = outcome([[1, 1, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0]])
    mean = 1.75 / 4
    variance = sum((share - mean) ** 2 for share in (0.5, 0.0, 1.0, 0.25)) / 3
    assert result.average_interval == pytest.approx(1.96 * math.sqrt(variance / 4))
    variance = (3 * 0.25**2 + 0.75**2) / 3
    assert result.pass_at(4)[1] == pytest.approx(1.96 * math.sqrt(variance / 4))


def test_pass_at_k_is_the_share_of_subsets_with_a_success() -> None:
    outcomes = [[1, 0, 0, 1, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 0], [0, 0, 1, 0, 0]]
    for k in range(1, 6):
        found = pass_at_k(torch.tensor(outcomes).bool(), k)
        for estimate, row in zip(found.tolist(), outcomes, strict=True):
            subsets = list(itertools.combinations(row, k))
            assert estimate == pytest.approx(sum(any(each) for each in subsets) / len(subsets))


def test_pass_at_one_is_avg() -> None:
    result = outcome([[1, 0, 0], [1, 1, 0]])
    assert result.pass_at(1)[0] == pytest.approx(result.average)


def test_pass_at_k_is_unbiased_for_the_chance_of_a_success_in_k() -> None:
    generator = torch.Generator().manual_seed(0)
    p, k = 0.3, 3
    estimates = pass_at_k(torch.rand((20_000, 8), generator=generator) < p, k)
    assert float(estimates.mean()) == pytest.approx(1 - (1 - p) ** k, abs=0.01)


@pytest.mark.parametrize("k", [0, 3, -1])
def test_pass_at_k_refuses_more_than_there_are_samples(k: int) -> None:
    with pytest.raises(ValueError, match="expected 1 to 2"):
        pass_at_k(torch.ones((4, 2)).bool(), k)


@pytest.mark.parametrize(
    ("answers", "correct", "expected"),
    [
        (["3", "4", "3"], [True, False, True], True),
        (["3", "4", "4"], [True, False, False], False),
        (["3", "4"], [True, False], True),
        (["4", "3"], [False, True], False),
        (["5"], [False], False),
    ],
)
def test_the_majority_is_the_most_frequent_answer_and_the_first_of_equals(
    answers: list[str], correct: list[bool], expected: bool
) -> None:
    assert majority_correct(answers, correct) is expected


@pytest.mark.parametrize("samples", [1, 3, 5, 9])
def test_the_majority_of_two_answers_is_a_binomial_tail(samples: int) -> None:
    """Condorcet: with chance p of the right answer, sum over c > n/2 of C(n,c) p^c (1-p)^(n-c)."""
    p, found = 0.6, 0.0
    for right in itertools.product([True, False], repeat=samples):
        chance = p ** sum(right) * (1 - p) ** (samples - sum(right))
        found += chance * majority_correct(["7" if each else "8" for each in right], right)
    tail = (
        math.comb(samples, c) * p**c * (1 - p) ** (samples - c)
        for c in range(samples // 2 + 1, samples + 1)
    )
    assert found == pytest.approx(sum(tail))


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("so 3, then 4.0", "4"),
        (r"\boxed{1} or \boxed{\frac{1}{ 2}} of 7", r"\frac{1}{2}"),
        (r"\boxed{8} and \boxed{open", "8"),
        ("  no  number ", "no number"),
    ],
)
def test_final_answer(text: str, answer: str) -> None:
    assert final_answer(text) == answer


@pytest.mark.parametrize(
    ("token_ids", "share"),
    [([1, 2, 3], 0.0), ([1, 2, 3, 4, 5], 0.0), ([1] * 7, 3 / 4), ([1, 2, 3, 4, 1, 2, 3, 4], 1 / 5)],
)
def test_repetition_is_the_share_of_4_grams_seen_before(token_ids: list[int], share: float) -> None:
    assert repetition(token_ids) == pytest.approx(share)


def test_one_question_has_no_interval() -> None:
    assert half_width(torch.ones(1)) == math.inf


def test_gain_is_paired_by_question() -> None:
    before = outcome([[0, 0], [1, 1], [0, 1]])
    after = outcome([[0, 1], [1, 1], [1, 1]])
    change, interval = gain(before, after)
    assert change == pytest.approx((0.5 + 0.0 + 0.5) / 3)
    variance = (2 * (0.5 - 1 / 3) ** 2 + (1 / 3) ** 2) / 2
    assert interval == pytest.approx(1.96 * math.sqrt(variance / 3))


def test_an_equal_change_of_every_question_is_certain() -> None:
    change, interval = gain(outcome([[0, 0], [1, 0]]), outcome([[1, 0], [1, 1]]))
    assert (change, interval) == (0.5, 0.0)


def test_the_table_shows_both_with_their_intervals() -> None:
    console = Console(width=100, record=True, quiet=False)
    with console.capture() as shown:
        console.print(accuracy_table([("before", outcome([[1, 0], [0, 0]]))], title="held-out"))
    text = shown.get()
    assert "avg@2" in text and "pass@2" in text
    assert "0.250 ± 0.490" in text and "0.500 ± 0.980" in text


class ScriptedEngine:
    """Answers with the question's own number, but for a question's first `wrong` samples."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, wrong: int) -> None:
        self._tokenizer, self._wrong = tokenizer, wrong
        self.seeds: list[int] = []

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        seeds: Sequence[int],
        group_size: int,
        sampling: Sampling,
    ) -> list[list[Rollout]]:
        self.seeds += seeds
        groups = []
        for prompt in prompts:
            number = "".join(filter(str.isdigit, self._tokenizer.decode(prompt)))
            texts = ["none" if i < self._wrong else number for i in range(group_size)]
            groups.append([self._rollout(text) for text in texts])
        return groups

    def _rollout(self, text: str) -> Rollout:
        ids = tuple(self._tokenizer(text)["input_ids"])
        return Rollout(
            token_ids=ids,
            logprobs=(0.0,) * len(ids),
            loss_mask=(True,) * len(ids),
            finish_reason="stop",
            policy_version=0,
        )

    def update_weights(self, model: Any, *, version: int) -> None:
        raise NotImplementedError


class OneOfTwo(World):
    """A rank whose sums are its own share."""

    def sum_(self, values: Tensor) -> Tensor:
        return values


@pytest.fixture
def evaluated(tokenizer: PreTrainedTokenizerFast) -> Callable[..., Evaluation]:
    def run(
        engine: ScriptedEngine,
        world: World,
        questions: int = 5,
        seed: int = 0,
        shown: int = 2,
        **options: Any,
    ) -> Evaluation:
        return evaluate(
            engine,
            tokenizer,
            ContextBuilder(tokenizer, ContextConfig()),
            [Question(id=f"q{n}", prompt=f"Say {n}.", answer=str(n)) for n in range(questions)],
            lambda items: [
                Outcome.CORRECT if text == question.answer else Outcome.WRONG
                for question, text in items
            ],
            sampling=Sampling(max_new_tokens=4),
            samples=3,
            seed=seed,
            world=world,
            shown=shown,
            **options,
        )

    return run


def test_every_sample_is_verified_against_its_own_question(
    evaluated: Callable[..., Evaluation], tokenizer: PreTrainedTokenizerFast
) -> None:
    result = evaluated(ScriptedEngine(tokenizer, wrong=1), World(rank=0, size=1))
    assert result.correct.tolist() == [[False, True, True]] * 5
    assert result.samples == [("Say 0.", "0", "none", False), ("Say 1.", "1", "none", False)]
    assert result.lengths.tolist() == [[4, 1, 1]] * 5
    assert result.majority.tolist() == [True] * 5


def test_samples_are_drawn_with_a_seed_of_the_run_and_the_question(
    evaluated: Callable[..., Evaluation], tokenizer: PreTrainedTokenizerFast
) -> None:
    seeds = []
    for seed in (0, 0, 1):
        engine = ScriptedEngine(tokenizer, wrong=0)
        evaluated(engine, World(rank=0, size=1), seed=seed)
        seeds.append(engine.seeds)
    assert seeds[0] == seeds[1]
    assert len({*seeds[0], *seeds[2]}) == 10


def test_ranks_cover_the_questions_between_them(
    evaluated: Callable[..., Evaluation], tokenizer: PreTrainedTokenizerFast
) -> None:
    engines = [ScriptedEngine(tokenizer, wrong=0) for _ in range(2)]
    shares = [
        evaluated(engine, OneOfTwo(rank=rank, size=2)).correct
        for rank, engine in enumerate(engines)
    ]
    assert [share.any(1).tolist() for share in shares] == [
        [True, False, True, False, True],
        [False, True, False, True, False],
    ]
    whole = ScriptedEngine(tokenizer, wrong=0)
    evaluated(whole, World(rank=0, size=1))
    assert sorted(engines[0].seeds + engines[1].seeds) == sorted(whole.seeds)


def test_eval_repeats_the_last_evaluation_of_a_run(
    trained_run: Path, tmp_path: Path, run_hsd: RunHsd, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--samples", 2, "--show-samples", 1, "--output", tmp_path]
    assert run_hsd("eval", trained_run, *flags) == 0
    out = capsys.readouterr().out
    last = json.loads((trained_run / "metrics.jsonl").read_text().splitlines()[-1])
    assert f"{last['avg']:.3f} ± {last['avg_interval']:.3f}" in out
    assert f"{last['pass']:.3f} ± {last['pass_interval']:.3f}" in out
    assert f"{last['majority']:.3f} ± {last['majority_interval']:.3f}" in out
    assert "Draw 16." in out


def test_eval_takes_another_model_split_and_limit(
    trained_run: Path,
    model_directory: Path,
    tmp_path: Path,
    run_hsd: RunHsd,
    capsys: pytest.CaptureFixture[str],
) -> None:
    flags = [
        "--output",
        tmp_path,
        "--model",
        model_directory,
        "--split",
        "train",
        "--limit",
        "3",
        "--temperature",
        "0",
    ]
    assert run_hsd("eval", trained_run, "--samples", "1", *flags) == 0
    out = capsys.readouterr().out
    assert "train questions, temperature 0" in out
    assert " 3 │" in out and "0.000" in out


def test_eval_adds_a_folder_to_the_run_and_leaves_the_rest(
    trained_run: Path, tmp_path: Path, run_hsd: RunHsd
) -> None:
    run = shutil.copytree(trained_run, tmp_path / "run")
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}
    assert run_hsd("eval", run, "--samples", 1) == 0
    after = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}
    assert {path: after[path] for path in before} == before
    assert {path.parent for path in after.keys() - before.keys()} == {run / "evaluations"}


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_eval_keeps_every_completion(trained_run: Path, tmp_path: Path, run_hsd: RunHsd) -> None:
    flags = ["--samples", 3, "--greedy", "--output", tmp_path / "out"]
    assert run_hsd("eval", trained_run, *flags) == 0
    files = sorted((tmp_path / "out").glob("heldout-*.jsonl"), key=lambda file: file.stat().st_size)
    counts = []
    for file in files:
        settings, *questions = lines(file)
        counts.append((settings["settings"]["temperature"], len(questions)))
        record = json.loads(file.with_suffix(".json").read_text())
        for question, correct in zip(questions, record["correct_per_question"], strict=True):
            outcomes = [each["outcome"] for each in question["completions"]]
            assert len(outcomes) == settings["settings"]["samples"]
            assert outcomes.count("correct") == correct
    assert counts == [(0.0, 4), (1.0, 4)]


class Killed(Exception):
    pass


class MortalEngine(ScriptedEngine):
    """Dies in its third call."""

    def generate(self, prompts: Sequence[Sequence[int]], **options: Any) -> list[list[Rollout]]:
        if len(self.seeds) >= 2:
            raise Killed
        return super().generate(prompts, **options)


@pytest.mark.parametrize("broken_end", ["", '{"question": "q2", "compl'])
def test_a_killed_evaluation_continues_where_it_was(
    broken_end: str,
    evaluated: Callable[..., Evaluation],
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
) -> None:
    path, alone = tmp_path / "completions.jsonl", World(rank=0, size=1)
    mortal = MortalEngine(tokenizer, wrong=1)
    with pytest.raises(Killed):
        evaluated(mortal, alone, completions=Completions(path, {"n": 3}), questions_per_round=1)
    with path.open("a") as file:
        file.write(broken_end)
    engine = ScriptedEngine(tokenizer, wrong=1)
    result = evaluated(
        engine, alone, completions=Completions(path, {"n": 3}), questions_per_round=1
    )
    whole = ScriptedEngine(tokenizer, wrong=1)
    expected = evaluated(whole, alone)
    assert mortal.seeds + engine.seeds == whole.seeds
    assert torch.equal(result.correct, expected.correct)
    assert torch.equal(result.lengths, expected.lengths)
    assert [record["question"] for record in lines(path)[1:]] == [f"q{n}" for n in range(5)]


def test_completions_of_other_settings_are_not_continued(tmp_path: Path) -> None:
    Completions(tmp_path / "c.jsonl", {"n": 3}).close()
    with pytest.raises(ValueError, match="found another evaluation"):
        Completions(tmp_path / "c.jsonl", {"n": 4})


@pytest.mark.parametrize("line", ["{}", "[]", '{"question": "q", "completions": 3}'])
def test_a_line_that_holds_no_completions_is_named(line: str, tmp_path: Path) -> None:
    Completions(tmp_path / "c.jsonl", {"n": 3}).close()
    with (tmp_path / "c.jsonl").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(ValueError, match=r"c\.jsonl:2: found no completions"):
        Completions(tmp_path / "c.jsonl", {"n": 3})


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ("--samples 0", "samples: found 0"),
        ("--samples x", "--samples"),
        ("--temperature -1", "temperature: found -1"),
        ("--temperature nan", "temperature: found nan"),
        ("--temperature inf", "temperature: found inf"),
        ("--show-samples -1", "show-samples: found -1"),
        ("--temperature 0", "samples: found 8"),
        ("--limit 0", "limit: found 0"),
        ("--split validation", "split: found no question in validation"),
        ("--split test", "--split"),
        ("--model /no/such/model", "'/no/such/model'"),
    ],
)
def test_wrong_flags_of_eval_are_one_line(
    flags: str,
    named: str,
    trained_run: Path,
    run_hsd: RunHsd,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run_hsd("eval", trained_run, *flags.split()) == 2
    error = capsys.readouterr().err
    assert error.startswith("hsd: error: ") and error.count("\n") == 1
    assert named in error


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (None, "config.json: no such file"),
        ("{", "config.json: found no configuration"),
        ('{"config": 3}', "config.json: found no configuration"),
        ("[]", "config.json: found no configuration"),
        ('{"model_type": "llama"}', "config.json: found no configuration"),
        ('{"config": {"stepps": 3}}', "config.json: stepps: unknown key"),
        ('{"config": {}}', "checkpoint: no checkpoint in this run"),
    ],
)
def test_a_folder_that_is_no_run_is_one_line(
    content: str | None,
    named: str,
    tmp_path: Path,
    run_hsd: RunHsd,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    assert run_hsd("eval", tmp_path) == 2
    error = capsys.readouterr().err
    assert error.startswith("hsd: error: ") and error.count("\n") == 1
    assert named in error


def test_a_run_whose_questions_are_gone_is_one_line(
    trained_run: Path, tmp_path: Path, run_hsd: RunHsd, capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(trained_run, tmp_path / "run")
    recorded = json.loads((run / "config.json").read_text())
    recorded["config"]["task"]["heldout"] = str(tmp_path / "gone.jsonl")
    (run / "config.json").write_text(json.dumps(recorded))
    assert run_hsd("eval", run) == 2
    assert "gone.jsonl" in capsys.readouterr().err
