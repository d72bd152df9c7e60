"""Batches of tokens in tests: rows of (token ids, supervision)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from panda.data.batches import RowShape
from panda.data.batches import TokenBatch
from panda.data.batches import token_batch
from panda.data.packing import RowLength
from panda.data.packing import exact_length


def collate(
    rows: Sequence[Sequence[tuple[Any, ...]]],
    pad_token_id: int,
    *,
    packed: bool = False,
    bounded: bool = False,
    row_length: RowLength = exact_length,
) -> TokenBatch:
    return token_batch(rows, pad_token_id, RowShape(row_length, packed, bounded))
