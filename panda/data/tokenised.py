"""Rows that are tokenised already: their ids as they are, and which of them carry loss."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from panda.data.conversations import UnusableRowError
from panda.data.conversations import refuse_weight
from panda.data.reading import Fields
from panda.data.reading import kind_of
from panda.files.terminal import number_of
from panda.registry.contexts import IGNORED_LABEL

IDS, LABELS, ATTENTION, POSITIONS = "input_ids", "labels", "attention_mask", "position_ids"
WEIGHTS = "weights"
"""A field with the weight of each token in the loss, a number of at least 0."""
LOSS_MASKS = ("loss_mask", "completion_mask", "assistant_masks")
"""Fields that say which tokens carry loss, by 0 and 1: the common name, and TRL's two."""


@dataclass(frozen=True)
class Tokenised:
    """A sample."""

    token_ids: list[int]
    supervised: bytes
    """A byte a token, 1 for a token to predict; the first token is none."""
    cut: bool = False
    """Whether it was longer."""
    weights: list[float] | None = None
    """The weight of each token in the loss, where the row states them."""

    def cut_to(self, limit: int) -> Tokenised:
        """The first ``limit`` tokens. Raises UnusableRowError where none of them carries loss."""
        if len(self.token_ids) <= limit:
            return self
        if 1 not in self.supervised[:limit]:
            raise UnusableRowError(f"none of its first {number_of(limit, 'token')} carries loss (max_seq_length)")
        return Tokenised(
            self.token_ids[:limit], self.supervised[:limit], cut=True, weights=self.weights and self.weights[:limit]
        )


def tokenised_of(fields: Mapping[str, Any], vocabulary: int, *, all_carry_loss: bool) -> Tokenised | None:
    """The tokens in a row, without padding, which ``attention_mask`` says; None where it has no field ``input_ids``.

    ``all_carry_loss``: whether tokens carry loss where no field says so. Raises UnusableRowError where ids are not
    below ``vocabulary``, a field has another length, nothing carries loss, or several documents are packed into it.
    """
    fields = fields if isinstance(fields, Fields) else Fields(fields)
    if not fields.has(IDS):
        return None
    refuse_weight(fields)
    ids = _numbers(fields, IDS)
    wrong = next((token for token in ids if not 0 <= token < vocabulary), None)
    if wrong is not None:
        raise UnusableRowError(f"field {IDS!r} has the token {wrong}, and the tokenizer has {vocabulary:,}, from 0 on")
    masks = [name for name in LOSS_MASKS if fields.has(name)]
    if not (masks or all_carry_loss or fields.has(LABELS) or fields.has(WEIGHTS)):
        raise UnusableRowError(f"it has {IDS!r}, and neither {LABELS!r} nor {LOSS_MASKS[0]!r} to say what carries loss")
    supervised = bytearray(b"\1" * len(ids))
    for name in masks:
        supervised = bytearray(map(int.__and__, supervised, _mask(fields, name, len(ids))))
    if fields.has(LABELS):
        labels = _of_length(_numbers(fields, LABELS), LABELS, len(ids))
        for place, (label, token) in enumerate(zip(labels, ids, strict=True)):
            if label == IGNORED_LABEL:
                supervised[place] = 0
            elif label != token:
                raise UnusableRowError(
                    f"{LABELS}[{place}] is {label} and {IDS}[{place}] {token}: a label is the token at its own place,"
                    f" or {IGNORED_LABEL}"
                )
    weights = _weights(fields, len(ids)) if fields.has(WEIGHTS) else None
    for place, weight in enumerate(weights or ()):
        supervised[place] &= weight > 0
    kept = _attended(fields, len(ids))
    _refuse_packed(fields, kept, len(ids))
    ids, supervised = ids[kept], supervised[kept]
    supervised[:1] = bytes(len(supervised[:1]))
    if 1 not in supervised:
        raise UnusableRowError("none of its tokens carries loss after the first one, which nothing predicts")
    return Tokenised(ids, bytes(supervised), weights=weights and weights[kept])


def _attended(fields: Fields, length: int) -> slice:
    """The tokens that are no padding, which is at the ends."""
    if not fields.has(ATTENTION):
        return slice(0, length)
    mask = _mask(fields, ATTENTION, length)
    kept = slice(mask.find(1), mask.rfind(1) + 1) if 1 in mask else slice(0, 0)
    if 0 in mask[kept]:
        raise UnusableRowError(
            f"field {ATTENTION!r} leaves tokens out between others, and not only padding at the ends"
        )
    return kept


def _refuse_packed(fields: Fields, kept: slice, length: int) -> None:
    """Raise UnusableRowError unless the positions of the tokens, if the row has them, are those of one document."""
    if fields.has(POSITIONS):
        positions = _of_length(_numbers(fields, POSITIONS), POSITIONS, length)[kept]
        if positions != list(range(len(positions))):
            raise UnusableRowError(
                f"field {POSITIONS!r} does not count from 0 on: documents that share a row would see each other. Give"
                " each a row of its own; `batching: packed` packs them"
            )


def _numbers(fields: Fields, name: str) -> list[int]:
    value = fields[name]
    if not isinstance(value, list):
        raise UnusableRowError(f"field {name!r} is {kind_of(value)}, not an array of whole numbers")
    for each in value:
        if not isinstance(each, int) or isinstance(each, bool):
            raise UnusableRowError(f"field {name!r} has {kind_of(each)} in it, and not only whole numbers")
    return value


def _weights(fields: Fields, length: int) -> list[float]:
    value = fields[WEIGHTS]
    is_number = isinstance(value, list) and all(
        isinstance(each, (int, float)) and not isinstance(each, bool) and 0 <= each < math.inf for each in value
    )
    if not is_number:
        raise UnusableRowError(f"field {WEIGHTS!r} is not an array of numbers of at least 0")
    weights: list[float] = _of_length(value, WEIGHTS, length)
    return weights


def _mask(fields: Fields, name: str, length: int) -> bytes:
    value = fields[name]
    if not isinstance(value, list) or any(each not in (0, 1) for each in value):
        raise UnusableRowError(f"field {name!r} is not an array of 0 and 1")
    return bytes(map(int, _of_length(value, name, length)))


def _of_length(value: list[Any], name: str, length: int) -> list[Any]:
    if len(value) != length:
        raise UnusableRowError(f"field {name!r} has {number_of(len(value), 'value')} for {length:,} of {IDS!r}")
    return value
