"""Notebook 14c: audits by group, many comparisons, and the weight of an answer."""

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import false_discovery_control

import grpodx_utils as gx

au, talks = gx.notebook("14c"), gx.notebook("05c")


def test_holm_by_hand():
    # sorted 0.01 0.02 0.03 0.04 -> times 4 3 2 1: 0.04 0.06 0.06 (0.06 < 0.06) 0.06
    assert np.allclose(au.holm([0.04, 0.01, 0.03, 0.02]), [0.06, 0.04, 0.06, 0.06])
    assert au.holm([0.6, 0.9]).tolist() == [1, 1] and au.holm([0.2]).tolist() == [0.2]
    assert au.holm([]).tolist() == []


def test_benjamini_hochberg_by_hand():
    # sorted 0.01 0.02 0.03 0.4 -> times 4/1 4/2 4/3 4/4: 0.04 0.04 0.04 0.4
    adjusted = false_discovery_control([0.4, 0.01, 0.03, 0.02])
    assert np.allclose(adjusted, [0.4, 0.04, 0.04, 0.04])
    assert (au.holm([0.4, 0.01, 0.03, 0.02]) >= adjusted).all()


@pytest.mark.parametrize("bad", [[0.1, 1.2], [-0.1], [np.nan], [[0.1]]])
def test_holm_refuses(bad):
    with pytest.raises(gx.InputError, match="list of p values"):
        au.holm(bad)


def test_mcnemar_by_hand():
    before, after = [1] * 6 + [0, 1, 0], [0] * 6 + [1, 1, 0]
    lost, won, p = au.mcnemar(before, after)
    # 6 of 7 to one side: 2 * (7 + 1) / 2**7
    assert (lost, won) == (6, 1) and np.isclose(p, 16 / 128)
    assert au.mcnemar([1, 0], [1, 0]) == (0, 0, 1.0)
    with pytest.raises(gx.InputError, match="same patients"):
        au.mcnemar([1, 0], [1])


def test_groups_by_hand():
    people = pd.DataFrame({"sex": list("ffffmmmm"), "all": ["x"] * 8})
    right = np.array([1, 1, 1, 1, 0, 0, 0, 0], bool)
    rows = au.audit_groups(people, right)
    assert [r[:4] for r in rows] == [("sex", "f", 4, 4), ("sex", "m", 4, 0)]
    kind, name, n, hits, share, low, high, gap, p = rows[0]
    assert (share, gap, high) == (1, 1, 1) and np.isclose(p, 2 / 70)  # C(8, 4)
    assert np.isclose(low, 4 / (4 + 1.959964**2))


def test_groups_of_a_case(bank):
    case = gx.make_case(bank, "Influenza|sampled|1")._replace(age=40, sex="male")
    told = au.describe(bank, case, withheld=["Influenza"])
    assert told["age"] == "40 to 59" and told["sex"] == "male"
    assert told["training"] == "withheld" and told["severity"] == case.disease.severity
    assert au.describe(bank, case._replace(age=5))["age"] == "under 40"
    assert au.describe(bank, case._replace(age=100))["age"] == "60 and older"
    assert au.describe(bank, case)["training"] == "trained"


def test_within_strata_a_shadow_is_no_finding():
    rng = np.random.default_rng(0)
    disease = np.repeat(["easy", "hard"], 400)
    right = rng.random(800) < np.where(disease == "easy", 0.9, 0.3)
    sex = np.where(rng.random(800) < np.where(disease == "easy", 0.9, 0.1), "f", "m")
    gap = right[sex == "f"].mean() - right[sex == "m"].mean()
    assert gap > 0.3  # yet nothing within a disease
    assert au.test_within(disease, sex, right, 300) > 0.05
    unfair = right & ~((sex == "m") & (rng.random(800) < 0.5))
    assert au.test_within(disease, sex, unfair, 300) < 0.01
    assert au.test_within(disease, disease, right, 50) == 1  # nothing to shuffle


def test_what_can_be_found():
    """The formula, and a simulation: about 8 of 10 audits find such a difference."""
    gap = au.detectable(200, 200, 0.5)
    assert np.isclose(gap, (1.959964 + 0.841621) * 0.05, atol=1e-6)
    assert au.detectable(200, 200, 0.5, tests=30) > gap > au.detectable(900, 900, 0.5)
    rng, half = np.random.default_rng(1), gap / 2
    a, b = (rng.binomial(200, 0.5 + x, 4000) / 200 for x in (half, -half))
    pooled = np.sqrt((a + b) / 2 * (1 - (a + b) / 2) * 2 / 200)
    assert 0.75 < (np.abs(a - b) / pooled > 1.96).mean() < 0.85
    assert np.isclose(au.detectable_in_pairs(100, 0.25), 2.801585 * 0.05, atol=1e-5)
    for bad in ((0, 10, 0.5), (10, 10, 1.0), (10, 10, 0.5, 0)):
        with pytest.raises(gx.InputError, match="detectable"):
            au.detectable(*bad)


def test_wordings_change_nothing_but_the_opening(bank):
    speech = gx.notebook("07b").Speech(bank)
    case = gx.make_case(bank, "Influenza|sampled|1")
    said = {}
    for wording in ("lexicon", "template", "free", "woman", "man"):
        patient, twin = (au.WordedPatient(speech, wording, bank, case) for _ in "ab")
        said[wording] = patient.opening()
        assert twin.opening() == said[wording]  # always the same words
        assert not bank.named_in(said[wording], "Influenza")
        asked = "Have you had chills or shivering?"
        assert patient.reply(asked) == gx.ScriptedPatient(bank, case).reply(asked)
    assert said["lexicon"] == gx.ScriptedPatient(bank, case).opening()
    assert len(set(said.values())) == 5
    assert said["woman"].replace("woman", "man") == said["man"]
    assert str(case.age) in said["man"]


class TwoAnswers(torch.nn.Module):
    """A doctor of equal logits, but: after "Yes, I have a fever." anywhere before, the
    diagnosis has `weight` more. Then it ends its turn."""

    def __init__(self, size, fever, diagnosis, end, weight):
        super().__init__()
        self.head = torch.nn.Linear(1, size)
        self.fever, self.diagnosis, self.end, self.weight = (
            fever,
            diagnosis,
            end,
            weight,
        )

    def get_output_embeddings(self):
        return self.head

    def forward(self, input_ids, attention_mask, logits_to_keep=0, **_):
        logits = torch.zeros(*input_ids.shape, self.head.out_features)
        told = ((input_ids == self.fever) * attention_mask).cumsum(1) > 0
        logits[..., self.diagnosis] = self.weight * told
        logits[input_ids == self.diagnosis] = -100.0
        logits[..., self.end].masked_fill_(input_ids == self.diagnosis, 100.0)
        logits = logits[:, -logits_to_keep:]
        return type("Out", (), {"logits": logits, "past_key_values": None})


@pytest.fixture
def talk(bank, chat):
    """Influenza with a fever, asked for fever and a sprained ankle."""
    case = gx.make_case(bank, "Influenza|sampled|1")
    case = case._replace(
        findings=frozenset({"sore throat", "fever"}), complaint="sore throat"
    )
    talk = gx.Consultation(bank, gx.ScriptedPatient(bank, case), chat, max_questions=2)
    for text in ("Do you have a fever?", "Do you have a headache?"):
        talk.step(text)
    talk.step("Final diagnosis: Influenza")
    return talk.record()


def test_the_answer_that_counts(chat, talk):
    (fever,), (named,) = (
        chat.encode("Yes, I have a fever."),
        chat.encode("Final diagnosis: Influenza"),
    )
    size = len(chat.tokenizer)
    model = TwoAnswers(size, fever, named, chat.end_ids[0], weight=3.0)
    weights = au.weigh_answers(model, chat, talk)
    # odds exp(3) / (size - 1) against 1 / (size - 1)
    assert np.allclose(weights, [3 / np.log(2), 0], atol=1e-3)


def test_what_is_left_without_an_answer(chat, talk):
    whole, first, last = au.rows_without(chat, talk)
    turns = [said for _, said in au.gguf.doctor_turns(talk)]
    assert whole + turns[-1] == talk.prompt_ids + talk.completion_ids
    fever, headache = (
        talk.replies[0],
        talk.replies[1].removesuffix(gx.LAST_TURN).strip(),
    )
    cued = (f"{fever} {gx.LAST_TURN}", f"{headache} {gx.LAST_TURN}")
    assert first == talk.prompt_ids + turns[1] + chat.bridge(turns[1], cued[1])
    assert last == talk.prompt_ids + turns[0] + chat.bridge(turns[0], cued[0])
    unsure = au.exchanges_without(talk, 1, "unsure")
    assert unsure == [(turns[0], fever), (turns[1], f"I'm not sure. {gx.LAST_TURN}")]


def test_whether_it_is_still_a_diagnosis(chat, talk):
    (fever,), (named,) = map(chat.encode, ("Yes, I have a fever.", talk.turns[-1]))
    size = len(chat.tokenizer)
    doctor = TwoAnswers(size, fever, named, chat.end_ids[0], weight=3.0)
    p = au.share_of_diagnoses(doctor, chat, talk, [named], "cut")
    with_fever = np.exp(3) / (np.exp(3) + size - 1)
    assert np.isclose(p, (with_fever + 1 / size) / 2, rtol=1e-3)


def test_bayes_as_in_part_5c(bank, talk):
    told = talks.weigh_evidence(bank, talk.evidence, "Influenza")
    told = {s: x for x, s, _ in told}
    weights = au.weigh_by_bayes(bank, talk)
    assert np.allclose(weights, [told["fever"], told["headache"]])
    talk.spoken.insert(1, talk.spoken[0])  # asked again: nothing new
    talk.replies.insert(1, talk.replies[0])
    assert np.allclose(au.weigh_by_bayes(bank, talk), [*weights[:1], 0, *weights[1:]])


def test_no_diagnosis_has_no_reasons(chat):
    e = gx.Episode(case_id="x", ended="too long", replies=["a", "b"])
    with pytest.raises(gx.InputError, match="x has 2 answers and ended by too long"):
        au.rows_without(chat, e)
    e = gx.Episode(case_id="x", ended="diagnosis", replies=["a"])
    with pytest.raises(gx.InputError, match="x has 1 answers .* two answers"):
        au.rows_without(chat, e)


def test_agreement_by_hand():
    pairs = [([3, 1, 0], [5, 2, 1]), ([3, 1, 0], [-9, 2, 1]), ([1, 2], [2, 1])]
    pairs.append(([0, 0], [1, 2]))  # no order
    pairs = [tuple(map(np.array, p)) for p in pairs]
    rank, top, chance = au.compare_weights(pairs)
    assert np.allclose(rank, [1, -0.5, -1]) and top == [True, True, False]
    assert np.allclose(chance, [1 / 3, 1 / 3, 1 / 2])
