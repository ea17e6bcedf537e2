"""The figures in README are those of the stored records."""

import pytest
from conftest import ROOT

import grpodx_utils as gx

README = (ROOT / "README.md").read_text("utf-8")
RESULTS = gx.DATA / "results"
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
        assert f"| {group} | {' | '.join(cells)} |\n" in README, group
    assert {s["n"] for s in scores.values()} == {2000}
    assert "patients (2,000 each, 5 questions)" in README


def test_the_training_seeds(evaluation):
    for name, row in evaluation["seeds"].items():
        keys = [f"{g}, {d}" for g in (NEW, WITHHELD) for d in ("sampled", "greedy")]
        assert f" | {' | '.join(percent(row[k]) for k in keys)} |\n" in README, name
    seeds = [row for name, row in evaluation["seeds"].items() if name != "mean"]
    for key, mean in evaluation["seeds"]["mean"].items():
        assert mean == pytest.approx(sum(row[key] for row in seeds) / len(seeds))


def test_the_first_paragraph_and_the_shares(evaluation):
    scores, mean = evaluation["groups"], evaluation["seeds"]["mean"]
    opening, shares = README.split("```bash")[0], README.split("## Results")[1]
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
    said = next(x for x in README.splitlines() if x.startswith("Notebook 04 at its"))
    scores = [*run["before"].values(), *run["after"].values(), run["bayes"]]
    for part in run["withheld"].values():
        scores += part.values()
    for s in scores:
        assert interval(s) in said
    assert f"{run['steps']} steps" in said and f"{run['minutes']:.1f} min" in said


def test_the_warm_start():
    run = gx.read_json(RESULTS / "07_sft_warm_start.json")
    said = next(x for x in README.splitlines() if x.startswith("The warm start (note"))
    for x in run["diagnosis"]["gain"]:
        assert percent(x) in said
    assert f"{run['minutes']:.1f} minutes" in said and f"{run['steps']} steps" in said
