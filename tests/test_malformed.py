"""Odd case ids, adapters and files end in a right result or in one clear sentence."""

import json
import random
import shutil

import pytest

import grpodx_utils as gx

one = gx.notebook("01")
RIGHT, WRONG = True, False
FLU = "Influenza|sampled|1"


def outcome(use, *given):
    """ "read", or the sentence that refuses it."""
    try:
        use(*given)
    except (gx.InputError, ValueError) as error:
        assert type(error) in (gx.InputError, ValueError), type(error)
        said = str(error)
        assert "\n" not in said and 15 < len(said) < 600, said
        assert said.endswith((".", "?", ")")), said
        return said
    return "read"


def judge(right, use, given, *shown):
    said = outcome(use, given)
    assert (said == "read") == right, (said, str(shown or given)[:300])


def a_case_id(rng):
    name, mode = "Influenza", rng.choice(["sampled", "noisy", "canonical"])
    wrong = [
        f"{name}|{mode}|٣", f"{name}|{mode}|³", f"{name}|{mode}|-1", f"{name}|{mode}|",
        f"{name}|{mode}|1.0", f"{name}|{mode}", f"{name}|{mode}|3|",
        f"{name}|{mode.title()}|3", f"{name}||3", f"influenza|{mode}|3", f"|{mode}|3",
        f"{name}|{mode}|{'9' * 5000}", f"{name} |{mode}|3", f"{name}|{mode}|+3",
        f"{name}|{mode}|1_0", f"{name}|{mode}| 3", f"{name}|{mode}|3\n",
        "", None, 3, True, b"x", [name, mode, 3],
    ]  # fmt: skip
    if rng.random() < 0.2:
        return RIGHT, f"{name}|{mode}|{rng.randrange(10**12)}"
    return WRONG, rng.choice(wrong)


def an_adapter(rng):
    config = gx.read_json(gx.DATA / "tiny_doctor_grpo" / "adapter_config.json")
    wrong = {
        "r": [None, 0, -1, 1.5, "32", True, [], 10**400],
        "lora_alpha": [None, 0, -2, "64", True, float("nan"), float("inf"), []],
        "base_model_name_or_path": [3, "", " ", [], True, "\ud800"],
        "peft_type": [None, "IA3", 3], "use_rslora": [True, "no"],
        "use_dora": [True], "rank_pattern": [{"q_proj": 4}, 3],
    }  # fmt: skip
    kind = rng.randrange(5)
    if kind == 0:
        return RIGHT, config | {"lora_alpha": rng.choice([1, 16.0, 64]), "new": 1}
    if kind == 1:
        return WRONG, rng.choice([[], None, 3, "x", [config]])
    key = rng.choice(list(wrong))
    if kind == 2 and key in ("r", "lora_alpha"):
        del config[key]
    else:
        config[key] = rng.choice(wrong[key])
    return WRONG, config


NOT_TEXT = [None, 3, True, ["x"], {}, 1.5]
NOT_TEXTS = [None, 3, "x", [3], [None], {"x": 1}, [["x"]]]
NEGATIVE = [-0.1, "0", True, float("nan"), [], {}]
NOT_SHARE = [None, "0.5", -0.1, 1.01, float("nan"), float("inf"), [], {}, "yes", 2, -1]
NOT_COUNT = [None, -1, 1.5, "3", True, [], {}, float("nan"), 2.0]
DISEASE = {
    "disease_name": [*NOT_TEXT, "", "  ", "A|B", "病", "Common cold", "flu"],
    "symptoms": [None, 3, "fever", [], {}, ["fever"], {"fevr": 1}, {"": 0.5}],
    "aliases": [*NOT_TEXTS, ["common cold"]], "red_flags": [*NOT_TEXTS, [""]],
    "icd10": NOT_TEXT, "body_system": NOT_TEXT, "source": NOT_TEXT,
    "typical_onset": [*NOT_TEXT, "", "week", "Days"], "sex": [*NOT_TEXT, "m", "Male"],
    "severity": [*NOT_TEXT, "", "grave", "Mild"], "prevalence": [*NOT_TEXT, "", "3%"],
    "age": [None, 40, "40", [40], [1, 2, 3], [50, 20], ["1", 9], [-1, 9], [1.5, 9]],
}  # fmt: skip
SYMPTOM = dict.fromkeys(("question", "complaint", "yes", "no"), [*NOT_TEXT, "", " "])
SYMPTOM |= dict.fromkeys(("ask", "kind_of"), [*NOT_TEXTS, [""]])
EPISODE = dict.fromkeys(("case_id", "truth", "system", "opening"), NOT_TEXT)
EPISODE |= dict.fromkeys(("turns", "spoken", "replies"), NOT_TEXTS)
EPISODE |= dict.fromkeys(("diagnosis", "matched", "ended"), NOT_TEXT[1:])
EPISODE |= dict.fromkeys(("budget", "questions", "repeats"), NOT_COUNT)
EPISODE |= {"correct": [None, 1, "true", []], "env_mask": [None, 1, [2], ["1"], [True]]}
EPISODE |= {"evidence": [None, [], {"fever": 1}, {"fever": None}, "fever"]}
EPISODE |= dict.fromkeys(
    ("prompt_ids", "completion_ids"), [None, 3, ["3"], [1.5], [-1]]
)


def change(rng, record, wrong):
    """(right or wrong, the record after one change): one field in five is right."""
    record = json.loads(json.dumps(record))
    kind = rng.randrange(6)
    if kind == 0:
        return RIGHT, record
    if kind == 1:
        record[rng.choice(["new", "icd1x", "", "asks", "Symptoms"])] = "x"
    elif kind == 2:
        return WRONG, rng.choice([None, 3, "x", [], [record], True])
    else:
        key = rng.choice(list(wrong))
        record[key] = rng.choice(wrong[key])
    return WRONG, record


BANK = gx.read_json(gx.DATA / "disease_bank.json")[:4]
USED = {s for disease in BANK for s in disease["symptoms"]}
LEXICON = gx.read_json(gx.DATA / "symptoms.json")
LEXICON["symptoms"] = {s: x for s, x in LEXICON["symptoms"].items() if s in USED}
for entry in LEXICON["symptoms"].values():
    entry["ask"] = entry["ask"][:3]


def a_bank(rng):
    records = json.loads(json.dumps(BANK))
    row = rng.randrange(2, len(records))
    if rng.random() < 0.3:  # a share
        name = rng.choice(list(records[row]["symptoms"]))
        records[row]["symptoms"][name] = rng.choice(NOT_SHARE)
        return WRONG, records
    if rng.random() < 0.1:
        del records[row][rng.choice(["disease_name", "symptoms"])]
        return WRONG, records
    right, records[row] = change(rng, records[row], DISEASE)
    return right, records


def a_lexicon(rng):
    lexicon = json.loads(json.dumps(LEXICON))
    if rng.random() < 0.2:
        key = rng.choice(["unknown", "synonyms", "symptoms"])
        lexicon[key] = rng.choice([3, "x", [3], {}, None, True])
        return WRONG, lexicon
    name = rng.choice(list(lexicon["symptoms"]))
    if rng.random() < 0.1:
        del lexicon["symptoms"][name][
            rng.choice(["question", "complaint", "yes", "no"])
        ]
        return WRONG, lexicon
    right, lexicon["symptoms"][name] = change(rng, lexicon["symptoms"][name], SYMPTOM)
    return right, lexicon


def a_parameter(rng):
    names = gx.read_json(gx.DATA / "schemas.json")["parameters"]["properties"]
    name = rng.choice(list(names))
    kind = names[name].get("$ref", name).split("/")[-1]
    wrong = {
        "count": NOT_COUNT, "positive_count": [*NOT_COUNT, 0, "a"],
        "positive_count_or_none": [*NOT_COUNT[1:], 0], "share": NOT_SHARE,
        "positive": [None, 0, -1, "1e-3", True, float("nan"), float("inf"), []],
        "positive_or_none": [0, -1, "1e-3", True, float("nan"), []],
        "not_negative": [None, *NEGATIVE], "not_negative_or_none": NEGATIVE,
        "truth": [None, 0, 1, "true", "false", "False", []],
        "truth_or_none": [0, 1, "true", "None"], "path": [None, 5, "", " ", True, []],
        "path_or_none": [5, "", " ", True, [], 0.5], "texts": NOT_TEXTS,
        "CREDIT": [None, "", "Turn", "episodes", 1], "ROWS": [None, 8, [], [0], ["8"]],
        "WORKERS": NOT_COUNT[1:], "SEEDS": [None, 0, [], [-1], "0"],
        "OTHER_SEEDS": ["x", [3], 3],
        "PRICES": [3, [1], ["1", "2"], [1, -2], [1, 2, 3]],
    }  # fmt: skip
    return WRONG, {name: rng.choice(wrong[kind])}


@pytest.mark.parametrize("number", range(20))
def test_case_ids(bank, number):
    rng = random.Random(number)
    for _ in range(20):
        right, case_id = a_case_id(rng)
        judge(right, lambda given: gx.make_case(bank, given), case_id)


@pytest.mark.parametrize("number", range(20))
def test_adapters(tmp_path, number):
    rng = random.Random(number)
    (tmp_path / "adapter_model.safetensors").touch()
    for _ in range(10):
        right, config = an_adapter(rng)
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
        judge(right, one.check_adapter, tmp_path, config)


@pytest.mark.parametrize("number", range(20))
def test_banks_lexica_and_parameters(bank, tmp_path, number):
    rng, path = random.Random(number), tmp_path / "mine.json"
    for make, use in (
        (a_bank, lambda _: gx.load_bank(path, bank.lexicon)),
        (a_lexicon, lambda _: gx.load_bank(BANK, lexicon=path)),
        (a_parameter, gx.check_parameters),
    ):
        for _ in range(6):
            right, given = make(rng)
            path.write_text(json.dumps(given))
            judge(right, use, given)


@pytest.mark.parametrize("number", range(20))
def test_transcripts(bank, tmp_path, number):
    rng, path = random.Random(number), tmp_path / "mine.jsonl"
    talk = gx.Consultation(bank, gx.ScriptedPatient(bank, gx.make_case(bank, FLU)))
    talk.step("Do you have a fever?")
    talk.step("Final diagnosis: Influenza")
    gx.save_transcripts([talk.record()] * 3, path)
    assert gx.load_transcripts(path) == [talk.record()] * 3
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for _ in range(5):
        right, line = change(rng, lines[1], EPISODE)
        text = "\n".join(json.dumps(x) for x in (lines[0], line, lines[2]))
        path.write_text(text)
        judge(right, gx.load_transcripts, path, line)
        assert right or "line 2" in outcome(gx.load_transcripts, path)


@pytest.mark.parametrize("number", range(20))
def test_damaged_files(bank, tmp_path, number):
    """Cut off, or with bytes changed: refused in a sentence, or read if still right."""
    rng, path = random.Random(number), tmp_path / "mine.json"
    for content, use in (
        (BANK, lambda _: gx.load_bank(path, bank.lexicon)),
        (LEXICON, lambda _: gx.load_bank(BANK, path)),
    ):
        whole = json.dumps(content, indent=1).encode()
        for _ in range(3):
            path.write_bytes(whole[: rng.randrange(len(whole) - 2)])
            judge(WRONG, use, path)
            damaged = bytearray(whole)
            for place in rng.sample(range(len(whole)), 5):
                damaged[place] = rng.randrange(256)
            path.write_bytes(damaged)
            outcome(use, path)


def test_a_key_that_comes_twice_is_refused(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text('[{"disease_name": "A", "symptoms": {"fever": 1, "fever": 0.2}}]')
    assert "'fever' comes twice" in outcome(gx.load_bank, path)


def test_a_folder_that_cannot_be_written_is_refused_before_the_work(tmp_path):
    (tmp_path / "file").touch()
    said = outcome(gx.check_parameters, {"OUTPUT_DIR": str(tmp_path / "file" / "runs")})
    assert "OUTPUT_DIR" in said and "Give another folder" in said
    gx.check_parameters({"OUTPUT_DIR": str(tmp_path / "new"), "SEED": 3, "OTHER": "x"})
    assert not list((tmp_path / "new").iterdir())


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-8"])
def test_a_bank_in_another_unicode_encoding_is_read(bank, tmp_path, encoding):
    text = (gx.DATA / "disease_bank.json").read_text("utf-8")
    (tmp_path / "mine.json").write_text(text, encoding=encoding)
    assert gx.load_bank(tmp_path / "mine.json").names == bank.names


@pytest.mark.parametrize(
    "content", [b"", b" \n", b"{,", b"[" * 100_000, '["Caf\u00e9"]'.encode("cp1252")]
)
def test_a_broken_file_is_one_sentence_that_names_it(tmp_path, content):
    (tmp_path / "mine.json").write_bytes(content)
    assert "mine.json" in outcome(gx.load_bank, tmp_path / "mine.json")
    assert str(tmp_path) in outcome(gx.load_bank, tmp_path)


def test_an_adapter_without_its_files_and_of_another_size(tmp_path, model):
    shipped = gx.DATA / "tiny_doctor_grpo"
    shutil.copy(shipped / "adapter_config.json", tmp_path)
    assert "adapter_model.safetensors" in outcome(one.check_adapter, tmp_path)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"broken")
    assert "does not fit" in outcome(one.fill_lora, model, tmp_path)


def test_the_base_model_is_found_after_a_move(monkeypatch):
    monkeypatch.chdir(gx.DATA.parent)
    for name in ("data/tiny_doctor", "/old/place/GRPODx/data/tiny_doctor"):
        assert one.find_base(name) == "data/tiny_doctor"
    assert one.find_base("unsloth/Qwen2.5-1.5B-Instruct").startswith("unsloth/")
    for name in ("/old/place/doctor", "runs/gone/doctor", "data/gone"):
        assert "MODEL_NAME" in outcome(one.find_base, name)
