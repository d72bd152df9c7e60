"""An average of the weights, and frozen weights, through panda's engine, in many configurations of one process group.

torchrun --nproc_per_node 2 tests/engine/other_weights.py CONFIGURATIONS.json OUT

CONFIGURATIONS is as for lamb_steps.py. OUT/NAME.pt is what each came to; test_other_weights.py judges it.
"""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path
from typing import Any

import torch
from lamb_steps import COUNTS
from lamb_steps import groups_of
from lamb_steps import loss_sum
from lamb_steps import make_network
from lamb_steps import micro_batches
from lamb_steps import trained_weights

from panda.configuration.options import RunOptions
from panda.engine.checkpoints.weights_copies import read_copies
from panda.engine.checkpoints.weights_copies import write_copies
from panda.engine.checkpoints.writing import Progress
from panda.engine.checkpoints.writing import load_checkpoint
from panda.engine.checkpoints.writing import save_checkpoint
from panda.engine.deepspeed_config import deepspeed_config
from panda.engine.engine import Engine
from panda.engine.processes import Processes
from panda.engine.processes import join_processes
from panda.engine.processes import leave_processes
from panda.engine.weights_copy import WeightsCopy
from panda.engine.weights_copy import copy_weights
from panda.engine.weights_copy import using

STEPS, USED, SAVED = 6, 3, 4
SHARE = 0.25
FROZEN, UNFROZEN_AT = ["layers.0.*", "embed.*"], 3

Weights = dict[str, torch.Tensor]


def make_engine(processes: Processes, file: Path, configuration: dict[str, Any]) -> Engine:
    module = make_network(configuration["network"])
    with torch.no_grad():
        next(module.parameters()).view(-1)[:3] = -0.0  # whose sign must not be lost
    if processes.rank == 0:
        file.write_text(json.dumps(configuration.get("deepspeed", {})))
    processes.barrier()
    options = RunOptions(
        **configuration["options"],
        gradient_accumulation_steps=len(COUNTS) // processes.world_size,
        deepspeed_config=str(file),
    )
    config = deepspeed_config(options, world_size=processes.world_size, on_gpu=False)
    return Engine(module, torch.optim.AdamW(groups_of(module), eps=1e-4), config, processes)


def step(engine: Engine, number: int) -> float:
    ranks = engine.processes
    return engine.step(micro_batches(number, ranks.rank, ranks.world_size), loss_sum).loss.item()


def forward_weights(engine: Engine) -> Weights:
    """The weights of the forward pass; on rank 0."""
    return {name: stored.read() for name, stored in engine.weights(trained_only=True).items()}


def whole(engine: Engine, copied: WeightsCopy) -> Weights:
    """The tensors of all ranks in ``copied``, by parameter."""
    here = [
        (layout.parameters[each.parameter], each.source, tensor.view(-1)[each.start : each.start + each.length].clone())
        for layout, tensor in zip(copied.layouts, copied.tensors, strict=True)
        for each in layout.segments
    ]
    found: Weights = {}
    shapes = {name: stored.shape for name, stored in engine.weights(trained_only=True).items()}
    for pieces in engine.processes.from_all(here):
        for name, source, values in pieces:
            into = found.setdefault(name, torch.full(shapes[name], torch.nan))
            into.view(-1)[source : source + len(values)] = values
    return found


def averaged(processes: Processes, out: Path, name: str, configuration: dict[str, Any]) -> dict[str, Any]:
    """A run with an average, beside one without; the average in use, saved, and loaded in another ZeRO stage."""
    file = out / f"{name}.json"
    engine = make_engine(processes, file, configuration)
    plain = {"losses": [step(engine, number) for number in range(STEPS)], "weights": trained_weights(engine)}
    engine.close()
    engine = make_engine(processes, file, configuration)
    copied = copy_weights(engine)
    masters, losses, found = [trained_weights(engine)], [], dict[str, Any](plain=plain)
    found["first"] = forward_weights(engine)  # with zeros that have a sign
    with using(engine, copied):
        pass
    found["first after"] = forward_weights(engine)
    for number in range(STEPS):
        losses.append(step(engine, number))
        copied.move_towards_trained(SHARE)
        masters.append(trained_weights(engine))
        if number + 1 == USED:
            found["at use"], found["before"] = whole(engine, copied), forward_weights(engine)
            with using(engine, copied):
                found["used"] = forward_weights(engine)
                engine.evaluate(micro_batches(99, processes.rank, processes.world_size), loss_sum)
            found["after"], found["average after"] = forward_weights(engine), whole(engine, copied)
        if number + 1 == SAVED:

            def write(folder: Path) -> None:
                write_copies(engine, {"average": copied}, folder)

            checkpoint = save_checkpoint(engine, out / f"{name}-checkpoints", Progress(SAVED), {}, write=write)
            found["saved"] = whole(engine, copied)
    found |= {"losses": losses, "masters": masters, "average": whole(engine, copied)}
    engine.close()
    options = configuration["options"]
    elsewhere = configuration | {"options": options | {"zero_stage": (options["zero_stage"] + 1) % 4}, "deepspeed": {}}
    for where, other in {"read here": configuration, "read elsewhere": elsewhere}.items():
        engine = make_engine(processes, file, other)
        load_checkpoint(engine, checkpoint)
        found[where] = whole(engine, read_copies(engine, checkpoint, ["average"])["average"])
        engine.close()
    return found


def frozen(processes: Processes, out: Path, name: str, configuration: dict[str, Any]) -> list[tuple[Weights, Weights]]:
    """Masters and weights of the forward pass after each step of a run in which some are frozen for a while."""
    engine = make_engine(processes, out / f"{name}.json", configuration)
    names = engine.freezing.matching(
        [each for each in FROZEN if configuration["network"] == "network" or each[0] == "l"]
    )
    engine.freezing.freeze(names)
    found = [(trained_weights(engine), forward_weights(engine))]
    for number in range(STEPS):
        if number == UNFROZEN_AT:
            engine.freezing.unfreeze(names)
        step(engine, number)
        found.append((trained_weights(engine), forward_weights(engine)))
    engine.close()
    return found


if __name__ == "__main__":
    joined, folder = join_processes(), Path(sys.argv[2])
    gc.freeze()  # as in lamb_steps.py
    for called, given in json.loads(Path(sys.argv[1]).read_text()).items():
        result = averaged(joined, folder, called, given) | {"frozen": frozen(joined, folder, called, given)}
        if joined.rank == 0:
            torch.save(result, folder / f"{called}.pt")
    leave_processes()
