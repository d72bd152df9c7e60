"""Trains a small LLaMA on real text with nvlamb and with AdamW, at small and large batches, and draws the curves.

    python bench/convergence.py --data DATA --output_dir /tmp/convergence
    python bench/convergence.py --data DATA --epochs 2 --batches 8 --jobs 1     # quicker

Each run is a panda-train process, over the same tokens in the same order and from the same weights; only the
optimizer, the batch size and the peak learning rate differ. Learning rates are about a factor of three apart.
The table has all runs; the picture shows the best of each optimizer at each batch size. Tokens are bytes.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC
from datetime import datetime
from importlib import metadata
from itertools import product
from pathlib import Path

RATES = {"adamw": (3e-4, 1e-3, 3e-3), "nvlamb": (1e-3, 3e-3, 1e-2)}
SEQUENCE = 512
RUN = {
    "arch": "llama-tiny",
    "num_layers": 6,
    "hidden_size": 384,
    "num_heads": 6,
    "intermediate_size": 1024,
    "task": "pretrain",
    "max_seq_length": SEQUENCE,
    "batching": "packed",
    "lr_scheduler": "cosine",
    "warmup_proportion": 0.1,
    "max_grad_norm": 1.0,
    "weight_decay": 0.1,
    "weight_decay_on": "matrices",
}
LAST = 0.05
"""The result of a run is the mean loss over this last fraction of it."""


@dataclass(frozen=True)
class Run:
    optimizer: str
    batch: int
    """Rows of ``SEQUENCE`` tokens a step."""
    rate: float
    folder: Path

    def flags(self, data: Path, epochs: float, micro: int, precision: str) -> list[str]:
        micro = min(micro, self.batch)
        options = RUN | {
            "pretraining_data_dir": data,
            "num_train_epochs": epochs,
            "precision": precision,
            "per_gpu_train_batch_size": micro,
            "gradient_accumulation_steps": self.batch // micro,
            "optimizer": self.optimizer,
            "learning_rate": self.rate,
            "output_dir": self.folder,
        }
        return [part for key, value in options.items() for part in (f"--{key}", str(value))]

    def curve(self) -> tuple[list[int], list[float]]:
        """The tokens seen after each log record, and the losses of the records."""
        tokens, losses, seen = [], [], 0
        for line in (self.folder / "metrics.jsonl").read_text().splitlines():
            record = json.loads(line)
            seen = record["tokens"]
            tokens.append(seen)
            losses.append(record["loss"])
        return tokens, losses

    def result(self) -> float:
        _, losses = self.curve()
        last = losses[-max(1, round(LAST * len(losses))) :]
        return sum(last) / len(last)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="rows of title and content, as panda's pretrain reads")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--batches", type=int, nargs="+", default=[16, 256], help=f"rows of {SEQUENCE} tokens a step")
    parser.add_argument("--micro", type=int, default=64, help="rows that are computed at once, at most")
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--jobs", type=int, default=4, help="runs at the same time")
    arguments = parser.parse_args()
    runs = [
        Run(optimizer, batch, rate, arguments.output_dir / f"{optimizer}-{batch}-{rate:g}")
        for batch, optimizer in product(arguments.batches, RATES)
        for rate in RATES[optimizer]
    ]

    def train(run: Run) -> None:
        begun = time.monotonic()
        flags = run.flags(arguments.data, arguments.epochs, arguments.micro, arguments.precision)
        done = subprocess.run([sys.executable, "-m", "panda.cli.train", *flags], capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{run}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
        print(f"{run.folder.name}: {run.result():.4f}, {time.monotonic() - begun:.0f} s", file=sys.stderr, flush=True)

    with ThreadPoolExecutor(arguments.jobs) as pool:
        list(pool.map(train, runs))
    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("torch", "deepspeed"))
    tokens = runs[0].curve()[0][-1]
    print(f"{datetime.now(UTC):%Y-%m-%d}, {device}, {versions}, {tokens:,} tokens, {arguments.epochs:g} epochs\n")
    print("| tokens a step | steps | optimizer | learning rate | loss at the end |\n|---|---|---|---|---|")
    best = {}
    for run in runs:
        steps = len(run.curve()[0])
        print(f"| {run.batch * SEQUENCE:,} | {steps:,} | {run.optimizer} | {run.rate:g} | {run.result():.4f} |")
        key = (run.batch, run.optimizer)
        best[key] = min(best.get(key, run), run, key=Run.result)
    draw(list(best.values()), arguments.output_dir / "convergence.png")


def draw(runs: list[Run], file: Path) -> None:
    from matplotlib.figure import Figure

    batches = sorted({run.batch for run in runs})
    figure = Figure(figsize=(5 * len(batches), 4), layout="constrained")
    axes = figure.subplots(1, len(batches), sharey=True, squeeze=False)[0]
    for axis, batch in zip(axes, batches, strict=True):
        for run in (run for run in runs if run.batch == batch):
            tokens, losses = run.curve()
            window = max(1, len(losses) // 60)
            smooth = [sum(losses[i : i + window]) / window for i in range(0, len(losses) - window + 1, window)]
            at = [tokens[i + window - 1] / 1e6 for i in range(0, len(losses) - window + 1, window)]
            axis.plot(at, smooth, label=f"{run.optimizer}, {run.rate:g}: {run.result():.3f}")
        axis.set_title(f"{batch * SEQUENCE:,} tokens a step")
        axis.set_xlabel("million tokens")
        axis.legend()
    axes[0].set_ylabel("loss a token")
    axes[0].set_ylim(0.8, 3.5)
    figure.savefig(file, dpi=110)


if __name__ == "__main__":
    main()
