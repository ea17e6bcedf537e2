"""The disease bank: its content, the loader's errors, the split."""

import json

import numpy as np
import pytest

import grpodx_utils as gx

two = gx.notebook("02")
SINCE = "sudden hours days weeks months years".split()


def test_the_bank_has_what_the_card_says(bank):
    assert len(bank.diseases) >= 60
    assert len({d.system for d in bank.diseases}) >= 8
    assert len(bank.symptoms) >= 100
    for d in bank.diseases:
        assert 6 <= len(d.findings) <= 16, d.name
        assert d.aliases and d.icd10 and d.red_flags and d.onset in SINCE, d.name
        assert "https://" in d.source, d.name


def test_no_chief_complaint_identifies_a_disease(bank):
    for s in bank.symptoms:
        p = two.belief(bank, [{s: True}])[0]
        possible = (bank.complaint_rates[:, bank.column[s]] > 0.01).sum()
        assert possible != 1 and (possible == 0 or p.max() < 0.9), s


def test_no_two_diseases_are_alike(bank):
    rates = bank.rates
    for i in range(len(rates)):
        gap = np.abs(rates - rates[i]).max(1)
        gap[i] = 1
        assert gap.min() >= 0.5, (bank.names[i], bank.names[int(gap.argmin())])


def test_rates_have_no_zero_and_complaints_sum_to_one(bank):
    assert (
        bank.rates.min() >= bank.BACKGROUND and bank.rates.max() <= 1 - bank.BACKGROUND
    )
    assert np.allclose(bank.complaint_rates.sum(1), 1)


GOOD = [
    {"disease_name": "A", "symptoms": {"fever": True, "rash": 0.6}},
    {"disease_name": "B", "symptoms": {"fever": 0.9, "headache": 0.7}},
]


def changed(**changes):
    records = json.loads(json.dumps(GOOD))
    records[1].update(changes)
    return records


@pytest.mark.parametrize(
    "records, says",
    [
        ([], "non-empty list"),
        ({"disease_name": "A"}, "non-empty list"),
        ([3], "disease 1: 3 is not an object"),
        (changed(disease_name=""), "disease 2"),
        (changed(disease_name="A"), "already used"),
        (changed(aliases=["a"]), "already used by A"),
        (changed(aliases="flu"), "'aliases': 'flu' is not a list"),
        (changed(symptoms={}), "B: 'symptoms': {} is not an object with at least"),
        (
            changed(symptoms={"fevr": True}),
            "B: unknown symptom 'fevr'. Did you mean 'fever'",
        ),
        (changed(symptoms={"fever": "yes"}), "B: 'fever': 'yes' is not true, false or"),
        (changed(symptoms={"fever": 1.2}), "B: 'fever': 1.2 is not"),
        (changed(symptoms={"fever": "0.5"}), "B: 'fever': '0.5' is not"),
        (changed(symptoms={"fever": float("nan")}), "B: 'fever': nan is not"),
        (changed(symptoms={"fever": None}), "B: 'fever': None is not"),
        (changed(symptoms={"fever": 1, "rash": 0.9}), "same as A's"),
        (changed(symptoms={"headache": 1}), "complaint gives it away"),
        (changed(age=[50, 20]), "'age': give [youngest, oldest]"),
        (changed(age=40), "'age': 40 is not [youngest, oldest]"),
        (changed(sex="Female"), "'sex': 'Female' is not one of"),
        (changed(typical_onset="week"), "'typical_onset': 'week' is not one of"),
        (changed(aliases=[1]), "'aliases': 1 is not a text"),
        (changed(icd10=7), "'icd10': 7 is not a text"),
        (changed()[:1], "complaint gives it away"),
    ],
)
def test_every_fault_gets_one_clear_error(tmp_path, records, says):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(records))
    with pytest.raises(gx.InputError) as error:
        gx.load_bank(path)
    assert says in str(error.value) and "mine.json" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "text, says", [("", "empty"), ("[{,}]", "line 1"), (None, "cannot be read")]
)
def test_unreadable_files(tmp_path, text, says):
    path = tmp_path / "bank.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(gx.InputError, match=says):
        gx.load_bank(path)


def test_true_is_one_false_is_absent(tmp_path):
    path = tmp_path / "bank.json"
    records = changed(symptoms={"fever": True, "headache": 0.5, "rash": False})
    path.write_text(json.dumps(records))
    assert gx.load_bank(path)["B"].findings == {"fever": 1.0, "headache": 0.5}


def test_lexicon_errors_name_the_symptom(tmp_path):
    path = tmp_path / "symptoms.json"
    path.write_text('{"symptoms": {"fever": {"question": "Fever?"}}}')
    with pytest.raises(gx.InputError, match="'fever' lacks complaint, yes, no"):
        gx.load_bank(lexicon=path)


@pytest.mark.parametrize(
    ("extra", "says"),
    [
        ({"aks": ["hot"]}, "'fever' has an unknown key 'aks'. Did you mean 'ask'"),
        ({"ask": "hot"}, "'ask': 'hot' is not a list of texts"),
        ({"yes": True}, "'yes': True is not a text"),
    ],
)
def test_a_lexicon_with_a_wrong_key_or_type(tmp_path, extra, says):
    path = tmp_path / "symptoms.json"
    whole = dict(question="Fever?", complaint="I am hot.", yes="Yes.", no="No.")
    path.write_text(json.dumps({"symptoms": {"fever": whole | extra}}))
    with pytest.raises(gx.InputError, match=says):
        gx.load_bank(lexicon=path)


def test_split_is_stratified_and_fixed(bank):
    train, withheld = gx.split_bank(bank)
    assert set(train) | set(withheld) == set(bank.names)
    assert not set(train) & set(withheld)
    assert (train, withheld) == gx.split_bank(bank)
    assert withheld != gx.split_bank(bank, seed=1)[1]
    systems = {bank[n].system for n in bank.names}
    assert {bank[n].system for n in withheld} == systems


def test_a_split_withholds_something_of_small_systems_too(bank):
    records = gx.read_json(gx.DATA / "disease_bank.json")
    one_each = list({r["body_system"]: r for r in records}.values())
    small = gx.load_bank(one_each)
    train, withheld = gx.split_bank(small)
    assert len(withheld) == 1 and len(train) == len(one_each) - 1
    assert gx.split_bank(small, withheld=0)[1] == []
