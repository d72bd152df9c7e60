"""Facts of the machine and of this environment on which runs depend. Imports no torch."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import panda
from panda.installation.findings import Finding
from panda.registry import UserError
from panda.registry.location import expanded

SHOWN = ("torch", "transformers", "deepspeed", "peft", "triton", "bitsandbytes")
GPUS = Path("/proc/driver/nvidia/gpus")
LITTLE_DISK = 2 << 30
"""Bytes; a checkpoint of a small model has less."""


def facts() -> Iterator[str]:
    """Lines that say what there is."""
    yield f"panda {panda.__version__} at {Path(panda.__file__).parent}"
    yield f"Python {platform.python_version()} at {sys.executable}, {platform.system()} {platform.machine()}"
    versions = []
    for name in SHOWN:
        try:
            versions.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            versions.append(f"no {name}")
    yield ", ".join(versions)
    gpus = sorted(GPUS.glob("*"))
    yield f"{os.cpu_count()} CPU cores; {len(gpus)} NVIDIA GPUs with a driver"


def examine_machine() -> list[Finding]:
    """What is wrong with this environment."""
    found = []
    gpus = any(GPUS.glob("*"))
    try:
        torch = importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        torch = ""
    if gpus and torch.endswith("+cpu"):
        problem = "this torch is built for CPUs, and the machine has an NVIDIA GPU"
        found.append(Finding(f"torch {torch}", problem, "Install a torch with CUDA: https://pytorch.org/get-started."))
    return [*found, *_folders()]


def _folders() -> Iterator[Finding]:
    if not os.path.isdir(os.path.expanduser("~")):
        yield Finding(
            f"HOME is {os.environ.get('HOME')!r}",
            "which is no folder: caches of panda, of the hub and of compilers go there",
            "Set HOME, or PANDA_CACHE and HF_HOME, to a folder that is yours.",
            is_broken=False,
        )
    used = {"TMPDIR (temporary files)": Path(tempfile.gettempdir())}
    cache = "PANDA_CACHE (the token cache)"
    try:
        used[cache] = expanded(os.environ.get("PANDA_CACHE") or "~/.cache/panda")
    except UserError as problem:
        yield Finding(cache, str(problem), "Set PANDA_CACHE to a folder that is yours.")
    for name, folder in used.items():
        existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
        if not (existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)):
            yield Finding(
                f"{name}: {folder}",
                f"it cannot be written: {existing} is {'not yours to write' if existing.is_dir() else 'no folder'}",
                f"Set {name.partition(' ')[0]} to a folder that is.",
            )
        elif (free := shutil.disk_usage(existing).free) < LITTLE_DISK:
            yield Finding(
                f"{name}: {folder}",
                f"{free / 2**30:.1f} GiB are free there",
                "Make room: runs write tokenised data and checkpoints.",
                is_broken=False,
            )
