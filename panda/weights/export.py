"""Exports: a folder that plain transformers loads, or safetensors where the model is not one of transformers.

A run describes its model when it begins, in ``model/``: configuration, tokenizer, chat template,
generation config. An export is that description with the weights of any later moment.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from panda.files.disk_full import writing
from panda.files.whole import whole
from panda.registry.contexts import ModelContext
from panda.registry.resolve import Chosen
from panda.weights.conversion import as_published
from panda.weights.files import write_weights
from panda.weights.pretrained import Pretrained
from panda.weights.stored_tensor import Weights


def describe_model(
    folder: Path,
    module: torch.nn.Module,
    dtype: torch.dtype,
    tokenizer: Any,
    *,
    model: Chosen,
    context: ModelContext,
    pretrained: Pretrained | None,
) -> None:
    """Write to ``folder`` all files of an export except its weights, which will have ``dtype``.

    A model of transformers is described as transformers does it; any other by the arguments of the factory of
    ``model``.
    """
    from transformers import PreTrainedModel

    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(folder)
    if isinstance(module, PreTrainedModel):
        config = copy.deepcopy(module.config)
        config.update({"use_cache": True, "dtype": dtype, "architectures": [type(module).__name__]})
        config.save_pretrained(folder)
        _write_json(folder / "generation_config.json", _generation_config(module, tokenizer, pretrained))
        return
    # If there are adapters: the base, by the names that it has without them.
    state = {
        name.replace(".base_layer.", "."): tensor
        for name, tensor in module.state_dict(keep_vars=True).items()
        if ".lora_" not in name
    }
    first: dict[int, str] = {}
    for name, tensor in state.items():
        first.setdefault(id(tensor), name)
    described = {
        "panda_model": model.offer.qualified,
        "panda_version": model.offer.version,
        "options": asdict(model.options),
        "context": asdict(context),
        "shared_tensors": {name: first[id(t)] for name, t in state.items() if first[id(t)] != name},
    }
    _write_json(folder / "config.json", described)


def export(description: Path, weights: Weights, folder: Path) -> None:
    """Make ``folder`` from the folder ``description`` of a model and its ``weights``, held one file at a time.

    Weights are named and split as those of published checkpoints: a mixture of experts has a tensor for each expert.

    Raises UserError where a weight is not finite or the disk is full; see ``exporting``.
    """
    with exporting(folder) as new:
        shutil.copytree(description, new)
        write_weights(as_published(description, weights), new)


@contextmanager
def exporting(folder: Path) -> Iterator[Path]:
    """Yields the path of a folder to make, which then becomes ``folder``: see ``whole``.

    Raises UserError where the disk is full.
    """
    then = "Checkpoints and any earlier export are untouched: free some space, then run `panda export RUN`."
    with writing(f"{folder}: the export", then), whole(folder) as new:
        yield new


def _generation_config(module: Any, tokenizer: Any, pretrained: Pretrained | None) -> dict[str, Any]:
    """The checkpoint's own generation config, or the model's, ending also at the token that training taught."""
    file = pretrained.folder / "generation_config.json" if pretrained else None
    # Read as JSON: some in use have values that transformers refuses to write (as of 5.23, 2026-11).
    values: dict[str, Any] = (
        json.loads(file.read_text()) if file and file.exists() else module.generation_config.to_diff_dict()
    )
    ends = values.get("eos_token_id") or []
    ends = ends if isinstance(ends, list) else [ends]
    if tokenizer.eos_token_id not in ends:
        ends = [*ends, tokenizer.eos_token_id]
    return values | {"eos_token_id": ends if len(ends) > 1 else ends[0]}


def _write_json(file: Path, content: Any) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
