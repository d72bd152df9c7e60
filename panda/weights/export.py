"""Exports: a folder that plain transformers loads, or safetensors where the model is not one of transformers.

A run describes its model when it begins, in ``model/``: configuration, tokenizer, chat template,
generation config. An export is that description with the weights of any later moment.
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Iterator
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from panda.files.disk_full import writing
from panda.files.locks import held
from panda.files.own import refuse_others
from panda.files.whole import whole
from panda.registry.chosen import Chosen
from panda.registry.contexts import ModelContext
from panda.weights.conversion import as_published
from panda.weights.export_format import FILE
from panda.weights.export_format import FILES
from panda.weights.export_format import read_export_format
from panda.weights.export_format import write_export_format
from panda.weights.files import write_weights
from panda.weights.formats import ADAPTERS
from panda.weights.formats import CONFIG
from panda.weights.generation_config import GENERATION_CONFIG
from panda.weights.generation_config import Decoding
from panda.weights.generation_config import answer_ends
from panda.weights.generation_config import decoding
from panda.weights.generation_config import generation_values
from panda.weights.generation_config import vocabulary_of
from panda.weights.json_object import write_json_object
from panda.weights.model_config import model_config
from panda.weights.parts import PARTS
from panda.weights.pretrained import Pretrained
from panda.weights.run_folders import CARD_MARK
from panda.weights.stored_tensor import Weights
from panda.weights.tokenizers import write_tokenizer

_NAMES = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "README.md", "additional_chat_templates")
"""What exports have that do not say what they have: those of earlier versions."""


CARD = "README.md"


def describe_model(
    folder: Path,
    module: torch.nn.Module,
    dtype: torch.dtype,
    tokenizer: Any,
    *,
    model: Chosen,
    context: ModelContext,
    pretrained: Pretrained | None,
    generation: Decoding,
    parts: Sequence[str] = (),
) -> None:
    """Write to ``folder`` all files of an export except its weights, which will have ``dtype``.

    A model of transformers is described as transformers does it, with what ``pretrained`` says of it; any other by the
    arguments of the factory of ``model``. ``generation``: how it answers. ``parts``: those that the task gave it.
    """
    from transformers import PreTrainedModel

    named = {PARTS: list(parts)} if parts else {}
    folder.mkdir(parents=True, exist_ok=True)
    write_tokenizer(tokenizer, folder)
    write_json_object(folder / GENERATION_CONFIG, generation.written())
    if isinstance(module, PreTrainedModel):
        config = copy.deepcopy(module.config)
        config.update({"use_cache": True, "dtype": dtype, "architectures": [type(module).__name__]})
        _state_ends(config, generation.ends)
        described = model_config(config, pretrained.config if pretrained else None)
        described.pop(PARTS, None)  # of the task that trained the checkpoint
        write_json_object(folder / CONFIG, described | named)
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
    write_json_object(folder / CONFIG, described | named)


def export(description: Path, weights: Weights, folder: Path, card: str = "", *, newest: str | None = None) -> None:
    """Make ``folder`` from the folder ``description`` of a model and its ``weights``, held one file at a time.

    Weights are named and split as those of published checkpoints: a mixture of experts has a tensor for each expert.

    Raises UserError where a weight is not finite or the disk is full; see ``exporting``.
    """
    with exporting(folder, card, newest=newest) as new:
        shutil.copytree(description, new)
        write_weights(as_published(description, weights), new)


@contextmanager
def exporting(folder: Path, card: str = "", *, newest: str | None = None) -> Iterator[Path]:
    """Yields the path of a folder to make, which then becomes ``folder``: see ``whole``.

    ``card`` is its model card, unless ``folder`` already has one that panda did not write, which stays. ``newest``: as
    ``newest_checkpoint`` of its run said before its weights were chosen. The run may have saved others since.
    One process at a time makes it; others wait. Raises UserError where the disk is full, and where ``folder`` holds
    something else than an export.
    """
    refuse_replacing(folder)
    then = "Checkpoints and any earlier export are untouched: `panda export RUN` writes it again."
    file = folder.absolute().with_name(f".{folder.name}.lock")
    with writing(f"{folder}: the export", then):
        file.parent.mkdir(parents=True, exist_ok=True)
        with held(file, waiting=_say_who_exports, removed=True), whole(folder) as new:
            yield new
            write_export_format(new, newest)
            _put_card(card, new, folder)


def refuse_replacing(folder: Path) -> None:
    """Raise UserError where an export cannot become ``folder``, since that holds something else, or files of others."""
    written = read_export_format(folder).get(FILES)
    names = [*written, FILE, CARD] if isinstance(written, list) else _NAMES
    refuse_others(folder, list(map(str, names)), (CONFIG, ADAPTERS), "an export")


def _put_card(card: str, new: Path, before: Path) -> None:
    """Write ``card`` to ``new``, or the card of another author that was in the folder ``before``."""
    own = before / CARD
    if own.is_file() and CARD_MARK not in own.read_text(encoding="utf-8", errors="replace"):
        shutil.copyfile(own, new / CARD)
    elif card:
        (new / CARD).write_text(card, encoding="utf-8")


def _say_who_exports(holder: str) -> None:
    print(f"waiting: {holder} is writing the same export", flush=True)


def decoding_of(module: Any, tokenizer: Any, pretrained: Pretrained | None, taught: list[int]) -> Decoding:
    """How an export of ``module`` answers: as ``pretrained`` says, ending also at the tokens that training ``taught``.

    Raises UserError where the generation config of ``pretrained`` is not a JSON object.
    """
    folders = [checkpoint.folder for checkpoint in (pretrained, pretrained and pretrained.base) if checkpoint]
    contents = generation_values(*folders)
    ends = answer_ends(taught, tokenizer, *contents)
    return decoding(contents[0] if contents else {}, ends, tokenizer, vocabulary_of(module, tokenizer))


def _state_ends(config: Any, ends: list[int]) -> None:
    """Let ``config`` name the ends, since a class of it names one of its own (LLaMA's is 2) where none is stated."""
    try:
        config.update({"eos_token_id": ends[0] if len(ends) == 1 else ends or None})
    # Of 802 classes of transformers 5.23 (2026-11), 13 take one end only, by a check of huggingface_hub.
    except Exception:
        config.update({"eos_token_id": ends[0]})
