"""Notebook 03b's batch, unrecorded on a CPU: it says what the plain one says."""

import gc
import weakref

import pytest
import torch

import grpodx_utils as gx

one, three, fast = (gx.notebook(number) for number in ("01", "03", "03b"))


class Uneven(gx.ScriptedPatient):
    """Adds words to its answers, so that conversations differ in length."""

    def reply(self, question):
        extra = " Well, yes, a bit." * (len(self.case.findings) % 4)
        return super().reply(question) + extra


def consultations(bank, chat, n, **options):
    """Open consultations with uneven patients; the budgets differ too."""
    cases = [gx.make_case(bank, i) for i in gx.sample_cases(bank.names, n, seed=8)]
    return [
        gx.Consultation(bank, Uneven(bank, c), chat, max_questions=2 + k % 4, **options)
        for k, c in enumerate(cases)
    ]


def greedy_by_generate(model, chat, c, cap):
    """The next turn of one consultation, computed from scratch by `generate`."""
    ids = torch.tensor([c.ids])
    out = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=cap,
        do_sample=False,
        eos_token_id=chat.stop_ids,
        pad_token_id=chat.tokenizer.pad_token_id,
    )
    return three.cut_turn(out[0, ids.shape[1] :].tolist(), chat.stop_ids)


def small_model(kind, vocabulary):
    """Random weights, four query heads and two key heads, and LoRA that counts."""
    import peft
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(
        kind,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=vocabulary,
        initializer_range=0.3,
    )
    lora = peft.LoraConfig(init_lora_weights=False, target_modules=one.LORA_TARGETS)
    return peft.get_peft_model(AutoModelForCausalLM.from_config(config), lora).eval()


@pytest.mark.parametrize("kind", ["tiny_doctor", *fast.GraphBatch.KINDS])
@pytest.mark.parametrize("batch", [three.Batch, fast.GraphBatch])
def test_the_cache_kept_between_turns_changes_nothing(
    bank, chat, model, monkeypatch, kind, batch
):
    """On a GPU steps are recorded; `tests/gpu` checks that."""
    if kind != "tiny_doctor":
        model = small_model(kind, len(chat.tokenizer))
    monkeypatch.setattr(fast.GraphBatch, "ROOM", 16)  # the cache must grow
    doctor = three.ModelDoctor(model, chat, 0, 6, batch)
    live = consultations(bank, chat, 8) + consultations(bank, chat, 5)  # 5 begin alike
    turns = 0
    while live:
        said = doctor(live)
        for c, ids in zip(live, said):
            assert ids == greedy_by_generate(model, chat, c, 6)
            c.step(ids)
        live, turns = [c for c in live if not c.done], turns + 1
    assert turns > 2, "several turns, and rows that leave before the others"


def test_a_switched_off_adapter_is_off(bank, chat):
    model = small_model("qwen2", len(chat.tokenizer))
    doctor = three.ModelDoctor(model, chat, 0, 6, fast.GraphBatch)
    (talk,) = consultations(bank, chat, 1)
    on = doctor([talk])
    with model.disable_adapter():
        doctor = three.ModelDoctor(model, chat, 0, 6, fast.GraphBatch)
        off = doctor([talk])
        assert off == [greedy_by_generate(model, chat, talk, 6)]
    assert on != off


@pytest.mark.parametrize("kind", [three.Batch, fast.GraphBatch])
def test_a_dropped_batch_frees_its_cache_at_once(model, kind):
    """Without the garbage collector, which does not know how full a GPU is."""
    batch, ids = kind(model), torch.full((3, 1), 5)
    with torch.inference_mode():
        batch.read(ids, torch.ones_like(ids))
    cache = weakref.ref(batch.cache)
    gc.disable()
    try:
        del batch
        assert cache() is None
    finally:
        gc.enable()
