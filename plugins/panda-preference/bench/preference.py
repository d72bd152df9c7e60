"""Fine-tunes a model on worked answers, and then prefers right ones to wrong ones: does it, on pairs held out?

    python bench/preference.py --model MODEL --data gsm8k.json --work /tmp/preference
    python bench/preference.py --model MODEL --data gsm8k.json --work /tmp/preference --seeds 1 --sft_steps 8 \
      --dpo_steps 10 --batch 4 --micro_batch 2 --max_seq_length 256 --held_out 24 --dpo_rate 2e-5   # on a CPU

Run it in an environment with panda and panda-preference; it takes the GPU if there is one. MODEL is a checkpoint as
`--ckpt_path` takes it. The data is a JSON array of {"input", "target"}; a target is a worked answer in which
``<<48/2=24>>`` writes a computation down, and whose last line is ``#### 72``: GSM8K's form. A wrong answer is the right
one with the result of one computation changed, there and wherever it is used.

Of each seed: `instruct` on some rows (SFT), from MODEL; then `dpo` on pairs of other rows, from what that left. The
table has the held-out pairs' log-probabilities, chosen less rejected, and which share of pairs is in the right order,
of MODEL's fine-tuned form (before) and after DPO; and the reward margin, which is 0 before, since the reference is that
form. Seeds draw other rows, other wrong answers, and another order.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import re
import statistics
import subprocess
import sys
from datetime import UTC
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from panda.hooks.metrics import read_evaluations
from panda.hooks.metrics import read_metrics

COMPUTED = re.compile(r"<<[^<>]*=(-?\d+(?:\.\d+)?)>>")
NO_PICTURES = ["-p", "no:plot", "-p", "no:tensorboard"]


def wrong(answer: str, rng: random.Random) -> str | None:
    """``answer`` with the result of one computation changed from there on; None where it has no whole number to change.

    The wrong one is near: a unit or a tenth off, or with two digits swapped.
    """
    found = [match for match in COMPUTED.finditer(answer) if match[1].isdecimal()]
    if not found:
        return None
    match = rng.choice(found)
    right = int(match[1])
    near = {right + 1, right - 1, right + 10, max(1, right * 11 // 10), int(str(right)[::-1])} - {right}
    other = str(rng.choice(sorted(each for each in near if each >= 0)))
    start = match.start(1)
    rest = re.sub(rf"(?<![\d.]){right}(?!\.?\d)", other, answer[start:])
    return answer[:start] + rest


def make_data(rows: list[dict[str, str]], folder: Path, seed: int, counts: argparse.Namespace) -> None:
    """Write rows to fine-tune on, pairs to train on, and pairs held out: of different rows."""
    rng = random.Random(seed)
    drawn = rng.sample(rows, len(rows))
    sft, rest = drawn[: counts.sft_rows], drawn[counts.sft_rows :]
    pairs = [
        {"prompt": row["input"], "chosen": row["target"], "rejected": other}
        for row in rest
        if (other := wrong(row["target"], rng)) is not None
    ][: counts.pairs + counts.held_out]
    if len(pairs) < counts.pairs + counts.held_out:
        sys.exit(f"the data has {len(rows):,} rows, too few for {counts.sft_rows} and {counts.pairs + counts.held_out}")
    for name, lines in {
        "sft": sft,
        "pairs": pairs[: counts.pairs],
        "held-out": pairs[counts.pairs :],
    }.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / name / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def train(folder: Path, name: str, options: dict[str, Any], flags: list[str]) -> Path:
    """Train; the run directory."""
    run = folder / name
    words = [word for key, value in (options | {"output_dir": run}).items() for word in (f"--{key}", str(value))]
    command = [str(Path(sys.executable).with_name("panda-train")), *words, *NO_PICTURES, *flags]
    with open(folder / f"{name}.log", "w") as log:
        done = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT)
    if done.returncode:
        sys.exit(
            f"{' '.join(command)}\nfailed: see {folder / name}.log\n{(folder / f'{name}.log').read_text()[-2000:]}"
        )
    return run


def measure(arguments: argparse.Namespace, seed: int, flags: list[str]) -> dict[str, float]:
    """Fine-tune and prefer, with one seed."""
    folder = arguments.work / f"seed-{seed}"
    make_data(json.loads(arguments.data.read_text()), folder, seed, arguments)
    shared = {
        "max_seq_length": arguments.max_seq_length,
        "per_gpu_train_batch_size": arguments.micro_batch,
        "gradient_accumulation_steps": arguments.batch // arguments.micro_batch,
        "precision": arguments.precision,
        "seed": seed,
        "lr_scheduler": "cosine",
        "warmup_proportion": 0.1,
        "max_grad_norm": 1.0,
    }
    sft = train(
        folder,
        "run-sft",
        shared
        | {
            "task": "instruct",
            "ckpt_path": arguments.model,
            "instruction_tuning_data_dir": folder / "sft",
            "max_steps": arguments.sft_steps,
            "learning_rate": arguments.sft_rate,
        },
        flags,
    )
    dpo = train(
        folder,
        "run-dpo",
        shared
        | {
            "task": "dpo",
            "ckpt_path": sft / "export",
            "preference_data_dir": folder / "pairs",
            "eval_data_dir": folder / "held-out",
            "eval_steps": arguments.eval_steps,
            "max_steps": arguments.dpo_steps,
            "learning_rate": arguments.dpo_rate,
            "beta": arguments.beta,
            "loss_type": arguments.loss_type,
        },
        flags,
    )
    evaluations = read_evaluations(dpo)
    print(f"seed {seed}: {'step':>5} {'margin':>9} {'accuracy':>9} {'loss':>9}")
    for record in evaluations:
        values = (record[f"eval_{name}"] for name in ("rewards/margins", "rewards/accuracies", "loss"))
        print(f"seed {seed}: {record['step']:>5} " + " ".join(f"{value:>9.4f}" for value in values), flush=True)
    last = evaluations[-1]
    after = last["eval_logps/chosen"] - last["eval_logps/rejected"]
    margin = last["eval_rewards/margins"]
    return {
        "sft_loss": read_metrics(sft)[-1]["loss"],
        "before": after - margin / arguments.beta,
        "after": after,
        "margin": margin,
        "accuracy": last["eval_rewards/accuracies"],
    }


def parsed() -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a checkpoint, as panda's ckpt_path")
    parser.add_argument("--data", type=Path, required=True, help="a JSON array of input and target")
    parser.add_argument("--work", type=Path, required=True, help="a folder for data and runs")
    parser.add_argument("--seeds", type=lambda text: [int(each) for each in text.split(",")], default=[1, 2, 3])
    parser.add_argument("--sft_rows", type=int, default=2000)
    parser.add_argument("--pairs", type=int, default=2000)
    parser.add_argument("--held_out", type=int, default=200)
    parser.add_argument("--sft_steps", type=int, default=100)
    parser.add_argument("--dpo_steps", type=int, default=100)
    parser.add_argument("--eval_steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=16, help="samples a step")
    parser.add_argument("--micro_batch", type=int, default=8)
    parser.add_argument("--max_seq_length", type=int, default=512)
    parser.add_argument("--sft_rate", type=float, default=1e-4)
    parser.add_argument("--dpo_rate", type=float, default=5e-6)
    parser.add_argument("--beta", type=float, default=0.1)
    parser.add_argument("--loss_type", default="sigmoid")
    parser.add_argument("--precision", default="fp32")
    return parser.parse_known_args()


def main() -> None:
    arguments, flags = parsed()
    arguments.work.mkdir(parents=True, exist_ok=True)
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("panda-train", "panda-preference", "torch"))
    print(f"{datetime.now(UTC):%Y-%m-%d}, {versions}, {platform.machine()}; {arguments.model}; beta {arguments.beta}")
    found = {seed: measure(arguments, seed, flags) for seed in arguments.seeds}
    columns = ("sft_loss", "before", "after", "margin", "accuracy")
    print("\n| seed | SFT loss | log p chosen - rejected, before | after | reward margin (before: 0) | accuracy |")
    print("|---|---|---|---|---|---|")
    for seed, values in found.items():
        print(f"| {seed} | " + " | ".join(f"{values[column]:.4f}" for column in columns) + " |")
    if len(found) > 1:
        margins = [values["margin"] for values in found.values()]
        print(
            f"\nreward margin: mean {statistics.mean(margins):.4f}, standard deviation {statistics.stdev(margins):.4f}"
        )


if __name__ == "__main__":
    main()
