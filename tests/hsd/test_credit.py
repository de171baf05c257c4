"""The numbers of `hsd credit` against the model's own logits, dense, in float64."""

from __future__ import annotations

import itertools
import json
import tracemalloc
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import credit_records
import numpy as np
import pytest
import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from hsd.config import Config, RolloutConfig
from hsd.credit.contexts import CreditContexts, OtherSuccesses
from hsd.credit.files import write_records
from hsd.credit.measure import ROLLOUTS_AT_A_TIME, measure
from hsd.credit.model import CreditModel
from hsd.credit.source import CreditGroup
from hsd.credit.summary import CreditSummary
from hsd.data.contexts import ContextBuilder, ContextConfig
from hsd.data.questions import Question
from hsd.objective.config import ObjectiveConfig
from hsd.policy.head import output_head

RunHsd = Callable[..., int]
MakeModel = Callable[..., transformers.PreTrainedModel]

CONTEXTS = ("answer_peer", "answer", "peer", "other_prompt", "none")
CLOSE = {"rtol": 0, "atol": 1e-4}


class Dense:
    """log p and log q of one rollout, (n, V) float64, from a model's own logits."""

    def __init__(self, model: Any, response: Sequence[int], temperature: float = 1.0) -> None:
        self.model, self.response, self.temperature = model, list(response), temperature

    def log_probs(self, prompt: Sequence[int]) -> Tensor:
        ids = torch.tensor([[*prompt, *self.response]])
        with torch.no_grad():
            logits = self.model(input_ids=ids).logits[0, len(prompt) - 1 : -1]
        return (logits.double() / self.temperature).log_softmax(-1)

    def at_tokens(self, log_probs: Tensor) -> Any:
        return log_probs[range(len(self.response)), self.response].numpy()


def entropy(log_probs: Tensor) -> Any:
    return -(log_probs.exp() * log_probs).sum(-1).numpy()


def kl(log_q: Tensor, log_p: Tensor) -> Any:
    return (log_q.exp() * (log_q - log_p)).sum(-1).numpy()


@pytest.mark.parametrize(
    "kind", ["llama", "gemma2-softcap", "cohere-scale", "granite-scale", "phi-bias"]
)
def test_both_views_equal_the_dense_ones(
    kind: str, make_model: MakeModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    model = make_model(kind)
    responses = [(5, 9, 200, 31), (7, 7, 120)]
    plain, shown = [(1, 2, 3), (4, 5, 6, 7)], [(9, 8, 7, 1, 2, 3), (3, 4, 5, 6, 7)]
    credit_model = CreditModel(
        model=model,
        head=output_head(model),
        tokenizer=tokenizer,
        compute_dtype=torch.float32,
        temperature=0.7,
        micro_batch_tokens=64,
    )
    hidden = credit_model.hidden(plain, responses)
    student = credit_model.student(hidden, responses)
    teacher = credit_model.teacher(hidden, shown, responses)
    exact = make_model(kind).double()
    for i, response in enumerate(responses):
        dense = Dense(exact, response, temperature=0.7)
        log_p, log_q = dense.log_probs(plain[i]), dense.log_probs(shown[i])
        np.testing.assert_allclose(student[i].logprob, dense.at_tokens(log_p), **CLOSE)
        np.testing.assert_allclose(student[i].entropy, entropy(log_p), **CLOSE)
        np.testing.assert_allclose(teacher[i].logprob, dense.at_tokens(log_q), **CLOSE)
        np.testing.assert_allclose(
            teacher[i].credit, dense.at_tokens(log_q) - dense.at_tokens(log_p), **CLOSE
        )
        np.testing.assert_allclose(teacher[i].kl, kl(log_q, log_p), **CLOSE)
        np.testing.assert_allclose(teacher[i].entropy, entropy(log_q), **CLOSE)
        for top, log_probs in ((student[i].top, log_p), (teacher[i].top, log_q)):
            best = log_probs.topk(5)
            np.testing.assert_allclose(top.logprobs, best.values.numpy(), **CLOSE)
            np.testing.assert_array_equal(top.token_ids, best.indices.numpy())


@pytest.fixture(scope="module")
def export(trained_run: Path, tmp_path_factory: pytest.TempPathFactory, run_hsd: RunHsd) -> Path:
    """What `hsd credit` leaves of a run, with every context. Look, and leave it as it is."""
    out = tmp_path_factory.mktemp("credit") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hsd_kernels.workspace.compiler_found", lambda: False)
        assert run_hsd("credit", trained_run, "--contexts", *CONTEXTS, "--out", out) == 0
    return out


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def other_text(records: Sequence[Mapping[str, Any]], at: int) -> str:
    """The latest success before the group of another question, else the first one behind."""
    own = records[at]
    first = at - own["index"]
    before = [r for r in records[:first] if r["correct"] and r["question"] != own["question"]]
    if before:
        # of the latest group that has one, its first
        latest = (before[-1]["step"], before[-1]["question"])
        return next(r["text"] for r in before if (r["step"], r["question"]) == latest)
    return next(
        r["text"] for r in records[first:] if r["correct"] and r["question"] != own["question"]
    )


def dense_views(run: Path, records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Per rollout: log p, entropy, and per context log q, KL and entropy; float64."""
    causal: Any = AutoModelForCausalLM
    model = causal.from_pretrained(run / "checkpoint", dtype=torch.float64).eval()
    loader: Any = AutoTokenizer
    tokenizer = loader.from_pretrained(run / "checkpoint")

    def prompts(answer: bool, peer: bool) -> ContextBuilder:
        return ContextBuilder(tokenizer, ContextConfig(show_answer=answer, show_peer=peer))

    answer, both, peer_alone = prompts(True, False), prompts(True, True), prompts(False, True)
    views = []
    for at, record in enumerate(records):
        question = Question(id=record["question"], prompt=record["prompt"], answer=record["answer"])
        first = at - record["index"]
        peer = None if record["peer"] is None else records[first + record["peer"]]["text"]
        contexts: dict[str, Any] = {
            "answer_peer": both.teacher(question, peers=[] if peer is None else [peer]),
            "answer": answer.teacher(question, peers=[]),
            "peer": peer_alone.teacher(question, peers=[peer]) if peer is not None else None,
            "other_prompt": both.teacher(question, peers=[other_text(records, at)]),
        }
        dense = Dense(model, record["token_ids"])
        student = answer.student(question)
        log_p = dense.log_probs(student)
        view = {"logprob": dense.at_tokens(log_p), "entropy": entropy(log_p), "contexts": {}}
        shown = {name: c.token_ids for name, c in contexts.items() if c} | {"none": student}
        for name, prompt in shown.items():
            log_q = dense.log_probs(prompt)
            view["contexts"][name] = {
                "logprob": dense.at_tokens(log_q),
                "kl": kl(log_q, log_p),
                "entropy": entropy(log_q),
            }
        views.append(view)
    return views


@pytest.fixture(scope="module")
def truth(trained_run: Path, export: Path) -> list[dict[str, Any]]:
    return dense_views(trained_run, lines(export / "credit.jsonl"))


def test_the_file_equals_the_dense_numbers(
    export: Path, truth: list[dict[str, Any]], trained_run: Path
) -> None:
    records = lines(export / "credit.jsonl")
    recorded = lines(trained_run / "rollouts.jsonl")
    assert [r["token_ids"] for r in records] == [r["token_ids"] for r in recorded]
    assert [r["divergence"] for r in records] == [r["divergence"] for r in recorded]
    assert any(not r["correct"] and r["peer"] is not None for r in records)
    assert any(r["peer"] is None for r in records)
    for record, view in zip(records, truth, strict=True):
        np.testing.assert_allclose(record["logprob"], view["logprob"], **CLOSE)
        np.testing.assert_allclose(record["entropy"], view["entropy"], **CLOSE)
        assert set(record["contexts"]) == set(view["contexts"])
        for name, exact in view["contexts"].items():
            found = record["contexts"][name]
            for key in ("logprob", "kl", "entropy"):
                np.testing.assert_allclose(found[key], exact[key], **CLOSE)
            np.testing.assert_allclose(found["credit"], exact["logprob"] - view["logprob"], **CLOSE)
        np.testing.assert_array_equal(record["contexts"]["none"]["credit"], 0)
        # two questions of four rollouts a step, every token counts
        count = len(record["token_ids"])
        np.testing.assert_allclose(record["weight"], [1 / (count * 8)] * count, rtol=1e-6)
        if "\ufffd" not in record["text"]:  # bytes that are no text show as the vocabulary has them
            assert "".join(record["tokens"]).removesuffix("<|end|>") == record["text"]


def test_the_page_equals_the_dense_numbers(export: Path, truth: list[dict[str, Any]]) -> None:
    scripts = credit_records.data_scripts(export / "credit.html")
    entries = [
        (f"b{g}-{place}", rollout)
        for g, group in enumerate(json.loads(scripts["index"])["groups"])
        for place, rollout in enumerate(group["rollouts"])
    ]
    assert len(entries) == len(truth)
    for (block, entry), view in zip(entries, truth, strict=True):
        present = [n for n, c in zip(CONTEXTS, entry["credit"], strict=True) if c is not None]
        found = credit_records.unpack(scripts[block], len(present))
        np.testing.assert_allclose(found["logprob"], view["logprob"], **CLOSE)
        np.testing.assert_allclose(found["entropy"], view["entropy"], **CLOSE)
        for name, context in zip(present, found["contexts"], strict=True):
            exact = view["contexts"][name]
            for key in ("logprob", "kl", "entropy"):
                np.testing.assert_allclose(context[key], exact[key], **CLOSE)


def test_the_summary_equals_the_dense_numbers(export: Path, truth: list[dict[str, Any]]) -> None:
    summary = json.loads((export / "summary.json").read_text())
    records = lines(export / "credit.jsonl")
    failing = [
        (r["divergence"], v)
        for r, v in zip(records, truth, strict=True)
        if not r["correct"] and r["peer"] is not None
    ]
    assert summary["failed_with_peer"] == len(failing)
    for name in CONTEXTS:
        found = summary["contexts"][name]
        sizes = [np.abs(v["contexts"][name]["logprob"] - v["logprob"]) for _, v in failing]
        taus = [tau for tau, _ in failing]
        at_tau = [s[t] for s, t in zip(sizes, taus, strict=True) if t < len(s)]
        np.testing.assert_allclose(found["peak"]["mean"], np.mean(at_tau), **CLOSE)
        for point in found["profile"]:
            d = point["distance"]
            values = [s[t + d] for s, t in zip(sizes, taus, strict=True) if 0 <= t + d < len(s)]
            np.testing.assert_allclose(point["mean"], np.mean(values), **CLOSE)
        inside = sum(s[max(0, t - 2) : t + 3].sum() for s, t in zip(sizes, taus, strict=True))
        whole = sum(s.sum() for s in sizes)  # no rollout here is longer than the window
        if name != "none":
            np.testing.assert_allclose(found["shares"][0]["share"], inside / whole, **CLOSE)
        kls = [v["contexts"][name]["kl"].mean() for v in truth if name in v["contexts"]]
        np.testing.assert_allclose(found["kl"]["mean"], np.mean(kls), **CLOSE)


def test_rollouts_stream(make_model: MakeModel, tokenizer: PreTrainedTokenizerFast) -> None:
    """From groups without end the first rollouts come: nothing waits for, or keeps, all of them."""
    taken = 0

    def groups() -> Iterator[CreditGroup]:
        nonlocal taken
        for taken in itertools.count(1):
            yield CreditGroup(
                question=Question(id=str(taken), prompt=f"Draw {taken}.", answer="1"),
                step=1,
                token_ids=[(18, 256), (17, 256)],
                loss_masks=[(True, True)] * 2,
                finish_reasons=["stop"] * 2,
                texts=["2", "1"],
                rewards=[False, True],
                peers=[1, None],
            )

    model = make_model()
    measured = measure(
        groups(),
        OtherSuccesses(()),
        CreditModel(
            model=model,
            head=output_head(model),
            tokenizer=tokenizer,
            compute_dtype=torch.float32,
            temperature=1.0,
            micro_batch_tokens=512,
        ),
        CreditContexts(tokenizer, ContextConfig(), ["answer", "other_prompt"]),
        Config(rollout=RolloutConfig(questions_per_step=2), objective=ObjectiveConfig(window=0)),
    )
    first = list(itertools.islice(measured, 3 * ROLLOUTS_AT_A_TIME))
    assert taken <= 3 * ROLLOUTS_AT_A_TIME / 2 + 1
    assert set(first[0].contexts) == {"answer"}  # no other question has come yet
    assert set(first[2].contexts) == {"answer", "other_prompt"}
    # a failure counts up to its divergence at token 0, with window 0
    np.testing.assert_allclose(first[2].weight, [1 / 8, 0])
    np.testing.assert_allclose(first[3].weight, [1 / 8, 1 / 8])


def test_memory_does_not_grow_with_rollouts(
    make_model: MakeModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """Measuring, writing and summing up of 1,024 rollouts take the memory of 128."""
    model = make_model()
    credit_model = CreditModel(
        model=model,
        head=output_head(model),
        tokenizer=tokenizer,
        compute_dtype=torch.float32,
        temperature=1.0,
        micro_batch_tokens=4096,
    )

    def peak(groups: int) -> int:
        summary = CreditSummary()
        measured = measure(
            (made_group(number) for number in range(groups)),
            OtherSuccesses(()),
            credit_model,
            CreditContexts(tokenizer, ContextConfig(), ["answer"]),
            Config(),
        )
        tracemalloc.start()
        count = 0
        for rollout in write_records(tmp_path / "credit.jsonl", measured, contexts=["answer"]):
            summary.add(rollout)
            count += 1
        assert count == 4 * groups
        used = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return used

    peak(8)  # what is made once
    few, many = peak(32), peak(256)
    assert many < 1.5 * few
    assert (tmp_path / "credit.jsonl").stat().st_size > 2 * few  # they would not fit into it


def made_group(number: int) -> CreditGroup:
    # Longer than the tuples that Python keeps for the next one of their size.
    responses = [tuple((number + i + j) % 200 for j in range(24)) for i in range(4)]
    return CreditGroup(
        question=Question(id=str(number), prompt=f"Draw {number}.", answer="1"),
        step=1,
        token_ids=responses,
        loss_masks=[(True,) * 24] * 4,
        finish_reasons=["stop"] * 4,
        texts=["a", "b", "c", "d"],
        rewards=[False, True, False, True],
        peers=[1, 3, 1, 1],
    )


def test_parquet_holds_the_same(
    export: Path, trained_run: Path, tmp_path: Path, run_hsd: RunHsd
) -> None:
    parquet = pytest.importorskip("pyarrow.parquet", reason="Python 3.10 has no pinned pyarrow")
    out = tmp_path / "out"
    command = ["credit", trained_run, "--contexts", *CONTEXTS, "--format", "parquet"]
    assert run_hsd(*command, "--out", out) == 0
    table = parquet.read_table(out / "credit.parquet")
    found = table.to_pylist()
    expected = lines(export / "credit.jsonl")
    absent = dict.fromkeys(CONTEXTS)  # a null where JSON has no key
    assert found == [{**record, "contexts": absent | record["contexts"]} for record in expected]
    assert list(found[0]) == list(expected[0])  # columns in the order of the keys
    assert table.schema.field("contexts").type.field("peer").nullable
    assert (out / "summary.json").read_text() == (export / "summary.json").read_text()
    page, own = (path / "credit.html" for path in (export, out))
    assert credit_records.data_scripts(own) == credit_records.data_scripts(page)


def test_credit_during_training_changes_nothing_else(
    trained_run: Path, tmp_path: Path, make_recipe: Callable[..., Path], run_hsd: RunHsd
) -> None:
    contexts = list(CONTEXTS)
    watch = {"every": 2, "groups": 1, "contexts": contexts}
    recipe = make_recipe(tmp_path / "recipe", {"credit": watch})
    run = tmp_path / "run"
    assert run_hsd("train", recipe, "--run-dir", run) == 0
    weights = [path / "checkpoint" / "model.safetensors" for path in (run, trained_run)]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    recorded = lines(run / "rollouts.jsonl")
    assert recorded == lines(trained_run / "rollouts.jsonl")
    assert [path.name for path in (run / "credit").iterdir()] == ["step-2"]
    found = lines(run / "credit" / "step-2" / "credit.jsonl")
    own = [r for r in recorded if r["step"] == 2][:4]
    for key in ("token_ids", "step", "question", "correct", "peer", "divergence"):
        assert [r[key] for r in found] == [r[key] for r in own]
    # the weights that sampled them: the engine's own log-probs
    for record, rollout in zip(found, own, strict=True):
        np.testing.assert_allclose(record["logprob"], rollout["logprobs"], rtol=0, atol=1e-4)
    assert all("none" in r["contexts"] for r in found)


def test_fresh_rollouts_of_a_recipe(
    tmp_path: Path, make_recipe: Callable[..., Path], run_hsd: RunHsd
) -> None:
    recipe = make_recipe(tmp_path / "recipe")
    assert run_hsd("credit", recipe, "--groups", "2", "--out", tmp_path / "out") == 0
    records = lines(tmp_path / "out" / "credit.jsonl")
    assert [r["prompt"] for r in records] == ["Draw 16."] * 4 + ["Draw 17."] * 4
    assert {name for r in records for name in r["contexts"]} == {"answer_peer", "answer"}


def test_a_file_of_rollouts(tmp_path: Path, model_directory: Path, run_hsd: RunHsd) -> None:
    rollouts = tmp_path / "mine.jsonl"
    rollouts.write_text(
        '{"prompt": "p", "answer": "2", "token_ids": [18, 256], "correct": true}\n'
        '{"prompt": "p", "answer": "2", "token_ids": [18, 17, 256], "correct": false}\n'
    )
    out = tmp_path / "out"
    assert run_hsd("credit", rollouts, "--model", model_directory, "--out", out) == 0
    first, second = lines(out / "credit.jsonl")
    assert (first["peer"], second["peer"], second["divergence"]) == (None, 0, 1)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["gone.jsonl", "--model", "MODEL"], "gone.jsonl: no such run folder, file"),
        (["gone"], "gone: no such run folder, file"),
        (["rollouts.jsonl", "--model", "MODEL", "--step", "-1"], "step: found -1"),
        (["rollouts.jsonl"], "model: found none, expected --model"),
        (["rollouts.jsonl", "--model", "MODEL", "--groups", "0"], "groups: found 0"),
        (["rollouts.jsonl", "--model", "MODEL", "--contexts", "answer", "answer"], "contexts: "),
        (["rollouts.jsonl", "--model", "MODEL", "--out", "used"], "out: found"),
        (["rollouts.jsonl", "--model", "MODEL", "--step", "9"], "found no rollout"),
        (["rollouts.jsonl", "--model", "MODEL"], "answer: found none"),
        (["."], "config.json: no such file"),
    ],
)
def test_bad_use_is_one_line(
    arguments: list[str],
    said: str,
    tmp_path: Path,
    model_directory: Path,
    run_hsd: RunHsd,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rollouts.jsonl").write_text('{"prompt": "p", "token_ids": [1], "correct": true}\n')
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "file").write_text("")
    words = [str(model_directory) if word == "MODEL" else word for word in arguments]
    assert run_hsd("credit", *words) == 2
    error = capsys.readouterr().err
    assert error.startswith("hsd: error: ") and said in error and error.count("\n") == 1
    assert not (tmp_path / "credit").exists()


def test_a_broken_model_is_an_error(
    tmp_path: Path,
    make_model: MakeModel,
    tokenizer: PreTrainedTokenizerFast,
    run_hsd: RunHsd,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    model = make_model()
    model.get_input_embeddings().weight.data[17] = float("nan")
    model.save_pretrained("broken")
    tokenizer.save_pretrained("broken")
    line = '{"prompt": "p", "answer": "2", "token_ids": [17, 18], "correct": true}\n'
    Path("rollouts.jsonl").write_text(line)
    assert run_hsd("credit", "rollouts.jsonl", "--model", "broken") == 2
    assert "that is not finite on rollout 0" in capsys.readouterr().err
    assert not Path("credit").exists()
