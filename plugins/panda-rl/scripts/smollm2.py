"""Train SmolLM2-135M-Instruct to add, by GRPO with a reward that can be verified, over several seeds.

    python scripts/smollm2.py --checkpoint HuggingFaceTB/SmolLM2-135M-Instruct --seeds 1 2 3

Each seed is two runs of panda-train: one that changes nothing, for the reward on held-out sums before, and one of
`--steps` optimizer steps, for that after. The reward is last-number: 1 for an answer whose last number is the sum. It
prints both for each seed, and their means with the standard deviation over the seeds. `--cpu` makes it small enough for
two cores: a few minutes for one seed of 12 steps.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import time
from pathlib import Path
from statistics import mean
from statistics import stdev

from panda.hooks.metrics import read_evaluations
from panda.hooks.metrics import read_metrics

QUESTION = "What is {} + {}? Answer with the number only."
HELD_OUT = 16


def write_data(folder: Path) -> None:
    """Sums of two numbers from 1 to 9, of which some are held out; the same ones for every seed."""
    pairs = [(first, second) for first in range(1, 10) for second in range(1, 10)]
    random.Random(0).shuffle(pairs)
    for name, part in (("held-out", pairs[:HELD_OUT]), ("train", pairs[HELD_OUT:])):
        (folder / name).mkdir(parents=True, exist_ok=True)
        rows = [{"prompt": QUESTION.format(*pair), "answer": str(sum(pair))} for pair in part]
        (folder / name / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def train(folder: Path, name: str, arguments: argparse.Namespace, *flags: str) -> Path:
    """A run with ``flags``; its directory."""
    directory = folder / name
    size = ("--per_gpu_train_batch_size", "2", "--gradient_accumulation_steps", "2", "--num_generations", "6")
    if not arguments.cpu:
        size = ("--per_gpu_train_batch_size", "8", "--gradient_accumulation_steps", "2", "--num_generations", "8")
    common = (
        *("--task", "grpo", "--model", "hf", "--ckpt_path", arguments.checkpoint, "--tokenizer", arguments.checkpoint),
        *("--prompt_data_dir", str(folder / "train"), "--eval_data_dir", str(folder / "held-out")),
        *("--reward", "last-number", "--max_completion_length", "16", "--max_seq_length", "80"),
        *("--lr_scheduler", "constant", "--warmup_steps", "0"),
        *("--max_grad_norm", "1.0", "--per_gpu_eval_batch_size", "4", "--logging_steps", "1", "--num_workers", "0"),
        *("--beta", str(arguments.beta), "--loss_type", arguments.loss_type, "--output_dir", str(directory)),
        *("--save_final", "false", "-p", "no:plot", "-p", "no:tensorboard"),
    )
    command = [str(Path(sys.executable).with_name("panda-train")), *common, *size, *flags]
    with (folder / f"{name}.log").open("w") as log:
        done = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT)
    if done.returncode:
        raise SystemExit((folder / f"{name}.log").read_text()[-3000:] + f"\n{name} failed")
    return directory


def main() -> None:
    """Train and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, help="folder or name on the hub of the model")
    parser.add_argument("--folder", type=Path, default=Path("runs/grpo-smollm2"), help="of data and runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--learning_rate", type=float, default=2e-5)
    parser.add_argument("--beta", type=float, default=0.0)
    parser.add_argument("--loss_type", default="dapo")
    parser.add_argument("--cpu", action="store_true", help="smaller steps")
    arguments, others = parser.parse_known_args()
    write_data(arguments.folder)
    before, after = [], []
    for seed in arguments.seeds:
        begun = time.perf_counter()
        flags = ("--seed", str(seed), *others)
        rate = ("--learning_rate", str(arguments.learning_rate))
        nothing = ("--max_steps", "1", "--learning_rate", "1e-30")
        still = train(arguments.folder, f"before-{seed}", arguments, *flags, *nothing)
        run = train(arguments.folder, f"seed-{seed}", arguments, *flags, *rate, "--max_steps", str(arguments.steps))
        before.append(read_evaluations(still)[-1]["eval_reward"])
        after.append(read_evaluations(run)[-1]["eval_reward"])
        records = read_metrics(run)
        course = " ".join(f"{record['reward']:.2f}" for record in records)
        rate = mean(record["generation/tokens_per_second"] for record in records)
        print(
            f"seed {seed}: reward on held-out sums {before[-1]:.3f} -> {after[-1]:.3f};"
            f" {rate:,.0f} tokens/s generated; {time.perf_counter() - begun:.0f} s\n  in training: {course}",
            flush=True,
        )
    if len(before) > 1:
        print(
            f"over {len(before)} seeds: {mean(before):.3f} (sd {stdev(before):.3f}) ->"
            f" {mean(after):.3f} (sd {stdev(after):.3f})"
        )


if __name__ == "__main__":
    main()
