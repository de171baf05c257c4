"""`hsd report` on made run folders: alarms, intervals, grouping, and names that are data."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from hsd.report.alarms import alarms
from hsd.report.command import write_report
from hsd.report.numbers import accuracy, change, evaluation_within
from hsd.report.runs import group_runs, read_run

SAMPLES = 8
HOSTILE = "a|b <img src=x onerror=alert(1)> $x_{1$ `c` [l](javascript:alert(1)) </style><script>"


def evaluation(step: int, counts: Sequence[int], **changes: Any) -> dict[str, Any]:
    return {
        "kind": "evaluation",
        "step": step,
        "samples": SAMPLES,
        "avg": sum(counts) / len(counts) / SAMPLES,
        "pass": sum(count > 0 for count in counts) / len(counts),
        "correct_per_question": list(counts),
        "repetition": 0.01,
        **changes,
    }


def make_run(
    path: Path,
    *,
    seed: int = 0,
    before: Sequence[int] = (2,) * 20,
    after: Sequence[int] = (4,) * 20,
    course: Mapping[str, Sequence[float]] | None = None,
    config: Mapping[str, Any] | None = None,
    finished: bool = True,
) -> Path:
    """A healthy run of eight steps, but for what is given: `course` replaces numbers of steps."""
    path.mkdir(parents=True)
    values = {"seed": seed, "run_dir": str(path), "steps": 8, "objective": {"window": 0}}
    (path / "config.json").write_text(json.dumps({"config": {**values, **(config or {})}}))
    healthy: dict[str, Sequence[float]] = {
        "entropy": [0.5 - 0.03 * i for i in range(8)],
        "response_length": [20 + 0.5 * i for i in range(8)],
        "repetition": [0.02 + 0.004 * i for i in range(8)],
        "ref_kl": [0.001 * i for i in range(8)],
        "reward": [0.5] * 8,
        "kl": [0.1] * 8,
        "failed_with_peer_share": [0.25] * 8,
        "grad_norm": [1.0] * 7 + [3.0],
        "rollout_seconds": [3.0] * 8,
        "update_seconds": [5.0] * 8,
        "peak_memory_bytes": [1.5 * 2**30] * 8,
    }
    columns = {**healthy, **(course or {})}
    records = [evaluation(0, before)]
    records += [
        {"kind": "step", "step": i + 1, **{key: column[i] for key, column in columns.items()}}
        for i in range(8)
    ]
    if finished:
        records.append(evaluation(8, after))
    (path / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in records))
    return path


def test_a_healthy_run_sets_off_no_alarm(tmp_path: Path) -> None:
    assert alarms(read_run(make_run(tmp_path / "run"))) == {}


@pytest.mark.parametrize(
    ("alarm", "changes"),
    [
        ("entropy", {"course": {"entropy": [0.5, 0.5, 0.4, 0.3, 0.3, 0.2, 0.1, 0.1]}}),
        ("entropy", {"course": {"entropy": [0.5, 0.5, 0.5, 0.6, 1.0, 2.0, 3.0, 3.0]}}),
        ("length", {"course": {"response_length": [20.0] * 6 + [9.0] * 2}}),
        ("length", {"course": {"response_length": [20.0] * 6 + [41.0] * 2}}),
        ("repetition", {"course": {"repetition": [0.0] * 6 + [0.11] * 2}}),
        # every question solved at times -> a quarter always, the others never
        ("diversity", {"before": (2,) * 40, "after": (8,) * 15 + (0,) * 25}),
    ],
)
def test_each_alarm_goes_off_alone(alarm: str, changes: dict[str, Any], tmp_path: Path) -> None:
    assert set(alarms(read_run(make_run(tmp_path / "run", **changes)))) == {alarm}


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ((2,) * 40, (1,) * 20 + (0,) * 20),  # both fall
        ((2,) * 40, (3,) * 39 + (0,)),  # one question of forty: within the interval
    ],
)
def test_a_fall_of_pass_at_k_alone_is_no_alarm(
    before: Sequence[int], after: Sequence[int], tmp_path: Path
) -> None:
    assert alarms(read_run(make_run(tmp_path / "run", before=before, after=after))) == {}


def test_accuracy_over_seeds_and_questions() -> None:
    """Two seeds of two questions by hand: seed means 3/8 and 5/8, question means 6/16 and 10/16."""
    seeds = [evaluation(0, (2, 4)), evaluation(0, (4, 6))]
    found = accuracy(seeds, 1)
    assert found.mean == pytest.approx(0.5)
    assert found.spread == pytest.approx(0.25 / 2**0.5)
    assert found.half_width == pytest.approx(1.96 * (0.25 / 2**0.5) / 2**0.5)
    # C(8 - 2, 2) / C(8, 2) = 15 / 28
    assert accuracy([evaluation(0, (2, 8))], 2).mean == pytest.approx((13 / 28 + 1) / 2)
    paired = change([evaluation(0, (2, 4))], [evaluation(8, (4, 6))], 1)
    assert (paired.mean, paired.half_width) == (pytest.approx(0.25), pytest.approx(0))
    assert paired.spread is None
    with pytest.raises(ValueError, match="different numbers of questions"):
        accuracy([evaluation(0, (1, 2)), evaluation(0, (1, 2, 3))], 1)


def test_equal_time_is_the_last_evaluation_within_it(tmp_path: Path) -> None:
    run = read_run(make_run(tmp_path / "run"))  # eight steps of eight seconds
    for seconds, step, spent in ((0, 0, 0), (63.9, 0, 0), (64, 8, 64), (1000, 8, 64)):
        found = evaluation_within(run, seconds)
        assert found is not None and (found[0]["step"], found[1]) == (step, spent)


def test_runs_of_a_recipe_are_grouped(tmp_path: Path) -> None:
    paths = [
        make_run(tmp_path / "hsd-seed1", seed=1),
        make_run(tmp_path / "grpo-0", config={"objective": {"window": "none"}}),
        make_run(tmp_path / "hsd-seed0", seed=0),
    ]
    groups = group_runs([read_run(path) for path in paths])
    assert [(g.label, [r.seed for r in g.runs]) for g in groups] == [("hsd", [0, 1]), ("grpo", [0])]


@pytest.fixture
def report(tmp_path: Path, run_hsd: Callable[..., int]) -> Path:
    runs = [
        make_run(tmp_path / "hsd-seed0", seed=0),
        make_run(tmp_path / "hsd-seed1", seed=1, after=(6,) * 20),
        make_run(
            tmp_path / "bad-seed0",
            config={"objective": {"window": "none"}},
            course={"entropy": [0.5] * 4 + [0.01] * 4},
        ),
        make_run(tmp_path / "short-seed0", config={"steps": 9}, finished=False),
    ]
    assert run_hsd("report", *runs, "--out", tmp_path / "report") == 0
    return tmp_path / "report"


def cells(report: Path, name: str, table: int) -> list[list[str]]:
    """The rows of a table of report.md that begin with a name."""
    tables = re.findall(r"(?:^\|.*\n)+", (report / "report.md").read_text(), re.MULTILINE)
    rows = [[c.strip() for c in line.strip("|").split("|")] for line in tables[table].splitlines()]
    return [row for row in rows if row[0] == name]


def test_the_page_holds_the_numbers(report: Path) -> None:
    assert {path.name for path in report.iterdir()} == {
        "report.html",
        "report.md",
        "curves.png",
        "curves.svg",
    }
    (row,) = cells(report, "hsd", 0)
    assert row[1:5] == [
        "0, 1",
        "0.250 ± 0.000 (sd 0.000)",
        "0.625 ± 0.000 (sd 0.177)",
        "+0.375 ± 0.000 (sd 0.177)",
    ]
    assert cells(report, "short", 0)[0][1] == "none finished"
    (alarm,) = cells(report, "bad-seed0", 2)
    assert alarm == ["bad-seed0", "entropy", "entropy 0.5 -> 0.01"]
    (course,) = cells(report, "hsd-seed1", 3)
    assert course[1:] == [
        "8 of 8",
        "0.0070",
        "0.485 -> 0.305",
        "20.2 -> 23.2",
        "2.2% -> 4.6%",
        "25.0%",
        "3",
        "8.0",
        "1.50",
    ]
    assert cells(report, "objective.window", 4) == [["objective.window", "0", '"none"', "0"]]
    text = (report / "report.html").read_text()
    assert "Not finished: short-seed0." in text
    assert text.count("<img ") == 1 and "data:image/svg+xml;base64," in text


def test_names_are_data(tmp_path: Path) -> None:
    path = make_run(tmp_path / "run", config={"note": HOSTILE, "objective": {"window": HOSTILE}})
    hostile = path.rename(tmp_path / HOSTILE.replace("/", "\u2215"))
    plain = make_run(tmp_path / "plain")
    write_report((hostile, plain), tmp_path / "report")
    text = (tmp_path / "report" / "report.html").read_text()
    tags = {tag.lower() for tag in re.findall(r"<([a-zA-Z]+)", text)}
    assert tags.isdisjoint({"script", "a", "iframe", "object", "link"})
    assert text.count("<img ") == 1 and text.count("<style>") == 1
    assert "&lt;img src=x onerror=alert(1)&gt;" in text
    assert "script-src" not in text and "default-src 'none'" in text
    markdown = (tmp_path / "report" / "report.md").read_text()
    assert "<img" not in markdown and "<script" not in markdown
    assert r"\[l\](javascript" in markdown and r"a\|b" in markdown


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda path: None, "config.json: no such file"),
        (lambda path: (path / "config.json").write_text("{"), "found no configuration"),
        (lambda path: (path / "metrics.jsonl").write_text("3\n"), "metrics.jsonl:1: found no rec"),
        (lambda path: (path / "metrics.jsonl").write_text("{\n"), "metrics.jsonl:1: "),
        (
            lambda path: (path / "metrics.jsonl").write_bytes(b"\xff\n"),
            "metrics.jsonl: found no UTF",
        ),
        (
            lambda path: (path / "metrics.jsonl").write_text('{"kind": "evaluation", "step": 8}\n'),
            "metrics.jsonl:1: found an evaluation without samples",
        ),
    ],
)
def test_bad_input_is_one_line(
    make: Callable[[Path], object],
    said: str,
    tmp_path: Path,
    run_hsd: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = make_run(tmp_path / "run") if "no such" not in said else tmp_path / "gone"
    make(folder)
    assert run_hsd("report", folder, "--out", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_folder_twice_is_refused(tmp_path: Path) -> None:
    path = make_run(tmp_path / "run")
    with pytest.raises(ValueError, match="runs: found a folder twice"):
        write_report((path, path), tmp_path / "out")


def test_a_trained_run_has_a_page(
    trained_run: Path, tmp_path: Path, run_hsd: Callable[..., int]
) -> None:
    assert run_hsd("report", trained_run, "--out", tmp_path / "report") == 0
    _, row = cells(tmp_path / "report", "run", -1)  # below a header of the same name
    assert row[1] == "3 of 3" and "-" not in row[2:] and float(row[-1]) > 0.1
