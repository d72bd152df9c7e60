"""The ``parquet`` reader: Parquet and Arrow files, a batch of rows at a time.

A batch is validated before anything in it is followed: a flipped bit in an offset is a segmentation fault otherwise.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from panda.data.reading import WINDOW
from panda.data.reading import BadRow
from panda.data.reading import LazyFields
from panda.data.reading import Row
from panda.data.reading import too_large
from panda.registry import NoOptions
from panda.registry import UserError
from panda.registry import register_reader
from panda.registry.contexts import ReaderContext

ROWS_AT_ONCE = 1000
BYTES_AT_ONCE = 8 << 20
"""Rows and bytes that a batch of Parquet has at most, or one row of more bytes."""
LARGEST_DICTIONARY = 64 << 20
"""Most bytes of a row group whose texts are read as dictionaries: each batch has all of them."""


@register_reader("parquet", aliases=("arrow",))
class ParquetReader:
    """Parquet, and Arrow's file and stream formats; each column a field. Needs pyarrow: panda-train[data]."""

    suffixes = (".parquet", ".arrow", ".feather")
    beginnings = (b"PAR1", b"ARROW1", b"\xff\xff\xff\xff")
    """Of Parquet, and of Arrow's file and stream formats."""

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

        from panda.data.arrow_arrays import values

        number = 0
        try:
            for batch in _batches(file):
                batch.validate(full=True)
                for column in batch.columns:
                    values(column.slice(0, 0))  # what is wrong with its type is found now, and not in a task
                _refuse_repeated_names(file, batch.schema.names)
                for columns in _parts(batch, self.limit):
                    if columns is None:
                        number += 1
                        yield BadRow(file, number, too_large(self.limit))
                        continue
                    for index in range(columns.batch.num_rows):
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

    def __init__(self, batch: Any, size: int) -> None:
        """``size``: bytes of a row, on average."""
        self.batch, self.size = batch, size
        self.names: list[str] = batch.schema.names
        self._values: dict[str, list[Any]] = {}

    def values(self, name: str) -> list[Any]:
        """The values of a column. Raises KeyError where there is none of that name."""
        if name not in self._values:
            from panda.data.arrow_arrays import values

            self._values[name] = values(self.batch.column(name))
        return self._values[name]

    def __reduce__(self) -> tuple[Any, ...]:
        from pyarrow import BufferOutputStream
        from pyarrow import RecordBatch
        from pyarrow import ipc

        from panda.data.arrow_arrays import decoded

        rows = RecordBatch.from_arrays([decoded(each) for each in self.batch.columns], self.names)
        sink = BufferOutputStream()
        with ipc.new_stream(sink, rows.schema) as stream:
            stream.write_batch(rows)
        return _received, (sink.getvalue().to_pybytes(), self.size)


def _received(written: bytes, size: int) -> _Columns:
    from pyarrow import ipc

    return _Columns(ipc.open_stream(written).read_next_batch(), size)


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

    with file.open("rb") as stream:
        begun = stream.read(8)
    if begun.startswith(b"FEA1"):
        raise ArrowInvalid("it is Feather of version 1, of which pyarrow makes version 2")
    is_arrow = begun.startswith(ParquetReader.beginnings) and not begun.startswith(b"PAR1")
    if begun.startswith(b"PAR1") or (file.name.lower().endswith(".parquet") and not is_arrow):
        described = parquet.read_metadata(file)
        # Read as it is stored: a text that is in the file once, and in many rows, is in memory once.
        dictionaries = _dictionaries(described)
        # Without a buffer, all of a row group is read at once.
        options = {"buffer_size": WINDOW, "page_checksum_verification": True}
        with parquet.ParquetFile(file, metadata=described, read_dictionary=dictionaries, **options) as table:
            for group in range(table.num_row_groups):
                of_group = described.row_group(group)
                fitting = BYTES_AT_ONCE * of_group.num_rows // max(1, of_group.total_byte_size)
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


def _dictionaries(described: Any) -> list[str]:
    """The columns of the Parquet file that is ``described`` to read as dictionaries; none if those may be large."""
    # Not by the size of a column: pyarrow 26 ends the process where that is asked of a damaged file.
    groups = map(described.row_group, range(described.num_row_groups))
    if any(group.total_byte_size > LARGEST_DICTIONARY for group in groups):
        return []
    columns = map(described.schema.column, range(len(described.schema)))
    return [
        column.path
        for column in columns
        if column.physical_type == "BYTE_ARRAY" and column.logical_type.type != "DECIMAL"
    ]


def _refuse_repeated_names(file: Path, names: list[str]) -> None:
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise UserError(f"{file}: more than one column is called {' and '.join(map(repr, repeated))}. Rename one.")


def _parts(batch: Any, limit: int) -> Iterator[_Columns | None]:
    """``batch`` in parts of few rows and at most ``limit`` bytes; None for a row of more, which is not converted."""
    import numpy as np
    import pyarrow

    from panda.data.arrow_arrays import decoded
    from panda.data.arrow_arrays import sizes

    for start in range(0, batch.num_rows, ROWS_AT_ONCE):
        some = batch.slice(start, ROWS_AT_ONCE)
        bytes_of_rows = sum(map(sizes, some.columns), np.zeros(some.num_rows, np.int64))
        first = 0
        while first < some.num_rows:
            ends = np.cumsum(bytes_of_rows[first:])
            count = int(np.searchsorted(ends, limit, side="right"))
            if not count:
                yield None
                first += 1
                continue
            part, size = some.slice(first, count), int(ends[count - 1])
            if part.nbytes > 2 * size:  # most of which is not of these rows, and would be held as long as they are
                part = pyarrow.RecordBatch.from_arrays(list(map(decoded, part.columns)), part.schema.names)
            yield _Columns(part, size // count)
            first += count
