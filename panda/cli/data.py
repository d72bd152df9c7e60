"""``panda data``: shows a configuration's data as the model will see it."""

from __future__ import annotations

import sys
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from panda.cli.command import run_command
from panda.cli.configured import configured
from panda.files.activity import activity
from panda.files.terminal import number_of
from panda.files.terminal import printable
from panda.files.terminal import printable_line

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

    from panda.data.token_dataset import SampleSet
    from panda.run.preparation import Preparation
    from panda.tasks.task import ShownPart
    from panda.tasks.task import Task

USAGE = """\
usage: panda data CONFIG [--KEY VALUE ...] [-p no:NAME]

Show what the data of a configuration becomes: the numbers of samples and
tokens, which rows of files cannot be used and why, the lengths of samples,
how full each `batching` makes the rows of a step, and the first samples of
the run, decoded, with the part that carries loss in colour (between » and «
if the output is not a terminal). Draws the lengths into
runs/NAME-lengths.png.

example: panda data panda:configs/instruct-tiny.yaml"""

BINS = 12
SAMPLES = 3
LONGEST_SHOWN = 600
"""Most tokens of a sample that are shown."""
SUPERVISED = "bold green"


def main(argv: list[str] | None = None) -> int:
    """Entry point of ``panda data``."""
    return run_command(_data, argv)


def _data(argv: list[str]) -> None:
    configuration = configured(argv, USAGE)
    if configuration is None:
        return

    from panda.run.first_look import look_for_inputs

    look_for_inputs(configuration)

    with activity("loading torch"):
        import numpy as np
        from rich.console import Console

        from panda.configuration.refusals import layouts_of
        from panda.data.packing import LAYOUTS
        from panda.hooks.lengths import draw_lengths
        from panda.hooks.lengths import lines
        from panda.run.assembly import lay_out
        from panda.run.directory import run_name
        from panda.run.preparation import Preparation

    # Without rich's own reading of text, [b] in a row is three characters, and :smile: is seven.
    console = Console(highlight=False, soft_wrap=True, markup=False, emoji=False)
    resolved, prepared = configuration.resolved, Preparation(configuration)
    with activity("reading the data"):
        task, dataset = prepared.task, prepared.dataset
    _print_report(console, prepared)

    lengths = dataset.lengths(np.arange(len(dataset)))
    console.print("\ntokens of a sample")
    limit = resolved.core.max_seq_length
    cut = dataset.report.cut(len(dataset), limit).removesuffix(" (max_seq_length)")
    for line in lines(lengths, BINS, limit=limit, cut=cut):
        console.print(line)
    picture = Path("runs") / f"{run_name(resolved)}-lengths.png"
    picture.parent.mkdir(exist_ok=True)
    title = f"{number_of(len(dataset), 'sample')}, {number_of(dataset.tokens, 'token')}"
    draw_lengths(lengths, picture, title=title, limit=limit, cut=cut)

    rows = f"per_gpu_train_batch_size {resolved.core.per_gpu_train_batch_size}"
    console.print(f"\nrows at the start of a run, on one rank and with {rows}")
    supported = layouts_of(type(task)) or ()
    for batching in (each for each in LAYOUTS if each in supported):
        layout = lay_out(resolved.core, dataset, 1, batching=batching)
        chosen = "  <- this run" if batching == resolved.core.batching else ""
        console.print(f"  {batching:8} {layout.filling()}{chosen}")

    positions = range(min(SAMPLES, layout.order.epoch_samples))
    for position, index in zip(positions, layout.order.samples(positions), strict=True):
        console.print(f"\n-- sample {position + 1} of the run, number {int(index):,} of the data")
        console.print(shown(task, dataset, int(index), coloured=sys.stdout.isatty()))
    console.print(f"\n{picture}: the lengths as a picture")


def _print_report(console: Console, prepared: Preparation) -> None:
    dataset, held_out = prepared.dataset, prepared.held_out
    report = dataset.report
    console.print(
        f"{number_of(report.files, 'file')}, {number_of(report.rows, 'row')}, {number_of(len(dataset), 'sample')}"
    )
    if len(dataset.sources) > 1:
        for source in dataset.sources:
            console.print(
                f"  {source.name}: {number_of(source.samples, 'sample')}, {source.per_epoch:,} of them an epoch"
            )
    share = dataset.supervised_tokens / max(1, dataset.tokens)
    console.print(f"{number_of(dataset.tokens, 'token')}, {dataset.supervised_tokens:,} with loss ({share:.1%})")
    console.print(f"tokenizer: {prepared.options.tokenizer}, with {len(prepared.tokenizer):,} entries")
    console.print(report.cut(len(dataset), prepared.options.max_seq_length))
    if report.bad_rows:
        console.print(f"{report.bad_rows:,} of {number_of(report.rows, 'row')} cannot be used:")
        for reason, count in report.reasons.most_common():
            console.print(f"  {count:>9,}  {printable_line(reason)}")
        console.print("the first of them:")
        for line in report.first_bad_lines():
            console.print(f"  {line}")
    for line in (*report.unused_lines(), *map(printable_line, report.notes)):
        console.print(line)
    for name, held in held_out.items():
        console.print(
            f"{number_of(len(held), 'sample is', 'samples are')} held out, to evaluate on{f', as {name}' * bool(name)}"
        )
        for line in held.report.lines():
            console.print(f"  {line}")


def shown(task: Task, dataset: SampleSet, index: int, *, coloured: bool) -> Text:
    """A decoded sample, with the parts that carry loss in colour, or between » and «."""
    from rich.text import Text

    text = Text()
    for number, part in enumerate(task.parts(dataset[index])):
        text.append("\n" * (number > 0) + f"[{part.name}] " * bool(part.name))
        _append(text, task, part, coloured=coloured)
    return text


def _append(text: Text, task: Task, part: ShownPart, *, coloured: bool) -> None:
    pairs = zip(part.token_ids[:LONGEST_SHOWN], part.supervised[:LONGEST_SHOWN], strict=True)
    for carries_loss, some in groupby(pairs, key=lambda pair: pair[1]):
        decoded = printable(task.tokenizer.decode([token for token, _ in some]))
        if carries_loss:
            text.append(decoded if coloured else f"»{decoded}«", style=SUPERVISED)
        else:
            text.append(decoded)
    if len(part.token_ids) > LONGEST_SHOWN:
        text.append(f" ... and {number_of(len(part.token_ids) - LONGEST_SHOWN, 'more token')}")
