"""The reference doctor of notebook 02 on DDXPlus: how many diagnoses are right after
0, 5, 7 and all questions? Prints a table and writes the figures where told.

    python tests/bench/ddxplus.py FOLDER --out data/results/ddxplus.json

FOLDER holds release_conditions.json and release_evidences.json (figshare 22687585) and
symptom_condition_probs.json, the share of each condition's patients with each evidence.
"""

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from scipy.stats import binomtest

import grpodx_utils as gx

two = gx.notebook("02")


def everything(bank, case_id):
    """All that a patient answers when asked everything: {symptom: present}."""
    case = gx.make_case(bank, case_id)
    asked = {s: s in case.findings for s in bank.symptoms if s != case.complaint}
    return {case.complaint: True, **asked}


def accuracy_of_all(bank, case_ids):
    """As `gx.evaluate` with a budget for every question, without the conversations:
    in which order the questions come does not matter then."""
    p = two.belief(bank, [everything(bank, c) for c in case_ids])
    guesses = [bank.names[i] for i in p.argmax(1)]
    right = sum(g == c.split("|")[0] for g, c in zip(guesses, case_ids))
    low, high = binomtest(right, len(case_ids)).proportion_ci(0.95, method="wilson")
    n = len(case_ids)
    scores = dict(n=n, accuracy=right / n, low=float(low), high=float(high))
    return scores | dict(questions=len(bank.symptoms) - 1), guesses


def measure(folder, background, budgets, n, seed):
    """One record: the scores by budget on the bank of the files in `folder`."""
    gx.Bank.BACKGROUND = background
    names = "release_conditions", "release_evidences", "symptom_condition_probs"
    bank = two.load_ddxplus(*(folder / f"{name}.json" for name in names))
    case_ids, doctor = gx.sample_cases(bank.names, n, seed), two.BayesDoctor(bank)
    scores = {"all": accuracy_of_all(bank, case_ids)[0]}
    for budget in budgets:
        found, _ = gx.evaluate(doctor, bank, case_ids, max_questions=budget)
        keys = "n", "accuracy", "low", "high", "questions", "not_understood"
        scores[budget] = {k: float(found[k]) for k in keys}
    few = case_ids[:10]  # the short way is the long way
    _, played = gx.evaluate(doctor, bank, few, max_questions=len(bank.symptoms) - 1)
    assert [e.diagnosis for e in played] == accuracy_of_all(bank, few)[1]
    findings = sum(len(gx.make_case(bank, c).findings) for c in case_ids) / n
    sizes = dict(conditions=len(bank.names), symptoms=len(bank.symptoms))
    return dict(background=background, findings=findings, **sizes, scores=scores)


def row(label, record, budgets):
    """A line of the table: accuracies in percent with their intervals."""
    cells = [record["scores"][b] for b in (*budgets, "all")]
    shown = ("{accuracy:.1%} ({low:.1%} to {high:.1%})".format(**c) for c in cells)
    return f"| {label} | {' | '.join(shown)} |"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("folder", type=Path, help="with the three JSON files")
    parser.add_argument("--out", help="a JSON file for the figures")
    parser.add_argument("--patients", type=int, default=5000)
    parser.add_argument("--budgets", type=int, nargs="+", default=[0, 5, 7])
    usual = gx.Bank.BACKGROUND
    parser.add_argument("--background", type=float, nargs="+", default=[usual])
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    records = []
    head = [*(f"{b} questions" for b in args.budgets), "all questions"]
    print(f"| stray findings | {' | '.join(head)} |\n|{'---|' * (len(head) + 1)}")
    for background in args.background:
        options = background, args.budgets, args.patients, args.seed
        records.append(measure(args.folder, *options))
        print(row(f"{background:.1%} each", records[-1], args.budgets), flush=True)
    if args.out:
        said = ("FOLDER" if Path(a) == args.folder else a for a in sys.argv[1:])
        command = f"python tests/bench/ddxplus.py {' '.join(said)}"
        machine = f"CPU, {os.cpu_count()} cores"
        gx.save_result({"banks": records}, args.out, command, args.seed, machine)
