"""Out of panda: a folder that plain transformers loads, or safetensors for a model of another kind.

A run describes its model when it begins, in ``model/``: configuration, tokenizer, chat template,
generation config. That and the weights, of whichever moment, are an export.
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

from panda.registry.contexts import ModelContext
from panda.registry.errors import writing
from panda.registry.resolve import Chosen
from panda.weights.files import write_weights
from panda.weights.pretrained import Pretrained
from panda.weights.stored_tensor import Weights

MODEL_FOLDER = "model"
"""In a run directory: the description of its model."""


def describe_model(
    folder: Path,
    module: torch.nn.Module,
    dtype: torch.dtype,
    tokenizer: Any,
    chat_template: str | None,
    model: Chosen,
    context: ModelContext,
    pretrained: Pretrained | None,
) -> None:
    """Write to ``folder`` all of an export but its weights, which will have ``dtype``.

    A transformers model is described as transformers does it; any other by all that the factory of
    ``model`` was given to make it. ``chat_template``: what replaces the tokenizer's, if anything.
    """
    from transformers import PreTrainedModel

    folder.mkdir(parents=True, exist_ok=True)
    if chat_template is not None:
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.chat_template = chat_template
    tokenizer.save_pretrained(folder)
    if isinstance(module, PreTrainedModel):
        config = copy.deepcopy(module.config)
        config.update({"use_cache": True, "dtype": dtype, "architectures": [type(module).__name__]})
        config.save_pretrained(folder)
        _write_json(folder / "generation_config.json", _generation_config(module, tokenizer, pretrained))
        return
    # Of a base under adapters, by the names that it has without them.
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
    """Make ``folder`` of the model that ``description`` describes and its ``weights``, read one shard at a time.

    Raises UserError where the disk is full; see ``replacing``.
    """
    with replacing(folder) as temporary:
        shutil.copytree(description, temporary)
        write_weights(weights, temporary)


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """Yields the path of a folder to make, which then becomes ``folder``.

    What was there before is replaced once the new one is complete; where that fails nothing else is left,
    and where it fails because the disk is full UserError is raised.
    """
    folder = folder.resolve()  # where it is a link, say to a larger disk, it stays one
    temporary = folder.with_name(f".tmp-{folder.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    then = "Checkpoints, and an export that was there, are untouched: make room, and `panda export RUN` writes it."
    with writing(f"{folder}: the export", then):
        try:
            yield temporary
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)  # what is half written may be large, and of no use
            raise
        if folder.exists():
            shutil.rmtree(folder)
        temporary.rename(folder)


def _generation_config(module: Any, tokenizer: Any, pretrained: Pretrained | None) -> dict[str, Any]:
    """The checkpoint's own, or the model's; generation ends at the token that training taught."""
    file = pretrained.folder / "generation_config.json" if pretrained else None
    # As it stands: some that are in use hold values that transformers refuses to write.
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
