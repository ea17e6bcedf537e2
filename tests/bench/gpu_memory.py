"""Does GRPO over whole consultations fit a small card? Trains models of real size with
random weights, 4-bit and LoRA, on groups of 8 consultations that fill a context of
2,048 tokens, while PyTorch may not allocate more GPU memory than a hard cap. Prints a
table and, as the last line, one JSON object.

    python tests/bench/gpu_memory.py

What notebook 04 does by default with a model from the hub:

    python tests/bench/gpu_memory.py --models Qwen2.5-1.5B --cap 14.5 --rank 32 \
        --at-once 32 --chunks 32 --episodes 32
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

CONTEXT = 2048
SETTINGS = {  # cap in GiB, rank of LoRA, episodes played at once, parts of the logits
    "Qwen2.5-1.5B": dict(cap=3.0, rank=16, at_once=8, chunks=32),
    "Qwen3-4B": dict(cap=8.0, rank=16, at_once=8, chunks=16),
    "Llama-3.1-8B": dict(cap=8.0, rank=16, at_once=4, chunks=16),
    "Phi-4": dict(cap=14.5, rank=16, at_once=4, chunks=16),
}


def settings(name, args):
    """The model's row of SETTINGS, changed as the command line says."""
    given = {k: getattr(args, k) for k in SETTINGS[name]}
    return SETTINGS[name] | {k: v for k, v in given.items() if v is not None}


def measure(name, args):
    """GRPO steps of one model under its cap; a dict of what they took."""
    import grpodx_utils as gx

    one, three, four = (gx.notebook(number) for number in ("01", "03", "04"))
    import torch
    from datasets import Dataset
    from random_models import write_model
    from trl import GRPOConfig, GRPOTrainer

    s = settings(name, args)
    gpu = torch.cuda.is_available()
    if gpu:
        cap, total = int(s["cap"] * 2**30), torch.cuda.mem_get_info()[1]
        torch.cuda.set_per_process_memory_fraction(cap / total)
        # Unsloth sizes its work by the free memory: it must see the small card's.
        torch.cuda.mem_get_info = lambda *_: (cap - torch.cuda.memory_allocated(), cap)
    bank = gx.load_bank()
    peak = {}

    def note(what):
        if gpu:
            for name, most in (
                (what, torch.cuda.max_memory_allocated()),
                (what + ", reserved", torch.cuda.max_memory_reserved()),
            ):
                peak[name] = max(peak.get(name, 0), round(most / 2**30, 2))
            print(f"{what}: {peak[what]} GiB", file=sys.stderr, flush=True)
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    with tempfile.TemporaryDirectory() as folder:
        write_model(name, folder, args.layers)
        note("writing the model")
        model, tokenizer = one.load_doctor(
            folder, lora_rank=s["rank"], max_seq_length=CONTEXT, dtype=torch.float16
        )
    note("loading")
    chat = three.ChatTokens(tokenizer)
    rollout = four.make_rollout(bank, chat, at_once=s["at_once"])
    gpu_options = dict(optim="adamw_8bit", unsloth_logit_chunk_multiplier=s["chunks"])
    clock = {"play": 0.0}

    def timed(prompts, trainer):
        note("learning")
        start = time.perf_counter()
        out = rollout(prompts, trainer)
        clock["play"] += time.perf_counter() - start
        note("playing")
        return out

    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        trainer = GRPOTrainer(
            model=model,
            processing_class=tokenizer,
            args=GRPOConfig(
                output_dir=folder,
                max_steps=args.steps,
                save_strategy="no",
                per_device_train_batch_size=1,
                gradient_accumulation_steps=args.episodes,
                num_generations=8,
                max_completion_length=CONTEXT - 250,
                loss_type="dr_grpo",
                scale_rewards="none",
                report_to="none",
                disable_tqdm=True,
                logging_steps=1,
                **(gpu_options if gpu else dict(use_cpu=True, bf16=False)),
            ),
            train_dataset=Dataset.from_dict(
                {"prompt": gx.sample_cases(bank.names, args.steps * args.episodes // 8)}
            ),
            reward_funcs=[lambda prompts, **_: torch.rand(len(prompts)).tolist()],
            rollout_func=timed,
        )
        trainer.generation_config.max_new_tokens = args.turn_tokens
        trainer.train()
    note("learning")
    seconds = time.perf_counter() - start
    lengths = [len(e.prompt_ids) + len(e.completion_ids) for e in rollout.episodes]
    return {
        "model": name,
        **s,
        "episodes": args.episodes,
        "dtype": "float16",
        "longest_context": max(lengths),
        "peak_gib": max([v for k, v in peak.items() if "reserved" in k], default=None),
        "peaks": peak,
        "seconds_per_step": round(seconds / args.steps, 1),
        "of_which_play": round(clock["play"] / args.steps, 1),
        "machine": one.device_line(),
        "unsloth": one.unsloth.__version__,
    }


parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
parser.add_argument("--models", nargs="+", default=list(SETTINGS), choices=SETTINGS)
parser.add_argument("--steps", type=int, default=2)
parser.add_argument("--turn-tokens", type=int, default=276)
parser.add_argument("--episodes", type=int, default=8, help="a step; groups of 8")
parser.add_argument("--cap", type=float, help="GiB, instead of the table's")
parser.add_argument("--rank", type=int, help="of LoRA, instead of the table's")
parser.add_argument(
    "--at-once", type=int, help="played at once, instead of the table's"
)
parser.add_argument("--chunks", type=int, help="parts of the logits, likewise")
parser.add_argument("--jobs", type=int, default=1, help="models measured at once")
parser.add_argument("--layers", type=int, help="cut the models, to try the script out")
parser.add_argument("--log", help="folder for what a failed run said")
parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
args = parser.parse_args()
if args.one:
    print(json.dumps(measure(args.models[0], args)))
    sys.exit()

if args.episodes % 8:
    parser.error("--episodes: a multiple of 8, the group")
passed_on = "steps turn_tokens layers episodes cap rank at_once chunks".split()
options = {"--" + k.replace("_", "-"): getattr(args, k) for k in passed_on}
given = [str(x) for k, v in options.items() if v is not None for x in (k, v)]


def in_its_own_process(name):
    command = [sys.executable, __file__, "--one", "--models", name, *given]
    ran = subprocess.run(command, capture_output=True, text=True)
    if ran.returncode:
        said = ran.stderr.strip().splitlines()
        phases = [x for x in said if x.endswith(" GiB")]
        row = {"model": name, **settings(name, args), "peaks before": phases}
        row["failed"] = said[-1] if said else "killed"
        if args.log:
            Path(args.log).mkdir(parents=True, exist_ok=True)
            Path(args.log, f"{name}.log").write_text(ran.stderr)
    else:
        row = json.loads(ran.stdout.splitlines()[-1])
    print(row, flush=True)
    return row


with ThreadPoolExecutor(args.jobs) as pool:
    rows = list(pool.map(in_its_own_process, args.models))
print(json.dumps({"bench": "gpu_memory", "context": CONTEXT, "rows": rows}))
