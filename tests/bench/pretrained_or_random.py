"""Does it help that the model was trained on much English before?

    python tests/bench/pretrained_or_random.py --seeds 0 1 2 --steps 300

The same architecture, lessons (notebook 07b's), steps and settings, all weights
trained: once from SmolLM2's weights, once from random ones. Prints for each run how
often its diagnosis is Bayes' on fresh conversations, and how many patients it gets
right who speak the lexicon's sentences, or sentences that no lesson had (greedy).
The last line is one JSON object.
"""

import argparse
import json
import time
from functools import partial

from free_wording import PATIENTS, four, gx, one, three

seven = gx.notebook("07b")
import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTTrainer

SHARES, TURNS = (0.2, 0.2, 0.01), 8  # 07b's parameters


def make_model(start, seed):
    """SmolLM2 with its weights, or with random ones; float32 (autocast trains it)."""
    torch.manual_seed(seed)
    folder = one.bring_smollm()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if start == "random":
        model = AutoModelForCausalLM.from_config(model.config, dtype=torch.float32)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return model.to(device), AutoTokenizer.from_pretrained(folder)


def train_and_test(start, seed, options, bank, case_ids):
    """One run: agreement with Bayes, and accuracy with each kind of wording."""
    model, tokenizer = make_model(start, seed)
    chat, speech = three.ChatTokens(tokenizer), seven.Speech(bank)

    def write(size, rng, pick):
        plans = seven.draw_plans(rng, bank, size, TURNS, SHARES)
        lessons = [seven.put_into_words(speech, pick, plan) for plan in plans]
        return [seven.write_lesson(chat, lesson) for lesson in lessons]

    def lessons(size, number, first):
        return seven.write_dataset(partial(write, size), number, first, options.workers)

    data = lessons(options.batch, options.steps, 10**6 * seed)
    fresh = lessons(options.fresh, 1, 10**6 * seed + 999_999)
    fresh = [(row["input_ids"], row["labels"]) for row in fresh]
    how = options.steps, options.batch, options.micro_batch, options.rate
    config = seven.sft_settings(*how, False, seed, "runs/pretrained_or_random")
    trainer = SFTTrainer(
        model, args=config, train_dataset=data, processing_class=tokenizer
    )
    began = time.time()
    trainer.train()
    model.eval()
    found = dict(start=start, seed=seed, minutes=round((time.time() - began) / 60, 2))
    found["agreement"] = seven.agreement(model, fresh)
    if torch.cuda.is_available():
        model.to(torch.bfloat16)
    for name, patient in PATIENTS.items():
        doctor = four.make_doctor(model, chat, 0.0, 32)
        scores, _ = gx.evaluate(
            doctor, bank, case_ids, chat, at_once=options.at_once, patient=patient
        )
        found[name] = scores["accuracy"]
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--starts", nargs="+", default=["pretrained", "random"])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=256, help="conversations a step")
    parser.add_argument("--micro-batch", type=int, default=64)
    parser.add_argument("--rate", type=float, default=4e-4)
    parser.add_argument("--fresh", type=int, default=512, help="conversations")
    parser.add_argument("--cases", type=int, default=500, help="patients")
    parser.add_argument("--at-once", type=int, default=128)
    parser.add_argument("--workers", type=int, default=0, help="that write lessons")
    options = parser.parse_args()
    bank = gx.load_bank()
    case_ids = gx.sample_cases(gx.split_bank(bank)[0], options.cases, seed=4711)
    runs = []
    for seed in options.seeds:
        for start in options.starts:
            runs.append(train_and_test(start, seed, options, bank, case_ids))
            print(runs[-1], flush=True)
    for start in options.starts:
        mine = [r for r in runs if r["start"] == start]
        means = {k: np.mean([r[k] for r in mine]) for k in ("agreement", *PATIENTS)}
        print(start, {k: f"{x:.1%}" for k, x in means.items()})
    print(json.dumps(dict(runs=runs, options=vars(options), machine=one.device_line())))


if __name__ == "__main__":
    main()
