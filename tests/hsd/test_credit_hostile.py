"""`hsd credit` on a file that was written to break it: the whole command, and what it leaves."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import credit_records
import numpy as np
import pytest

END = 256
TEXTS = {
    "markup": "</script><script>alert(1)</script><!-- --><img src=x onerror=alert(1)>",
    "emoji": "👩‍👩‍👧 🇪🇺 e\u0301 \u200b\u2028",
    "right to left": "\u202eשלום עולם\u202c 42",
    "control": "\x00\x1b[31m\r\n\t\ufffd",
    "markdown": "[red]$x_{1$ `c` [/] {policy} {data}",
}


def line(question: str, text: str, correct: bool, **changes: Any) -> dict[str, Any]:
    ids = [*text.encode(), END]
    record = {
        "question": question,
        "prompt": f"{question}: {TEXTS['markup']}",
        "answer": "4\u202e2",
    }
    return {**record, "token_ids": ids, "text": text, "correct": correct, **changes}


def hostile_lines() -> list[dict[str, Any]]:
    """Groups with all outcomes, one, and none; a prefix of its peer, equal ones, 2,000 tokens."""
    success = "the same beginning"
    mixed = [line("mixed", success, True, peer=None)]
    mixed += [line("mixed", text, False, peer=0) for text in TEXTS.values()]
    mixed += [
        line("mixed", "the same", False, peer=0, token_ids=list(b"the same")),  # a prefix
        line("mixed", success, False, peer=0),  # the success itself, judged otherwise
    ]
    mixed += [line("mixed", "the same end", False, peer=0)] * 2
    long = [
        line("long", "1" * 1999, True, peer=None),
        line("long", "1" * 1500 + "2", False, peer=0),
    ]
    return [
        *mixed,
        *long,
        *(line("no success", text, False) for text in ("a", "b")),
        *(line("no failure", text, True) for text in ("a", "a")),
        line("alone", "a", False),
    ]


@pytest.fixture(scope="module")
def out(
    tmp_path_factory: pytest.TempPathFactory, model_directory: Path, run_hsd: Callable[..., int]
) -> Path:
    folder = tmp_path_factory.mktemp("hostile")
    path = folder / "rollouts.jsonl"
    path.write_text("".join(json.dumps(each) + "\n" for each in hostile_lines()), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hsd_kernels.workspace.compiler_found", lambda: False)
        assert run_hsd("credit", path, "--model", model_directory, "--out", folder / "out") == 0
    return folder / "out"


def test_every_rollout_is_measured_and_its_text_kept(out: Path) -> None:
    lines = (out / "credit.jsonl").read_text(encoding="utf-8").split("\n")
    found = [json.loads(each) for each in lines if each]
    given = hostile_lines()
    for record, own in zip(found, given, strict=True):
        for key in ("question", "prompt", "answer", "text", "token_ids", "correct"):
            assert record[key] == own[key], key
        assert len(record["logprob"]) == len(own["token_ids"])
        credit = record["contexts"]["answer"]["credit"]
        assert np.isfinite(np.array(credit, dtype=np.float64)).all()
    taus = {
        r["text"]: r["divergence"] for r in found if r["question"] == "mixed" and r["peer"] == 0
    }
    assert taus["the same"] == len("the same")  # of all its tokens: a prefix of its peer
    assert taus["the same beginning"] == len("the same beginning") + 1  # equal to it
    assert taus["the same end"] == len("the same ")
    assert [r["divergence"] for r in found if r["question"] == "long"] == [None, 1500]


def test_groups_without_a_peer_are_counted_and_in_no_profile(out: Path) -> None:
    summary = json.loads((out / "summary.json").read_text())
    given = hostile_lines()
    assert summary["rollouts"] == len(given)
    assert summary["correct"] == sum(each["correct"] for each in given)
    assert summary["failed_with_peer"] == 9 + 1
    assert summary["prefix_length"]["counts"][-1] == [1500, 1]


def test_the_page_holds_the_texts_as_data(out: Path) -> None:
    page = (out / "credit.html").read_text(encoding="utf-8")
    assert "<script>alert" not in page and "<img src=x" not in page
    groups = credit_records.page_index(out / "credit.html")["groups"]
    shown = [rollout["text"] for group in groups for rollout in group["rollouts"]]
    assert shown == [each["text"] for each in hostile_lines()]
