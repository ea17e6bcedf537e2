"""Trains a small language model that plays patients: it reads the facts in the
instructions of `LLMPatient` and answers questions, taught by `ScriptedPatient`. It lets
notebook 09 and the tests talk to a real language model behind a real server, offline.
It has learned the lexicon's own questions and says nothing sensible to others.

    python tests/tiny_patient.py --serve    # `transformers serve`, prints the address
    python tests/tiny_patient.py --steps 5000  # trains it again into data/tiny_patient
"""

import argparse
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

import grpodx_utils as gx

nine = gx.notebook("09")
SPECIAL = ["<|pad|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
TEMPLATE = """\
{%- for m in messages -%}
{{- "<|" + m["role"] + "|>" + m["content"] + "<|end|>" -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- "<|assistant|>" -}}{%- endif -%}"""
ANSWER = {  # how `transformers serve` finds the reply in what the model wrote
    "defaults": {"role": "assistant"},
    "start_anchor": "<|assistant|>",
    "fields": {"content": {"close": "<|end|>"}},
}
OTHER = {
    "age": ["How old are you?", "What is your age?"],
    "sex": ["Are you male or female?"],
    "since": ["How long have you had this?", "When did it start?"],
    "unsure": ["What is your name?", "Do you like music?", "Where do you live?"],
}


def make_tokenizer(bank):
    """Every sentence of the lexicon is one token; other text is byte-level BPE."""
    symptoms = [bank.lexicon.symptoms[s] for s in bank.symptoms]
    sentences = [t for s in symptoms for t in (s.question, s.complaint, s.yes, s.no)]
    sentences += [
        gx.ScriptedPatient.UNSURE,
        gx.ScriptedPatient.NOTHING_ELSE,
        "What brings you here?",
        gx.LAST_TURN,
    ]
    sentences += [t for said in gx._SINCE.values() for t in said]
    sentences += [t.strip() for t in re.split(r"\{\w+\}", nine.PATIENT) if len(t) > 3]
    sentences += [q for questions in OTHER.values() for q in questions]
    sentences = list(dict.fromkeys(sentences))
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    ages = [f"I am {age} years old." for age in range(100)]
    core.train_from_iterator(sentences + ages, trainer)
    core.add_tokens([AddedToken(s, normalized=False) for s in sentences])
    return PreTrainedTokenizerFast(
        response_template=ANSWER,
        tokenizer_object=core,
        pad_token="<|pad|>",
        eos_token="<|end|>",
        unk_token="<|pad|>",
        additional_special_tokens=SPECIAL[1:4],
        chat_template=TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=1024,
    )


def lesson(bank, rng, questions=12):
    """The messages of one conversation; half of the questions meet a finding."""
    disease, seed = bank.names[rng.integers(len(bank.names))], rng.integers(2**31)
    case = gx.make_case(bank, f"{disease}|sampled|{seed}")
    teacher = gx.ScriptedPatient(bank, case)
    messages = list(nine.LLMPatient(bank, case, None).messages)
    have, symptoms = sorted(case.findings), bank.lexicon.symptoms
    for _ in range(questions):
        kind = rng.choice(3, p=[0.5, 0.4, 0.1])
        if kind == 2:
            question = str(rng.choice(OTHER[str(rng.choice(list(OTHER)))]))
        else:
            question = symptoms[str(rng.choice((have, bank.symptoms)[kind]))].question
        messages.append({"role": "user", "content": question})
        messages.append({"role": "assistant", "content": teacher.reply(question)})
    return messages


class Lessons(torch.utils.data.IterableDataset):
    """Endless batches (ids, labels), both [rows, longest]; labels are the replies."""

    def __init__(self, bank, tokenizer, rows, seed):
        self.bank, self.tokenizer, self.rows, self.seed = bank, tokenizer, rows, seed

    def __iter__(self):
        worker = torch.utils.data.get_worker_info()
        rng = np.random.default_rng([self.seed, worker.id if worker else 0])
        speaks, ends = self.tokenizer.convert_tokens_to_ids(
            ["<|assistant|>", "<|end|>"]
        )
        while True:
            talks = [
                self.tokenizer(
                    self.tokenizer.apply_chat_template(
                        lesson(self.bank, rng), tokenize=False
                    ),
                    add_special_tokens=False,
                )["input_ids"]
                for _ in range(self.rows)
            ]
            width = max(map(len, talks))
            ids = torch.full((self.rows, width), self.tokenizer.pad_token_id)
            labels = torch.full_like(ids, -100)
            for row, talk in enumerate(talks):
                ids[row, : len(talk)] = torch.tensor(talk)
                speaking = False
                for k, token in enumerate(talk):
                    if speaking:
                        labels[row, k] = token
                    speaking = token == speaks or (speaking and token != ends)
            yield ids, labels


def train(out, steps, rows=64, workers=0, seed=0):
    torch.manual_seed(seed)
    bank = gx.load_bank()
    tokenizer = make_tokenizer(bank)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        tie_word_embeddings=True,
        max_position_embeddings=1024,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = Qwen2ForCausalLM(config).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda k: min(1, (k + 1) / 50) * (1 - k / steps)
    )
    lessons = Lessons(bank, tokenizer, rows, seed)
    loader = torch.utils.data.DataLoader(lessons, batch_size=None, num_workers=workers)
    start = time.time()
    for step, (ids, labels) in zip(range(steps), loader):
        ids, labels = ids.to(device), labels.to(device)
        mask = (ids != tokenizer.pad_token_id).long()
        result = model(input_ids=ids, attention_mask=mask, labels=labels)
        result.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 100 == 0 or step == steps - 1:
            taught = labels[:, 1:] != -100
            right = result.logits[:, :-1].argmax(-1) == labels[:, 1:]
            share, seconds = right[taught].float().mean().item(), time.time() - start
            loss = f"{step} loss {result.loss.item():.3f}"
            print(f"{loss} right {share:.3f} {seconds:.0f} s", flush=True)
    model.half().save_pretrained(out)
    tokenizer.save_pretrained(out)
    made = {"steps": steps, "rows": rows, "seed": seed, "last_loss": result.loss.item()}
    made["machine"] = gx.notebook("01").device_line()
    Path(out, "training.json").write_text(json.dumps(made, indent=1) + "\n")


def serve(model, port=0, patience=120):
    """Runs `transformers serve` on the loopback until our standard input closes. The
    folder's name is the model's name."""
    if not port:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "transformers.cli.transformers",
        "serve",
        Path(model).name,
    ]
    command += ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    with tempfile.TemporaryFile("w+") as log:  # a pipe that nobody reads would fill up
        out = dict(stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        folder = Path(model).resolve().parent
        server = subprocess.Popen(command, env=env, cwd=folder, **out)
        try:
            start = time.time()
            while not is_up(port):
                if server.poll() is not None or time.time() - start > patience:
                    log.seek(0)
                    last = (log.read().strip().splitlines() or ["no reason given"])[-1]
                    sys.exit(f"transformers serve did not start: {last}")
                time.sleep(0.2)
            print(f"http://127.0.0.1:{port}/v1", flush=True)
            sys.stdin.read()
        finally:
            server.terminate()
            server.wait()


def is_up(port):
    try:
        urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1)
    except OSError:
        return False
    return True


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--serve", action="store_true")
    parser.add_argument("--port", type=int, default=0, help="0: any free one")
    parser.add_argument(
        "--out", default=str(gx.DATA / "tiny_patient"), help="its folder"
    )
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.serve:
        serve(args.out, args.port)
    else:
        train(args.out, args.steps, args.rows, args.workers, args.seed)
