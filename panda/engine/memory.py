"""Whether there is room for a model, as far as that is certain beforehand; and what to do where no memory is left."""

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
"""What a container may use, as the two versions of Linux' control groups have it."""


def refuse_without_room(
    parameters: int, options: RunOptions, config: dict[str, Any], device: torch.device, *, world_size: int, drawn: bool
) -> None:
    """Raise UserError where ``parameters`` weights alone are more than all the memory that they are to be in.

    That is the memory of ``device``, spread over ``world_size`` ranks as ``config`` tells DeepSpeed; and before that,
    where they are ``drawn`` all at once, the host's: each rank draws them in fp32. Gradients, optimizer state and
    activations are not counted: what is refused cannot work, and what is not may still run out of memory.
    """
    zero = config["zero_optimization"]
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)  # torchrun, deepspeed
    bits = options.quant_bits if options.use_quant else 32 if options.precision == "fp32" else 16
    share = parameters * bits // 8 // (options.tensor_parallel_size * (world_size if zero["stage"] == 3 else 1))
    instead = "Take a smaller arch" + ("" if options.use_quant else ", `use_quant` for 4 bits")
    instead += ", or `zero_stage: 3` on more ranks"
    if device.type == "cpu":
        _refuse(parameters, bits, share * ranks_here, _host_memory(), "this machine has", instead)
    elif "offload_param" not in zero:
        room = torch.cuda.get_device_properties(device).total_memory
        _refuse(parameters, bits, share, room, f"{device} has", instead)
    if drawn:
        has = f"this machine, on which {ranks_here} rank(s) draw them, has"
        instead = "Models of transformers are drawn one layer at a time. With `ckpt_path` nothing is drawn"
        _refuse(parameters, 32, 4 * parameters * ranks_here, _host_memory(), has, instead)


@contextmanager
def explaining_lack_of_memory() -> Iterator[None]:
    """Adds to the error of a GPU without memory left what to do about it."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        error.add_note(
            "The GPU has no memory left. What makes a step smaller, by what it costs: a smaller"
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
    """Bytes of memory of this machine, or of the container that this process is in."""
    sizes = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for file in _LIMITS:
        text = file.read_text().strip() if file.exists() else ""
        sizes += [int(text)] if text.isdigit() else []
    return min(sizes)
