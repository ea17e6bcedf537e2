"""DDXPlus as a bank (notebook 02): records in its format, made up for the tests."""

import copy
import json

import numpy as np
import pytest

import grpodx_utils as gx

two = gx.notebook("02")


def evidence(question, kind="B", values=(), antecedent=False, **more):
    entry = dict(question_en=question, data_type=kind, is_antecedent=antecedent)
    entry |= {"possible-values": list(values), "default_value": 0}
    return entry | more


ASKED = {  # code -> question; codes and questions as in the release
    "E_91": "Do you have a fever (either felt or measured with a thermometer)?",
    "E_201": "Do you have a cough?",
    "E_97": "Do you have a sore throat?",
    "E_66": "Are you experiencing shortness of breath or difficulty breathing in a "
    "significant way?",
    "E_148": "Are you feeling nauseous or do you feel like vomiting?",
    "E_94": "Have you had chills or shivers?",
    "E_181": "Do you have nasal congestion or a clear runny nose?",
    "E_14": "Do you have chest pain even at rest?",
    "E_53": "Do you have pain somewhere, related to your reason for consulting?",
    "E_51": "Have you had diarrhea or an increase in stool frequency?",
    "E_89": "Do you constantly feel fatigued or do you have non-restful sleep?",
}
BURNING = {"V_11": {"en": "NA"}, "V_181": {"en": "burning"}, "V_192": {"en": "sharp"}}
EVIDENCES = {code: evidence(question) for code, question in ASKED.items()} | {
    "E_79": evidence("Do you smoke cigarettes?", antecedent=True),
    "E_69": evidence("Do you have diabetes?", antecedent=True),
    "E_54": evidence("Characterize your pain:", "M", BURNING, value_meaning=BURNING)
    | {"default_value": "V_11"},
    "E_56": evidence("How intense is the pain?", "C", range(11)),
}


def condition(name, english, symptoms, antecedents, icd10):
    entry = dict(condition_name=name, symptoms=dict.fromkeys(symptoms.split(), {}))
    entry |= dict(antecedents=dict.fromkeys(antecedents.split(), {}), severity=3)
    return entry | {"cond-name-eng": english, "icd10-id": icd10}


CONDITIONS = {
    c["condition_name"]: c
    for c in (
        condition("Grippe", "Flu", "E_91 E_201 E_94 E_89 E_97", "E_69", "J11"),
        condition("Rhume", "Cold", "E_201 E_181 E_97 E_91", "E_79", "J00"),
        condition("Angor", "Angina", "E_14 E_66 E_53 E_54 E_56", "E_79 E_69", "I20"),
        condition("Gastrite", "Gastritis", "E_148 E_51 E_53 E_54 E_91", "E_79", "K29"),
        condition("Embolie", "Embolism", "E_66 E_201 E_53 E_54", "", "I26"),
    )
}
SHARES = {  # E_56 is coded with a default value: present in everybody
    "Grippe": {"E_91": 0.9, "E_201": 0.8, "E_94": 0.7, "E_89": 0.75, "E_97": 0.55},
    "Rhume": {"E_201": 0.7, "E_181": 0.9, "E_97": 0.6, "E_91": 0.3, "E_79": 0.5},
    "Angor": {"E_14": 0.9, "E_66": 0.7, "E_53": 1.0, "E_79": 0.8, "E_69": 0.6},
    "Gastrite": {"E_148": 0.9, "E_51": 0.6, "E_53": 0.8, "E_91": 0.2, "E_79": 0.3},
    "Embolie": {"E_66": 0.9, "E_201": 0.5, "E_53": 0.9},
}
VALUES = {"Angor": {"E_54": 1.0, "E_54_@_V_192": 0.6, "E_54_@_V_11": 0.1},
          "Gastrite": {"E_54": 1.0, "E_54_@_V_181": 0.7, "E_56_@_7": 0.2},
          "Embolie": {"E_54": 1.0, "E_54_@_V_192": 0.3}}  # fmt: skip


def table():
    rows = {n: dict.fromkeys(ASKED, 0.0) | row for n, row in SHARES.items()}
    rows = {n: row | VALUES.get(n, {}) | {"E_56": 1.0} for n, row in rows.items()}
    rows["Grippe"]["E_69"] = 0.4
    return {"conditions": [*rows], "probabilities": rows}


def load(folder, conditions=CONDITIONS, evidences=EVIDENCES, rates=None):
    """The bank of these contents, by way of files."""
    contents = {"c.json": conditions, "e.json": evidences}
    contents |= {} if rates is None else {"r.json": rates}
    for name, content in contents.items():
        (folder / name).write_text(json.dumps(content))
    return two.load_ddxplus(*(folder / name for name in contents))


PLAIN = [
    ("Do you have a fever?", "E_91"),
    ("Any cough?", "E_201"),
    ("Is your throat sore?", "E_97"),
    ("Are you short of breath?", "E_66"),
    ("Do you feel nauseous?", "E_148"),
    ("Any shivers?", "E_94"),
    ("Do you have a runny nose?", "E_181"),
    ("Do you have chest pain?", "E_14"),
    ("Are you in pain?", "E_53"),
    ("Have you had diarrhea?", "E_51"),
    ("Do you feel tired?", "E_89"),
    ("Do you smoke?", "E_79"),
    ("Do you have diabetes?", "E_69"),
]


@pytest.mark.parametrize(("question", "code"), PLAIN)
def test_plain_questions_are_understood(tmp_path, question, code):
    bank = load(tmp_path)
    assert bank.lexicon.find(question) == (EVIDENCES[code]["question_en"],)


@pytest.mark.parametrize(
    ("question", "phrases", "statement"),
    [
        (ASKED["E_91"], ["fever"], "I have a fever (either felt or measured with a "
         "thermometer)"),
        (ASKED["E_94"], ["chills", "shivers"], "I have had chills or shivers"),
        (ASKED["E_148"], ["nauseous", "like vomiting"], ""),
        (ASKED["E_53"], ["pain"], ""),
        ("Have you ever felt that your heart races when you’re asleep?",
         ["heart races when you’re asleep"],
         "I have felt that my heart races when I am asleep"),
        ("Have you or any member of your family ever had croup?",
         ["or any member of your family ever had croup"], ""),
    ],
)  # fmt: skip
def test_phrases_and_statements(question, phrases, statement):
    assert two.short_phrases(question) == phrases
    assert two.first_person(question) == statement


@pytest.mark.parametrize("rates", [None, table()])
def test_sentences_are_read_back(tmp_path, rates):
    bank = load(tmp_path, rates=rates)
    for s in bank.symptoms:
        said = bank.lexicon.symptoms[s]
        for sentence, present in ((said.complaint, True), (said.yes, True),
                                  (said.no, False)):  # fmt: skip
            assert gx.read_evidence(bank, "", sentence) == {s: present}
        assert bank.lexicon.find(said.question) == (s,)


@pytest.mark.parametrize("rates", [None, table()])
def test_patients_complain_of_symptoms_only(tmp_path, rates):
    bank = load(tmp_path, rates=rates)
    told = {q for code, q in ASKED.items()}
    others = [i for i, s in enumerate(bank.symptoms) if s not in told]
    assert others and bank.complaint_rates[:, others].max() < 1e-6
    assert np.allclose(bank.complaint_rates.sum(1), 1)
    cases = [gx.make_case(bank, c) for c in gx.sample_cases(bank.names, 500)]
    assert {c.complaint for c in cases} <= told
    smoke = EVIDENCES["E_79"]["question_en"]  # it is still a finding
    assert any(smoke in c.findings for c in cases)
    assert np.isfinite(two.belief(bank, [{smoke: True}])).all()


def test_rates_are_read(tmp_path):
    bank = load(tmp_path, rates=table())
    for name, row in table()["probabilities"].items():
        english = CONDITIONS[name]["cond-name-eng"]
        for code, share in row.items():
            if code in ASKED:
                found = bank[english].findings.get(EVIDENCES[code]["question_en"], 0)
                assert found == share, (name, code)
    assert bank["Flu"].aliases == ["Grippe"] and bank["Flu"].system == "J"
    release = load(tmp_path)
    assert set(release["Flu"].findings.values()) == {1.0}


def test_constant_columns_are_dropped(tmp_path):
    rates = table()
    for row in rates["probabilities"].values():
        row["E_69"] = 0.25
    bank = load(tmp_path, rates=rates)
    assert EVIDENCES["E_69"]["question_en"] not in bank.symptoms
    assert EVIDENCES["E_69"]["question_en"] in load(tmp_path, rates=table()).symptoms


def test_values_are_findings_where_the_rates_have_them(tmp_path):
    whole = [e["question_en"] for e in EVIDENCES.values() if e["data_type"] != "B"]
    assert not set(whole) & set(load(tmp_path).symptoms)  # nothing is known of values
    bank = load(tmp_path, rates=table())
    starts = tuple(w.rstrip("?") for w in whole)
    values = [s for s in bank.symptoms if s.startswith(starts)]
    sharp = 'Characterize your pain: "sharp"?'
    burning = 'Characterize your pain: "burning"?'
    seven = 'How intense is the pain: "7"?'
    assert sorted(values) == [burning, sharp, seven]  # not "NA", the default
    assert bank["Angina"].findings[sharp] == 0.6
    case = gx.make_case(bank, "Gastritis|sampled|0")._replace(findings={burning})
    patient = gx.ScriptedPatient(bank, case)
    assert patient.reply(burning) == f'Yes to: "{burning}"'
    assert patient.reply(sharp) == f'No to: "{sharp}"'


def test_the_reference_plays_on_it(tmp_path):
    bank = load(tmp_path, rates=table())
    cases = gx.sample_cases(bank.names, 100)
    scores, _ = gx.evaluate(two.BayesDoctor(bank), bank, cases)
    assert scores["accuracy"] > 0.8 and scores["not_understood"] == 0


def change(name, path, value):
    """The three contents with one place changed; `value` None removes it."""
    contents = dict(
        conditions=copy.deepcopy(CONDITIONS),
        evidences=copy.deepcopy(EVIDENCES),
        rates=table(),
    )
    if not path:
        return contents | {name: value}
    place = contents[name]
    for key in path[:-1]:
        place = place[key]
    if value is None:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    return contents


GRIPPE = ("probabilities", "Grippe")
FAULTS = [
    ("evidences", (), [1, 2], "e.json: not DDXPlus's format: the whole file"),
    ("evidences", (), "text", "e.json: not DDXPlus's format: the whole file"),
    ("evidences", ("E_91",), 3, "e.json: not DDXPlus's format: E_91"),
    ("evidences", ("E_91", "question_en"), None, "E_91, question_en: field required"),
    ("evidences", ("E_91", "question_en"), 5, "e.json.* E_91, question_en: "),
    ("evidences", ("E_91", "question_en"), " ?", "e.json.* E_91, question_en: "),
    ("evidences", ("E_91", "data_type"), "X", "e.json.* E_91, data_type: "),
    ("evidences", ("E_91", "data_type"), None, "e.json.* E_91, data_type: "),
    ("evidences", ("E_54", "value_meaning"), [1], "e.json.* E_54, value_meaning: "),
    ("evidences", ("E_54", "possible-values"), 3, "e.json.* E_54, possible-values: "),
    ("evidences", ("E_54", "default_value"), [], "e.json.* E_54, default_value"),
    ("evidences", ("E_91",), None, "c.json: Grippe: evidence E_91 is not in"),
    ("conditions", (), ["Grippe"], "c.json: not DDXPlus's format: the whole file"),
    ("conditions", (), {}, "r.json: Angor is not in the file of conditions"),
    ("conditions", ("Rhume",), [], "c.json: not DDXPlus's format: Rhume"),
    ("conditions", ("Rhume", "condition_name"), None, "Rhume, condition_name: field"),
    ("conditions", ("Rhume", "condition_name"), 7, "c.json.* Rhume, condition_name"),
    ("conditions", ("Rhume", "symptoms"), None, "Rhume, symptoms: field required"),
    ("conditions", ("Rhume", "symptoms"), ["E_91"], "c.json.* Rhume, symptoms: "),
    ("conditions", ("Rhume", "antecedents"), "E_91", "c.json.* Rhume, antecedents: "),
    ("conditions", ("Rhume", "symptoms", "E_999"), {}, "c.json: Rhume: evidence E_999"),
    ("conditions", ("Rhume", "icd10-id"), 11, "c.json.* Rhume, icd10-id: "),
    ("conditions", ("Rhume", "cond-name-eng"), "Flu", "c.json.*: Flu: the name"),
    ("rates", (), [0.5], "r.json: not DDXPlus's format: the whole file"),
    ("rates", ("probabilities",), None, "r.json.* probabilities: field required"),
    ("rates", ("probabilities",), [], "r.json.* probabilities: "),
    ("rates", GRIPPE, [1.0], "r.json.* probabilities, Grippe: "),
    ("rates", GRIPPE, None, "r.json: Grippe has no rates"),
    ("rates", ("probabilities", "Gripe"), {}, "r.json: Gripe is not in the file"),
    ("rates", (*GRIPPE, "E_91"), 1.5, "probabilities, Grippe, E_91: .*less than"),
    ("rates", (*GRIPPE, "E_91"), -0.1, "probabilities, Grippe, E_91: .*greater"),
    ("rates", (*GRIPPE, "E_91"), float("nan"), "probabilities, Grippe, E_91: "),
    ("rates", (*GRIPPE, "E_91"), "0.5", "probabilities, Grippe, E_91: "),
    ("rates", (*GRIPPE, "E_91"), True, "probabilities, Grippe, E_91: "),
    ("rates", (*GRIPPE, "E_91"), None, "r.json: Grippe: no rate for evidence E_91"),
    ("rates", (*GRIPPE, "E_999"), 0.5, "r.json: Grippe: evidence E_999 is not in"),
    ("rates", (*GRIPPE, "E_54_@_V_9"), 0.5, "r.json: Grippe: evidence E_54_@_V_9"),
    ("rates", (*GRIPPE, "E_91_@_"), 0.5, "r.json: Grippe: evidence E_91_@_ is"),
]


@pytest.mark.parametrize(("name", "path", "value", "message"), FAULTS)
def test_a_malformed_file_is_one_sentence(tmp_path, name, path, value, message):
    with pytest.raises(gx.InputError, match=message) as error:
        load(tmp_path, **change(name, path, value))
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)


def test_the_release_without_rates_has_its_own_faults(tmp_path):
    with pytest.raises(gx.InputError, match="c.json: expected a non-empty list"):
        load(tmp_path, conditions={})
    lone = dict(CONDITIONS, Toux=condition("Toux", "Croup", "E_54", "", "J05"))
    with pytest.raises(gx.InputError, match="c.json: Croup: 'symptoms': {} is not"):
        load(tmp_path, conditions=lone)  # a value alone is no finding
    lone = dict(CONDITIONS, Toux=condition("Toux", "Croup", "", "E_79", "J05"))
    with pytest.raises(gx.InputError, match="c.json: Croup: no symptom that half"):
        load(tmp_path, conditions=lone)
    with pytest.raises(gx.InputError, match="DDXPlus"):
        gx.load_bank(tmp_path / "c.json")
    with pytest.raises(gx.InputError, match="c.json: not DDXPlus's"):  # swapped
        two.load_ddxplus(tmp_path / "e.json", tmp_path / "c.json")
    with pytest.raises(gx.InputError, match="disease_bank.json: not DDXPlus's"):
        two.load_ddxplus(gx.DATA / "disease_bank.json", tmp_path / "e.json")
    with pytest.raises(gx.InputError, match="nothing.json: cannot be read"):
        two.load_ddxplus(tmp_path / "c.json", tmp_path / "nothing.json")
    (tmp_path / "e.json").write_text("{")
    with pytest.raises(gx.InputError, match="e.json: line 1"):
        two.load_ddxplus(tmp_path / "c.json", tmp_path / "e.json")
