"""The page as a file: what is packed into it, how large it gets, and that data stays data."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from credit_records import (
    CONTEXTS,
    StandInTokenizer,
    about,
    data_scripts,
    make_groups,
    make_rollout,
    page_index,
    summarise,
    unpack,
    unpack_context,
)

from hsd.credit.html import write_page
from hsd.credit.packing import pack, top_positions
from hsd.credit.records import RolloutCredit


def page_of(path: Path, rollouts: list[RolloutCredit], **options: Any) -> int:
    return write_page(
        path,
        lambda: iter(rollouts),
        about=about(),
        summary=summarise(iter(rollouts)),
        tokenizer=StandInTokenizer(),  # type: ignore[arg-type]
        **options,
    )


def test_a_block_holds_the_numbers() -> None:
    rollout = make_rollout(50, divergence=3)
    rollout.entropy[7] = np.nan
    rollout.logprob[8] = -1e9  # beyond the range: clipped, not wrapped
    found = unpack(pack(rollout, CONTEXTS, top_share=1.0), contexts=2)
    np.testing.assert_array_equal(found["token_ids"], rollout.token_ids)
    np.testing.assert_allclose(found["weight"], rollout.weight, rtol=1e-6)
    np.testing.assert_allclose(found["entropy"], rollout.entropy, rtol=0, atol=1e-5)
    assert found["logprob"][8] == pytest.approx(-32768, abs=1)
    for name, context in zip(CONTEXTS, found["contexts"], strict=True):
        for key, values in context.items():
            exact = getattr(rollout.contexts[name], key)
            np.testing.assert_allclose(values, exact, rtol=0, atol=1e-5)
    for top, exact_top in zip(
        found["tops"], [rollout.top, *(rollout.contexts[n].top for n in CONTEXTS)], strict=True
    ):
        np.testing.assert_array_equal(top["token_ids"], exact_top.token_ids)
        np.testing.assert_allclose(top["logprobs"], exact_top.logprobs, rtol=0, atol=1e-5)


def test_a_block_leaves_out_contexts_without_a_teacher() -> None:
    rollout = make_rollout(4, credits={"answer": [1, 2, 3, 4]})
    found = unpack(pack(rollout, CONTEXTS, top_share=0.5), contexts=1)
    np.testing.assert_array_equal(found["positions"], [2, 3])
    np.testing.assert_array_equal(found["tops"][1]["token_ids"].shape, (2, 5))


@pytest.mark.parametrize(
    ("share", "chosen"), [(1.0, [0, 1, 2, 3]), (0.5, [0, 2]), (0.3, [0, 2]), (0.05, [2])]
)
def test_top_tokens_are_kept_where_credit_is_largest(share: float, chosen: list[int]) -> None:
    # |A| of 1 at positions 0, 1 and 3: of equal ones the earlier
    rollout = make_rollout(4, credits={"answer": [-1, 1, 0, 1], "answer_peer": [0, 0, -5, 0]})
    assert top_positions(rollout, share).tolist() == chosen
    assert top_positions(make_rollout(4, credits={}), 0.5).tolist() == [0, 1]


def test_the_index_names_every_rollout(tmp_path: Path) -> None:
    rollouts = list(make_groups(groups=3, group_size=2, length=8))
    assert page_of(tmp_path / "page.html", rollouts) == 6
    index = page_index(tmp_path / "page.html")
    entries = [(g["question"], r) for g in index["groups"] for r in g["rollouts"]]
    assert [(q, r["index"]) for q, r in entries] == [(r.question, r.index) for r in rollouts]
    for (_, entry), rollout in zip(entries, rollouts, strict=True):
        means = [np.abs(rollout.contexts[name].credit).mean() for name in CONTEXTS]
        assert entry["credit"] == pytest.approx(means, abs=1e-4)
        assert (entry["tau"], entry["peer"]) == (rollout.divergence, rollout.peer)


def test_a_page_that_would_be_too_large_keeps_fewer_top_tokens_then_fewer_groups(
    tmp_path: Path,
) -> None:
    rollouts = list(make_groups(groups=6, group_size=2, length=300))
    path = tmp_path / "page.html"
    assert page_of(path, rollouts) == 12
    whole = path.stat().st_size
    assert page_index(path)["top_share"] == 1.0
    assert page_of(path, rollouts, most_bytes=whole) == 12 and path.stat().st_size <= whole
    assert page_of(path, rollouts, most_bytes=whole - 5000) == 12
    less = path.stat().st_size
    assert less <= whole - 5000 and page_index(path)["top_share"] == 0.05
    # then the second context goes into files beside the page
    assert page_of(path, rollouts, most_bytes=less - 5000) == 12
    assert path.stat().st_size <= less - 5000
    assert page_index(path)["sidecars"] == "page-contexts"
    least = path.stat().st_size - 5000
    shown = page_of(path, rollouts, most_bytes=least)
    assert 0 < shown < 12 and shown % 2 == 0 and path.stat().st_size <= least
    assert page_index(path)["shown"] == shown
    with pytest.raises(ValueError, match="the first group needs more than 50000 bytes"):
        page_of(path, rollouts, most_bytes=50_000)


def test_contexts_beside_the_page_hold_the_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hsd.credit.sidecars.PART_BYTES", 1)
    rollouts = list(make_groups(groups=2, group_size=2, length=8))
    path = tmp_path / "page.html"
    assert page_of(path, rollouts, sidecars=True) == 4
    index = page_index(path)
    assert [group["part"] for group in index["groups"]] == [0, 1]
    names = {f"answer-{part}.js" for part in range(2)}
    assert {file.name for file in (tmp_path / "page-contexts").iterdir()} >= names
    for number, rollout in enumerate(rollouts):
        block = f"b{number // 2}-{number % 2}"
        inside = unpack(data_scripts(path)[block], contexts=1)["contexts"]
        own = rollout.contexts["answer_peer"]
        np.testing.assert_allclose(inside[0]["kl"], own.kl, rtol=0, atol=1e-5)
        script = (tmp_path / "page-contexts" / f"answer-{number // 2}.js").read_text()
        found = re.fullmatch(r'creditSidecar\("answer", (\{[^{}<]*\})\);\n', script)
        assert found is not None
        values = unpack_context(json.loads(found[1])[block])
        beside = rollout.contexts["answer"]
        for key in ("logprob", "kl", "entropy"):
            np.testing.assert_allclose(values[key], getattr(beside, key), rtol=0, atol=1e-5)
        np.testing.assert_array_equal(values["token_ids"], beside.top.token_ids)
    page_of(path, rollouts)
    assert not (tmp_path / "page-contexts").exists()


def test_hostile_text_cannot_leave_its_block(tmp_path: Path) -> None:
    hostile = "</script><script>alert(1)</script><!--<script>\u2028{data}{script}{policy}"
    rollouts = [
        make_rollout(
            3,
            text=hostile,
            prompt=hostile,
            question=hostile,
            answer=hostile,
            tokens=(hostile, "<img src=x onerror=alert(1)>", "]]>"),
        )
    ]
    path = tmp_path / "page.html"
    page_of(path, rollouts)
    text = path.read_text(encoding="utf-8")
    assert "alert(1)" not in re.sub(r"<script type=[^>]*>[^<]*</script>", "", text)
    (group,) = page_index(path)["groups"]
    assert group["rollouts"][0]["text"] == group["prompt"] == hostile
    assert text.count("<script>") == 1 and text.count("</script>") == 4


def test_the_policy_allows_the_one_script_and_the_one_style(tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    page_of(path, [make_rollout(3)])
    text = path.read_text(encoding="utf-8")
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]*)"', text)
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    for kind, tag in (("script-src", "script"), ("style-src", "style")):
        content = text.split(f"<{tag}>")[1].split(f"</{tag}>")[0]
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert rules[kind] == f"'sha256-{digest}'"
    assert rules["default-src"] == "'none'"
    assert "innerHTML" not in text and "http" not in re.sub(
        r"http-equiv|http://www.w3.org/2000/svg", "", text
    )
    assert set(data_scripts(path)) == {"index", "tokens", "b0-0"}
