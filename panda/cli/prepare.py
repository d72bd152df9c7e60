"""``panda prepare``: tokenise a configuration's data into the token cache, ahead of time and without a GPU."""

from __future__ import annotations

from panda.cli.command import run_command
from panda.cli.configuration import configured

USAGE = """\
usage: panda prepare CONFIG [--KEY VALUE ...] [-p no:NAME]

Read and tokenise the data of a configuration on all cores, as panda-train would at its start, into
the token cache. Runs that use the same data, tokenizer and options then start at once. Needs no GPU
and starts no process group; PANDA_CACHE or `token_cache` says where the cache is.

example: panda prepare configs/instruct-tiny.yaml"""


def main(argv: list[str] | None = None) -> int:
    """Entry point of ``panda prepare``."""
    return run_command(_prepare, argv)


def _prepare(argv: list[str]) -> None:
    resolved = configured(argv, USAGE)
    if resolved is None:
        return

    from panda.assembly import build_evaluation_task
    from panda.assembly import build_task
    from panda.assembly import dataset_of
    from panda.assembly import load_tokenizer
    from panda.data.token_cache import cache_folder

    task = build_task(resolved, load_tokenizer(resolved.core.tokenizer))
    evaluated = build_evaluation_task(resolved, task)
    for name, each in (("", task), ("evaluation data: ", evaluated)):
        if each is None:
            continue
        dataset = dataset_of(resolved, each)
        for line in dataset.report.lines():
            print(f"{name}{line}")
        print(
            f"{name}{dataset.report.files:,} files, {dataset.report.rows:,} rows: {len(dataset):,} samples,"
            f" {dataset.tokens:,} tokens, {dataset.supervised_tokens:,} with loss"
        )
    print(f"in {cache_folder(resolved.core.token_cache)}")
