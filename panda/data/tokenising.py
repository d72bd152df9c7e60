"""Rows of files to blocks of samples, on all cores and in order."""

from __future__ import annotations

import multiprocessing
import os
from collections import deque
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
from concurrent.futures import Future
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from panda.data.fields import TEXT
from panda.data.fields import Field
from panda.data.reading import BadRow
from panda.data.reading import LazyFields
from panda.data.reading import Reader
from panda.data.reading import Row
from panda.data.reading import rows_of
from panda.data.token_dataset import SampleBlock
from panda.registry import UserError

ROWS_AT_ONCE = 1000
CHARACTERS_AT_ONCE = 1 << 20
"""Rows and characters that are tokenised together, at most."""
BYTES_A_PROCESS = 4 << 20
"""The amount of data for which one more process is worth its start."""
CHARACTERS_A_TOKEN = 4
"""About as many, for rows that are tokenised already."""
AHEAD = 3
"""Blocks for each process that are read ahead or wait to be written, at most: this bounds memory."""

Tokenise = Callable[[list[Row | BadRow]], SampleBlock]


def tokenised_blocks(
    files: Sequence[Path],
    reader: Reader,
    tokenise: Tokenise,
    *,
    fields: Sequence[Field] = TEXT,
    processes: int | None = None,
    progress: Callable[[SampleBlock], None] = lambda block: None,
) -> Iterator[SampleBlock]:
    """What ``tokenise`` makes of all rows of ``files``, in order, some rows at a time.

    Little data is tokenised in this process, more in ``processes`` others, by default one a core. ``fields``: those of
    a sample.
    """
    stretches = _stretches(files, reader)
    first = SampleBlock(fields)
    first.report.files = len(files)
    yield first
    if processes is None:
        size = sum(file.stat().st_size for file in files)
        processes = min(len(os.sched_getaffinity(0)), size // BYTES_A_PROCESS)
    # Otherwise tokenizers warns, and turns its threads off, when processes are forked from this one.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    blocks = map(tokenise, stretches) if processes < 2 else _in_processes(stretches, tokenise, processes)
    for block in blocks:
        progress(block)
        yield block


def _stretches(files: Sequence[Path], reader: Reader) -> Iterator[list[Row | BadRow]]:
    stretch: list[Row | BadRow] = []
    characters = 0
    for file in files:
        for row in rows_of(reader, file):
            stretch.append(row)
            if isinstance(row, Row):
                characters += _characters(row.fields)
            if len(stretch) == ROWS_AT_ONCE or characters >= CHARACTERS_AT_ONCE:
                yield stretch
                stretch, characters = [], 0
    if stretch:
        yield stretch


def _characters(value: object) -> int:
    """About how many characters of text a value of a row has."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, LazyFields):
        return value.size
    if isinstance(value, Mapping):
        return sum(map(_characters, value.values()))
    if isinstance(value, list):
        return len(value) * CHARACTERS_A_TOKEN if value and isinstance(value[0], int) else sum(map(_characters, value))
    return 0


def _in_processes(stretches: Iterator[list[Row | BadRow]], tokenise: Tokenise, processes: int) -> Iterator[SampleBlock]:
    # Forked: they share the tokenizer, and start in milliseconds. They only tokenise, and end.
    context = multiprocessing.get_context("fork")
    waiting: deque[Future[SampleBlock]] = deque()
    with ProcessPoolExecutor(processes, context, initializer=_begin, initargs=(tokenise,)) as pool:
        try:
            for stretch in stretches:
                waiting.append(pool.submit(_tokenise, stretch))
                if len(waiting) >= AHEAD * processes:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool:
            raise UserError(
                "tokenising: a process was killed from outside, most likely since memory ran out. Free some, or allow"
                " fewer cores: `taskset -c 0-3 panda prepare ...`."
            ) from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


_tokenise_here: Tokenise


def _begin(tokenise: Tokenise) -> None:
    """Begin a tokenising process. There is one a core, so the tokenizer uses no threads in it."""
    global _tokenise_here
    _tokenise_here = tokenise
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def _tokenise(stretch: list[Row | BadRow]) -> SampleBlock:
    return _tokenise_here(stretch)
