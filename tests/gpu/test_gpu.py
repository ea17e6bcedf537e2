"""The training path on a CUDA GPU, 4-bit and float16 as on a T4: `make gpu-check`."""

import json

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("no CUDA GPU here: the GPU checks did not run", allow_module_level=True)

import grpodx_utils as gx

one, three, four = (gx.notebook(number) for number in ("01", "03", "04"))
from datasets import Dataset
from test_fast_self_play import consultations, fast, small_model
from trl import GRPOConfig, GRPOTrainer

STEPS, GROUP, EPISODES = 3, 8, 64


@pytest.fixture(scope="module")
def bank():
    return gx.load_bank()


@pytest.fixture(scope="module")
def loaded():
    return one.load_doctor(gx.DATA / "tiny_doctor", lora_rank=16, dtype=torch.float16)


@pytest.fixture(scope="module")
def chat(loaded):
    return three.ChatTokens(loaded[1])


@pytest.fixture(scope="module")
def cases(bank):
    return gx.sample_cases(bank.names, 48, seed=5)


@pytest.fixture
def doctor(loaded, chat):
    one.FastLanguageModel.for_inference(loaded[0])
    torch.manual_seed(0)
    return four.make_doctor(loaded[0], chat, 0, 16)


# First, while Unsloth has not yet put its own code into these models' layers.
@pytest.mark.parametrize("kind", fast.GraphBatch.KINDS)
def test_recorded_steps_say_what_the_cpu_says(kind, bank, tiny_tokenizer, monkeypatch):
    """Long uneven turns: columns are added and rows drop out between recordings."""
    monkeypatch.setattr(fast.GraphBatch, "ROOM", 16)
    monkeypatch.setattr(fast.GraphBatch, "WARM_UP", 1)
    recorded, graph = [], torch.cuda.CUDAGraph
    monkeypatch.setattr(
        torch.cuda, "CUDAGraph", lambda: recorded.append(graph()) or recorded[-1]
    )
    chat = three.ChatTokens(tiny_tokenizer)
    model = small_model(kind, len(tiny_tokenizer))
    said = {}
    for device in ("cpu", "cuda"):
        batch = fast.GraphBatch if device == "cuda" else three.Batch
        doctor = three.ModelDoctor(model.to(device), chat, 0, 24, batch)
        talks = live = consultations(bank, chat, 13)
        while live:
            for c, ids in zip(live, doctor(live)):
                c.step(ids)
            live = [c for c in live if not c.done]
        said[device] = [list(c.ids) for c in talks]
    print(f"{kind}: {len(recorded)} recordings")
    assert len(recorded) > 3
    assert said["cuda"] == said["cpu"]


def test_the_model_has_a_row_for_every_token_and_no_other(loaded):
    """Unsloth would add rows without filling them: whatever the memory held."""
    saved = json.loads((gx.DATA / "tiny_doctor" / "config.json").read_text())
    rows = loaded[0].get_input_embeddings().weight
    assert len(loaded[1]) == len(rows) == saved["vocab_size"]
    assert torch.isfinite(rows).all()


def test_layers_are_4_bit_and_the_rest_float16(loaded):
    kinds = {p.dtype for p in loaded[0].parameters()}
    assert (
        torch.uint8 in kinds and torch.float16 in kinds and torch.bfloat16 not in kinds
    )


def test_the_cache_kept_between_turns_changes_next_to_nothing(
    doctor, bank, chat, cases
):
    """Each turn computed anew by `generate`. float16 rounds differently in batches of
    different shape, so near ties may fall the other way; nearly all must agree."""
    same = total = 0
    played = gx.play(doctor, bank, cases[:24], chat)
    assert sum(e.correct for e in played) > 12, "it does not speak sense"
    for e in played:
        ids = e.prompt_ids + e.completion_ids
        edges = [i for i in range(len(e.env_mask)) if e.env_mask[i]]
        starts = [i for i in edges if i == 0 or not e.env_mask[i - 1]]
        for start in starts:
            upto = torch.tensor([ids[: len(e.prompt_ids) + start]], device="cuda")
            out = doctor.model.generate(
                input_ids=upto,
                attention_mask=torch.ones_like(upto),
                max_new_tokens=16,
                do_sample=False,
                pad_token_id=chat.tokenizer.pad_token_id,
                eos_token_id=chat.stop_ids,
            )
            new = three.cut_turn(out[0, upto.shape[1] :].tolist(), chat.stop_ids)
            same += ids[upto.shape[1] :][: len(new)] == new
            total += 1
    print(f"{same} of {total} turns are the same")
    assert total > 100 and same >= 0.97 * total


def test_grpo_steps_then_the_adapter_is_saved_and_read_back(
    loaded, bank, chat, tmp_path
):
    model, tokenizer = loaded
    rollout = four.make_rollout(bank, chat)
    cases = gx.sample_cases(bank.names, STEPS * EPISODES // GROUP, seed=1)
    lora = {n: p for n, p in model.named_parameters() if "lora_B" in n}
    start = {n: p.detach().clone() for n, p in lora.items()}
    trainer = GRPOTrainer(
        model=model,
        processing_class=tokenizer,
        args=GRPOConfig(
            output_dir=str(tmp_path / "run"),
            max_steps=STEPS,
            save_strategy="no",
            per_device_train_batch_size=EPISODES,
            num_generations=GROUP,
            max_completion_length=512,
            learning_rate=1e-3,
            loss_type="dr_grpo",
            scale_rewards="none",
            report_to="none",
            logging_steps=1,
        ),
        train_dataset=Dataset.from_dict({"prompt": cases}),
        reward_funcs=[gx.reward_correct, gx.reward_repeats, gx.reward_no_diagnosis],
        rollout_func=rollout,
    )
    trainer.generation_config.max_new_tokens = 16
    assert trainer.args.fp16 and not trainer.args.bf16, "float16 as on a T4"
    trainer.train()
    log = [x for x in trainer.state.log_history if "reward" in x]
    print(
        json.dumps([{k: round(x[k], 3) for k in ("reward", "grad_norm")} for x in log])
    )
    assert len(log) == STEPS and all(0 < x["grad_norm"] < 100 for x in log)
    assert any(not torch.equal(p, start[n]) for n, p in lora.items())

    for e in rollout.episodes:  # the mask: exactly the doctor's words
        mine = [t for t, m in zip(e.completion_ids, e.env_mask) if m]
        assert chat.decode(mine) == "".join(e.turns)
    groups = [e.truth for e in rollout.episodes]
    assert all(len(set(groups[i : i + GROUP])) == 1 for i in range(0, EPISODES, GROUP))

    model.save_pretrained(str(tmp_path / "adapter"))
    again, _ = one.load_doctor(adapter=tmp_path / "adapter", dtype=torch.float16)
    mine = dict(model.named_parameters())
    for name, value in again.named_parameters():
        if "lora_" in name:
            assert torch.equal(value.cpu(), mine[name].detach().cpu()), name
