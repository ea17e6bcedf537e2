"""The rollout that TRL calls, credit per turn, loading, and what notebooks save."""

import json
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator

import grpodx_utils as gx


@pytest.fixture(scope="session")
def model():
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(gx.DATA / "tiny_doctor").float().eval()


@pytest.fixture
def trainer(model):
    """What `make_rollout` needs of TRL's trainer."""
    torch.manual_seed(0)
    return SimpleNamespace(
        args=SimpleNamespace(max_completion_length=512, temperature=1.0),
        generation_config=SimpleNamespace(max_new_tokens=16),
        model_wrapped=model,
        accelerator=Accelerator(cpu=True),
    )


@pytest.fixture
def chat(tiny_tokenizer):
    return gx.ChatTokens(tiny_tokenizer)


def test_a_group_shares_one_patient_and_order_is_kept(bank, chat, trainer):
    cases = gx.sample_cases(bank.names, 6, seed=2)
    prompts = np.repeat(cases, 4).tolist()
    out = gx.make_rollout(bank, chat)(prompts, trainer)
    assert [e.case_id for e in out["episode"]] == prompts
    for g in range(6):
        group = out["episode"][4 * g : 4 * g + 4]
        assert len({e.opening for e in group}) == len({e.truth for e in group}) == 1
    assert len({tuple(p) for p in out["prompt_ids"]}) == 1, "prompts need no padding"
    for e, ids, mask in zip(out["episode"], out["completion_ids"], out["env_mask"]):
        assert len(ids) == len(mask) > 0 and set(mask) <= {0, 1}
        mine = [i for i, m in zip(ids, mask) if m]
        assert chat.decode(mine) == "".join(e.turns)
        assert e.opening in chat.decode(ids)


class Uneven(gx.ScriptedPatient):
    """Adds words to its answers, so that conversations differ in length."""

    def reply(self, question):
        extra = " Well, yes, a bit." * (len(self.case.findings) % 4)
        return super().reply(question) + extra


def consultations(bank, chat, n, **options):
    """Open consultations with uneven patients; the budgets differ too."""
    cases = [gx.make_case(bank, i) for i in gx.sample_cases(bank.names, n, seed=8)]
    return [
        gx.Consultation(bank, Uneven(bank, c), chat, max_questions=2 + k % 4, **options)
        for k, c in enumerate(cases)
    ]


def greedy_by_generate(model, chat, c, cap):
    """The next turn of one consultation, computed from scratch by `generate`."""
    ids = torch.tensor([c.ids])
    out = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=cap,
        do_sample=False,
        eos_token_id=chat.stop_ids,
        pad_token_id=chat.tokenizer.pad_token_id,
    )
    return gx.cut_turn(out[0, ids.shape[1] :].tolist(), chat.stop_ids)


def small_model(kind, vocabulary):
    """Random weights, four query heads and two key heads, and LoRA that counts."""
    import peft
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(
        kind,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=vocabulary,
        initializer_range=0.3,
    )
    lora = peft.LoraConfig(init_lora_weights=False, target_modules=gx.LORA_TARGETS)
    return peft.get_peft_model(AutoModelForCausalLM.from_config(config), lora).eval()


@pytest.mark.parametrize("kind", ["tiny_doctor", *gx._GraphBatch.KINDS])
@pytest.mark.parametrize("batch", [gx._Batch, gx._GraphBatch])
def test_the_cache_kept_between_turns_changes_nothing(
    bank, chat, model, monkeypatch, kind, batch
):
    """On a GPU `_GraphBatch` is used; there `tests/gpu` checks the recorded steps."""
    if kind != "tiny_doctor":
        model = small_model(kind, len(chat.tokenizer))
    monkeypatch.setattr(gx, "_Batch", batch)
    monkeypatch.setattr(gx._GraphBatch, "ROOM", 16)  # the cache must grow
    doctor = gx.ModelDoctor(model, chat, temperature=0, max_new_tokens=6)
    live = consultations(bank, chat, 8) + consultations(bank, chat, 5)  # 5 begin alike
    turns = 0
    while live:
        said = doctor(live)
        for c, ids in zip(live, said):
            assert ids == greedy_by_generate(model, chat, c, 6)
            c.step(ids)
        live, turns = [c for c in live if not c.done], turns + 1
    assert turns > 2, "several turns, and rows that leave before the others"


def test_a_switched_off_adapter_is_off(bank, chat, monkeypatch):
    monkeypatch.setattr(gx, "_Batch", gx._GraphBatch)
    model = small_model("qwen2", len(chat.tokenizer))
    doctor = gx.ModelDoctor(model, chat, temperature=0, max_new_tokens=6)
    (talk,) = consultations(bank, chat, 1)
    on = doctor([talk])
    with model.disable_adapter():
        doctor = gx.ModelDoctor(model, chat, temperature=0, max_new_tokens=6)
        off = doctor([talk])
        assert off == [greedy_by_generate(model, chat, talk, 6)]
    assert on != off


def test_an_interrupted_turn_leaves_nothing_behind(bank, chat, model, monkeypatch):
    doctor = gx.ModelDoctor(model, chat, temperature=0)
    (talk,) = consultations(bank, chat, 1)
    talk.step(doctor([talk])[0])
    fair = greedy_by_generate(model, chat, talk, 64)
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(
            doctor, "_sample", lambda logits: (_ for _ in ()).throw(KeyboardInterrupt)
        )
        doctor([talk])
    assert doctor([talk]) == [fair] and doctor([]) == []


def test_few_or_many_at_once_is_the_same(bank, chat, model):
    doctor = gx.ModelDoctor(model, chat, temperature=0)
    cases = gx.sample_cases(bank.names, 11, seed=3)
    few, many = (gx.play(doctor, bank, cases, chat, at_once=n) for n in (4, 64))
    assert few == many and [e.case_id for e in few] == cases


def test_a_turn_that_was_not_heard_is_computed_again(bank, chat, model):
    doctor = gx.ModelDoctor(model, chat, temperature=0)
    (c,) = consultations(bank, chat, 1)
    first = doctor([c])
    assert doctor([c]) == first
    short = gx.ModelDoctor(model, chat, temperature=0, max_new_tokens=1)
    assert short([c]) == short([c]) == [first[0][:1]], "a turn of one token"
    c.step("Do you have a fever?")  # somebody else speaks instead
    assert doctor([c]) == [greedy_by_generate(model, chat, c, 64)]


def test_sampling_follows_the_distribution(chat):
    doctor = gx.ModelDoctor(None, chat, temperature=2.0)
    p = torch.tensor([0.0, 0.5, 0.2, 0.3, 0.0])
    torch.manual_seed(0)
    drawn = doctor._sample(2 * p.log().expand(20_000, 5))
    share = torch.bincount(drawn, minlength=5) / 20_000
    assert torch.allclose(share, p, atol=0.015) and share[0] == share[4] == 0


def test_turn_scores_by_hand(bank, chat):
    (e,) = gx.play(gx.BayesDoctor(bank), bank, ["Influenza|sampled|5"])
    assert gx.turn_scores(bank, [e])[0] == pytest.approx([1.0] * 6), "Bayes is the best"
    e.spoken[1], e.replies[1] = e.spoken[0], e.replies[0]
    assert gx.turn_scores(bank, [e])[0][1] == -0.5, "asked again"
    e.spoken[1] = f"{e.spoken[2]} {e.spoken[3]}"
    e.replies[1] = f"{e.replies[2]} {e.replies[3]}"
    assert gx.turn_scores(bank, [e])[0][1] == -0.5, "two questions in one turn"
    p = gx.belief(bank, [e.evidence])[0]
    second = int(np.argsort(p)[-2])
    (e,) = gx.play(gx.BayesDoctor(bank), bank, ["Influenza|sampled|5"])
    e.matched = bank.names[second]
    assert gx.turn_scores(bank, [e])[0][-1] == pytest.approx(p[second] / p.max())
    e.matched = None
    assert gx.turn_scores(bank, [e])[0][-1] == -0.5, "no diagnosis"


def test_an_early_diagnosis_costs_something(bank):
    def hasty(consultations):
        return ["Final diagnosis: flu" for _ in consultations]

    (e,) = gx.play(hasty, bank, ["Influenza|sampled|5"])
    assert gx.turn_scores(bank, [e])[0] == [-0.5]


def test_turn_advantages_sit_on_the_doctors_tokens_and_are_centred(bank, chat, trainer):
    prompts = np.repeat(gx.sample_cases(bank.names, 4, seed=4), 8).tolist()
    rollout = gx.make_rollout(bank, chat)
    out = rollout(prompts, trainer)
    width = max(map(len, out["completion_ids"]))
    table = gx.turn_advantages(bank, rollout.episodes, 8, width)
    assert table.shape == (32, width)
    for row, mask in zip(table, out["env_mask"]):
        silent = np.ones(width, bool)
        silent[: len(mask)] = np.array(mask) == 0
        assert not row[silent].any()
    first = [next(i for i, m in enumerate(mask) if m) for mask in out["env_mask"]]
    at_first = table[np.arange(32), first].reshape(4, 8)
    assert np.allclose(at_first.mean(1), 0), "the first turn's advantages sum to zero"


def test_default_model_and_missing_adapter(tmp_path):
    assert gx.default_model()
    with pytest.raises(FileNotFoundError, match="notebook 04"):
        gx.check_adapter(tmp_path / "nothing")


def test_results_carry_their_origin(tmp_path):
    path = gx.save_result({"x": 1}, tmp_path / "a" / "r.json", "notebook 99", seed=3)
    saved = json.loads(path.read_text())
    assert saved["x"] == 1 and saved["origin"]["seed"] == 3
    assert {"machine", "versions", "command"} <= set(saved["origin"])


def test_cut_turn():
    assert gx.cut_turn([5, 6, 1, 7], [1]) == [5, 6, 1]
    assert gx.cut_turn([5, 6], [1]) == [5, 6]


def test_shipped_results_have_an_origin():
    for path in sorted((gx.DATA / "results").glob("*.json")):
        origin = json.loads(path.read_text())["origin"]
        assert {"machine", "versions", "command", "seed"} <= set(origin), path.name


def test_tiny_doctor_files(tiny_tokenizer):
    folder = gx.DATA / "tiny_doctor"
    assert sum(f.stat().st_size for f in folder.iterdir()) < 12 * 2**20
    t = tiny_tokenizer
    assert t.chat_template and t.pad_token != t.eos_token
    config = json.loads(
        (gx.DATA / "tiny_doctor_grpo" / "adapter_config.json").read_text()
    )
    assert config["base_model_name_or_path"] == "data/tiny_doctor"


def test_an_interrupted_run_is_finished_from_its_last_checkpoint(tmp_path):
    def notebook_04(**given):
        out = tmp_path / "out.ipynb"
        command = [
            sys.executable,
            "-m",
            "papermill",
            "--no-progress-bar",
            "--no-log-output",
        ]
        command += [str(gx.ROOT / "notebooks" / "04_grpo_training.ipynb"), str(out)]
        given |= {
            "OUTPUT_DIR": str(tmp_path / "run"),
            "TEST_CASES": 8,
            "BATCH_SIZE": 16,
        }
        for name, value in given.items():
            command += ["-p", name, str(value)]
        ran = subprocess.run(command, capture_output=True, text=True, cwd=gx.ROOT)
        assert ran.returncode == 0, ran.stderr[-2000:]
        return json.loads((tmp_path / "run" / "results.json").read_text())["curve"]

    first = notebook_04(MAX_STEPS=2, SAVE_STEPS=1)
    saved = tmp_path / "run" / "checkpoint-2" / "adapter_model.safetensors"
    stamp = saved.stat().st_mtime_ns
    second = notebook_04(MAX_STEPS=3, SAVE_STEPS=1, RESUME=True)
    assert second[:2] == first and len(second) == 3
    assert saved.stat().st_mtime_ns == stamp  # steps 1 and 2 were not made again
    assert (tmp_path / "run" / "checkpoint-3").is_dir()


def test_the_advised_doctor_takes_advice(bank):
    """The inner loop of notebook 10: better where the tries differ, and only because of
    the critic's words."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = gx.DATA / "tiny_doctor_advised"
    model = AutoModelForCausalLM.from_pretrained(folder).float().eval()
    chat = gx.ChatTokens(AutoTokenizer.from_pretrained(folder))
    doctor = gx.ModelDoctor(model, chat, 1.0, 16)
    cases = gx.sample_cases(gx.split_bank(bank)[0], 100, seed=4)
    torch.manual_seed(0)
    first = gx.play(doctor, bank, cases, chat)
    advice = [gx.critique(bank, e) for e in first]
    better = {}
    for name, words in (("advised", advice), ("again", ())):
        second = gx.play(doctor, bank, cases, chat, feedback=words)
        a, b = ([np.mean(s) for s in gx.turn_scores(bank, x)] for x in (first, second))
        differ = [x.turns != y.turns for x, y in zip(first, second)]
        better[name] = np.mean(np.array(b)[differ] > np.array(a)[differ])
    assert better["advised"] >= 0.8 and better["again"] <= 0.65
