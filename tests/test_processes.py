"""Notebook 04 as a script under `accelerate launch`: two CPU processes against one."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from conftest import ROOT

BATCH, GROUP, STEPS = 64, 8, 3
CHECK = f"""
import json
cases = [e.case_id for e in rollout.episodes]
whole = all(len(set(cases[i:i + {GROUP}])) == 1 for i in range(0, len(cases), {GROUP}))
lora = sum(p.detach().double().abs().sum().item() for p in trainer.model.parameters()
           if p.requires_grad)
print("CHECK " + json.dumps(dict(
    rank=trainer.accelerator.process_index, cases=cases, whole=whole, lora=lora,
    correct=[e.correct for e in rollout.episodes],
    logged=log["rewards/reward_correct/mean"].iloc[-1], curve=results["curve"])))
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    def launch(processes):
        folder = tmp_path_factory.mktemp(f"processes{processes}")
        ready, script = folder / "04.ipynb", folder / "04.py"
        given = {"MAX_STEPS": STEPS, "BATCH_SIZE": BATCH, "TEST_CASES": 16}
        given |= {"OUTPUT_DIR": str(folder / "run")}
        options = [x for name, value in given.items() for x in ("-p", name, str(value))]
        for command in (
            ["papermill", "--prepare-only", "--no-progress-bar",
             "notebooks/04_grpo_training.ipynb", str(ready), *options],
            ["jupyter", "nbconvert", "--to", "python", str(ready)],
        ):  # fmt: skip
            subprocess.run([sys.executable, "-m", *command], cwd=ROOT, check=True)
        script.write_text(script.read_text() + CHECK)
        command = "accelerate.commands.launch --num_machines 1 --mixed_precision no"
        command += f" --dynamo_backend no --num_processes {processes}"
        command += " --multi_gpu" if processes > 1 else ""  # gloo, as there is no GPU
        env = {**os.environ, "ACCELERATE_USE_CPU": "true", "MPLBACKEND": "Agg"}
        ran = subprocess.run(
            [sys.executable, "-m", *command.split(), str(script)],
            cwd=ROOT, env=env, capture_output=True, text=True,
        )  # fmt: skip
        assert ran.returncode == 0, ran.stderr[-3000:]
        lines = [x for x in ran.stdout.splitlines() if x.startswith("CHECK ")]
        return sorted((json.loads(x[6:]) for x in lines), key=lambda x: x["rank"])

    return launch


def test_two_processes_train_one_model(run):
    (alone,), (a, b) = run(1), run(2)
    assert alone["whole"] and a["whole"] and b["whole"], "groups stay whole"
    assert len(a["cases"]) == len(b["cases"]) == BATCH // 2
    assert a["lora"] == b["lora"], "both hold the same weights after the same steps"
    assert sorted(a["cases"] + b["cases"]) == sorted(alone["cases"]), (
        "the same patients"
    )
    assert (
        a["logged"]
        == b["logged"]
        == pytest.approx(np.mean(a["correct"] + b["correct"]))
    )
    noise = 4 * np.sqrt(2 * 0.25 / (BATCH * STEPS))  # four standard errors
    assert abs(np.mean(a["curve"]) - np.mean(alone["curve"])) < noise
