"""Whether a model fits into memory, as far as that is certain in advance; and advice for when memory runs out."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from panda.configuration.options import RunOptions
from panda.registry import UserError

_LIMITS = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes")
"""Where the two versions of Linux control groups state the memory that a container may use."""


def refuse_without_room(
    parameters: int, options: RunOptions, config: dict[str, Any], device: torch.device, *, world_size: int, drawn: bool
) -> None:
    """Raise UserError if the ``parameters`` weights by themselves exceed the memory that they have to fit into.

    That is the memory of ``device``, with the weights spread over ``world_size`` ranks as ``options`` say, unless
    ``config`` tells DeepSpeed to offload them. Weights that are ``drawn`` all at once also have to fit into the host's
    memory first: each rank draws them in fp32. Gradients, optimizer state and activations are not counted: a run
    that is refused cannot work, and one that is not may still run out of memory.
    """
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)  # torchrun, deepspeed
    bits = options.quant_bits if options.use_quant else 32 if options.precision == "fp32" else 16
    share = parameters * bits // 8 // (options.tensor_parallel_size * (world_size if options.zero == 3 else 1))
    instead = "Take a smaller arch" + ("" if options.use_quant else ", `use_quant` for 4 bits")
    instead += ", or `zero_stage: 3` on more ranks"
    if device.type == "cpu":
        _refuse(parameters, bits, share * ranks_here, _host_memory(), "this machine has", instead)
    elif "offload_param" not in config["zero_optimization"]:
        room = torch.cuda.get_device_properties(device).total_memory
        _refuse(parameters, bits, share, room, f"{device} has", instead)
    if drawn:
        has = f"this machine, on which {ranks_here} rank(s) draw them, has"
        instead = "Models of transformers are drawn one layer at a time. With `ckpt_path` nothing is drawn"
        _refuse(parameters, 32, 4 * parameters * ranks_here, _host_memory(), has, instead)


@contextmanager
def explaining_lack_of_memory() -> Iterator[None]:
    """Add advice to the error that torch raises when a GPU is out of memory."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        error.add_note(
            "The GPU is out of memory. What makes a step smaller, the cheapest first: a smaller"
            " `per_gpu_train_batch_size` with more `gradient_accumulation_steps` (the same trajectory),"
            " `activation_checkpointing: selective` or `full`, `zero_stage: 2` or `3` on more ranks, a shorter"
            " `max_seq_length`, `use_lora`, `use_quant`. docs/memory.md says what each does."
        )
        raise


def _refuse(parameters: int, bits: int, need: int, room: int, has: str, instead: str) -> None:
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
