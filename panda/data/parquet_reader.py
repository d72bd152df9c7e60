"""The ``parquet`` reader: Parquet and Arrow files, a batch of rows at a time.

A batch is validated before anything in it is followed: a flipped bit in an offset is a segmentation fault otherwise.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from itertools import pairwise
from pathlib import Path
from typing import Any

from panda.data.reading import WINDOW
from panda.data.reading import BadRow
from panda.data.reading import LazyFields
from panda.data.reading import Row
from panda.data.reading import Unconverted
from panda.data.reading import too_large
from panda.registry import NoOptions
from panda.registry import UserError
from panda.registry import register_reader
from panda.registry.contexts import ReaderContext

ROWS_AT_ONCE = 1000
BYTES_AT_ONCE = 8 << 20
"""Rows and bytes that a batch of Parquet has at most, or one row of more bytes."""


@register_reader("parquet", aliases=("arrow",))
class ParquetReader:
    """Parquet, and Arrow's file and stream formats; each column a field. Needs pyarrow: panda-train[data]."""

    suffixes = (".parquet", ".arrow", ".feather")

    def __init__(self, options: NoOptions, context: ReaderContext) -> None:
        self.limit = context.max_row_bytes
        try:
            import pyarrow  # noqa: F401 - whether it is there
        except ImportError as problem:
            raise UserError(
                f"reader: parquet needs pyarrow, which cannot be imported ({problem}). Install it:"
                " pip install 'panda-train[data]'"
            ) from None

    def read(self, file: Path) -> Iterator[Row | BadRow]:
        """Rows in order. A file that is neither Parquet nor Arrow is an error.

        Columns are converted once a field of theirs is asked for, in the process that asks. Values that JSON has no
        kind for, such as times and bytes, are ``Unconverted``.
        """
        import pyarrow

        number = 0
        try:
            for batch in _batches(file):
                batch.validate(full=True)
                for column in batch.columns:
                    _values(column.slice(0, 0))  # what is wrong with its type is found now, and not in a task
                _refuse_repeated_names(file, batch.schema.names)
                for part in _parts(batch, self.limit):
                    if part is None:
                        number += 1
                        yield BadRow(file, number, too_large(self.limit))
                        continue
                    columns = _Columns(part)
                    for index in range(part.num_rows):
                        number += 1
                        yield Row(ColumnFields(columns, index), file, number)
        except (pyarrow.ArrowException, UnicodeDecodeError) as problem:
            raise UserError(f"{file}: not a complete Parquet or Arrow file, after row {number}: {problem}") from None
        except OSError as problem:  # pyarrow raises it for damaged pages, too
            raise UserError(f"{file}: cannot be read after row {number}: {problem.strerror or problem}") from None
        if number == 0:
            raise UserError(f"{file}: the file has no rows.")


class _Columns:
    """The columns of some rows. Another process gets those rows and not the batch that they are a part of."""

    def __init__(self, batch: Any) -> None:
        self.batch = batch
        self.names: list[str] = batch.schema.names
        self.size = int(batch.nbytes) // int(batch.num_rows)
        """Bytes of a row, on average."""
        self._values: dict[str, list[Any]] = {}

    def values(self, name: str) -> list[Any]:
        """The values of a column. Raises KeyError where there is none of that name."""
        if name not in self._values:
            self._values[name] = _values(self.batch.column(name))
        return self._values[name]

    def __reduce__(self) -> tuple[Any, ...]:
        from pyarrow import BufferOutputStream
        from pyarrow import RecordBatch
        from pyarrow import ipc

        rows = RecordBatch.from_arrays(_decoded(self.batch), self.names)  # not with all of a dictionary
        sink = BufferOutputStream()
        with ipc.new_stream(sink, rows.schema) as stream:
            stream.write_batch(rows)
        return _received, (sink.getvalue().to_pybytes(),)


def _received(written: bytes) -> _Columns:
    from pyarrow import ipc

    return _Columns(ipc.open_stream(written).read_next_batch())


def _decoded(batch: Any) -> list[Any]:
    """The columns of ``batch``; those of a dictionary, which all of its rows share, with values of their own."""
    from pyarrow import types

    return [each.dictionary_decode() if types.is_dictionary(each.type) else each for each in batch.columns]


class ColumnFields(LazyFields):
    """The fields of a row of some columns."""

    __slots__ = ("_columns", "_index")

    def __init__(self, columns: _Columns, index: int) -> None:
        self._columns, self._index = columns, index

    def __getitem__(self, name: str) -> Any:
        return self._columns.values(name)[self._index]

    def __iter__(self) -> Iterator[str]:
        return iter(self._columns.names)

    def __len__(self) -> int:
        return len(self._columns.names)

    def __contains__(self, name: object) -> bool:
        return name in self._columns.names

    def has(self, name: str) -> bool:
        return name in self and self._columns.batch.column(name)[self._index].is_valid

    @property
    def size(self) -> int:
        return self._columns.size


def _batches(file: Path) -> Iterator[Any]:
    from pyarrow import ArrowInvalid
    from pyarrow import ipc
    from pyarrow import memory_map
    from pyarrow import parquet

    with file.open("rb") as begun:
        is_parquet = begun.read(4) == b"PAR1"
    if is_parquet or file.name.lower().endswith(".parquet"):
        # Without a buffer, all of a row group is read at once.
        with parquet.ParquetFile(file, buffer_size=WINDOW, page_checksum_verification=True) as table:
            for group in range(table.num_row_groups):
                described = table.metadata.row_group(group)
                fitting = BYTES_AT_ONCE * described.num_rows // max(1, described.total_byte_size)
                yield from table.iter_batches(min(max(1, fitting), ROWS_AT_ONCE), row_groups=[group])
        return
    with memory_map(str(file)) as source:
        try:
            opened = ipc.open_file(source)
        except ArrowInvalid:  # the stream format, which Hugging Face's `datasets` keeps on disk
            source.seek(0)
            opened = ipc.open_stream(source)
            batches = iter(opened)
        else:
            batches = (opened.get_batch(index) for index in range(opened.num_record_batches))
        yield from batches


def _refuse_repeated_names(file: Path, names: list[str]) -> None:
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise UserError(f"{file}: more than one column is called {' and '.join(map(repr, repeated))}. Rename one.")


def _parts(batch: Any, limit: int) -> Iterator[Any]:
    """``batch`` in parts of few rows; None for a row of more than ``limit`` bytes, which is not converted."""
    for start in range(0, batch.num_rows, ROWS_AT_ONCE):
        part = batch.slice(start, ROWS_AT_ONCE)
        if part.nbytes <= limit:
            yield part
            continue
        for index in range(part.num_rows):
            row = part.slice(index, 1)
            yield row if _size(row) <= limit else None


def _size(row: Any) -> int:
    """Bytes of a batch of one row. All of a dictionary counts as part of each of its rows, unless it is decoded."""
    return sum(column.nbytes for column in _decoded(row))


def _values(array: Any) -> list[Any]:
    """The values of ``array`` as JSON has them: texts, numbers, booleans, lists, dictionaries; else ``Unconverted``."""
    from pyarrow import BaseExtensionType
    from pyarrow import compute
    from pyarrow import types

    kind = array.type
    if types.is_dictionary(kind):
        return _values(array.dictionary_decode())
    if isinstance(kind, BaseExtensionType):
        return _values(array.storage)
    if (
        types.is_boolean(kind)
        or types.is_integer(kind)
        or types.is_floating(kind)
        or types.is_null(kind)
        or types.is_string(kind)
        or types.is_large_string(kind)
        or types.is_string_view(kind)
    ):
        values: list[Any] = array.to_pylist()
        return values
    valid = array.is_valid().to_pylist()
    if types.is_struct(kind):
        names = [kind.field(index).name for index in range(kind.num_fields)]
        columns = [_values(array.field(index)) for index in range(kind.num_fields)]
        rows = zip(*columns, strict=True) if columns else iter(() for _ in valid)
        return [dict(zip(names, row, strict=True)) if there else None for row, there in zip(rows, valid, strict=True)]
    if types.is_map(kind):
        bounds = array.offsets.to_pylist()
        start, length = bounds[0], bounds[-1] - bounds[0]
        keys, items = (_values(part.slice(start, length)) for part in (array.keys, array.items))
        parts = [slice(low - start, high - start) for low, high in pairwise(bounds)]
        maps = [dict(zip(keys[part], items[part], strict=True)) for part in parts]
        return [each if there else None for each, there in zip(maps, valid, strict=True)]
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        flat = iter(_values(array.flatten()))  # without those of lists that are null
        lengths = compute.list_value_length(array).to_pylist()
        return [None if length is None else list(islice(flat, length)) for length in lengths]
    described = str(kind)
    return [Unconverted(described) if there else None for there in valid]
