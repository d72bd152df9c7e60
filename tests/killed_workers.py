"""Kills a process that prepares batches at a random moment, many times, and counts what comes of it.

python tests/killed_workers.py --times 100

Anything but panda's message is counted by its name; ``hung`` are those that took longer than a minute.
"""

from __future__ import annotations

import argparse
import collections
import multiprocessing
import os
import random
import signal
import threading
import time
from functools import partial
from typing import Any

import numpy as np

from panda.data.batches import Batch
from panda.data.batches import RowShape
from panda.data.batches import token_batch
from panda.data.loading import step_batches
from panda.data.order import BatchPlan
from panda.data.order import SampleOrder
from panda.data.packing import Layout
from panda.data.token_dataset import in_memory
from panda.data.workers import workers_standing
from panda.registry import UserError

TOKENS = 60_000
"""In a row: a batch is then larger than the pipe through which it comes, and a worker can be killed in its middle."""


def collate(rows: list[list[Any]], shape: RowShape) -> Batch:
    return token_batch([[(s["token_ids"], s["supervised"]) for s in row] for row in rows], 0, shape)


def once(seed: int, answer: Any) -> None:
    draw = random.Random(seed)
    tokens = np.arange(TOKENS, dtype=np.int32)
    dataset = in_memory({"token_ids": tokens, "supervised": tokens > 0} for _ in range(8))
    plan = BatchPlan(samples=len(dataset), micro_batch=1, accumulation=1, ranks=1, epochs=500.0)
    layout = Layout(dataset, SampleOrder(dataset.sources, 1), plan, "padded", TOKENS)
    batches = step_batches(layout, collate, rank=0, num_workers=2, prefetch_factor=2, pin_memory=False)
    for _ in range(draw.randrange(1, 4)):
        next(batches)
    pids = [int(words.split()[2]) for words in workers_standing().split("; ")]
    kill = partial(os.kill, draw.choice(pids), signal.SIGKILL)
    threading.Timer(draw.random() * 0.05, kill).start()
    try:
        for _ in batches:
            if draw.random() < 0.3:
                time.sleep(0.002)  # a step
        answer.send("not noticed")
    except UserError as error:
        is_named = "was killed from outside" in str(error) and "SIGKILL" in str(error)
        answer.send("panda's message" if is_named else str(error))
    except BaseException as error:
        answer.send(f"{type(error).__name__}: {error}")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--times", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    forks, counts = multiprocessing.get_context("fork"), collections.Counter[str]()
    for number in range(arguments.times):
        here, there = forks.Pipe(duplex=False)
        process = forks.Process(target=once, args=(arguments.seed + number, there))
        process.start()
        there.close()
        try:
            counts[here.recv() if here.poll(60) else "hung"] += 1
        except EOFError:
            counts["ended without a word"] += 1
        process.join(10)
        if process.exitcode is None:
            counts["did not end"] += 1
            process.kill()
    for outcome, times in counts.most_common():
        print(f"{times:5} {outcome}")


if __name__ == "__main__":
    main()
