"""Out of panda: a folder that plain transformers loads, or safetensors for a model of another kind."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from panda.registry.contexts import ModelContext
from panda.registry.resolve import Chosen


def export(
    module: torch.nn.Module,
    weights: dict[str, torch.Tensor],
    folder: Path,
    tokenizer: Any,
    model: Chosen,
    context: ModelContext,
) -> None:
    """Write ``weights`` (whole tensors on the CPU) of ``module`` and its tokenizer to ``folder``.

    A transformers model becomes a Hugging Face folder. Any other becomes ``model.safetensors`` and
    a ``config.json`` with all that the factory of ``model`` was given to make it.
    """
    from transformers import PreTrainedModel

    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(folder)
    if isinstance(module, PreTrainedModel):
        from transformers.utils import logging

        logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        use_cache, module.config.use_cache = module.config.use_cache, True
        module.config.dtype = next(iter(weights.values())).dtype
        module.save_pretrained(folder, state_dict=weights)
        module.config.use_cache = use_cache
    else:
        _save_other(weights, folder, model, context)
    mask = os.umask(0)
    os.umask(mask)
    for file in folder.iterdir():  # safetensors lets nobody else read what it writes, whatever the umask
        file.chmod(0o666 & ~mask)


def _save_other(weights: dict[str, torch.Tensor], folder: Path, model: Chosen, context: ModelContext) -> None:

    from safetensors.torch import save_file

    unshared: dict[int, str] = {}
    for name, tensor in weights.items():
        unshared.setdefault(tensor.data_ptr(), name)
    save_file({name: weights[name].contiguous() for name in unshared.values()}, folder / "model.safetensors")
    described = {
        "panda_model": model.offer.qualified,
        "panda_version": model.offer.version,
        "options": asdict(model.options),
        "context": asdict(context),
        "shared_tensors": {
            name: unshared[t.data_ptr()] for name, t in weights.items() if name not in unshared.values()
        },
    }
    (folder / "config.json").write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
