"""Does a doctor understand people who do not speak like the lexicon?

    python tests/bench/free_wording.py --adapter data/smol_doctor_start --cases 150
    python tests/bench/free_wording.py --cases 200 --seed 7001 --wordings lexicon

The same patients twice: with the lexicon's sentences, and with those of
tests/free_wordings.json, which no training has seen. Prints both accuracies and the
paired difference with its 95% interval. --temperature 1 samples; 0 is greedy.
"""

import argparse
import json
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
os.chdir(ROOT)
sys.path.insert(0, str(ROOT))
import grpodx_utils as gx

one, two, three, four = (gx.notebook(n) for n in ("01", "02", "03", "04"))
import numpy as np
import torch

SAID = json.loads((ROOT / "tests" / "free_wordings.json").read_text("utf-8"))


class FreePatient(gx.ScriptedPatient):
    """Answers as the scripted patient does, in a person's words."""

    def opening(self):
        return SAID[self.case.complaint]["complaint"]

    def reply(self, question):
        asked = self.bank.lexicon.find(question)
        if not asked:
            return super().reply(question)
        has = self.case.findings
        return " ".join(SAID[s]["yes" if s in has else "no"] for s in asked)


PATIENTS = {"lexicon": gx.ScriptedPatient, "free": FreePatient}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--adapter", default="data/smol_doctor_start")
    parser.add_argument("--cases", type=int, default=200)
    parser.add_argument("--seed", type=int, default=4711)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument(
        "--wordings", nargs="+", default=list(PATIENTS), choices=PATIENTS
    )
    options = parser.parse_args()
    bank = gx.load_bank()
    case_ids = gx.sample_cases(gx.split_bank(bank)[0], options.cases, options.seed)
    model, tokenizer = one.load_doctor(adapter=options.adapter, load_in_4bit=False)
    one.FastLanguageModel.for_inference(model)
    chat = three.ChatTokens(tokenizer)
    for ask in ("random", "gain"):
        scores, _ = gx.evaluate(two.BayesDoctor(bank, ask), bank, case_ids)
        print(f"Bayes, {ask} questions: {scores['accuracy']:.1%}")
    right = {}
    for name in options.wordings:
        torch.manual_seed(1)
        longest = 16 if chat.by_sentence else 32
        doctor = four.make_doctor(model, chat, options.temperature, longest)
        how = dict(at_once=64, patient=PATIENTS[name])
        scores, episodes = gx.evaluate(doctor, bank, case_ids, chat, **how)
        right[name] = np.array([e.correct for e in episodes], float)
        low, high = scores["low"], scores["high"]
        print(f"{name}: {scores['accuracy']:.1%} ({low:.1%} to {high:.1%})", flush=True)
    if len(right) == 2:
        print_difference(right)
    print(one.device_line(), options)


def print_difference(right):
    change = right["free"] - right["lexicon"]
    half = 1.96 * change.std() / np.sqrt(len(change))
    print(f"difference: {100 * change.mean():+.1f} points (± {100 * half:.1f})")


if __name__ == "__main__":
    main()
