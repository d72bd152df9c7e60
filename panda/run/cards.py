"""GPUs: their memory, and how fast they multiply matrices at most. Data."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from panda.engine.memory_parts import GIB
from panda.registry import UserError
from panda.registry.errors import did_you_mean
from panda.registry.errors import in_brief

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Card:
    """A GPU."""

    name: str
    memory: int
    """Bytes that a run can use: those that torch reports, without what other processes hold."""
    peak: float | None = None
    """Dense bf16 operations a second, as published; None where that is not known."""
    held_by_others: int = 0
    """Bytes that other processes hold."""


def _card(name: str, gib: float, tera: float) -> Card:
    return Card(name, round(gib * GIB), tera * 1e12)


CARDS = {
    card.name.lower(): card
    for card in (
        _card("H200", 139.8, 989.4),
        _card("H100", 79.2, 989.4),
        _card("H100-PCIe", 79.2, 756.0),
        _card("H100-NVL", 93.1, 835.0),
        _card("B200", 178.4, 2250.0),
        _card("A100", 79.2, 312.0),
        _card("A100-40", 39.4, 312.0),
        _card("L40S", 44.4, 362.0),
        _card("L4", 22.0, 121.0),
        _card("RTX-4090", 23.5, 165.2),
        _card("RTX-3090", 23.6, 71.0),
    )
}
"""Common cards by name. Speeds are NVIDIA's data sheets', without sparsity; of RTX cards, with fp32 sums."""

COMMON = ("H200", "H100", "A100-40", "RTX-4090")
"""Those that an estimate is compared with where no card is named and this machine has none."""

GPUS = ("/dev/nvidiactl", "/dev/nvidia0", "/dev/kfd", "/dev/dxg")
"""Of which a Linux machine with a GPU has one: NVIDIA's, AMD's, and that of WSL."""

_REPORTED = (
    ("H100 PCIe", "h100-pcie"),
    ("H100 NVL", "h100-nvl"),
    ("H200 NVL", "h100-nvl"),
    ("H200", "h200"),
    ("H100", "h100"),
    ("B200", "b200"),
    ("A100", "a100"),
    ("L40S", "l40s"),
    ("L4", "l4"),
    ("RTX 4090", "rtx-4090"),
    ("RTX 3090", "rtx-3090"),
)
"""What drivers call cards, and the card whose speed it has: the first that a name contains."""


OWN_CONTEXT = GIB
"""What CUDA and its libraries hold of a GPU for this process, at most: torch does not count it."""


def this_card(device: torch.device | int = 0) -> Card:
    """The GPU ``device`` of this machine, with what other processes hold of it now."""
    import torch

    name, total = torch.cuda.get_device_name(device), torch.cuda.get_device_properties(device).total_memory
    free, of_all = torch.cuda.mem_get_info(device)
    held = max(0, of_all - free - torch.cuda.memory_reserved(device) - OWN_CONTEXT)
    return Card(name, total - held, peak_of(name), held)


def has_bf16(device: torch.device) -> bool:
    """Whether ``device`` computes in bf16: NVIDIA GPUs do from compute capability 8.0 on."""
    import torch

    if device.type != "cuda" or torch.version.hip is not None:
        return True
    return torch.cuda.get_device_capability(device) >= (8, 0)


def why_unused() -> str:
    """Why torch cannot use a GPU that this machine seems to have; empty where it has none, or is to use none."""
    import torch

    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1", "none", "NoDevFiles")
    if torch.cuda.is_available() or hidden or not any(map(os.path.exists, GPUS)):
        return ""
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]
    except Exception as problem:  # of an old driver, of a torch for CPUs, ...
        return in_brief(problem)
    return "torch.cuda.is_available() is false"


def peak_of(reported: str) -> float | None:
    """Dense bf16 operations a second of the card that its driver calls ``reported``; None for one not known."""
    words = f" {reported.replace('-', ' ')} "
    if "Laptop" in words or " MIG " in words or words.startswith(" GRID "):
        return None  # slower ones, or a part of one
    for part, card in _REPORTED:
        if f" {part} " in words:
            return CARDS[card].peak
    return None


def named_card(text: str) -> Card:
    """The card called ``text``, or one with as many GiB. Raises UserError for anything else."""
    if text.lower() in CARDS:
        return CARDS[text.lower()]
    try:
        gib = float(text.lower().removesuffix("gib").strip())
    except ValueError:
        gib = 0.0
    if not 0 < gib < 10_000:
        names = ", ".join(card.name for card in CARDS.values())
        hint = did_you_mean(text.lower(), CARDS)
        raise UserError(f"--card: {text!r} is not a card that panda knows ({names}), nor a number of GiB.{hint}")
    return Card(f"{gib:g} GiB", round(gib * GIB))
