r"""Where does a GRPO step's time go? Seconds per step for

    generation   the consultations (`make_rollout`)
    scoring      rewards, advantages of turns, padding to tensors
    learning     forward and backward passes
    rest         optimizer, logging, data

and the peak memory. `plain` is one forward and backward pass over the same tokens in
the same micro-batches, with the mean log-probability of the doctor's tokens as loss;
`learning` over it is the ratio. Prints a table and, as the last line, one JSON object.

    python tests/bench/grpo_step.py --episodes 128 --steps 10
    python tests/bench/grpo_step.py --adapter data/smol_doctor_start --episodes 256 \
        --micro-batch 64 256 --turn-tokens 32
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

    learnt = []  # the micro-batches of the last step

    def _generate_and_score_completions(self, inputs):
        start, before = now(), spent["generation"]
        out = super()._generate_and_score_completions(inputs)
        spent["scoring"] += now() - start - (spent["generation"] - before)
        return out

    def compute_loss(self, model, inputs, *a, **k):
        last = self.args.gradient_accumulation_steps
        self.learnt = [*self.learnt, inputs][-last:]
        return super().compute_loss(model, inputs, *a, **k)

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


def plain_pass(trainer):
    """Seconds of one forward and backward pass over the last step's tokens."""
    model, seconds = trainer.model, []
    model.train()
    for _ in range(3):  # at first libraries choose their kernels
        start = now()
        for part in trainer.learnt:
            new = part["completion_ids"].shape[1]
            ids = torch.cat([part["prompt_ids"], part["completion_ids"]], 1)
            seen = torch.cat([part["prompt_mask"], part["completion_mask"]], 1)
            spoken = (part["tool_mask"] * part["completion_mask"]).bool()
            labels = torch.full_like(ids, -100)
            labels[:, -new:][spoken] = part["completion_ids"][spoken]
            with trainer.compute_loss_context_manager():
                loss = model(input_ids=ids, attention_mask=seen, labels=labels).loss
            trainer.accelerator.backward(loss)
        model.zero_grad()
        seconds.append(now() - start)
    return min(seconds)


parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
)
parser.add_argument("--episodes", type=int, default=128, help="of one step")
parser.add_argument("--micro-batch", type=int, nargs="+", default=[64])
parser.add_argument("--group", type=int, default=8)
parser.add_argument("--steps", type=int, default=10)
parser.add_argument("--turn-tokens", type=int, default=16)
parser.add_argument("--lora-rank", type=int, default=32)
parser.add_argument("--model", help="None: the adapter's, or the tiny doctor")
parser.add_argument("--adapter", help="a saved adapter to start from")
parser.add_argument("--no-4bit", action="store_true", help="weights as they are stored")
parser.add_argument("--checkpointing", action="store_true", help="saves memory")
parser.add_argument("--kl", type=float, default=0.0)
parser.add_argument("--learning-rate", type=float, default=1e-4)
parser.add_argument("--seed", type=int, default=0)
args = parser.parse_args()

bank = gx.load_bank()
train, _ = gx.split_bank(bank)
school = gx.Bank([bank[n] for n in train], bank.lexicon)
tiny = None if args.adapter else str(gx.DATA / "tiny_doctor")
model, tokenizer = one.load_doctor(
    args.model or tiny,
    adapter=args.adapter,
    lora_rank=args.lora_rank,
    load_in_4bit=False if args.no_4bit else None,
    seed=args.seed,
)
one.FastLanguageModel.for_training(model, use_gradient_checkpointing=args.checkpointing)
chat = three.ChatTokens(tokenizer)
plain_rollout = four.make_rollout(school, chat)
cases = gx.sample_cases(
    train, (args.steps + 1) * args.episodes // args.group, args.seed
)
on_gpu = torch.cuda.is_available()
idle = peak_mib()


def rollout(prompts, trainer):
    start = now()
    out = plain_rollout(prompts, trainer)
    spent["generation"] += now() - start
    rollout.episodes = plain_rollout.episodes
    return out


def make_trainer(folder, micro):
    trainer = Timed(
        model=model,
        processing_class=tokenizer,
        args=GRPOConfig(
            output_dir=folder,
            max_steps=args.steps + 1,
            save_strategy="no",
            per_device_train_batch_size=micro,
            gradient_accumulation_steps=args.episodes // micro,
            gradient_checkpointing=args.checkpointing,
            num_generations=args.group,
            max_completion_length=1024,
            learning_rate=args.learning_rate,
            loss_type="dr_grpo",
            scale_rewards="none",
            beta=args.kl,
            report_to="none",
            disable_tqdm=True,
            logging_steps=1000,
            seed=args.seed,
            **({} if on_gpu else dict(use_cpu=True, bf16=False)),
        ),
        train_dataset=Dataset.from_dict({"prompt": cases}),
        reward_funcs=[gx.reward_correct, gx.reward_repeats, gx.reward_no_diagnosis],
        rollout_func=rollout,
        callbacks=[Stopwatch()],
    )
    trainer.credit = four.make_credit(args.group)
    if args.kl and "ref" not in model.peft_config:
        four.add_reference(model)
    trainer.generation_config.max_new_tokens = args.turn_tokens
    return trainer


results = {}
for micro in args.micro_batch:
    spent = Counter()
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(folder, min(micro, args.episodes))
        trainer.train()
    parts = {
        k: spent[k] / args.steps for k in ("generation", "scoring", "learning", "total")
    }
    parts["rest"] = parts["total"] - sum(
        parts[k] for k in ("generation", "scoring", "learning")
    )
    parts["plain"] = plain_pass(trainer)
    print(f"{args.episodes} episodes a step, {micro} learnt from at once:")
    for name in ("generation", "scoring", "learning", "rest", "total", "plain"):
        print(f"{name:11}{parts[name]:7.3f} s  {parts[name] / parts['total']:6.1%}")
    print(f"learning / plain: {parts['learning'] / parts['plain']:.2f}", flush=True)
    results[micro] = {name: round(s, 4) for name, s in parts.items()}
    results[micro]["peak_mib_more"] = round(peak_mib() - idle)
result = {
    "bench": "grpo_step",
    "machine": one.device_line(),
    "episodes": args.episodes,
    "seconds_per_step": results,
    "arguments": vars(args),
}
print(json.dumps(result))
