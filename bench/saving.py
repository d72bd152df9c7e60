"""How long a save holds the steps of a run, and what it spends that on.

    python bench/saving.py [--ckpt_path FOLDER] [--zero_stage 0] [--folder /a/disk] [--saves 5]

Trains llama-tiny, or the model in FOLDER, on the sample data for a step a save. Prints for each save its megabytes, its
milliseconds, and those of each part: serialising (torch.save, and the state that DeepSpeed collects, with the copies
from a GPU), hashing, writing into the page cache, syncing to the disk, removing the older checkpoint.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import panda
from panda.engine.checkpoints import hashing
from panda.engine.checkpoints import in_use
from panda.engine.checkpoints import writing
from panda.files import whole
from panda.run import loop

PARTS = ("hashing", "writing", "syncing", "removing")
spent: dict[str, list[float]] = defaultdict(list)
"""Seconds of each call, by part."""


def timed(function: Callable[..., Any], part: str) -> Callable[..., Any]:
    def called(*arguments: Any, **named: Any) -> Any:
        begun = time.perf_counter()
        try:
            return function(*arguments, **named)
        finally:
            spent[part].append(time.perf_counter() - begun)

    return called


class TimedDigest:
    """A sha256 that is timed."""

    def __init__(self) -> None:
        self.digest = hashing.hashlib.sha256()
        self.update, self.hexdigest = timed(self.digest.update, "hashing"), self.digest.hexdigest


class TimedHashed(hashing._Hashed):
    """A file that is hashed and written, in turn."""

    def __init__(self, file: Any) -> None:
        super().__init__(file)
        self.digest: Any = TimedDigest()
        self.file = type("File", (), {"write": staticmethod(timed(file.write, "writing")), "flush": file.flush})()


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt_path", type=Path)
    parser.add_argument("--zero_stage", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="on the disk to be measured; by default that of TMPDIR")
    parser.add_argument("--saves", type=int, default=5)
    given = parser.parse_args(argv)
    whole.sync = writing.sync = timed(whole.sync, "syncing")
    in_use.remove = timed(in_use.remove, "removing")
    hashing._Hashed = TimedHashed  # type: ignore[misc]
    rows: list[list[float]] = []
    saved: list[Path] = []

    def save(*arguments: Any, **named: Any) -> Path:
        spent.clear()
        saved.append(timed(writing.save_checkpoint, "all")(*arguments, **named))
        return saved[-1]

    def finish(*arguments: Any, **named: Any) -> None:
        timed(writing.finish_save, "all")(*arguments, **named)
        size = sum(file.stat().st_size for file in saved[-1].rglob("*") if file.is_file())
        total, *parts = (sum(spent[part]) for part in ("all", *PARTS))
        rows.append([size / 1e6, *(1000 * each for each in (total, total - sum(parts), *parts))])

    loop.save_checkpoint, loop.finish_save = save, finish
    model = {"model": "hf", "ckpt_path": given.ckpt_path} if given.ckpt_path else {"arch": "llama-tiny"}
    folder = Path(tempfile.mkdtemp(dir=given.folder))
    try:
        panda.train(
            task="instruct",
            instruction_tuning_data_dir="panda:data/sample/instruct",
            **model,
            zero_stage=given.zero_stage,
            max_seq_length=32,
            max_steps=given.saves,
            gradient_accumulation_steps=1,
            per_gpu_train_batch_size=1,
            save_steps=1,
            save_total_limit=1,
            output_dir=folder / "run",
        )
    finally:
        shutil.rmtree(folder)
    print("\n| save | MB | all | serialising | " + " | ".join(PARTS) + " |\n" + "|---" * (len(PARTS) + 4) + "|")
    for number, row in enumerate([*rows, [statistics.median(column) for column in zip(*rows, strict=True)]], 1):
        print(f"| {number if number <= len(rows) else 'median'} | " + " | ".join(f"{each:,.1f}" for each in row) + " |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
