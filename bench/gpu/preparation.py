"""What a run needs before it is timed: its checkpoint, panda's token cache, and the peer's copy of the samples.

Runs in a process of its own, so that the bench itself holds no memory of the device:

    python -m bench.gpu.preparation JOBS.json
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from bench.gpu.cases import SHAPES


def main() -> None:
    for job in json.loads(Path(sys.argv[1]).read_text()):
        begun = time.perf_counter()
        made = {"checkpoint": make_checkpoint, "samples": make_samples}[job.pop("make")](**job)
        print(f"{made}: {time.perf_counter() - begun:.1f} s", flush=True)


def make_checkpoint(shape: str, folder: str) -> str:
    from bench.gpu.checkpoint import make_checkpoint

    make_checkpoint(SHAPES[shape], Path(folder))
    return folder


def make_samples(argv: list[str], ranks: int, file: str) -> str:
    """The samples of a run of panda with ``argv`` in the order of its steps; fills the token cache on the way."""
    import numpy as np

    from panda.configuration.arguments import parse_arguments
    from panda.configuration.configure import configure
    from panda.run.assembly import lay_out
    from panda.run.preparation import Preparation

    prepared = Preparation(configure(parse_arguments(argv)))
    layout = lay_out(prepared.options, prepared.dataset, ranks)
    steps = range(1, layout.plan.total_steps + 1)
    taken = [prepared.dataset[int(s)] for step in steps for s in layout.order.samples(layout.plan.positions(step))]
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    partial = Path(file + ".partial.npz")
    arrays: dict[str, Any] = {
        "ids": np.concatenate([sample["token_ids"] for sample in taken]).astype(np.int32),
        "supervised": np.concatenate([sample["supervised"] for sample in taken]).astype(bool),
        "ends": np.cumsum([len(sample["token_ids"]) for sample in taken]),
    }
    np.savez(partial, **arrays)
    facts = {"samples": len(taken), "tokens": len(arrays["ids"]), "supervised": int(arrays["supervised"].sum())}
    Path(file).with_suffix(".json").write_text(json.dumps(facts))
    partial.rename(file)
    return f"{file}: {facts}"


if __name__ == "__main__":
    main()
