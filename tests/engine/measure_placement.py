"""Prints what placing weights costs each rank at most: `torchrun --nproc_per_node 2 measure_placement.py STAGE FOLDER`.

The module is eight matrices of 64 MiB, whose weights are in FOLDER. A thread samples the memory of
the process that is not a mapped file.
"""

from __future__ import annotations

import json
import re
import sys
import threading
import time
from pathlib import Path

import torch

from panda.configuration.options import RunOptions
from panda.engine.placement import place
from panda.engine.processes import join_processes
from panda.engine.processes import leave_processes
from panda.models.initialisation.creation import without_weights
from panda.weights.files import safetensors_weights
from panda.weights.matching import matched

SIDE, COUNT = 4096, 8


def anonymous_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"RssAnon:\s+(\d+) kB", status).group(1)) * 1024  # type: ignore[union-attr]


def measure(stage: int, folder: Path) -> None:
    processes = join_processes()
    import deepspeed.runtime.zero  # noqa: F401 - its memory is not that of weights

    with without_weights():
        module = torch.nn.Sequential(*(torch.nn.Linear(SIDE, SIDE, bias=False) for _ in range(COUNT)))
    weights = matched(module, safetensors_weights(folder), source=str(folder))
    config = {
        "train_batch_size": processes.world_size,
        "zero_optimization": {"stage": stage},
    }
    processes.barrier()
    before = peak = anonymous_bytes()
    placed = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not placed.is_set():
            peak = max(peak, anonymous_bytes())
            time.sleep(0.001)

    watcher = threading.Thread(target=watch)
    watcher.start()
    place(module, weights, RunOptions(zero_stage=stage), config, processes)
    placed.set()
    watcher.join()
    kept = anonymous_bytes()  # on a busy machine the watcher may have slept through the last tensor
    print(json.dumps({"rank": processes.rank, "peak": max(peak, kept) - before, "kept": kept - before}), flush=True)
    leave_processes()


if __name__ == "__main__":
    measure(int(sys.argv[1]), Path(sys.argv[2]))
