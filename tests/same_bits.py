"""Compares checkpoints by what they hold: files whose bytes differ may hold the same tensors and values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from panda.engine.checkpoints.manifest import read_manifest
from panda.engine.checkpoints.reading import load_plain


def different(found: Path, expected: Path) -> str | None:
    """The first part of the checkpoint ``found`` that is not that of ``expected``, to the bit; None for none."""
    manifests = [read_manifest(each) for each in (found, expected)]
    for part in ("progress", "agreement", "passing"):
        if getattr(manifests[0], part) != getattr(manifests[1], part):
            return part
    if manifests[0].files.keys() != manifests[1].files.keys():
        return "files"
    for name, written in manifests[1].files.items():
        if manifests[0].files[name].sha256 == written.sha256:
            continue
        if problem := _different_file(found / name, expected / name):
            return f"{name}{problem}"
    return None


def _different_file(found: Path, expected: Path) -> str | None:
    if found.suffix == ".safetensors":  # whose metadata come in any order
        from safetensors import safe_open

        contents = [
            {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118 - not a mapping
            | {"metadata": sorted((opened.metadata() or {}).items())}
            for opened in (safe_open(file, "pt") for file in (found, expected))
        ]
    elif found.suffix == ".pt":  # which say the same object twice, or once and where
        import deepspeed  # noqa: F401 - whose classes are in them

        contents = [load_plain(file) for file in (found, expected)]
    else:
        return " "
    return _different_value(*contents, "")


def _different_value(found: Any, expected: Any, place: str) -> str | None:
    if type(found) is not type(expected):
        return f"{place}: {type(found).__name__}, not {type(expected).__name__}"
    if isinstance(expected, torch.Tensor):
        same = found.dtype == expected.dtype and found.shape == expected.shape and _bits(found).equal(_bits(expected))
        return None if same else f"{place}: other bits"
    if isinstance(expected, dict):
        if list(found) != list(expected):
            return f"{place}: {list(found)}, not {list(expected)}"
        items: Any = expected.items()
    elif isinstance(expected, (list, tuple)):
        if len(found) != len(expected):
            return f"{place}: {len(found)} values, not {len(expected)}"
        items = enumerate(expected)
    elif hasattr(expected, "__dict__") and not isinstance(expected, type) and type(expected).__eq__ is object.__eq__:
        return _different_value(vars(found), vars(expected), f"{place}.{type(expected).__name__}")
    else:
        return None if found == expected or found is expected else f"{place}: {found!r}, not {expected!r}"
    return next(
        (problem for key, value in items if (problem := _different_value(found[key], value, f"{place}[{key!r}]"))), None
    )


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8) if tensor.dim() or tensor.numel() else tensor
