"""The figures in README and data/results/README.md are those of the stored records."""

import json
import re

import pytest
from conftest import ROOT

import grpodx_utils as gx

README = (ROOT / "README.md").read_text("utf-8")
RESULTS = gx.DATA / "results"
DETAILS = (RESULTS / "README.md").read_text("utf-8")
NEW, WITHHELD = "new patients", "withheld diseases"


def percent(x):
    return f"{100 * x:.1f}%"


def interval(s):
    return f"{percent(s['accuracy'])} ({percent(s['low'])} to {percent(s['high'])})"


@pytest.fixture(scope="module")
def evaluation():
    return gx.read_json(RESULTS / "05_evaluation.json")


def test_the_table_of_the_evaluation(evaluation):
    scores = evaluation["groups"]
    whos = ("before", "before, greedy", "after", "after, greedy", "random", "Bayes")
    for group in (NEW, WITHHELD, "textbook patients", "noisy patients"):
        cells = [interval(scores[f"{group} | {who}"]) for who in whos]
        assert f"| {group} | {' | '.join(cells)} |\n" in DETAILS, group
    assert {s["n"] for s in scores.values()} == {2000}
    assert "patients (2,000 each, 5 questions)" in DETAILS


def test_the_training_seeds(evaluation):
    for name, row in evaluation["seeds"].items():
        keys = [f"{g}, {d}" for g in (NEW, WITHHELD) for d in ("sampled", "greedy")]
        assert f" | {' | '.join(percent(row[k]) for k in keys)} |\n" in DETAILS, name
    seeds = [row for name, row in evaluation["seeds"].items() if name != "mean"]
    for key, mean in evaluation["seeds"]["mean"].items():
        assert mean == pytest.approx(sum(row[key] for row in seeds) / len(seeds))


def test_the_first_paragraph_and_the_shares(evaluation):
    scores, mean = evaluation["groups"], evaluation["seeds"]["mean"]
    opening, shares = README.split("```bash")[0], DETAILS
    for group in (NEW, WITHHELD):
        bayes = scores[f"{group} | Bayes"]["accuracy"]
        sampled, greedy = mean[f"{group}, sampled"], mean[f"{group}, greedy"]
        before, at_best = (
            scores[f"{group} | before{x}"]["accuracy"] for x in ("", ", greedy")
        )
        assert f"from {percent(before)} to {percent(sampled)}" in opening
        assert f"from {percent(at_best)} to {percent(greedy)}" in opening
        assert at_best >= before, "called its best decoding"
        assert percent(bayes) in opening
        for x in (sampled, greedy):
            assert percent(x / bayes) in shares
        assert evaluation["gains"][group]["each at its best"] in shares
        assert evaluation["gains"][group]["sampled"] in shares
        assert interval(evaluation["asks_as_trained"][group]) in shares


def test_the_run_of_notebook_04():
    run = gx.read_json(RESULTS / "04_grpo_training.json")
    said = next(x for x in DETAILS.splitlines() if x.startswith("Notebook 04 at its"))
    scores = [*run["before"].values(), *run["after"].values(), run["bayes"]]
    for part in run["withheld"].values():
        scores += part.values()
    for s in scores:
        assert interval(s) in said
    assert f"{run['steps']} steps" in said and f"{run['minutes']:.1f} min" in said


def test_the_warm_start():
    run = gx.read_json(RESULTS / "07_sft_warm_start.json")
    said = next(x for x in DETAILS.splitlines() if x.startswith("The warm start (note"))
    for x in run["diagnosis"]["gain"]:
        assert percent(x) in said
    assert f"{run['minutes']:.1f} minutes" in said and f"{run['steps']} steps" in said


def test_smollm_after_grpo():
    record = gx.read_json(RESULTS / "04_smol_grpo.json")
    run = record["credit: gain in the doctor's own belief"]["result"]
    for kind, row in run.items():
        group, decoding = kind.split(", ")
        low, high = row["gain, 95% interval over patients"]
        gain = f"{100 * row['gain']:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})"
        before, after = percent(row["mean before"]), percent(row["mean after"])
        seeds = ", ".join(map(percent, row["after"]))
        cells = group, decoding, before, f"{after} ({seeds})", gain
        assert f"| {' | '.join(cells)} |\n" in DETAILS, kind
        if group[0] == "t":  # training diseases
            assert f"from {before} to {after}" in README, kind


def test_readme_is_short():
    shown = re.sub(r"\]\([^)]*\)", "]", README)  # links without their addresses
    assert len(re.findall(r"\w[\w.,%'-]*", shown)) <= 1500


GIVEN = {  # not results
    "95%": "confidence",
    "2%": "Bank.BACKGROUND",
    "10%": "noise",
    "99.9%": "a tail",
    "13%": "a scale of 4 bytes for 64 weights of half a byte, rounded",
    "30%": "the stand-in's share of faults, in the code below it",
}


def numbers(value):
    """All numbers of a stored record, those in texts included; no curves."""
    if isinstance(value, dict | list):
        parts = value.values() if isinstance(value, dict) else value[:12]
        return {x for part in parts for x in numbers(part)}
    if isinstance(value, str):
        return {float(x) for x in re.findall(r"\d+\.?\d*", value) if len(x) < 12}
    return {float(value)} if isinstance(value, int | float) else set()


def is_recorded(said, known):
    """Whether a percentage in a text is a known number, or its share, rounded."""
    digits = len(said.split(".")[1]) if "." in said else 0
    return any(round(x, digits) == float(said) for x in known)


@pytest.mark.parametrize("path", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=str)
def test_percentages_in_the_text_of_a_notebook_are_recorded(path):
    """In its own outputs, or in its own record in data/results."""
    cells = json.loads(path.read_text("utf-8"))["cells"]
    known = {0.0, 100.0}
    for record in RESULTS.rglob(f"{path.name.split('_')[0]}_*.json"):
        known |= numbers(gx.read_json(record))
    outputs = [o for c in cells for o in c.get("outputs", ())]
    for o in outputs:
        texts = [o.get("text", ""), o.get("data", {}).get("text/plain", "")]
        known |= numbers("".join("".join(text) for text in texts))
    known |= {100 * x for x in known if 0 <= x <= 1}
    text = " ".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")
    said = set(re.findall(r"(\d+(?:\.\d+)?)%", text)) - {x[:-1] for x in GIVEN}
    assert not [x for x in sorted(said) if not is_recorded(x, known)], path.name
