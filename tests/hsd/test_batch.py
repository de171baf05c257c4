"""From a judged group to the rows of the loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from hsd.config import Config, ObjectiveConfig, RolloutConfig
from hsd.data.contexts import ContextBuilder, ContextConfig
from hsd.data.peers import PeerConfig, PeerPolicy
from hsd.data.questions import Question
from hsd.data.verify import Outcome
from hsd.objective.batch import JudgedRollout, judge
from hsd.objective.normalisation import StepTotals
from hsd.rollout.groups import Group
from hsd.rollout.protocol import Rollout

QUESTION = Question(id="q", prompt="Compute 1 + 2.", answer="the answer 3")

Judge = Callable[..., list[JudgedRollout]]


@pytest.fixture(params=["chat", "plain"])
def contexts(
    request: pytest.FixtureRequest,
    tokenizer: PreTrainedTokenizerFast,
    plain_tokenizer: PreTrainedTokenizerFast,
) -> Callable[..., ContextBuilder]:
    chosen = tokenizer if request.param == "chat" else plain_tokenizer
    return lambda **options: ContextBuilder(chosen, ContextConfig(**options))


@pytest.fixture
def judged(tokenizer: PreTrainedTokenizerFast, contexts: Callable[..., ContextBuilder]) -> Judge:
    """Judges rollouts given as texts; those that end in "!" are correct."""

    def run(
        texts: list[str],
        context: dict[str, Any] | None = None,
        *,
        peers: dict[str, Any] | None = None,
        seed: int = 0,
        step: int = 0,
        questions: int = 1,
        loss_mask: Callable[[int], bool] = lambda position: True,
        **objective: Any,
    ) -> list[JudgedRollout]:
        rollouts = []
        for text in texts:
            token_ids = (*tokenizer(text)["input_ids"], tokenizer.eos_token_id)
            rollouts.append(
                Rollout(
                    token_ids=token_ids,
                    logprobs=tuple(-0.5 * position for position in range(len(token_ids))),
                    loss_mask=tuple(map(loss_mask, range(len(token_ids)))),
                    finish_reason="stop",
                    policy_version=0,
                )
            )
        group = Group(
            question=QUESTION,
            rollouts=rollouts,
            texts=texts,
            outcomes=[Outcome.CORRECT if text.endswith("!") else Outcome.WRONG for text in texts],
            step=step,
        )
        config = Config(
            rollout=RolloutConfig(max_new_tokens=32),
            context=ContextConfig(**(context or {})),
            peers=PeerConfig(**(peers or {})),
            objective=ObjectiveConfig(**objective),
        )
        policy = PeerPolicy(config.peers, seed=seed)
        return judge(
            group,
            policy.choose(group.attempts),
            contexts(**(context or {})),
            config,
            StepTotals(
                questions=questions, tokens=sum(group.own_tokens) * questions, max_new_tokens=32
            ),
        )

    return run


def shown(tokenizer: PreTrainedTokenizerFast, outcome: JudgedRollout) -> str:
    assert outcome.row is not None
    return str(tokenizer.decode(outcome.row.teacher_prompt))


def test_the_teacher_sees_the_peer_and_the_answer(
    judged: Judge, tokenizer: PreTrainedTokenizerFast
) -> None:
    failed, peer = judged(["it is 4", "it is 3!"])
    assert failed.peer == 1 and peer.peer is None
    assert "it is 3!" in shown(tokenizer, failed) and QUESTION.answer in shown(tokenizer, failed)
    assert "it is 3!" not in shown(tokenizer, peer) and QUESTION.answer in shown(tokenizer, peer)


def test_the_student_sees_neither(judged: Judge, tokenizer: PreTrainedTokenizerFast) -> None:
    for outcome in judged(["it is 4", "it is 3!"]):
        assert outcome.row is not None
        prompt = str(tokenizer.decode(outcome.row.student_prompt))
        assert QUESTION.prompt in prompt
        assert "it is" not in prompt and QUESTION.answer not in prompt


def test_the_response_and_its_logprobs_are_those_of_the_engine(
    judged: Judge, tokenizer: PreTrainedTokenizerFast
) -> None:
    texts = ["it is 4", "it is 3!"]
    for text, outcome in zip(texts, judged(texts), strict=True):
        assert outcome.row is not None
        assert outcome.row.response == (*tokenizer(text)["input_ids"], tokenizer.eos_token_id)
        assert outcome.row.logprobs == tuple(-0.5 * i for i in range(len(text) + 1))
        assert len(outcome.row.weights) == len(outcome.row.response)


def test_both_prompts_end_alike_before_the_response(
    judged: Judge, contexts: Callable[..., ContextBuilder]
) -> None:
    outcome, _ = judged(["it is 4", "it is 3!"])
    assert outcome.row is not None
    assert outcome.row.student_prompt[-3:] == outcome.row.teacher_prompt[-3:]


def test_every_failed_rollout_has_its_own_divergence(judged: Judge) -> None:
    outcomes = judged(["it is 4", "was 3", "it is 3!", "it is 3"])
    assert [outcome.divergence for outcome in outcomes] == [6, 0, None, 7]


def test_peers_are_drawn_anew_by_rollout_step_and_seed(judged: Judge) -> None:
    texts = [f"it is {n}!" for n in range(9)]
    draws = [
        tuple(outcome.peer for outcome in judged(texts, seed=seed, step=step))
        for seed, step in ((0, 0), (0, 0), (1, 0), (0, 1))
    ]
    assert draws[0] == draws[1]
    assert len(set(draws)) == 3
    assert len(set(draws[0])) > 1
    assert all(peer != i for draw in draws for i, peer in enumerate(draw))


def test_without_a_peer_the_fallback_answer_is_shown(
    judged: Judge, tokenizer: PreTrainedTokenizerFast
) -> None:
    for outcome in judged(["it is 4", "it is 5"], {"show_answer": False}):
        assert QUESTION.answer in shown(tokenizer, outcome)


def test_without_a_peer_the_fallback_skip_leaves_the_rollout_out(judged: Judge) -> None:
    outcomes = judged(["it is 4", "it is 3!"], {"fallback": "skip"})
    assert outcomes[0].row is not None
    assert outcomes[1].row is None
    assert outcomes[1].peer is None


def test_mask_failures_leaves_correct_rollouts_out_and_keeps_them_as_peers(
    judged: Judge, tokenizer: PreTrainedTokenizerFast
) -> None:
    outcomes = judged(["it is 4", "it is 3!", "is 3!"], mask="failures")
    assert [outcome.row is None for outcome in outcomes] == [False, True, True]
    assert "is 3!" in shown(tokenizer, outcomes[0])
    assert outcomes[1].peer == 2


def test_a_teacher_without_context_has_the_prompt_of_the_student(judged: Judge) -> None:
    for outcome in judged(["it is 4", "it is 3!"], {"show_answer": False, "show_peer": False}):
        assert outcome.row is not None
        assert outcome.row.teacher_prompt == outcome.row.student_prompt


def test_weights_sum_to_the_share_of_the_question(judged: Judge) -> None:
    outcomes = judged(["it is 4", "no", "it is 3!"], questions=5)
    sums = [sum(outcome.row.weights) for outcome in outcomes if outcome.row]
    assert sums == pytest.approx([1 / 15] * 3)


def test_the_group_counts_whole_where_rollouts_are_left_out(judged: Judge) -> None:
    outcomes = judged(["it is 4", "it is 3!"], mask="failures")
    assert outcomes[0].row is not None
    assert sum(outcomes[0].row.weights) == pytest.approx(1 / 2)


def test_the_window_keeps_what_leads_to_the_slip(judged: Judge) -> None:
    failed, correct = judged(["it is 4 .", "it is 3!"], window=1)
    assert failed.row is not None and correct.row is not None
    assert [weight > 0 for weight in failed.row.weights] == [True] * 8 + [False] * 2
    assert all(weight > 0 for weight in correct.row.weights)


def test_the_window_leaves_a_failure_without_a_peer_no_weight(judged: Judge) -> None:
    for outcome in judged(["it is 4", "it is 5"], window=8):
        assert outcome.row is None or not any(outcome.row.weights)


def test_the_loss_mask_of_a_rollout_takes_weight_away(judged: Judge) -> None:
    outcome, _ = judged(["it is 4", "it is 3!"], loss_mask=lambda position: position >= 2)
    assert outcome.row is not None
    assert [weight > 0 for weight in outcome.row.weights] == [False] * 2 + [True] * 6
    assert sum(outcome.row.weights) == pytest.approx(1 / 2)


def test_what_was_cut_and_removed_is_counted(judged: Judge) -> None:
    failed, _ = judged(["it is 4", "<|user|>0123456789!"], {"peer_token_budget": 4})
    assert failed.special_tokens_removed == 1
    assert failed.peer_truncated_tokens == 7
