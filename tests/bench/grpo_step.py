"""Where does a GRPO step's time go? Seconds per step for

    generation   the consultations (`make_rollout`)
    scoring      rewards, advantages of turns, padding to tensors
    learning     forward and backward passes
    rest         optimizer, logging, data

and the peak memory. Prints a table and, as the last line, one JSON object.

    python tests/bench/grpo_step.py --episodes 128 --steps 10
"""

import argparse
import json
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import grpodx_utils as gx

one, three, four = (gx.notebook(number) for number in ("01", "03", "04"))
import torch
from datasets import Dataset
from self_play import peak_mib
from transformers import TrainerCallback
from trl import GRPOConfig


def now():
    """The clock, after everything that the device still has to do."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


class Timed(four.ConsultationTrainer):
    """GRPO as in notebook 04, with a clock around every part."""

    def _generate_and_score_completions(self, inputs):
        start, before = now(), spent["generation"]
        out = super()._generate_and_score_completions(inputs)
        spent["scoring"] += now() - start - (spent["generation"] - before)
        return out

    def training_step(self, *a, **k):
        start, before = now(), spent["generation"] + spent["scoring"]
        loss = super().training_step(*a, **k)
        spent["learning"] += (
            now() - start - (spent["generation"] + spent["scoring"] - before)
        )
        return loss


class Stopwatch(TrainerCallback):
    """Leaves the first step out: it compiles and warms up."""

    def on_step_end(self, arguments, state, control, **_):
        if state.global_step == 1:
            spent.clear()
            self.start = now()
        elif state.global_step == arguments.max_steps:
            spent["total"] = now() - self.start


def timed_rollout(prompts, trainer):
    start = now()
    out = rollout(prompts, trainer)
    spent["generation"] += now() - start
    timed_rollout.episodes = rollout.episodes
    return out


parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
parser.add_argument("--episodes", type=int, default=128, help="of one step")
parser.add_argument("--micro-batch", type=int, default=64)
parser.add_argument("--group", type=int, default=8)
parser.add_argument("--steps", type=int, default=10)
parser.add_argument("--turn-tokens", type=int, default=16)
parser.add_argument("--lora-rank", type=int, default=32)
parser.add_argument("--model", default=str(gx.DATA / "tiny_doctor"))
parser.add_argument("--no-4bit", action="store_true", help="weights as they are stored")
parser.add_argument("--seed", type=int, default=0)
args = parser.parse_args()

spent = Counter()
bank = gx.load_bank()
train, _ = gx.split_bank(bank)
school = gx.Bank([bank[n] for n in train], bank.lexicon)
model, tokenizer = one.load_doctor(
    args.model, lora_rank=args.lora_rank, load_in_4bit=not args.no_4bit, seed=args.seed
)
chat = three.ChatTokens(tokenizer)
rollout = four.make_rollout(school, chat)
cases = gx.sample_cases(
    train, (args.steps + 1) * args.episodes // args.group, args.seed
)
micro = min(args.micro_batch, args.episodes)
on_gpu = torch.cuda.is_available()
idle = peak_mib()
with tempfile.TemporaryDirectory() as folder:
    trainer = Timed(
        model=model,
        processing_class=tokenizer,
        args=GRPOConfig(
            output_dir=folder,
            max_steps=args.steps + 1,
            save_strategy="no",
            per_device_train_batch_size=micro,
            gradient_accumulation_steps=args.episodes // micro,
            num_generations=args.group,
            max_completion_length=1024,
            learning_rate=1e-3,
            loss_type="dr_grpo",
            scale_rewards="none",
            report_to="none",
            disable_tqdm=True,
            logging_steps=1000,
            seed=args.seed,
            **({} if on_gpu else dict(use_cpu=True, bf16=False)),
        ),
        train_dataset=Dataset.from_dict({"prompt": cases}),
        reward_funcs=[gx.reward_correct, gx.reward_repeats, gx.reward_no_diagnosis],
        rollout_func=timed_rollout,
        callbacks=[Stopwatch()],
    )
    trainer.credit = four.make_credit(school, args.group)
    trainer.generation_config.max_new_tokens = args.turn_tokens
    trainer.train()

parts = {
    k: spent[k] / args.steps for k in ("generation", "scoring", "learning", "total")
}
parts["rest"] = parts["total"] - sum(
    parts[k] for k in ("generation", "scoring", "learning")
)
for name in ("generation", "scoring", "learning", "rest", "total"):
    print(f"{name:11}{parts[name]:7.3f} s  {parts[name] / parts['total']:6.1%}")
result = {
    "bench": "grpo_step",
    "machine": one.device_line(),
    "episodes": args.episodes,
    "seconds_per_step": {name: round(s, 4) for name, s in parts.items()},
    "peak_mib_more": round(peak_mib() - idle),
}
print(json.dumps(result))
