"""``panda prepare``: tokenises a configuration's data into the token cache, ahead of time and without a GPU."""

from __future__ import annotations

from panda.cli.command import run_command
from panda.cli.configured import configured
from panda.files.activity import activity
from panda.files.terminal import number_of

USAGE = """\
usage: panda prepare CONFIG [--KEY VALUE ...] [-p no:NAME]

Read the data of a configuration and tokenise it into the token cache, on all
cores, as panda-train would at its start. Runs with the same data, tokenizer
and options then start at once. Needs no GPU and no launcher; PANDA_CACHE or
`token_cache` says where the cache is.

example: panda prepare panda:configs/instruct-tiny.yaml"""


def main(argv: list[str] | None = None) -> int:
    """Entry point of ``panda prepare``."""
    return run_command(_prepare, argv)


def _prepare(argv: list[str]) -> None:
    configuration = configured(argv, USAGE)
    if configuration is None:
        return

    from panda.run.first_look import look_for_inputs

    look_for_inputs(configuration)

    with activity("loading torch"):
        from panda.data.token_cache import cache_folder
        from panda.run.preparation import Preparation

    with activity("reading the data"):
        prepared = Preparation(configuration)
        _ = prepared.dataset, prepared.held_out
    held_out = {f"evaluation data{f' {name}' * bool(name)}: ": held for name, held in prepared.held_out.items()}
    for name, dataset in {"": prepared.dataset, **held_out}.items():
        for line in dataset.report.lines():
            print(f"{name}{line}")
        read = (
            f"{number_of(dataset.report.files, 'file')}, {number_of(dataset.report.rows, 'row')}: "
            if dataset.report.files
            else ""
        )
        print(
            f"{name}{read}{number_of(len(dataset), 'sample')}, {number_of(dataset.tokens, 'token')},"
            f" {dataset.supervised_tokens:,} with loss"
        )
        if read:
            print(f"{name}{dataset.report.cut(len(dataset), configuration.options.max_seq_length)}")
    print(f"in {cache_folder(configuration.options.token_cache)}")
