"""Does a doctor understand people who do not speak like the lexicon?

    python tests/bench/free_wording.py --adapter data/smol_doctor_start --cases 200

The same patients twice: with the lexicon's sentences, and with those of
tests/free_wordings.json, which no training has seen. Prints both accuracies, greedy,
and the paired difference with its 95% interval.
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

one, three, four = (gx.notebook(number) for number in ("01", "03", "04"))
import numpy as np

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


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--adapter", default="data/smol_doctor_start")
    parser.add_argument("--cases", type=int, default=200)
    parser.add_argument("--seed", type=int, default=4711)
    options = parser.parse_args()
    bank = gx.load_bank()
    case_ids = gx.sample_cases(gx.split_bank(bank)[0], options.cases, options.seed)
    model, tokenizer = one.load_doctor(adapter=options.adapter, load_in_4bit=False)
    one.FastLanguageModel.for_inference(model)
    chat = three.ChatTokens(tokenizer)
    right = {}
    for name, patient in (("lexicon", gx.ScriptedPatient), ("free", FreePatient)):
        doctor = four.make_doctor(model, chat, 0.0, 16 if chat.by_sentence else 32)
        how = dict(at_once=64, patient=patient)
        scores, episodes = gx.evaluate(doctor, bank, case_ids, chat, **how)
        right[name] = np.array([e.correct for e in episodes], float)
        print(f"{name} wording: {scores['accuracy']:.1%} of {scores['n']}", flush=True)
    change = right["free"] - right["lexicon"]
    half = 1.96 * change.std() / np.sqrt(len(change))
    print(f"difference: {100 * change.mean():+.1f} points (± {100 * half:.1f})")
    print(one.device_line(), options)


if __name__ == "__main__":
    main()
