"""How fast is self-play? Compares, on the same cases and device, in one run:

    play        all episodes together, as `grpodx_utils.play` does
    one_by_one  one episode at a time with `model.generate`, as simple examples do
    generate    the limit: one plain batched `generate` of as many doctor tokens

and shows how time and memory of `play` grow with the number of episodes. Prints a table
and, as the last line, one JSON object.

    python tests/bench/self_play.py --episodes 256
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import grpodx_utils as gx

one, three, four = (gx.notebook(number) for number in ("01", "03", "04"))
import numpy as np
import torch

SIZES = (16, 64, 256, 1024)


def one_by_one(model, chat, bank, case_ids, cap):
    """Each episode alone; every turn computes the whole conversation again."""

    def doctor(consultations):
        (c,) = consultations
        ids = torch.tensor([c.ids], device=model.device)
        with torch.inference_mode():
            out = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=cap,
                do_sample=True,
                top_k=0,
                pad_token_id=chat.tokenizer.pad_token_id,
                eos_token_id=chat.stop_ids,
            )
        return [three.cut_turn(out[0, ids.shape[1] :].tolist(), chat.stop_ids)]

    return [gx.play(doctor, bank, [case_id], chat)[0] for case_id in case_ids]


def plain_generate(model, chat, prompts, tokens):
    """One batch, `tokens` new tokens for each prompt, nothing else."""
    width, pad = max(map(len, prompts)), chat.tokenizer.pad_token_id
    ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    with torch.inference_mode():
        model.generate(
            input_ids=ids.to(model.device),
            attention_mask=mask.to(model.device),
            min_new_tokens=tokens,
            max_new_tokens=tokens,
            do_sample=True,
            top_k=0,
            pad_token_id=pad,
        )


def clock(work, *args, **options):
    """(seconds, result) of one call, the device's queue included."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    result = work(*args, **options)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start, result


def peak_mib():
    """Peak memory so far in MiB: of the device, or of this process on a CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def load(args):
    bank = gx.load_bank()
    model, tokenizer = one.load_doctor(args.model, lora_rank=32)
    one.FastLanguageModel.for_inference(model)
    chat = three.ChatTokens(tokenizer)
    torch.manual_seed(args.seed)
    doctor = four.make_doctor(model, chat, 1.0, args.turn_tokens)
    return bank, model, chat, doctor


def grow(args):
    """One size in a process of its own, so that its peak memory is its own."""
    bank, _, chat, doctor = load(args)
    gx.play(doctor, bank, gx.sample_cases(bank.names, 8, seed=1), chat)
    idle = peak_mib()
    case_ids = gx.sample_cases(bank.names, args.grow, seed=args.seed)
    times = [clock(gx.play, doctor, bank, case_ids, chat)[0] for _ in range(3)]
    row = {"episodes": args.grow, "seconds": min(times), "mib": peak_mib() - idle}
    print(json.dumps(row))


def main(args):
    bank, model, chat, doctor = load(args)
    case_ids = gx.sample_cases(bank.names, args.episodes, seed=args.seed)
    warm = case_ids[:8]
    gx.play(doctor, bank, warm, chat)
    one_by_one(model, chat, bank, warm[:1], args.turn_tokens)

    rounds = []
    for _ in range(args.rounds):  # side by side, so that noise meets both
        a, episodes = clock(gx.play, doctor, bank, case_ids, chat)
        tokens = sum(sum(e.env_mask) for e in episodes)
        each = round(tokens / len(episodes))
        prompts = [e.prompt_ids for e in episodes]
        c, _ = clock(plain_generate, model, chat, prompts, each)
        rounds.append((a, c))
    few = case_ids[: args.alone]
    b, alone = clock(one_by_one, model, chat, bank, few, args.turn_tokens)
    b *= len(case_ids) / len(few)
    a, c = np.median(rounds, axis=0)
    rows = {
        "play": (a, tokens),
        "one_by_one": (
            b,
            sum(sum(e.env_mask) for e in alone) * len(case_ids) / len(few),
        ),
        "generate": (c, each * len(episodes)),
    }
    for name, (seconds, made) in rows.items():
        print(
            f"{name:11} {seconds:8.2f} s  {args.episodes / seconds:8.1f} episodes/s"
            f"  {made / seconds:8.0f} tokens/s"
        )
    growth = []
    for size in SIZES:
        command = [
            sys.executable,
            __file__,
            "--grow",
            str(size),
            "--seed",
            str(args.seed),
        ]
        command += ["--turn-tokens", str(args.turn_tokens)]
        command += ["--model", args.model]
        out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        growth.append(json.loads(out.splitlines()[-1]))
        g = growth[-1]
        print(
            f"{size:5} episodes {g['seconds']:7.2f} s "
            f"{1000 * g['seconds'] / size:7.1f} ms each {g['mib']:7.0f} MiB more"
        )
    result = {
        "bench": "self_play",
        "machine": one.device_line(),
        "episodes": args.episodes,
        "seconds": {name: round(row[0], 3) for name, row in rows.items()},
        "episodes_per_s": {n: round(args.episodes / r[0], 1) for n, r in rows.items()},
        "tokens_per_s": {n: round(r[1] / r[0]) for n, r in rows.items()},
        "speedup_over_one_by_one": round(rows["one_by_one"][0] / a, 1),
        "time_over_generate": round(float(np.median([x / y for x, y in rounds])), 2),
        "growth": growth,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--episodes", type=int, default=256)
    parser.add_argument("--model", default=str(gx.DATA / "tiny_doctor"))
    parser.add_argument(
        "--alone", type=int, help="episodes played one by one (default: all)"
    )
    parser.add_argument("--turn-tokens", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--grow", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    grow(args) if args.grow else main(args)
