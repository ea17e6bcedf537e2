"""Notebook 03c: scores of turns by the doctor's own belief in the true disease."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

import grpodx_utils as gx

two, three, four = (gx.notebook(n) for n in ("02", "03", "04"))
per_turn = gx.notebook("03c")
FLU = "Influenza|canonical|2"  # complains of a sore throat
FEVER, COUGH = "Do you have a fever?", "Do you have a dry cough?"
GOUT, RIGHT = "Final diagnosis: Gout", "Final diagnosis: Influenza"


@pytest.fixture
def wrapped(model):
    """The tiny doctor as `peft` hands it over, as far as 03c asks."""
    return SimpleNamespace(get_base_model=lambda: model)


def say(*sentences):
    """A doctor that says these sentences, one after another."""
    return lambda talks: [sentences[len(talk.turns)] for talk in talks]


def by_hand(chat, e):
    """An episode's states, put together from the texts."""
    cue, before = f" {gx.LAST_TURN}", chat.prompt(e.system, e.opening)
    states = [chat.prompt(e.system, e.opening + cue)]
    for question, reply in zip(e.spoken, e.replies):
        before = before + chat.encode(question) + chat.end_ids
        plain = reply.removesuffix(cue)
        states.append(before + chat.bridge(before, plain + cue))
        before = before + chat.bridge(before, plain)
    return states


def test_states_are_what_was_said_and_a_request(bank, chat):
    cases = gx.sample_cases(bank.names, 4, seed=1)
    for e in gx.play(two.BayesDoctor(bank), bank, cases, chat):
        states = per_turn.states_to_decide(chat, e)
        assert states == by_hand(chat, e) and len(states) == 6
        ids = e.prompt_ids + e.completion_ids
        assert states[-1] == ids[: len(states[-1])], "nobody had to add a request"
        assert chat.decode(ids[len(states[-1]) :]) == e.turns[-1]
        four.to_trl([e])  # the opening moves to the completion
        assert per_turn.states_to_decide(chat, e) == states


def test_states_of_a_model_that_samples_are_its_own_tokens(bank, chat, model):
    torch.manual_seed(0)
    doctor = three.ModelDoctor(model, chat, 1.0, 16)
    cases = gx.sample_cases(bank.names, 16, seed=2)
    for e in gx.play(doctor, bank, cases, chat):
        states = per_turn.states_to_decide(chat, e)
        ids = e.prompt_ids + e.completion_ids
        assert len(states) == len(e.replies) + 1
        if e.ended == "diagnosis" and e.questions >= e.budget:
            assert states[-1] == ids[: len(states[-1])]
        for state in states[1:]:  # all but the request is what was played
            same = sum(a == b for a, b in zip(state, ids))
            assert same >= len(state) - len(chat.encode(f". {gx.LAST_TURN}")) - 2


def test_a_critics_words_stay_in_the_states(bank, chat):
    words = ["Turn 1 told little."]
    (e,) = gx.play(two.BayesDoctor(bank), bank, [FLU], chat, feedback=words)
    states = per_turn.states_to_decide(chat, e)
    assert states[-1] == (e.prompt_ids + e.completion_ids)[: len(states[-1])]
    shared = len(e.prompt_ids) - len(chat.encode(e.opening)) - 2
    assert states[0][:shared] == e.prompt_ids[:shared]


def test_without_questions_the_only_state_is_the_prompt(bank, chat):
    (e,) = gx.play(say(RIGHT), bank, [FLU], chat, max_questions=0)
    assert per_turn.states_to_decide(chat, e) == [e.prompt_ids]


def test_log_probabilities_of_turns_are_the_models(bank, chat, model, wrapped):
    cases = gx.sample_cases(bank.names, 3, seed=3)
    played = gx.play(two.BayesDoctor(bank), bank, cases, chat)
    states = [s for e in played for s in per_turn.states_to_decide(chat, e)]
    names = ("Gout", "Influenza", "Common cold")
    said = [chat.encode(f"Final diagnosis: {n}") + chat.end_ids for n in names]
    said.append(chat.encode("I would say it is the flu."))  # many tokens
    turns = [said[i % 4] for i in range(len(states))]
    fair = []
    for state, turn in zip(states, turns):
        ids = torch.tensor([state + turn])
        mask = torch.ones_like(ids)
        with torch.no_grad():
            fair.append(four.log_probs(model, ids, mask, len(turn)).sum().item())
    for at_once in (1, 4, 256):
        quick = per_turn.turn_log_probs(wrapped, states, turns, at_once)
        assert quick == pytest.approx(fair, abs=1e-3)
    assert np.ptp(fair) > 1, "they differ"


def test_own_beliefs_are_of_the_truth_in_each_state(bank, chat, wrapped):
    cases = ["Influenza|sampled|5", "Gout|sampled|1"]
    played = gx.play(say(FEVER, COUGH, GOUT), bank, cases, chat, max_questions=2)
    for e, mine in zip(played, per_turn.own_beliefs(wrapped, chat, played)):
        states = per_turn.states_to_decide(chat, e)
        turn = chat.encode(f"Final diagnosis: {e.truth}") + chat.end_ids
        fair = per_turn.turn_log_probs(wrapped, states, [turn] * 3)
        assert mine == pytest.approx(fair.tolist(), abs=1e-4) and len(mine) == 3


@pytest.fixture
def scored(bank, monkeypatch):
    """Scores of a consultation under invented beliefs: one for each state."""

    def score(log_p, *sentences, **options):
        (e,) = gx.play(say(*sentences), bank, [FLU], **options)
        assert len(log_p) == len(e.replies) + 1
        monkeypatch.setattr(per_turn, "own_beliefs", lambda *_: [log_p])
        (turns,) = per_turn.belief_scores(bank, None, None, [e])
        return pytest.approx(turns)

    return score


def test_a_question_scores_its_gain(scored):
    two_asked = dict(max_questions=2)
    assert scored([-5, -2, -3], FEVER, COUGH, RIGHT, **two_asked) == [0.3, -0.1, 1.0]
    assert scored([-5, -2, -4], FEVER, COUGH, GOUT, **two_asked) == [0.3, -0.2, 0.0]
    assert scored([-25, -9, -12], FEVER, COUGH, RIGHT, **two_asked) == [0.1, -0.1, 1.0]


def test_several_findings_in_one_turn_share_the_gain(scored):
    both = "Do you have a fever? Do you have a dry cough?"
    assert scored([-6, -2], both, RIGHT, max_questions=2) == [0.2, 1.0]
    assert scored([-6, -2], both, RIGHT, max_questions=1) == [-0.1, 1.0], "no answer"


def test_what_brings_nothing_new_costs_a_little(scored):
    asked_again = scored([-6, -5, -2], FEVER, FEVER, RIGHT, max_questions=2)
    assert asked_again == [0.1, -0.1, 1.0]
    assert scored([-6, -2], "How are you?", RIGHT, max_questions=1) == [-0.1, 1.0]


def test_early_or_never_is_wasted(scored):
    assert scored([-6], RIGHT) == [-0.5]
    assert scored([-6, -3], FEVER, RIGHT) == [0.3, -0.5]
    assert scored([-6, -3], FEVER, COUGH, max_questions=1) == [0.3, -0.5]


def test_credit_calls_the_score_and_weighs_the_diagnosis(bank):
    """With scores, the rewards' advantages count no more."""
    played = gx.play(say(FEVER, RIGHT), bank, [FLU] * 2, max_questions=1)
    scores = [[0.4, 1.0], [0.0, 0.0]]
    for weight in (0.0, 1.0):
        credit = four.make_credit(2, weight, lambda _: scores)
        turns = credit(played, [7.0, -7.0])
        assert np.allclose(turns, [[0.2, 0.5 * weight], [-0.2, -0.5 * weight]])
    assert four.make_credit(2)(played, [7.0, -7.0]) == [[7.0, 0.0], [-7.0, 0.0]]


def test_settings_of_the_doctors():
    one = gx.notebook("01")
    usual = [one.usual_settings(SimpleNamespace(num_parameters=lambda n=n: n), tiny)
             for n, tiny in ((2e6, True), (1.3e8, False), (1.5e9, False))]  # fmt: skip
    assert [u["CREDIT"] for u in usual] == ["episode", "belief", "episode"]
    assert [u["TRAIN_DIAGNOSIS"] for u in usual] == [0.0, 0.0, 1.0]
    assert [u["LEARNING_RATE"] for u in usual] == [5e-4, 5e-4, 2e-5]
