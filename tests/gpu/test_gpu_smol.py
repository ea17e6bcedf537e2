"""SmolLM2 on a CUDA GPU: recorded decode steps, two GRPO steps, its adapter."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("no CUDA GPU here: the GPU checks did not run", allow_module_level=True)

import grpodx_utils as gx
from conftest import ROOT
from peft import load_peft_weights

one, three, four = (gx.notebook(number) for number in ("01", "03", "04"))


def test_recorded_turns_are_those_of_plain_decoding():
    """Greedy turns of whole consultations, each state given to both ways of decoding.
    16 bits round differently in another kernel, so near ties may differ."""
    model, tokenizer = one.load_doctor(adapter=gx.DATA / "smol_doctor_grpo")
    one.FastLanguageModel.for_inference(model)
    bank, chat = gx.load_bank(), three.ChatTokens(tokenizer)
    doctor = four.make_doctor(model, chat, 0.0, 32)
    assert doctor.new_batch is four.fast.GraphBatch
    played = gx.play(doctor, bank, gx.sample_cases(bank.names, 24, seed=5), chat)
    states, said = [], []
    for e in played:
        ids, mine = e.prompt_ids + e.completion_ids, [0] * len(e.prompt_ids)
        mine += e.env_mask
        starts = [i for i, m in enumerate(mine) if m and not mine[i - 1]]
        for start in starts:
            end = next((i for i in range(start, len(mine)) if not mine[i]), len(mine))
            states.append(SimpleNamespace(ids=ids[:start]))
            said.append(ids[start:end])
    plain = three.ModelDoctor(model, chat, 0.0, 32, three.Batch)
    again = plain(states)
    same = sum(list(a) == b for a, b in zip(again, said))
    print(f"{same} of {len(said)} turns are the same")
    assert len(said) > 100 and same >= 0.95 * len(said)


def test_two_grpo_steps_of_notebook_04(tmp_path):
    given = {"MODEL_NAME": one.bring_smollm(), "OUTPUT_DIR": tmp_path, "MAX_STEPS": 2}
    given |= {"BATCH_SIZE": 64, "TEST_CASES": 16, "SAVE_STEPS": 2}
    command = [sys.executable, "-m", "papermill", "--no-progress-bar"]
    command += ["notebooks/04_grpo_training.ipynb", str(tmp_path / "out.ipynb")]
    for key, value in given.items():
        command += ["-p", key, str(value)]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert ran.returncode == 0, ran.stderr[-2000:]
    result = json.loads((tmp_path / "results.json").read_text())
    assert result["steps"] == 2
    files = [f for f in (tmp_path / "adapter").rglob("*") if f.is_file()]
    assert sum(f.stat().st_size for f in files) < 12e6
    start = load_peft_weights(str(gx.DATA / "smol_doctor_start"), device="cpu")
    after = load_peft_weights(str(tmp_path / "adapter"), device="cpu")
    assert start.keys() == after.keys()
    assert any((start[name] != after[name]).any() for name in start), "it learned"
    reference = load_peft_weights(str(tmp_path / "checkpoint-2" / "ref"), device="cpu")
    assert all(torch.equal(reference[n].float(), start[n].float()) for n in start), (
        "the KL term pulls to the warm start"
    )
