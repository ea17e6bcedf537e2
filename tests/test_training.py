"""The rollout that TRL calls, credit per turn, loading, and what notebooks save."""

import json
import random
from types import SimpleNamespace

import numpy as np
import pytest

import grpodx_utils as gx


class FakeTrainer:
    """Generates random known sentences, as TRL's trainer would: ids in, ids out."""

    def __init__(self, chat, bank, seed=0):
        self.random = random.Random(seed)
        self.args = SimpleNamespace(max_completion_length=512)
        said = [s.question for s in bank.lexicon.symptoms.values()]
        self.lines = [chat.encode(q) + chat.end_ids for q in said]
        self.final = chat.encode("Final diagnosis: Gout") + chat.end_ids
        self.cue = chat.encode(gx.LAST_TURN)[-1]

    def _generate_single_turn(self, ids, images, fields, n):
        return [
            self.final
            if self.cue in i or self.random.random() < 0.1
            else self.random.choice(self.lines)
            for i in ids
        ], None


@pytest.fixture
def chat(tiny_tokenizer):
    return gx.ChatTokens(tiny_tokenizer)


def test_a_group_shares_one_patient_and_order_is_kept(bank, chat):
    cases = gx.sample_cases(bank.names, 6, seed=2)
    prompts = np.repeat(cases, 4).tolist()
    out = gx.make_rollout(bank, chat)(prompts, FakeTrainer(chat, bank))
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


def test_turn_scores_by_hand(bank, chat):
    (e,) = gx.play(gx.BayesDoctor(bank), bank, ["Influenza|sampled|5"])
    scores = gx.turn_scores(bank, [e])[0]
    assert scores[:-1] == pytest.approx([1.0] * 5), "Bayes asks the best question"
    sure = gx.belief(bank, [e.evidence])[0].max()
    assert scores[-1] == pytest.approx(0.1 * (e.correct - sure))
    e.spoken[1], e.replies[1] = e.spoken[0], e.replies[0]
    assert gx.turn_scores(bank, [e])[0][1] == -0.5, "asked again"


def test_an_early_diagnosis_costs_something(bank):
    def hasty(consultations):
        return ["Final diagnosis: flu" for _ in consultations]

    (e,) = gx.play(hasty, bank, ["Influenza|sampled|5"])
    assert gx.turn_scores(bank, [e])[0][0] < -0.3


def test_turn_advantages_sit_on_the_doctors_tokens_and_are_centred(bank, chat):
    prompts = np.repeat(gx.sample_cases(bank.names, 4, seed=4), 8).tolist()
    rollout = gx.make_rollout(bank, chat)
    out = rollout(prompts, FakeTrainer(chat, bank, seed=1))
    width = max(map(len, out["completion_ids"]))
    table = gx.turn_advantages(bank, rollout.episodes, 8, width)
    assert table.shape == (32, width)
    for row, mask in zip(table, out["env_mask"]):
        silent = np.ones(width, bool)
        silent[: len(mask)] = np.array(mask) == 0
        assert not row[silent].any()
    first = [next(i for i, m in enumerate(mask) if m) for mask in out["env_mask"]]
    at_first = table[np.arange(32), first].reshape(4, 8)
    assert np.allclose(at_first.mean(1), 0), "the first turn's advantages sum to zero"


def test_default_model_and_missing_adapter(tmp_path):
    assert gx.default_model()
    with pytest.raises(FileNotFoundError, match="notebook 04"):
        gx.check_adapter(tmp_path / "nothing")


def test_results_carry_their_origin(tmp_path):
    path = gx.save_result({"x": 1}, tmp_path / "a" / "r.json", "notebook 99", seed=3)
    saved = json.loads(path.read_text())
    assert saved["x"] == 1 and saved["origin"]["seed"] == 3
    assert {"machine", "versions", "command"} <= set(saved["origin"])


def test_cut_turn():
    assert gx.cut_turn([5, 6, 1, 7], [1]) == [5, 6, 1]
    assert gx.cut_turn([5, 6], [1]) == [5, 6]


def test_shipped_results_have_an_origin():
    for path in sorted((gx.DATA / "results").glob("*.json")):
        origin = json.loads(path.read_text())["origin"]
        assert {"machine", "versions", "command", "seed"} <= set(origin), path.name


def test_tiny_doctor_files(tiny_tokenizer):
    folder = gx.DATA / "tiny_doctor"
    assert sum(f.stat().st_size for f in folder.iterdir()) < 12 * 2**20
    t = tiny_tokenizer
    assert t.chat_template and t.pad_token != t.eos_token
    config = json.loads((gx.DATA / "tiny_doctor_grpo" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "data/tiny_doctor"
