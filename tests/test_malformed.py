"""Odd case ids, adapters and files end in a right result or in one clear sentence."""

import json
import random
import shutil

import pytest

import grpodx_utils as gx

one = gx.notebook("01")
RIGHT, WRONG = True, False


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
