"""Token in, token out: templates, the mask, and text that tries to forge tokens."""

import random
from pathlib import Path

import pytest
import trl
from conftest import dummy_tokenizer
from transformers import AutoTokenizer

import grpodx_utils as gx

three = gx.notebook("03")
TEMPLATES = Path(trl.__file__).parent / "chat_templates"
IM, LLAMA = ["<|im_start|>", "<|im_end|>"], ["<|start_header_id|>", "<|end_header_id|>"]
MODELS = {  # template file: (special tokens, end of turn)
    "qwen2_5": (IM, "<|im_end|>"),
    "qwen3": ([*IM, "<think>", "</think>"], "<|im_end|>"),
    "qwen3_instruct_2507": (IM, "<|im_end|>"),
    "llama3": ([*LLAMA, "<|eot_id|>", "<|begin_of_text|>"], "<|eot_id|>"),
    "llama3_2": ([*LLAMA, "<|eot_id|>", "<|begin_of_text|>"], "<|eot_id|>"),
    "gemma": (["<start_of_turn>", "<end_of_turn>"], "<eos>"),
    "gemma3": (["<start_of_turn>", "<end_of_turn>"], "<eos>"),
    "phi3": (["<|user|>", "<|assistant|>", "<|system|>", "<|end|>"], "<|endoftext|>"),
    "phi3_5": (["<|user|>", "<|assistant|>", "<|system|>", "<|end|>"], "<|endoftext|>"),
}


@pytest.fixture(params=[*MODELS, "tiny_doctor"])
def chat(request, tiny_tokenizer):
    if request.param == "tiny_doctor":
        return three.ChatTokens(tiny_tokenizer)
    template = (TEMPLATES / f"{request.param}.jinja").read_text()
    return three.ChatTokens(dummy_tokenizer(template, *MODELS[request.param]))


@pytest.mark.parametrize("name", ["tiny_doctor", "tiny_doctor_advised", "tiny_patient"])
def test_shipped_models_have_a_row_for_every_token_and_no_other(name):
    """transformers adds tokens that a tokenizer's file leaves open (unk, pad, eos)."""
    config = gx.read_json(gx.DATA / name / "config.json")
    tokenizer = AutoTokenizer.from_pretrained(str(gx.DATA / name))
    assert len(tokenizer) == config["vocab_size"]


def test_only_the_tiny_doctor_speaks_by_sentence(tiny_tokenizer):
    assert three.ChatTokens(tiny_tokenizer).by_sentence
    template = (TEMPLATES / "qwen3.jinja").read_text()
    assert not three.ChatTokens(dummy_tokenizer(template, *MODELS["qwen3"])).by_sentence


class TokenDoctor:
    """Says random lines as token ids; sometimes it is cut off before its end token."""

    def __init__(self, chat, seed):
        self.chat, self.random, self.said = chat, random.Random(seed), {}

    def __call__(self, consultations):
        out = []
        for c in consultations:
            stop = len(c.turns) >= c.budget or self.random.random() < 0.15
            line = self.random.choice(
                ["Any fever?", "Do you cough? né €", "Rash , or ?"]
            )
            line = "Final diagnosis: Gout" if stop else line
            ids = self.chat.encode(line)
            if self.random.random() < 0.7:
                ids = ids + self.chat.end_ids
            self.said.setdefault(id(c), []).append(line)
            out.append(ids)
        return out


@pytest.mark.parametrize("seed", range(3))
def test_mask_one_is_exactly_what_the_doctor_said(bank, chat, seed):
    doctor = TokenDoctor(chat, seed)
    ids = gx.sample_cases(bank.names, 8, seed=seed)
    episodes = gx.play(doctor, bank, ids, chat)
    spoken = list(doctor.said.values())
    for e in episodes:
        assert len(e.completion_ids) == len(e.env_mask) > 0
        mine = [i for i, m in zip(e.completion_ids, e.env_mask) if m]
        lines = next(s for s in spoken if s == e.turns)
        assert chat.decode(mine) == "".join(lines)
        theirs = [i for i, m in zip(e.completion_ids, e.env_mask) if not m]
        heard = chat.decode(theirs)
        assert all(reply in heard for reply in e.replies)
        assert e.completion_ids[-1] in chat.stop_ids


def test_the_conversation_reads_like_the_template(bank, chat):
    """Our token list decodes to what the template would print for the same talk."""
    lines = ["Any fever?", "Any rash?", "Final diagnosis: Gout"]
    (e,) = gx.play(
        lambda cs: [chat.encode(lines[len(c.turns)]) + chat.end_ids for c in cs],
        bank,
        ["Influenza|canonical|2"],
        chat,
        max_questions=2,
    )
    messages = [{"role": "system", "content": e.system}]
    talk = [e.opening, lines[0], e.replies[0], lines[1], e.replies[1]]
    if refuses_system(chat):
        messages, talk[0] = [], f"{e.system}\n\n{talk[0]}"
    for i, text in enumerate(talk):
        messages.append({"role": ("user", "assistant")[i % 2], "content": text})
    want = chat.tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True
    )
    ours = chat.tokenizer.decode(e.prompt_ids + e.completion_ids)
    last = chat.tokenizer.decode(chat.encode(lines[2]))
    assert ours[: ours.rindex(last)] == want


def refuses_system(chat) -> bool:
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    try:
        chat.tokenizer.apply_chat_template(messages, tokenize=False)
    except Exception:
        return True
    return False


def test_patient_text_cannot_forge_special_tokens(bank, chat):
    tokenizer = chat.tokenizer
    forged = "".join(tokenizer.all_special_tokens)
    special = set(tokenizer.all_special_ids)
    assert not special & set(chat.encode(forged))
    honest = chat.prompt("You are a doctor.", "hello")
    hostile = chat.prompt("You are a doctor.", forged)
    count = lambda ids: sum(i in special for i in ids)  # noqa: E731
    assert count(honest) == count(hostile)
    assert count(chat.bridge([], "hello")) == count(chat.bridge([], forged))


def test_too_long_episodes_end_cleanly(bank, chat):
    doctor = lambda cs: [chat.encode("Any fever? ") * 3 for _ in cs]  # noqa: E731
    (e,) = gx.play(doctor, bank, ["Gout|sampled|1"], chat, max_tokens=60)
    assert e.ended == "too long" and not e.correct and e.diagnosis is None
    assert len(e.completion_ids) == len(e.env_mask)
