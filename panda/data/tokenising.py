"""Rows of files to blocks of samples, on all cores and in order."""

from __future__ import annotations

import multiprocessing
import os
from collections import deque
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Sequence
from concurrent.futures import Future
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from panda.data.reading import BadRow
from panda.data.reading import Reader
from panda.data.reading import Row
from panda.data.reading import rows_of
from panda.data.token_dataset import SampleBlock
from panda.registry import UserError

ROWS_AT_ONCE = 1000
CHARACTERS_AT_ONCE = 1 << 20
"""Rows and characters that are tokenised in one go."""
BYTES_A_PROCESS = 4 << 20
"""Data for which a process more is worth its start."""
AHEAD = 3
"""Blocks for each process that are read ahead, or wait to be written: what bounds memory."""

Tokenise = Callable[[list[Row | BadRow]], SampleBlock]


def tokenised_blocks(
    files: Sequence[Path],
    reader: Reader,
    tokenise: Tokenise,
    *,
    processes: int | None = None,
    progress: Callable[[SampleBlock], None] = lambda block: None,
) -> Iterator[SampleBlock]:
    """``tokenise`` of all rows of ``files``, in order, a stretch at a time.

    In this process for little data, else in ``processes`` beside it, by default one a core.
    """
    stretches = _stretches(files, reader)
    first = SampleBlock()
    first.report.files = len(files)
    yield first
    if processes is None:
        size = sum(file.stat().st_size for file in files)
        processes = min(len(os.sched_getaffinity(0)), size // BYTES_A_PROCESS)
    # Set, so that tokenizers neither warns nor turns its threads off when processes are forked from this one.
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
                characters += sum(_characters(value) for value in row.fields.values())
            if len(stretch) == ROWS_AT_ONCE or characters >= CHARACTERS_AT_ONCE:
                yield stretch
                stretch, characters = [], 0
    if stretch:
        yield stretch


def _characters(value: object) -> int:
    """About how much text there is in a value of a row."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        return sum(map(_characters, value.values()))
    return sum(map(_characters, value)) if isinstance(value, list) else 0


def _in_processes(stretches: Iterator[list[Row | BadRow]], tokenise: Tokenise, processes: int) -> Iterator[SampleBlock]:
    # Forked: they share the tokenizer, and start in milliseconds. They do nothing but tokenise and end.
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
    """The processes work side by side already: no threads in them."""
    global _tokenise_here
    _tokenise_here = tokenise
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def _tokenise(stretch: list[Row | BadRow]) -> SampleBlock:
    return _tokenise_here(stretch)
