"""Whether a model fits into memory, as far as that is certain in advance; and advice for when memory runs out."""

from __future__ import annotations

import os
from collections.abc import Callable
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from panda.configuration.launcher import processes_here
from panda.configuration.options import RunOptions
from panda.engine.memory_parts import MemoryParts
from panda.engine.memory_parts import gib
from panda.registry import UserError

_LIMITS = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes")
"""Where the two versions of Linux control groups state the memory that a container may use."""


def refuse_without_room(
    parameters: int,
    parts: MemoryParts,
    options: RunOptions,
    device: torch.device,
    *,
    drawn: bool,
    quantisable: bool = True,
    advice: Callable[[], str] = str,
) -> None:
    """Raise UserError if what a run certainly holds exceeds the memory that it has to fit into.

    On a GPU these are the standing ``parts``: weights, fp32 masters, optimizer states and sums of gradients. On a CPU
    they are the weights of all ranks here. Weights that are ``drawn`` all at once, ``parameters`` of them, also have to
    fit into the host's memory first: each rank draws them in fp32. Activations are not counted: a run that is refused
    cannot work, and one that is not may still run out of memory. What to change is said: on a GPU by ``advice()``, and
    on a CPU with `use_quant` only where the model is ``quantisable``.
    """
    ranks_here = processes_here()
    if device.type == "cpu":
        bits = options.quant_bits if options.use_quant else 32 if options.precision == "fp32" else 16
        instead = "Take a smaller arch" + ("" if options.use_quant else ", `use_quant` for 4 bits" * quantisable)
        instead += ", or `zero_stage: 3` on more ranks"
        _refuse(parameters, bits, parts.weights * ranks_here, "this machine has", instead)
    else:
        room = torch.cuda.get_device_properties(device).total_memory
        if parts.standing > room:
            standing = replace(parts, gradients=0, buffers=0)
            raise UserError(
                f"the model has {parameters:,} weights, for which each GPU would hold {gib(parts.standing)} GiB before"
                f" any activation ({standing.describe()}), and {device} has {gib(room)} GiB in all. {advice()}"
            )
    if drawn:
        has = f"this machine, on which {ranks_here} rank(s) draw them, has"
        instead = "Models of transformers are drawn one layer at a time. With `ckpt_path` nothing is drawn"
        _refuse(parameters, 32, 4 * parameters * ranks_here, has, instead)


@contextmanager
def explaining_lack_of_memory(explain: Callable[[], str]) -> Iterator[None]:
    """Add ``explain()`` to the error that torch raises when a GPU is out of memory."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        try:
            error.add_note(explain())
        except Exception as problem:  # the run's own error matters more
            error.add_note(f"The GPU is out of memory; what it holds cannot be estimated: {problem!r}.")
        raise


def _refuse(parameters: int, bits: int, need: int, has: str, instead: str) -> None:
    room = _host_memory()
    if need > room:
        raise UserError(
            f"the model has {parameters:,} weights, which take {need / 1e9:,.1f} GB in {bits} bits, and {has}"
            f" {room / 1e9:,.1f} GB in all. {instead}."
        )


def _host_memory() -> int:
    """Bytes of memory of this machine, or of the container that this process runs in."""
    sizes = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for file in _LIMITS:
        text = file.read_text().strip() if file.exists() else ""
        sizes += [int(text)] if text.isdigit() else []
    return min(sizes)
