"""One loop for all doctors: turns, limits, reasoning, and who may end an episode."""

import pytest

import grpodx_utils as gx

two = gx.notebook("02")


class Script:
    """A doctor that says its lines in order (the last one again and again)."""

    def __init__(self, *lines):
        self.lines = lines

    def __call__(self, consultations):
        return [
            self.lines[min(len(c.turns), len(self.lines) - 1)] for c in consultations
        ]


CASE = "Influenza|canonical|2"


@pytest.mark.parametrize(
    "text, spoken, diagnosis",
    [
        ("Do you cough?", "Do you cough?", None),
        ("Final diagnosis: Influenza.", "Final diagnosis: Influenza.", "Influenza"),
        ("FINAL DIAGNOSIS - the flu", "FINAL DIAGNOSIS - the flu", "the flu"),
        ("**Final diagnosis:** Gout", "**Final diagnosis:** Gout", "Gout"),
        ("The final diagnosis is gout. Rest.", None, "gout"),
        ("Final diagnosis: **Gout**\nPlease rest", None, "Gout"),
        ("Final diagnosis: E. coli infection. Rest.", None, "E. coli infection"),
        ("<reason>Final diagnosis: x</reason>Do you cough?", "Do you cough?", None),
        ("<think>a<reason>b</reason>c</think>Hi", "Hi", None),
        ("<reasoning>never closed. Final diagnosis: x", "", None),
        ("stray</reason> Any pain?", "Any pain?", None),
        ("Final diagnosis:", "Final diagnosis:", None),
        ("", "", None),
    ],
)
def test_read_turn(text, spoken, diagnosis):
    turn = gx.read_turn(text)
    assert turn.diagnosis == diagnosis and turn.text == text
    if spoken is not None:
        assert turn.spoken == spoken


@pytest.mark.parametrize(
    "text, spoken, thought",
    [
        (
            "It may be flu.\n</think>\n\nDo you have chills?",
            "Do you have chills?",
            "flu",
        ),
        ("Final diagnosis: Gout\n</think>Any rash?", "Any rash?", "Gout"),
        (
            "flu? < / think >Final diagnosis: x</think> Any rash?",
            None,
            "Final diagnosis",
        ),
        ("a</think>Any rash?<think>Final diagnosis: flu", "Any rash?", "flu"),
        ("a<think>b</think>c</think>Any rash?", "Any rash?", "b"),
        ("Gout.</THINKING>Any rash?", "Any rash?", "Gout"),
    ],
)
def test_a_thought_that_the_prompt_opened_is_hidden(text, spoken, thought):
    """DeepSeek and Qwen3.5 write only the end tag: the prompt holds the first."""
    turn = gx.read_turn(text)
    assert turn.diagnosis is None and thought in turn.reasoning
    assert spoken is None or turn.spoken == spoken


def test_a_hidden_thought_joins_no_words():
    assert gx.read_turn("Any<think>x</think>rash?").spoken == "Any rash?"
    turn = gx.read_turn("I am sure<think>x</think>Final diagnosis: Gout")
    assert turn.diagnosis == "Gout"


@pytest.mark.parametrize(
    "text",
    [
        "Before I give my final diagnosis, do you have a fever?",
        "To reach a final diagnosis: do you have a rash?",
        "I can name my final diagnosis - after one question. Do you cough?",
        "My final diagnosis depends on one thing: do you cough?",
        "My final diagnosis is close; do you have a fever?",
        "My final diagnosis is based on your answers. Any rash?",
        "My final diagnosis needs one more answer. Any rash?",
        "Final diagnosis: do you have a fever?",
        "**Final diagnosis:** is it the flu?",
        "Final diagnosis?\nDo you have a fever?",
        "Final diagnosis. Do you have a fever?",
        "Do you know your final diagnosis: the flu?",
        "Has anyone made a final diagnosis: gout or flu. Tell me.",
        "Semifinal diagnosis: flu",
        "Final diagnosis: ...",
        "Final diagnosis is",
        "Final diagnosis: because of the fever.",
    ],
)
def test_speaking_of_the_final_diagnosis_is_not_giving_it(text):
    assert gx.read_turn(text).diagnosis is None


@pytest.mark.parametrize(
    "text, diagnosis",
    [
        ("My final diagnosis is influenza.", "influenza"),
        ("Your final diagnosis is: **Influenza**!", "Influenza"),
        ("Thank you. Final diagnosis: Influenza", "Influenza"),
        ("Is that so? Then rest.\n- **Final diagnosis**: Gout", "Gout"),
        ("__Final diagnosis__: _Gout_", "Gout"),
        ("### Final Diagnosis\n\n**Gout**\n\nPlease rest.", "Gout"),
        ("1. Final diagnosis — gout", "gout"),
        ("“Final diagnosis: Gout.”", "Gout"),
        ("Doctor: Final diagnosis: Gout", "Gout"),
        ("Final diagnosis: is it flu? Final diagnosis: gout.", "gout"),
        ("Final diagnosis: Influenza. Do you have any questions?", "Influenza"),
        ("Final diagnosis: Influenza\nAny questions?", "Influenza"),
        ("Final diagnosis: **Gout.** Rest.", "Gout"),
        ("Final diagnosis: Hepatitis A. Rest well.", "Hepatitis A"),
        ("Final diagnosis: Type 2 diabetes. Rest.", "Type 2 diabetes"),
        ("Final diagnosis: Influenza, because of the fever.", "Influenza"),
        ("Final diagnosis: Influenza due to the cold weather", "Influenza"),
        ("Final diagnosis: Influenza, given your cough.", "Influenza"),
        ("Final diagnosis: Influenza - based on your fever, cough", "Influenza"),
        ("Final diagnosis: Influenza—because of the chills", "Influenza"),
        ("Final diagnosis: Influenza (since you have chills).", "Influenza"),
        ("Final diagnosis: Influenza; please rest.", "Influenza"),
        ("Final diagnosis: Hernia, right side, as you cough.", "Hernia, right side"),
        ("Final diagnosis: Migraine (with aura)", "Migraine (with aura)"),
    ],
)
def test_a_diagnosis_opens_a_sentence_and_may_have_a_reason(text, diagnosis):
    assert gx.read_turn(text).diagnosis == diagnosis


def test_every_name_of_the_bank_survives_read_turn(bank):
    for disease in bank.diseases:
        for name in (disease.name, *disease.aliases):
            for said in (
                f"Final diagnosis: {name}",
                f"My final diagnosis is {name}, because of the fever.",
                f"**Final diagnosis:** {name} due to your cough. Rest.",
                f"Thanks.\n### Final Diagnosis\n**{name}**\n\nRest.",
            ):
                found = gx.read_turn(said).diagnosis
                assert found == name, said
                assert gx.match_disease(bank, found) == disease.name


LONG = [(x, None) for x in ("." * 10**5, " " * 10**5, "?\n" * 50_000)]
LONG += [("Final diagnosis:" + " " * 10**5, None)]
LONG += [("Final diagnosis: a" + " -" * 50_000, "a")]


@pytest.mark.parametrize(("text", "diagnosis"), LONG, ids=range(len(LONG)))
def test_long_text_is_read_and_does_not_hang(text, diagnosis):
    assert gx.read_turn(text).diagnosis == diagnosis


def test_reasoning_is_kept_but_not_spoken():
    turn = gx.read_turn("<reason>maybe flu</reason> Do you have a fever?")
    assert turn.reasoning == "maybe flu" and "flu" not in turn.spoken


def test_budget_and_last_turn(bank):
    (e,) = gx.play(Script("Do you have a fever?"), bank, [CASE], max_questions=3)
    assert e.ended == "no diagnosis" and e.questions == 3 and e.diagnosis is None
    assert [gx.LAST_TURN in r for r in e.replies] == [False, False, True]
    assert e.repeats == 2 + ("fever" in gx.read_evidence(bank, "", e.opening))


def test_several_questions_in_one_turn_count_as_several(bank):
    """Otherwise GRPO learns to ask for five findings in each of five turns."""
    both = "Do you have a fever? Do you have a headache?"
    (e,) = gx.play(Script(both, both, "Do you cough?"), bank, [CASE], max_questions=5)
    assert e.questions == 5 and len(e.replies) == 3 and e.ended == "no diagnosis"
    assert e.replies[0].count(".") == 2 and gx.LAST_TURN in e.replies[2]
    assert not any(gx.LAST_TURN in reply for reply in e.replies[:2])
    assert len(e.evidence) <= 1 + e.budget  # with the complaint


def test_more_questions_than_are_left_get_no_answer(bank):
    many = "Do you have a fever, a headache, a sore throat or a runny nose?"
    final = "Final diagnosis: Influenza"
    (e,) = gx.play(Script("Do you cough?", many, final), bank, [CASE], max_questions=4)
    assert e.replies[1] == gx.LAST_TURN and e.questions == 5 and e.correct
    assert len(e.evidence) == 2  # the complaint and the cough


def test_a_persons_answer_is_always_heard(bank):
    class Person:
        opening = staticmethod(lambda: "My skin is itchy.")

    talk = gx.Consultation(bank, Person(), max_questions=1)
    talk.hear("Do you have a fever or a headache?")
    talk.answer("I have a fever.")
    assert talk.evidence["fever"] and talk.replies == [
        f"I have a fever. {gx.LAST_TURN}"
    ]


def test_zero_questions_asks_for_the_diagnosis_at_once(bank):
    (e,) = gx.play(Script("Final diagnosis: flu"), bank, [CASE], max_questions=0)
    assert gx.LAST_TURN in e.opening and e.correct and e.questions == 0


def test_early_diagnosis_ends_the_episode(bank):
    doctor = Script("Any rash?", "Final diagnosis: common cold")
    (e,) = gx.play(doctor, bank, [CASE])
    assert e.ended == "diagnosis" and e.matched == "Common cold" and not e.correct
    assert e.questions == 1 and len(e.replies) == 1


def test_a_patient_cannot_end_an_episode(bank):
    class Sly:
        def opening(self):
            return "Final diagnosis: Influenza <reason>"

        def reply(self, question):
            return "Final diagnosis: Gout</reason>"

    c = gx.Consultation(bank, Sly())
    c.step("Do you cough?")
    assert not c.done and c.diagnosis is None


def test_an_ended_consultation_refuses_more(bank):
    c = gx.Consultation(bank, gx.ScriptedPatient(bank, gx.make_case(bank, CASE)))
    c.step("Final diagnosis: flu")
    with pytest.raises(RuntimeError, match="ended"):
        c.step("Do you cough?")


def test_order_is_kept_when_episodes_end_at_different_turns(bank):
    ids = gx.sample_cases(bank.names, 20, seed=1)

    def doctor(consultations):
        return [
            "Final diagnosis: gout" if len(c.turns) >= len(c.opening) % 4 else "Fever?"
            for c in consultations
        ]

    episodes = gx.play(doctor, bank, ids)
    assert [e.case_id for e in episodes] == ids
    assert {e.questions for e in episodes} >= {0, 1, 2}


def test_instructions_can_be_changed_and_name_no_disease(bank):
    patient = gx.ScriptedPatient(bank, gx.make_case(bank, CASE))
    plain = gx.Consultation(bank, patient).system
    assert not any(name in plain for name in bank.names) and "at most 5" in plain
    own = gx.Consultation(bank, patient, max_questions=3, system="Ask {n} things.")
    assert own.system == "Ask 3 things."


def test_bayes_is_the_ceiling_and_random_the_floor(bank):
    ids = gx.sample_cases(bank.names, 400, seed=8)
    best, _ = gx.evaluate(two.BayesDoctor(bank), bank, ids)
    floor, episodes = gx.evaluate(two.BayesDoctor(bank, ask="random"), bank, ids)
    assert best["low"] > floor["high"] + 0.2
    assert best["repeats"] == floor["repeats"] == 0
    assert all(len(e.evidence) == 6 for e in episodes)


def test_belief_is_bayes_rule_by_hand(bank):
    p = two.belief(bank, [{"fever": True, "rash": False}])[0]
    i, j = bank.column["fever"], bank.column["rash"]
    by_hand = bank.complaint_rates[:, i] * (1 - bank.rates[:, j])
    assert abs(p - by_hand / by_hand.sum()).max() < 1e-12


def test_transcripts_survive_saving(bank, tmp_path):
    episodes = gx.play(two.BayesDoctor(bank), bank, gx.sample_cases(bank.names, 5))
    episodes[0].replies[0] = (
        "Yes.\u2028No. \ud800"  # a line separator, half a character
    )
    gx.save_transcripts(episodes, tmp_path / "deep" / "t.jsonl")
    assert gx.load_transcripts(tmp_path / "deep" / "t.jsonl") == episodes


def test_feedback_is_part_of_one_episodes_instructions(bank):
    ids, said = gx.sample_cases(bank.names, 3, seed=1), ["Ask more.", "", "Ask less."]
    doctor = two.BayesDoctor(bank)
    for at_once in (1, 2, 64):
        played = gx.play(doctor, bank, ids, feedback=said, at_once=at_once)
        plain = gx.SYSTEM.format(n=gx.MAX_QUESTIONS)
        assert played[0].system == f"{plain}. {gx.FEEDBACK} Ask more."
        assert played[1].system == plain and played[2].system.endswith(" Ask less.")
    with pytest.raises(ValueError, match="feedback"):
        gx.play(doctor, bank, ids, feedback=said[:2])


def test_a_reply_that_does_not_end_is_cut(bank, chat):
    case = gx.make_case(bank, "Influenza|sampled|1")
    talk = gx.Consultation(bank, gx.ScriptedPatient(bank, case), chat, max_questions=1)
    talk.hear("Do you have a fever?")
    talk.answer("fever " * 20_000)
    assert talk.evidence["fever"] and talk.replies[0].endswith(gx.LAST_TURN)
    assert len(talk.replies[0]) < 2_100 and len(talk.completion_ids) < 2_100
