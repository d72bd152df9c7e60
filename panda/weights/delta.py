"""Deltas: what a fine-tune changed, to be added to the base that it started from.

By the rule of PandaLLM and FastChat: ``delta = target - base`` for every tensor except the embedding and the
output, which a delta has **whole**, since a fine-tune may have more entries in its vocabulary than its base.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING
from typing import Any

from panda.files.disk_full import writing
from panda.files.whole import whole
from panda.registry import UserError
from panda.weights.formats import CONFIG
from panda.weights.json_object import read_json_object
from panda.weights.json_object import write_json_object
from panda.weights.model_config import for_all_readers
from panda.weights.tokenizers import TOKENIZER_CONFIG
from panda.weights.tokenizers import write_tokenizer_config

if TYPE_CHECKING:
    import torch

    from panda.weights.pretrained import Pretrained
    from panda.weights.stored_tensor import StoredTensor
    from panda.weights.stored_tensor import Weights

MARK = "delta.json"
"""A file beside the weights that marks them as a delta; a delta without it has a name that ends in ``-delta``."""

IDENTITY = "base_weights"
"""Key in MARK: the identity of the base's weights. Deltas made by other programs lack it."""

WHOLE = ("embed_tokens.weight", "lm_head.weight")
"""How the names of the tensors end that a delta has whole."""


def is_delta(folder: Path, name: str) -> bool:
    """Whether ``folder``, which the user called ``name``, holds a delta."""
    names = (name.rstrip("/").rpartition("/")[2], folder.resolve().name)
    return (folder / MARK).exists() or any(given.lower().endswith("-delta") for given in names)


def check_base(delta: Pretrained, base: Pretrained) -> None:
    """Raise UserError if ``delta`` records another base: with equal shapes the sum would be neither model."""
    file = delta.folder / MARK
    mark = read_json_object(file) if file.exists() else {}
    made_from = mark.get(IDENTITY)
    if isinstance(made_from, str) and base.identity != made_from:
        raise UserError(
            f"{delta.folder}: a delta to another base: {mark.get('base')}, {made_from}, and not {base.folder},"
            f" {base.identity}. Name the folder of the former. The same weights in another format count as another"
            f" base, too: if you are sure that these are the same, remove {IDENTITY!r} from {file}."
        )


def applied(delta: Weights, base: Weights, *, source: str, base_source: str) -> Weights:
    """The fine-tuned tensors: when one is read, it is added in float32 and rounded to the delta's type.

    ``source`` and ``base_source`` are what errors call the two. Raises UserError where ``base`` lacks a tensor
    of ``delta``, or has it in another shape.
    """
    return {
        name: tensor if name.endswith(WHOLE) else _sum(tensor, base[name], 1)
        for name, tensor in _paired(delta, base, source, base_source).items()
    }


def made(target: Weights, base: Weights, *, source: str, base_source: str) -> Weights:
    """The delta of ``target`` to ``base``: the inverse of ``applied``, with the same errors."""
    return {
        name: tensor if name.endswith(WHOLE) else _sum(tensor, base[name], -1)
        for name, tensor in _paired(target, base, source, base_source).items()
    }


def write_delta(target: Pretrained, base: Pretrained, output: Path) -> float:
    """Write the delta of ``target`` to ``base`` to the new folder ``output``.

    Returns the largest absolute error of a weight once the delta is applied again: a delta has the type of
    ``target``, which cannot represent every difference.
    """
    from panda.weights.files import safetensors_weights
    from panda.weights.files import write_weights

    target_weights, base_weights = target.weights(), base.weights()
    sources = {"source": str(target.folder), "base_source": str(base.folder)}
    delta = made(target_weights, base_weights, **sources)
    mark = {"base": str(base.folder), IDENTITY: base.identity, "whole": WHOLE}
    with _writing(output, target) as new:
        write_weights(delta, new)
        (new / MARK).write_text(json.dumps(mark, indent=2) + "\n", encoding="utf-8")
        back = applied(safetensors_weights(new), base_weights, **sources)
        return max(
            float((back[name].read().float() - target_weights[name].read().float()).abs().max()) for name in back
        )


def write_applied(merged: Pretrained, output: Path) -> None:
    """Write ``merged``, a delta with its base, as a whole model to the new folder ``output``."""
    from panda.weights.files import write_weights

    weights = merged.weights()
    with _writing(output, merged) as new:
        write_weights(weights, new)


@contextmanager
def _writing(output: Path, source: Pretrained) -> Iterator[Path]:
    """Yields a folder with ``source``'s configuration and tokenizer, which becomes ``output`` when all is written.

    Raises UserError where ``output`` is not empty, and where the disk is full.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"output: {str(output)!r} is not empty. Name a folder that does not exist.")
    with (
        writing(str(output), "Nothing is left of it."),
        whole(output) as new,
    ):
        new.mkdir(parents=True)
        write_json_object(new / CONFIG, for_all_readers(source.config))
        for file in source.files_beside():
            shutil.copy(file, new / file.name)
        if (new / TOKENIZER_CONFIG).exists():
            write_tokenizer_config(read_json_object(new / TOKENIZER_CONFIG), new)
        yield new


def _paired(fine: Weights, base: Weights, source: str, base_source: str) -> Weights:
    """``fine``, without tensors that are computed. Raises UserError where one to be added has no counterpart."""
    from panda.weights.matching import is_computed

    fine = {name: tensor for name, tensor in fine.items() if not is_computed(name, tensor)}
    unlike = [
        f"{name} is {list(tensor.shape)} and {list(base[name].shape) if name in base else 'missing'} in the base"
        for name, tensor in fine.items()
        if not name.endswith(WHOLE) and (name not in base or base[name].shape != tensor.shape)
    ]
    if unlike:
        raise UserError(
            f"{base_source}: not the base of {source}: {'; '.join(unlike[:4])}"
            + (f"; and {len(unlike) - 4} more." if len(unlike) > 4 else ".")
        )
    return fine


def _sum(tensor: StoredTensor, base: StoredTensor, sign: int) -> StoredTensor:
    from dataclasses import replace

    def read() -> torch.Tensor:
        result: Any = tensor.read().float().add(base.read().float(), alpha=sign).to(tensor.dtype)
        return result  # type: ignore[no-any-return]

    return replace(tensor, read=read)
