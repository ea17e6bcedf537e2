"""The rollout that TRL calls, credit per turn, loading, and what notebooks save."""

import json
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import nbformat
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file

import grpodx_utils as gx
from conftest import ROOT
from test_fast_self_play import consultations, greedy_by_generate

one, two, three, four = (gx.notebook(n) for n in ("01", "02", "03", "04"))
per_turn = gx.notebook("03c")
ten = gx.notebook("10")


@pytest.fixture
def trainer(model):
    """What `make_rollout` needs of TRL's trainer."""
    torch.manual_seed(0)
    return SimpleNamespace(
        max_completion_length=512,
        temperature=1.0,
        generation_config=SimpleNamespace(max_new_tokens=16),
        model_wrapped=model,
        accelerator=Accelerator(cpu=True),
    )


def test_a_group_shares_one_patient_and_order_is_kept(bank, chat, trainer):
    cases = gx.sample_cases(bank.names, 6, seed=2)
    prompts = np.repeat(cases, 4).tolist()
    out = four.make_rollout(bank, chat)(prompts, trainer)
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


def interrupt(*_):
    raise KeyboardInterrupt


def test_an_interrupted_turn_leaves_nothing_behind(bank, chat, model, monkeypatch):
    doctor = three.ModelDoctor(model, chat, temperature=0)
    (talk,) = consultations(bank, chat, 1)
    talk.step(doctor([talk])[0])
    fair = greedy_by_generate(model, chat, talk, 64)
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(three, "draw_tokens", interrupt)
        doctor([talk])
    assert doctor([talk]) == [fair] and doctor([]) == []


def test_few_or_many_at_once_is_the_same(bank, chat, model):
    doctor = three.ModelDoctor(model, chat, temperature=0)
    cases = gx.sample_cases(bank.names, 11, seed=3)
    few, many = (gx.play(doctor, bank, cases, chat, at_once=n) for n in (4, 64))
    assert few == many and [e.case_id for e in few] == cases


def test_a_turn_that_was_not_heard_is_computed_again(bank, chat, model):
    doctor = three.ModelDoctor(model, chat, temperature=0)
    (c,) = consultations(bank, chat, 1)
    first = doctor([c])
    assert doctor([c]) == first
    short = three.ModelDoctor(model, chat, temperature=0, max_new_tokens=1)
    assert short([c]) == short([c]) == [first[0][:1]], "a turn of one token"
    c.step("Do you have a fever?")  # somebody else speaks instead
    assert doctor([c]) == [greedy_by_generate(model, chat, c, 64)]


def test_sampling_follows_the_distribution():
    p = torch.tensor([0.0, 0.5, 0.2, 0.3, 0.0])
    torch.manual_seed(0)
    drawn = three.draw_tokens(2 * p.log().expand(20_000, 5), temperature=2.0)
    share = torch.bincount(drawn, minlength=5) / 20_000
    assert torch.allclose(share, p, atol=0.015) and share[0] == share[4] == 0


def test_turn_scores_by_hand(bank, chat):
    (e,) = gx.play(two.BayesDoctor(bank), bank, ["Influenza|sampled|5"])
    assert per_turn.turn_scores(bank, [e])[0] == pytest.approx([1.0] * 6), (
        "Bayes is the best"
    )
    e.spoken[1], e.replies[1] = e.spoken[0], e.replies[0]
    assert per_turn.turn_scores(bank, [e])[0][1] == -0.5, "asked again"
    e.spoken[1] = f"{e.spoken[2]} {e.spoken[3]}"
    e.replies[1] = f"{e.replies[2]} {e.replies[3]}"
    assert per_turn.turn_scores(bank, [e])[0][1] == -0.5, "two questions in one turn"
    p = two.belief(bank, [e.evidence])[0]
    second = int(np.argsort(p)[-2])
    (e,) = gx.play(two.BayesDoctor(bank), bank, ["Influenza|sampled|5"])
    e.matched = bank.names[second]
    assert per_turn.turn_scores(bank, [e])[0][-1] == pytest.approx(p[second] / p.max())
    e.matched = None
    assert per_turn.turn_scores(bank, [e])[0][-1] == -0.5, "no diagnosis"


def test_an_early_diagnosis_costs_something(bank):
    def hasty(consultations):
        return ["Final diagnosis: flu" for _ in consultations]

    (e,) = gx.play(hasty, bank, ["Influenza|sampled|5"])
    assert per_turn.turn_scores(bank, [e])[0] == [-0.5]


def test_credit_sits_on_the_doctors_tokens_and_is_centred(bank, chat, trainer):
    prompts = np.repeat(gx.sample_cases(bank.names, 4, seed=4), 8).tolist()
    rollout = four.make_rollout(bank, chat)
    out = rollout(prompts, trainer)
    width = max(map(len, out["completion_ids"]))
    scores = per_turn.turn_scores(bank, rollout.episodes)
    turns = per_turn.turn_credit(rollout.episodes, scores, 8)
    table = four.spread(rollout.episodes, turns, width)
    assert table.shape == (32, width)
    for row, mask in zip(table, out["env_mask"]):
        silent = np.ones(width, bool)
        silent[: len(mask)] = np.array(mask) == 0
        assert not row[silent].any()
    first = [next(i for i, m in enumerate(mask) if m) for mask in out["env_mask"]]
    at_first = table[np.arange(32), first].reshape(4, 8)
    assert np.allclose(at_first.mean(1), 0), "the first turn's advantages sum to zero"
    assert len(set(np.round(turns[0], 6))) > 1, "turns differ"


def test_credit_goes_to_each_token_of_its_turn(bank, chat):
    (e,) = gx.play(two.BayesDoctor(bank), bank, ["Influenza|sampled|5"], chat)
    (row,) = four.spread([e], [[1, 2, 3, 4, 5, 6]], len(e.env_mask))
    spoken = [
        [int(row[i]) for i in range(len(row)) if e.env_mask[i] and row[i] == turn]
        for turn in range(1, 7)
    ]
    lengths = [len(chat.encode(text)) + len(chat.end_ids) for text in e.turns]
    assert [len(x) for x in spoken] == lengths
    assert (row == 0).sum() == e.env_mask.count(0)


def test_the_weight_of_the_diagnosis(bank):
    (e,) = gx.play(two.BayesDoctor(bank), bank, ["Influenza|sampled|5"])
    silent = gx.play(lambda talks: ["Hm." for _ in talks], bank, [e.case_id])[0]
    turns = four.weigh_diagnosis([e, silent], [[0.5] * 6, [0.5] * 6], 0.1)
    assert turns[0] == [0.5] * 5 + [0.05] and turns[1] == [0.5] * 6


def start_notebook_04(tmp_path, name, disaster="", **given):
    """Runs notebook 04 with few, small steps, the code `disaster` before it trains."""
    given |= {"OUTPUT_DIR": tmp_path / name, "TEST_CASES": 8, "BATCH_SIZE": 16}
    notebook = nbformat.read(ROOT / "notebooks" / "04_grpo_training.ipynb", 4)
    (training,) = [c for c in notebook.cells if "trainer.train(" in c.source]
    training.source = f"{disaster}\n{training.source}"
    nbformat.write(notebook, tmp_path / f"{name}_in.ipynb")
    command = [sys.executable, "-m", "papermill", "--no-progress-bar"]
    command += ["--no-log-output", str(tmp_path / f"{name}_in.ipynb")]
    command += [str(tmp_path / f"{name}.ipynb")]
    for key, value in given.items():
        command += ["-p", key, str(value)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


def run_notebook_04(tmp_path, name, **given):
    """Runs notebook 04 to its end; returns its folder."""
    ran = start_notebook_04(tmp_path, name, **given)
    assert ran.returncode == 0, ran.stderr[-2000:]
    return tmp_path / name


@pytest.mark.parametrize("credit", ["episode", "turn", "belief"])
def test_withheld_diseases_touch_nothing_that_is_learned(bank, tmp_path, credit):
    """The withheld diseases exchange their findings; the adapter stays the same."""
    records = json.loads((gx.DATA / "disease_bank.json").read_text("utf-8"))
    _, withheld = gx.split_bank(bank)
    mine = [r for r in records if r["disease_name"] in withheld]
    findings = [r["symptoms"] for r in mine]
    for r, other in zip(mine, findings[1:] + findings[:1]):
        r["symptoms"] = other
    changed = tmp_path / "changed.json"
    changed.write_text(json.dumps(records), "utf-8")
    new = gx.load_bank(changed)
    assert any((new.rates != bank.rates).any(1)), "the two banks differ"
    weights = [
        load_file(run_notebook_04(tmp_path, name, MAX_STEPS=2, CREDIT=credit, **other)
                  / "adapter" / "adapter_model.safetensors")
        for name, other in (("shipped", {}), ("changed", {"BANK": changed}))
    ]  # fmt: skip
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][k], weights[1][k]) for k in weights[0])
    moved = [w for k, w in weights[0].items() if "lora_B" in k]
    assert any(w.abs().max() > 0 for w in moved), "an update was made"


def test_default_model_and_missing_adapter(tmp_path):
    assert one.default_model()
    with pytest.raises(ValueError, match="notebook 04"):
        one.check_adapter(tmp_path / "nothing")


def test_results_carry_their_origin(tmp_path):
    path = gx.save_result(
        {"x": 1}, tmp_path / "a" / "r.json", "notebook 99", 3, "a machine"
    )
    saved = json.loads(path.read_text())
    assert saved["x"] == 1 and saved["origin"]["seed"] == 3
    assert {"machine", "versions", "command"} <= set(saved["origin"])


def test_cut_turn():
    assert three.cut_turn([5, 6, 1, 7], [1]) == [5, 6, 1]
    assert three.cut_turn([5, 6], [1]) == [5, 6]


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


SIX_STEPS = dict(MAX_STEPS=6, SAVE_STEPS=2, MICRO_BATCH=8)
NO_SPACE = """
def save(thing, path, write=torch.save, **options):
    if "checkpoint-4" in str(path):
        raise OSError(28, "No space left on device")
    write(thing, path, **options)


torch.save = save
"""


@pytest.fixture(scope="module")
def never_stopped(tmp_path_factory):
    return run_notebook_04(tmp_path_factory.mktemp("a"), "run", **SIX_STEPS)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """The same run, but at the checkpoint of step 4 the disk is full: (folder, what the
    kernel said)."""
    folder = tmp_path_factory.mktemp("b")
    ran = start_notebook_04(folder, "run", NO_SPACE, **SIX_STEPS)
    assert ran.returncode != 0
    return folder / "run", ran.stderr


def test_a_full_disk_ends_with_one_sentence(stopped):
    folder, said = stopped
    (last,) = [line for line in said.splitlines() if "SystemExit: " in line]
    assert f"{folder / 'checkpoint-4'} was not written: the disk is full." in last
    assert "OUTPUT_DIR" in last and "RESUME = True" in last
    assert [p.name for p in folder.glob("checkpoint-*")] == ["checkpoint-2"]
    assert four.is_whole(folder / "checkpoint-2")


def test_a_resumed_run_ends_like_one_that_never_stopped(never_stopped, stopped):
    folder, _ = stopped
    state = json.loads((folder / "checkpoint-2" / "trainer_state.json").read_text())
    took = [round(x["step_time"], 2) for x in state["log_history"]]
    cut_off = shutil.copytree(folder / "checkpoint-2", folder / "checkpoint-4")
    os.truncate(cut_off / "optimizer.pt", 100_000)
    run_notebook_04(folder.parent, "run", RESUME=True, **SIX_STEPS)
    said = (folder.parent / "run.ipynb").read_text("utf-8")
    assert f"from {folder / 'checkpoint-2'}; not from checkpoint-4, cut off" in said
    assert four.is_whole(cut_off), "written again"
    result, fair = (
        json.loads((x / "results.json").read_text()) for x in (folder, never_stopped)
    )
    assert result["seconds_per_step"][:2] == took, "steps 1 and 2 were not made again"
    assert result["curve"] == fair["curve"] and len(fair["curve"]) == 6
    assert result["after"] == fair["after"]
    for part in ("checkpoint-4", "checkpoint-6", "adapter"):
        weights, fair = (
            load_file(x / part / "adapter_model.safetensors")
            for x in (folder, never_stopped)
        )
        assert weights.keys() == fair.keys()
        assert all(torch.equal(weights[k], fair[k]) for k in fair), part


def test_cut_off_checkpoints_are_recognised(never_stopped, tmp_path):
    whole, copy = never_stopped / "checkpoint-6", tmp_path / "checkpoint-6"
    shutil.copytree(whole, copy)
    assert four.is_whole(whole) and four.is_whole(copy)
    names = "adapter_model.safetensors optimizer.pt rng_state.pth scheduler.pt"
    files = [copy / name for name in (*names.split(), "trainer_state.json")]
    for file in (*files, copy / "ref" / "adapter_model.safetensors"):
        content = file.read_bytes()
        for kept in (0, len(content) // 2, len(content) - 5):
            file.write_bytes(content[:kept])
            assert not four.is_whole(copy), f"{file.name}, {kept} of {len(content)}"
        file.write_bytes(content)
    for file in files:
        file.rename(tmp_path / "elsewhere")
        assert not four.is_whole(copy), f"no {file.name}"
        (tmp_path / "elsewhere").rename(file)
    optimizer = bytearray((copy / "optimizer.pt").read_bytes())
    optimizer[100_000:200_000] = bytes(100_000)  # never reached the disk
    (copy / "optimizer.pt").write_bytes(optimizer)
    assert not four.is_whole(copy)


def test_the_newest_whole_checkpoint_is_chosen(never_stopped, tmp_path, capsys):
    for order, number in enumerate((60, 2, 4, 6)):  # 60: of an earlier, longer run
        folder = tmp_path / f"checkpoint-{number}"
        shutil.copytree(never_stopped / "checkpoint-6", folder)
        for path in (folder, *folder.glob("*")):
            os.utime(path, (order, order))
    assert four.choose_checkpoint(tmp_path) == str(tmp_path / "checkpoint-6")
    assert capsys.readouterr().out == f"from {tmp_path / 'checkpoint-6'}\n"
    for number in (4, 6):
        (tmp_path / f"checkpoint-{number}" / "trainer_state.json").unlink()
    assert four.choose_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")
    assert capsys.readouterr().out.count("\n") == 1
    for number in (2, 60):
        (tmp_path / f"checkpoint-{number}" / "optimizer.pt").unlink()
    with pytest.raises(SystemExit, match=r"no whole checkpoint .*Set it to False"):
        four.choose_checkpoint(tmp_path)


FULL = "No space left on device"


@pytest.mark.parametrize("error, free, says", [
    (OSError(28, FULL), 0, "the disk is full"),
    (SafetensorError(f"I/O error: {FULL} (os error 28)"), 10**9, "the disk is full"),
    (RuntimeError("unexpected pos 576 vs 534"), 0, "the disk is full"),  # torch.save
    (OSError(30, "Read-only file system"), 10**9, "Read-only file system"),
])  # fmt: skip
def test_half_an_adapter_does_not_stay(tmp_path, monkeypatch, error, free, says):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
    adapter = tmp_path / "adapter"

    def write(folder):
        folder.mkdir()
        (folder / "adapter_model.safetensors").write_bytes(b"half")
        raise error

    with pytest.raises(SystemExit, match=says) as stop:
        four.write_whole(adapter, write, adapter)
    assert str(adapter) in str(stop.value) and "OUTPUT_DIR" in str(stop.value)
    assert not adapter.exists()


def test_the_advised_doctor_takes_advice(bank):
    """The inner loop of notebook 10: better where the tries differ, and only because of
    the critic's words."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = gx.DATA / "tiny_doctor_advised"
    model = AutoModelForCausalLM.from_pretrained(folder).float().eval()
    chat = three.ChatTokens(AutoTokenizer.from_pretrained(folder))
    doctor = three.ModelDoctor(model, chat, 1.0, 16)
    cases = gx.sample_cases(gx.split_bank(bank)[0], 100, seed=4)
    torch.manual_seed(0)
    first = gx.play(doctor, bank, cases, chat)
    advice = [ten.critique(bank, e) for e in first]
    better = {}
    for name, words in (("advised", advice), ("again", ())):
        second = gx.play(doctor, bank, cases, chat, feedback=words)
        a, b = (
            [np.mean(s) for s in per_turn.turn_scores(bank, x)] for x in (first, second)
        )
        differ = [x.turns != y.turns for x, y in zip(first, second)]
        better[name] = np.mean(np.array(b)[differ] > np.array(a)[differ])
    assert better["advised"] >= 0.8 and better["again"] <= 0.65


def test_the_loss_by_hand():
    """Clipping ends the push in the direction of the advantage, never against it."""
    log_p = torch.tensor([[2.0, 0.5, 9.0], [2.0, 0.5, 9.0]]).log()
    played = torch.zeros(2, 3)
    mask = torch.tensor([[1, 1, 0], [1, 1, 0]])  # the third token is the patient's
    advantage = torch.tensor([[1.0], [-1.0]])
    loss = four.grpo_loss(log_p, played, advantage, mask, longest=10)
    by_hand = -((1.2 + 0.5) + (-2.0 - 0.8)) / (2 * 10)
    assert loss.item() == pytest.approx(by_hand)
    per_token = torch.tensor([[1.0, 0.0, 5.0], [-1.0, 0.0, 5.0]])
    loss = four.grpo_loss(log_p, played, per_token, mask, longest=10)
    assert loss.item() == pytest.approx(-(1.2 - 2.0) / (2 * 10))


def test_on_a_cpu_4_bit_weights_are_computed_in_32_bits():
    if torch.cuda.is_available():
        pytest.skip("a GPU keeps its weights packed")
    packed, tokenizer = one.load_base("data/tiny_doctor", load_in_4bit=True)
    ids = torch.tensor([tokenizer("Do you have a fever? Any rash?")["input_ids"]])
    with torch.inference_mode():
        before = packed(input_ids=ids).logits
        after = one.unpack_4bit(packed)(input_ids=ids).logits
    assert torch.allclose(before, after, atol=1e-3)
    model, _ = one.load_doctor("data/tiny_doctor")
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert not model.get_base_model().is_loaded_in_4bit, "or TRL trains in bfloat16"


def test_a_run_without_any_signal_rings_the_alarm(monkeypatch, capsys):
    class Silent(four.ConsultationTrainer):
        said = [SimpleNamespace(env_mask=[1, 0], turns=["Hm."])]
        rollout_func = SimpleNamespace(episodes=said)

        def __init__(self):
            pass

    nothing = {"advantages": torch.zeros(8)}
    base = "_generate_and_score_completions"
    monkeypatch.setattr(four.GRPOTrainer, base, lambda self, inputs: nothing)
    trainer = Silent()
    for _ in range(9):
        trainer._generate_and_score_completions([])
    assert "ALARM" not in capsys.readouterr().out
    trainer._generate_and_score_completions([])
    assert "ALARM" in capsys.readouterr().out


def test_the_kl_reference_is_the_adapter_before_training():
    model, _ = one.load_doctor(adapter=gx.DATA / "tiny_doctor_grpo")
    four.add_reference(model)
    weights = dict(model.named_parameters())
    mine = [name for name in weights if ".default." in name]
    pairs = [(weights[n], weights[n.replace(".default.", ".ref.")]) for n in mine]
    assert pairs and model.active_adapter == "default"
    assert all(torch.equal(now, ref) for now, ref in pairs)
    assert all(now.requires_grad and not ref.requires_grad for now, ref in pairs)
    with torch.no_grad():
        pairs[0][0].add_(1)
    assert not torch.equal(*pairs[0]), "a copy"
