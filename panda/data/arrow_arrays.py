"""Arrow arrays as rows have them: their values, and how many bytes each has by itself."""

from __future__ import annotations

from itertools import islice
from itertools import pairwise
from typing import Any

import numpy as np

from panda.data.reading import Unconverted


def values(array: Any) -> list[Any]:
    """The values of ``array`` as JSON has them: texts, numbers, booleans, lists, dictionaries; else ``Unconverted``."""
    from pyarrow import BaseExtensionType
    from pyarrow import compute
    from pyarrow import types

    kind = array.type
    if types.is_dictionary(kind):  # a value that many rows have is one object
        used = compute.unique(array.indices).drop_null()
        known = dict(zip(used.to_pylist(), values(array.dictionary.take(used)), strict=True))
        return [known.get(index) for index in array.indices.to_pylist()]
    if types.is_run_end_encoded(kind):
        return values(compute.run_end_decode(array))
    if isinstance(kind, BaseExtensionType):
        return values(array.storage)
    if (
        types.is_boolean(kind)
        or types.is_integer(kind)
        or types.is_floating(kind)
        or types.is_null(kind)
        or types.is_string(kind)
        or types.is_large_string(kind)
        or types.is_string_view(kind)
    ):
        listed: list[Any] = array.to_pylist()
        return listed
    valid = array.is_valid().to_pylist()
    if types.is_struct(kind):
        names = [kind.field(index).name for index in range(kind.num_fields)]
        columns = [values(array.field(index)) for index in range(kind.num_fields)]
        rows = zip(*columns, strict=True) if columns else iter(() for _ in valid)
        return [dict(zip(names, row, strict=True)) if there else None for row, there in zip(rows, valid, strict=True)]
    if types.is_map(kind):
        bounds = array.offsets.to_pylist()
        start, length = bounds[0], bounds[-1] - bounds[0]
        keys, items = (values(part.slice(start, length)) for part in (array.keys, array.items))
        parts = [slice(low - start, high - start) for low, high in pairwise(bounds)]
        maps = [dict(zip(keys[part], items[part], strict=True)) for part in parts]
        return [each if there else None for each, there in zip(maps, valid, strict=True)]
    if _is_list(kind):
        flat = iter(values(array.flatten()))  # without those of lists that are null
        lengths = compute.list_value_length(array).to_pylist()
        return [None if length is None else list(islice(flat, length)) for length in lengths]
    described = str(kind)
    return [Unconverted(described) if there else None for there in valid]


def sizes(array: Any) -> np.ndarray:
    """int64 [values]: about how many bytes each value of ``array`` has; one of a dictionary, wherever it is used.

    Arrow itself counts a dictionary once, and all of what views share for any part of it.
    """
    from pyarrow import BaseExtensionType
    from pyarrow import compute
    from pyarrow import types

    kind = array.type
    if isinstance(kind, BaseExtensionType):
        return sizes(array.storage)
    if types.is_dictionary(kind):
        valid = array.indices.is_valid().to_numpy(zero_copy_only=False)
        used = np.zeros(len(array), np.int64)
        used[valid] = sizes(array.dictionary)[array.indices.drop_null().to_numpy()]
        return used
    if types.is_struct(kind):
        fields = (sizes(array.field(index)) for index in range(kind.num_fields))
        return sum(fields, np.zeros(len(array), np.int64))
    if types.is_string_view(kind) or types.is_binary_view(kind):  # a view is 16 bytes, and begins with the length
        lengths = np.frombuffer(array.buffers()[1], np.int32)[::4][array.offset : array.offset + len(array)]
        return np.where(array.is_valid().to_numpy(zero_copy_only=False), lengths, 0).astype(np.int64)
    if _is_text_or_bytes(kind):
        return _counts(compute.binary_length(array))
    if types.is_map(kind):
        bounds = array.offsets.to_numpy()
        keys, items = (sizes(part.slice(bounds[0], bounds[-1] - bounds[0])) for part in (array.keys, array.items))
        return _sums(keys + items, np.diff(bounds))
    if _is_list(kind):
        return _sums(sizes(array.flatten()), _counts(compute.list_value_length(array)))
    return np.full(len(array), array.nbytes // max(1, len(array)), np.int64)


def _is_text_or_bytes(kind: Any) -> bool:
    from pyarrow import types

    checks = (types.is_string, types.is_large_string, types.is_binary, types.is_large_binary)
    return any(is_one(kind) for is_one in checks)


def _is_list(kind: Any) -> bool:
    from pyarrow import types

    views = (types.is_list_view, types.is_large_list_view)
    return any(is_one(kind) for is_one in (types.is_list, types.is_large_list, types.is_fixed_size_list, *views))


def _counts(array: Any) -> np.ndarray:
    """int64: the numbers in ``array``; 0 for null."""
    counts: np.ndarray = array.fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64)
    return counts


def _sums(sizes: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """The sums of consecutive stretches of ``sizes``, which are ``lengths`` long."""
    before = np.concatenate([[0], np.cumsum(sizes)])
    ends = np.cumsum(lengths)
    sums: np.ndarray = before[ends] - before[ends - lengths]
    return sums


def decoded(array: Any) -> Any:
    """``array`` with values of its own, in place of those of dictionaries and views, which rows beyond it share."""
    from pyarrow import ArrowNotImplementedError

    plain = _plain(array.type)
    try:
        return array if plain == array.type else array.cast(plain)
    except ArrowNotImplementedError:
        return array


def _plain(kind: Any) -> Any:
    """The type ``kind`` without dictionaries and views of text and bytes."""
    import pyarrow
    from pyarrow import types

    if types.is_dictionary(kind):
        return _plain(kind.value_type)
    if types.is_string_view(kind):
        return pyarrow.large_string()
    if types.is_binary_view(kind):
        return pyarrow.large_binary()
    if types.is_struct(kind):
        return pyarrow.struct([_plain_field(kind.field(index)) for index in range(kind.num_fields)])
    if types.is_map(kind):
        return pyarrow.map_(_plain_field(kind.key_field), _plain_field(kind.item_field))
    if types.is_fixed_size_list(kind):
        return pyarrow.list_(_plain_field(kind.value_field), kind.list_size)
    if types.is_list(kind):
        return pyarrow.list_(_plain_field(kind.value_field))
    if types.is_large_list(kind):
        return pyarrow.large_list(_plain_field(kind.value_field))
    return kind


def _plain_field(field: Any) -> Any:
    return field.with_type(_plain(field.type))
