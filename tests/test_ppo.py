"""Notebook 13: the environment, PPO by hand, groups of policies, two more rewards."""

import json
import time
import warnings
from types import SimpleNamespace

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env

import grpodx_utils as gx

two, three, four = (gx.notebook(number) for number in ("02", "03", "04"))
nb = gx.notebook("13")
ID = "GRPODx/Diagnosis-v0"


@pytest.fixture(scope="module", autouse=True)
def registered():
    if ID not in gymnasium.registry:
        gymnasium.register(ID, nb.DiagnosisEnv)


# ------------------------------------------------------------------- the environment
def test_gymnasium_finds_no_fault(bank):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*alternative render modes.*")
        check_env(gymnasium.make(ID, bank=bank, render_mode="ansi").unwrapped)


def test_a_diagnosis_terminates_and_the_budget_truncates(bank):
    env = gymnasium.make(ID, bank=bank, max_questions=2, render_mode="ansi")
    case = {"case": "Influenza|canonical|2"}
    seen, info = env.reset(options=case)
    assert seen == "I have a sore throat." and info["questions_left"] == 2
    assert "Influenza" not in str(info), "the truth is told at the end only"
    *_, info = env.step("Any fever, or a cough?")  # two findings are two questions
    assert info["questions_left"] == 0
    seen, reward, terminated, truncated, info = env.step("Final diagnosis: flu")
    assert (reward, terminated, truncated) == (1.0, True, False) and info["correct"]
    assert info["truth"] == "Influenza" and info["talk"][-1] == "doctor: " + (
        "Final diagnosis: flu"
    )
    assert env.render().splitlines() == info["talk"]
    env.reset(options=case)
    ends = [env.step("Do you have hives?")[1:4] for _ in range(3)]
    assert ends == [(0.0, False, False)] * 2 + [(pytest.approx(-0.6), False, True)]
    with pytest.raises(RuntimeError, match="has ended"):
        env.unwrapped.step("Any hives?")


def test_seeds_draw_training_diseases_and_odd_options_are_named(bank):
    env, withheld = nb.DiagnosisEnv(bank), set(gx.split_bank(bank)[1])
    drawn = [(env.reset(seed=s), env.talk.case_id)[1] for s in range(300)]
    assert len({c.split("|")[0] for c in drawn}) > 50
    assert not {c.split("|")[0] for c in drawn} & withheld
    env.reset(seed=7)
    assert env.talk.case_id == drawn[7]
    with pytest.raises(gx.InputError, match="unknown option 'kase'"):
        env.reset(options={"kase": "x"})
    with pytest.raises(ValueError, match="expected disease"):
        env.reset(options={"case": "Plague|sampled|1"})


def test_all_that_the_bank_says_is_in_the_space(bank):
    space = nb.DiagnosisEnv(bank).observation_space
    for s in bank.lexicon.symptoms.values():
        assert all(
            space.contains(text) for text in (s.question, s.complaint, s.yes, s.no)
        )
    assert all(space.contains(f"Final diagnosis: {name}") for name in bank.names)
    assert not space.contains("流感")


def test_64_consultations_step_together_and_end_as_played(bank):
    many = gymnasium.make_vec(ID, num_envs=64, vectorization_mode="sync", bank=bank)
    many.reset(seed=5)
    talks = [env.unwrapped.talk for env in many.envs]
    bayes, paid = two.BayesDoctor(bank), np.zeros(64)
    for turn in range(6):
        _, reward, terminated, truncated, _ = many.step(tuple(bayes(talks)))
        paid += reward
        assert not truncated.any() and terminated.all() == (turn == 5)
    played = gx.play(bayes, bank, [t.case_id for t in talks])
    assert [t.record() for t in talks] == played
    assert paid.tolist() == nb.total_reward(played).tolist() and 0 < paid.mean() < 1


# ----------------------------------------------------------------------- PPO by hand
MASK = torch.tensor([[True, False, True, True, False]])


@pytest.mark.parametrize(
    "decay, expected",
    [
        (0.5, [0.0, 0, 0.6, 0.4, 0]),
        (1.0, [0.5, 0, 0.8, 0.4, 0]),
        (0.0, [-0.3, 0, 0.4, 0.4, 0]),
    ],
)
def test_gae_by_hand(decay, expected):
    values = torch.tensor([[0.5, 9.0, 0.2, 0.6, 7.0]])
    paid = nb.at_the_end([1.0], MASK)
    assert paid.tolist() == [[0, 0, 0, 1, 0]]
    advantage, returns = nb.gae(paid, values, MASK, decay=decay)
    assert torch.allclose(advantage, torch.tensor([expected]), atol=1e-6)
    assert torch.allclose(returns, (advantage + values) * MASK, atol=1e-6)


def test_gae_is_the_sum_of_discounted_surprises():
    rng = np.random.default_rng(0)
    reward, value = rng.normal(size=6), rng.normal(size=6)
    surprise = reward + 0.9 * np.append(value[1:], 0) - value
    expected = [
        sum((0.9 * 0.8) ** k * d for k, d in enumerate(surprise[t:])) for t in range(6)
    ]
    as_row = lambda x: torch.tensor(x)[None]  # noqa: E731
    every = torch.ones(1, 6, dtype=torch.bool)
    advantage, _ = nb.gae(as_row(reward), as_row(value), every, 0.9, 0.8)
    assert np.allclose(advantage[0], expected, atol=1e-6)


def test_the_clipped_loss_and_the_critics_loss_by_hand():
    ratio = torch.tensor([[1.5, 3.0, 0.5, 1.1, 1.0]]).log()
    gain = torch.tensor([[1.0, 9, -1, 2, 9]])
    loss = four.grpo_loss(ratio, torch.zeros(1, 5), gain, MASK, longest=1)
    by_hand = -(1.2 * 1 + 0.8 * -1 + 1.1 * 2)  # clipped, clipped, free
    assert abs(loss.item() - by_hand) < 1e-6
    error = nb.squared_error(ratio.exp(), gain, MASK, longest=2)
    assert abs(error.item() - 0.5 * (0.5**2 + 1.5**2 + 0.9**2) / 2) < 1e-6
    pull = nb.kl_loss(torch.zeros(1, 5), ratio, MASK, longest=1)
    by_hand = sum(r - np.log(r) - 1 for r in (1.5, 0.5, 1.1))
    assert abs(pull.item() - by_hand) < 1e-6
    plain = nb.reinforce_loss(ratio, None, gain, MASK, longest=1)
    assert abs(plain.item() - -(np.log(1.5) - np.log(0.5) + 2 * np.log(1.1))) < 1e-6


def test_the_baselines_by_hand():
    batch = SimpleNamespace(mask=MASK[[0, 0, 0]], weight=torch.ones(3, 5))
    reward = np.array([1.0, 0, 0.5])
    group, _ = nb.against_group(reward, batch, 3)
    assert torch.allclose(group[:, 0], torch.tensor([0.5, -0.5, 0]))
    others, _ = nb.against_others(reward, batch, 3)
    by_hand = [1 - (0 + 0.5) / 2, 0 - (1 + 0.5) / 2, 0.5 - (1 + 0) / 2]
    assert torch.allclose(others[:, 0], torch.tensor(by_hand))
    batch.values = torch.zeros(3, 5)
    for advantage in (nb.against_critic, nb.against_policies):
        found, returns = advantage(reward, batch, 3)
        mine = found[batch.mask]
        assert abs(mine.mean()) < 1e-6 and abs(mine.std() - 1) < 1e-4
    assert returns[:, 3].tolist() == [0.5, -0.5, 0]  # of the policies: against the mean


def learner(bank, name, **changes):
    recipe = dict(model="data/tiny_doctor", adapter=None, rate=1e-3, kl=0.01, group=3)
    recipe |= dict(batch_size=6, steps=1, tests=4, bank=bank, end=time.time() + 99)
    play = dict(max_questions=2, max_tokens=256)
    recipe |= dict(play=play, settings={}, micro=None)
    return nb.make_learner(name, SimpleNamespace(**recipe | changes), seed=0)


@pytest.fixture
def here(monkeypatch):
    monkeypatch.chdir(gx.DATA.parent)


def test_one_forward_pass_reads_what_notebook_04_reads(bank, here):
    x = learner(bank, "GRPO")
    ids = gx.sample_cases(bank.names, 6, seed=2)
    episodes, owner = nb.play_policies(x, bank, ids)
    batch = nb.make_batch(x, episodes, owner)
    log_p, entropy, values = nb.read_all(x, batch)
    expected = four.log_probs(x.model, batch.ids, batch.seen, batch.mask.shape[1])
    assert torch.allclose(log_p, expected * batch.mask, atol=1e-4)
    assert (entropy[batch.mask] > 0).any() and not entropy[~batch.mask].any()
    assert values.abs().max() < 1, "at first the critic expects next to nothing"
    for e, row, mask, weight in zip(episodes, batch.ids, batch.mask, batch.weight):
        mine = row[-mask.shape[0] :][mask].tolist()
        assert x.chat.decode(mine) == "".join(e.turns)
        forced = e.questions >= e.budget and e.diagnosis is not None
        assert weight[mask].tolist()[-2:] == ([0, 0] if forced else [1, 1])


def adapters(x):
    found = {}
    for name, weight in x.model.named_parameters():
        if "lora_B" in name:
            kind = name.split(".")[-2]
            found.setdefault(kind, []).append(weight.detach().clone().flatten())
    return {kind: torch.cat(parts) for kind, parts in found.items()}


@pytest.mark.parametrize("name", list(nb.METHODS))
def test_every_method_trains_its_policies_and_nothing_else(bank, name, here):
    x = learner(bank, name)
    x.recipe.micro = 4  # so that portions are added up
    before = adapters(x)
    rest = [
        p.detach().clone() for n, p in x.model.named_parameters() if "lora" not in n
    ]
    (row,) = nb.train(x, seed=0)
    after = adapters(x)
    assert set(before) == {*x.names, "ref"} and torch.equal(after["ref"], before["ref"])
    assert all(not torch.equal(after[k], before[k]) for k in x.names)
    policies = [after[k] for k in x.names]
    assert len({round(float(p.abs().sum()), 6) for p in policies}) == len(policies)
    now = [p for n, p in x.model.named_parameters() if "lora" not in n]
    assert all(torch.equal(a, b) for a, b in zip(rest, now))
    assert row["entropy"] > 0 and row["KL"] == pytest.approx(0, abs=1e-6)
    assert ("unexplained" in row) == (name in ("PPO", "policies"))


def test_finished_runs_are_not_repeated(bank, tmp_path, monkeypatch):
    ran = []

    def run_once(name, seed, recipe, bank, groups):
        ran.append((name, seed))
        return {"steps": 0 if name == "before" else recipe.done}

    monkeypatch.setattr(nb, "run_once", run_once)
    recipe = SimpleNamespace(
        steps=3, done=2, settings={"kl": 0.1}, end=time.time() + 99
    )
    jobs = [("before", 0), ("PPO", 0)]
    again = lambda: nb.run_all(tmp_path, jobs, recipe, bank, {})  # noqa: E731
    assert set(again()) == {("before", 0)} and ran == jobs
    recipe.done = 3
    again()
    assert ran[2:] == [("PPO", 0)], "time ran out in it, so it is run again"
    assert set(again()) == set(jobs) and len(ran) == 3
    recipe.settings = {"kl": 0.2}
    recipe.end = 0
    assert again() == {} and len(ran) == 3, "no time is left"
    recipe.end = time.time() + 99
    again()
    assert len(ran) == 5, "other settings"


def test_shares_and_the_worst_quarter():
    assert nb.percent("1" * 8 + "0" * 2) == "80.0% (49.0% to 94.3%)"
    names = "a a b b c c d d e e".split()
    assert nb.worst_quarter(names, "1111001011") == 0.25  # c: 0, d: 1/2


# -------------------------------------------------------------------------- rewards
def consultation(bank, said, case="Myocardial infarction|canonical|1"):
    return gx.play(lambda talks: [said], bank, [case])[0]


@pytest.mark.parametrize(
    "said, paid",
    [
        ("Final diagnosis: flu", 0),
        ("Final diagnosis: Influenza (flu)", 0),
        ("Final diagnosis: flu or a cold", -0.3),
        ("Final diagnosis: influenza / COVID-19", -0.3),
        ("Final diagnosis: either flu, or something else", -0.3),
        ("Final diagnosis: flu and pneumonia", -0.3),
        ("Final diagnosis: Influenza (COVID-19)", -0.3),
        ("Final diagnosis: flu. Or a common cold.", -0.3),
        ("Final diagnosis: flu. Rest or sleep helps.", 0),
        ("Final diagnosis: flu, not COVID-19", 0),
        ("Final diagnosis: flu because COVID-19 is unlikely", 0),
        ("Final diagnosis: the plague", 0),
    ],
)
def test_a_choice_costs(bank, said, paid):
    (found,) = nb.ambiguity_penalty(bank)(
        episode=[consultation(bank, said)], prompts=[1]
    )
    assert found == pytest.approx(paid)


@pytest.mark.parametrize(
    "said, paid",
    [
        ("Final diagnosis: Myocardial infarction", -0.2),
        ("Final diagnosis: heart attack. Order an ECG.", 0),
        ("Final diagnosis: heart attack; electrocardiogram now", 0),
        ("Final diagnosis: heart attack. No ECG is needed.", -0.2),
        ("Final diagnosis: heart attack. Check the TSH.", -0.2),
        ("Final diagnosis: hypothyroidism. Not an ECG, but a TSH test.", 0),
        ("Final diagnosis: influenza", 0),
        ("Final diagnosis: the plague", 0),
    ],
)
def test_the_guidelines_test_must_be_named(bank, said, paid):
    check = nb.guideline_check(nb.load_guidelines(bank))
    (found,) = check(episode=[consultation(bank, said)], log_metric=print)
    assert found == pytest.approx(paid)


def test_rewards_leave_out_what_cannot_be_scored(bank):
    e = consultation(bank, "Final diagnosis: flu or a cold")
    e.ended = "leak"
    extra = nb.ambiguity_penalty(bank), nb.guideline_check(nb.load_guidelines(bank))
    assert [f(episode=[e]) for f in extra] == [[None], [None]]
    assert nb.total_reward([e]).tolist() == [0]
    silent = gx.Episode(ended="no diagnosis", spoken=["Hello?"])
    assert [f(episode=[silent]) for f in extra] == [[0], [0]]


def test_the_shipped_guidelines(bank):
    rules = nb.load_guidelines(bank)
    assert len(rules) >= 10
    for name, rule in rules.items():
        assert nb.names_test(rule, rule["test"]), name
        assert rule["source"]["body"] and 1990 < rule["source"]["year"] <= 2026
        assert name.lower() not in " ".join(rule["accept"]).lower()


@pytest.mark.parametrize(
    "change, fault",
    [
        (dict(disease="Plague"), "rule 2: 'Plague' is not in the bank"),
        (dict(disease="Gout"), "rule 2: 'Gout' has a rule already"),
        (dict(accept=[]), "rule 2: 'accept'"),
        (dict(source={"body": "WHO", "year": 2020}), "'source' lacks guideline"),
        (dict(tset="x"), "unknown key 'tset'. Did you mean 'test'"),
    ],
)
def test_a_wrong_rule_is_one_sentence(bank, tmp_path, change, fault):
    rules = gx.read_json(gx.DATA / "guidelines.json")
    gout = next(r for r in rules if r["disease"] == "Gout")
    other = next(r for r in rules if r["disease"] == "Malaria") | change
    path = tmp_path / "rules.json"
    path.write_text(json.dumps([gout, other]))
    with pytest.raises(gx.InputError, match=fault):
        nb.load_guidelines(bank, path)
