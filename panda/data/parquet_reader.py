"""The ``parquet`` reader: Parquet and Arrow files, a batch of rows at a time."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from panda.data.reading import BadRow
from panda.data.reading import Row
from panda.registry import NoOptions
from panda.registry import UserError
from panda.registry import register_reader
from panda.registry.contexts import ReaderContext

ROWS_AT_ONCE = 1000


@register_reader("parquet", aliases=("arrow",))
class ParquetReader:
    """Parquet, and Arrow's file and stream formats; each column a field. Needs pyarrow: panda-train[data]."""

    suffixes = (".parquet", ".arrow", ".feather")

    def __init__(self, options: NoOptions, context: ReaderContext) -> None:
        try:
            import pyarrow  # noqa: F401 - whether it is there
        except ImportError as problem:
            raise UserError(
                f"reader: parquet needs pyarrow, which cannot be imported ({problem}). Install it:"
                " pip install 'panda-train[data]'"
            ) from None

    def read(self, file: Path) -> Iterator[Row | BadRow]:
        """Rows in order. A file that is neither Parquet nor Arrow is an error."""
        import pyarrow

        number = 0
        try:
            for batch in _batches(file):
                for fields in batch.to_pylist():
                    number += 1
                    yield Row(fields, file, number)
        except pyarrow.ArrowException as problem:
            raise UserError(f"{file}: not a complete Parquet or Arrow file, after row {number}: {problem}") from None
        except OSError as problem:  # pyarrow raises it for damaged pages, too
            raise UserError(f"{file}: cannot be read after row {number}: {problem.strerror or problem}") from None
        if number == 0:
            raise UserError(f"{file}: the file has no rows.")


def _batches(file: Path) -> Iterator[Any]:
    from pyarrow import ArrowInvalid
    from pyarrow import ipc
    from pyarrow import memory_map
    from pyarrow import parquet

    if file.name.lower().endswith(".parquet"):
        with parquet.ParquetFile(file) as table:
            yield from table.iter_batches(batch_size=ROWS_AT_ONCE)
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
        for batch in batches:
            for start in range(0, batch.num_rows, ROWS_AT_ONCE):
                yield batch.slice(start, ROWS_AT_ONCE)
