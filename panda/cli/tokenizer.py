"""``panda tokenizer``: trains a tokenizer on data, for pretraining."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING
from typing import Any

from panda.cli.command import run_command
from panda.cli.parser import in_short
from panda.configuration.arguments import parse_arguments
from panda.configuration.configure import Configuration
from panda.configuration.configure import configure
from panda.files.disk_full import disk_full
from panda.files.terminal import number_of
from panda.files.whole import check_can_be_made
from panda.files.whole import whole
from panda.registry import UserError
from panda.registry.location import expanded
from panda.registry.options import Given
from panda.registry.options import Option
from panda.registry.settings import CORE

if TYPE_CHECKING:
    from panda.data.reading import Reader
    from panda.data.report import DataReport

USAGE = """\
usage: panda tokenizer DATA [DATA ...] --vocab_size N [--output DIR]
                       [--reader NAME] [--KEY VALUE ...]

Train a byte-level BPE tokenizer on the text of files, folders, patterns or
data sets on the hub, and write it into a folder (by default ./tokenizer) that
panda-train and transformers read. A document is read as `--task pretrain`
reads it; of a conversation or an exchange, the text of its turns is read. KEY
is an option of the reader, title_field, content_field or max_row_bytes.

examples:
  panda tokenizer panda:data/sample/pretrain --vocab_size 1000 --output mine
  panda-train --task pretrain --arch llama-tiny --tokenizer mine ..."""

USED = ("reader", "max_row_bytes", "plugins")
"""Keys of every run that have a meaning here."""
SECONDS = 5.0
"""Time between lines of progress."""


def main(argv: list[str] | None = None) -> int:
    """Entry point of ``panda tokenizer``."""
    return run_command(_tokenizer, argv)


def _tokenizer(argv: list[str]) -> None:
    data = list(takewhile(lambda word: not word.startswith("-"), argv))
    if {"-h", "--help"} & set(argv):
        print(USAGE)
        return
    if not data:
        raise UserError(f"no data is given.\n{in_short(USAGE)}")
    given = ["--task", "pretrain", "--arch", "llama-tiny", "--pretraining_data_dir", *data]
    configuration, vocab_size, folder = _parsed(given, argv[len(data) :])

    from panda.run.sources import with_lasting_sources

    configuration = with_lasting_sources(configuration)
    _train(configuration, vocab_size, folder)


def _parsed(given: list[str], flags: list[str]) -> tuple[Configuration, int, Path]:
    """The configuration of a run over the data, the entries of the tokenizer, and its folder."""
    from panda.data.tokenizer_training import SMALLEST

    arguments = parse_arguments(flags)
    own = {key: arguments.given.pop(key) for key in ("vocab_size", "output") if key in arguments.given}
    if "vocab_size" not in own:
        raise UserError(
            f"--vocab_size is not given: the number of entries of the tokenizer, such as 32000.\n{in_short(USAGE)}"
        )
    vocab_size = _converted("vocab_size", int, own["vocab_size"])
    if vocab_size < SMALLEST:
        raise UserError(
            f"--vocab_size: {vocab_size:,} is too small: 256 bytes and 3 special tokens are {SMALLEST}. Common sizes"
            " are 8000 to 128000."
        )
    folder = expanded(_converted("output", str, own["output"]) if "output" in own else "tokenizer")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"--output: {str(folder)!r} exists. Name another folder, or move this one away.")
    check_can_be_made(folder, "--output")
    asked = dict(arguments.given)
    arguments.given.update(parse_arguments(given).given)
    configuration = configure(arguments)
    for key, value in asked.items():
        if key in ("task", "arch") or (configuration.resolved.settings[key].owner == CORE and key not in USED):
            raise UserError(f"{value.origin}: {key} is not used to train a tokenizer. Leave it out.\n{in_short(USAGE)}")
    return configuration, vocab_size, folder


def _converted(key: str, kind: type, given: Given) -> Any:
    return Option(key, kind, None, "").convert(given)


def _train(configuration: Configuration, vocab_size: int, folder: Path) -> None:
    from panda.data.reading import Reader
    from panda.data.report import DataReport
    from panda.data.tokenizer_training import trained_tokenizer
    from panda.data.tokenizer_training import write_folder
    from panda.registry.contexts import ReaderContext

    resolved = configuration.resolved
    context = ReaderContext(max_row_bytes=resolved.core.max_row_bytes)
    reader = resolved.components["reader"].build(context, Reader)
    report = DataReport()
    texts = _texts(reader, resolved.components["task"].options, report)
    tokenizer = trained_tokenizer(texts, vocab_size, show_progress=sys.stderr.isatty())
    for line in report.lines():
        print(line)
    if report.bad_rows == report.rows:
        raise UserError("the data has no row with text.")
    try:
        with whole(folder) as new:
            write_folder(tokenizer, new)
    except OSError as problem:
        raise UserError(f"--output: cannot write {str(folder)!r}: {disk_full(problem) or problem.strerror}.") from None
    entries = tokenizer.get_vocab_size()
    if entries < vocab_size:
        print(f"the data has no more pairs that repeat: {entries:,} entries, not {vocab_size:,}")
    print(
        f"{folder}: {entries:,} entries, from {number_of(report.rows - report.bad_rows, 'row')}. Use it:"
        f" --tokenizer {folder}"
    )


def _texts(reader: Reader, options: Any, report: DataReport) -> Iterator[str]:
    """The texts of all rows, one row at a time; says how far it is, and counts rows in ``report``."""
    from panda.data.conversations import UnusableRowError
    from panda.data.locations import data_files
    from panda.data.locations import data_sets
    from panda.data.reading import BadRow
    from panda.data.reading import rows_of
    from panda.tasks.pretrain import text_of_row

    last, characters = time.monotonic(), 0
    files = data_files(options.pretraining_data_dir, reader.suffixes, "DATA")
    report.files = len(files)
    report.notes += [data_set.describe() for data_set in data_sets(options.pretraining_data_dir)]
    for file in files:
        for row in rows_of(reader, file):
            report.rows += 1
            try:
                if isinstance(row, BadRow):
                    raise UnusableRowError(row.problem)
                text = text_of_row(row.fields, options)
            except UnusableRowError as problem:
                report.add_bad(BadRow(row.file, row.number, str(problem)))
                continue
            characters += len(text)
            if time.monotonic() - last >= SECONDS:
                last = time.monotonic()
                print(
                    f"reading {file}: {number_of(report.rows, 'row')}, {number_of(characters, 'character')}", flush=True
                )
            yield text
