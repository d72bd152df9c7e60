"""Rows of files to blocks of samples, on all cores and in order."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import traceback
from collections import deque
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
from concurrent.futures import Future
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from queue import SimpleQueue

from panda.data.fields import TEXT
from panda.data.fields import Field
from panda.data.reading import BadRow
from panda.data.reading import LazyFields
from panda.data.reading import Reader
from panda.data.reading import Row
from panda.data.reading import rows_of
from panda.data.token_dataset import SampleBlock
from panda.files.parent import end_with_parent
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
    workers = _started(tokenise, processes)
    idle: SimpleQueue[_Worker] = SimpleQueue()
    for worker in workers:
        idle.put(worker)

    def tokenised(stretch: list[Row | BadRow]) -> SampleBlock:
        worker = idle.get()
        found = worker.tokenised(stretch)
        idle.put(worker)
        return found

    waiting: deque[Future[SampleBlock]] = deque()
    with ThreadPoolExecutor(processes, "tokenising") as threads:
        try:
            for stretch in stretches:
                waiting.append(threads.submit(tokenised, stretch))
                if len(waiting) >= AHEAD * processes:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except _KilledError:
            raise UserError(
                "tokenising: a process was killed from outside, most likely since memory ran out. Free some, or allow"
                " fewer cores: `taskset -c 0-3 panda prepare ...`."
            ) from None
        finally:
            for each in waiting:
                each.cancel()
            for worker in workers:  # which ends the threads that wait for them, too
                worker.end()
            for _ in workers:  # and those that wait for a worker
                idle.put(workers[0])


class _KilledError(Exception):
    """A tokenising process has ended without being asked to."""


class _Worker:
    """A tokenising process, and this process's end of the connection to it.

    Each has a connection of its own, which closes when either side ends, however that happens: a queue that several
    share, as in a ProcessPoolExecutor, stays open, and whoever waits for the rest of a message then waits for ever.
    """

    def __init__(self, process: BaseProcess, connection: Connection) -> None:
        self.process, self.connection = process, connection

    def tokenised(self, stretch: list[Row | BadRow]) -> SampleBlock:
        """The samples of ``stretch``. Raises what tokenising it raises there, and _KilledError."""
        try:
            self.connection.send(stretch)
            found = self.connection.recv()
        except (EOFError, OSError):
            raise _KilledError from None
        if isinstance(found, BaseException):
            raise found
        block: SampleBlock = found
        return block

    def end(self) -> None:
        """End the process, which has nothing to lose."""
        self.process.kill()
        self.process.join()
        # The connection is left to its last user, a thread that may still read from it.


def _started(tokenise: Tokenise, count: int) -> list[_Worker]:
    """``count`` tokenising processes. Forked: they share the tokenizer, and start in milliseconds."""
    context = multiprocessing.get_context("fork")
    workers: list[_Worker] = []
    for _ in range(count):
        ours, theirs = context.Pipe()
        of_parent = [*(worker.connection for worker in workers), ours]
        process = context.Process(target=_work, args=(tokenise, theirs, of_parent, os.getpid()), daemon=True)
        process.start()
        theirs.close()  # now only the worker has it, so that it closes when the worker ends
        workers.append(_Worker(process, ours))
    return workers


def _work(tokenise: Tokenise, connection: Connection, of_parent: list[Connection], parent: int) -> None:
    """What a tokenising process does, until the process that started it is gone."""
    for other in of_parent:  # which close when that process ends only if nobody else has them
        other.close()
    end_with_parent(parent, signal.SIGKILL)  # also where it is stopped
    # Ctrl-C reaches all processes of a terminal, and the one that started this says what there is to say.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # there is a process a core
    with suppress(EOFError, OSError):
        while True:
            stretch = connection.recv()
            try:
                found: object = tokenise(stretch)
            except Exception as error:
                found = _to_send(error)
            connection.send(found)


def _to_send(error: Exception) -> Exception:
    """``error`` with its traceback as a note, since tracebacks cannot be sent; one that can be sent in its place."""
    told = "".join(traceback.format_exception(error))
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(told)
    if not isinstance(error, UserError):
        error.add_note(f"In a tokenising process:\n{told}")
    return error
