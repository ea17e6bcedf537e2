"""How many tokens a second does self-play make on a GPU, and how far is that from what
the memory allows? Plays consultations of 5 questions with a randomly initialised model,
for several numbers of episodes at once. The limit is the time to read the weights and
the key/value cache once per decoded token, at the bandwidth that a large copy reaches
here. Prints a table and, as the last line, one JSON object.

    python tests/bench/generation.py --shape Qwen2.5-1.5B --episodes 8 64 256
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import grpodx_utils as gx

one, three, four = (gx.notebook(number) for number in ("01", "03", "04"))
import torch
from random_models import SHAPES, write_model
from self_play import clock


def bandwidth():
    """Bytes a second that a large copy reads and writes here."""
    x = torch.empty(2**28, dtype=torch.float32, device=device)
    y = torch.empty_like(x)
    y.copy_(x)
    seconds, _ = clock(lambda: [y.copy_(x) for _ in range(10)])
    return 20 * x.numel() * x.element_size() / seconds


def bytes_per_step(model, rows, length):
    """Weights that one decode step must read, and the cache of `rows` conversations."""
    seen, total = set(), 0
    for p in (*model.parameters(), *model.buffers()):
        if p.data_ptr() not in seen and "cpu" not in str(p.device):
            seen.add(p.data_ptr())
            total += p.numel() * p.element_size()
    c = model.config
    size = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    cache = 2 * 2 * c.num_hidden_layers * c.num_key_value_heads * size
    return total, rows * length * cache


parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
parser.add_argument("--shape", default="Qwen2.5-1.5B", choices=SHAPES)
parser.add_argument("--layers", type=int, help="cut the model, to try the script out")
parser.add_argument("--episodes", type=int, nargs="+", default=[8, 64, 256])
parser.add_argument("--turn-tokens", type=int, default=64)
parser.add_argument("--rounds", type=int, default=2)
parser.add_argument("--seed", type=int, default=0)
args = parser.parse_args()

device = "cuda" if torch.cuda.is_available() else "cpu"
bank = gx.load_bank()
with tempfile.TemporaryDirectory() as folder:
    write_model(args.shape, folder, args.layers)
    model, tokenizer = one.load_doctor(folder, lora_rank=16)
one.FastLanguageModel.for_inference(model)
chat = three.ChatTokens(tokenizer)
torch.manual_seed(args.seed)
doctor = four.make_doctor(model, chat, 1.0, args.turn_tokens)
speed, rows = bandwidth(), []
print(f"{one.device_line()}; a copy moves {speed / 1e9:.0f} GB/s")
for n in args.episodes:
    case_ids = gx.sample_cases(bank.names, n, seed=args.seed)
    gx.play(doctor, bank, case_ids, chat, max_questions=1)  # warms up
    times = []
    for _ in range(args.rounds):
        seconds, episodes = clock(gx.play, doctor, bank, case_ids, chat)
        times.append(seconds)
    tokens = sum(sum(e.env_mask) for e in episodes)
    length = sum(len(e.prompt_ids) + len(e.env_mask) / 2 for e in episodes) / n
    weights, cache = bytes_per_step(model, n, length)
    limit = n * speed / (weights + cache)
    row = {
        "episodes": n,
        "tokens_per_s": round(tokens / min(times)),
        "ms_per_step": round(1000 * min(times) * n / tokens, 2),
        "limit_tokens_per_s": round(limit),
        "share_of_limit": round(tokens / min(times) / limit, 4),
    }
    rows.append(row)
    print(row, flush=True)
result = {
    "bench": "generation",
    "machine": one.device_line(),
    "shape": args.shape,
    "turn_tokens": args.turn_tokens,
    "copy_gb_per_s": round(speed / 1e9),
    "rows": rows,
}
print(json.dumps(result))
