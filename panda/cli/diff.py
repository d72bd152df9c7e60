"""``panda diff``: where two runs part."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from panda.cli.command import run_command
from panda.cli.parser import Parser
from panda.cli.run_folders import run_folder
from panda.engine.checkpoints.agreement import MADE_OF
from panda.files.terminal import number_of
from panda.files.terminal import printable_line
from panda.run.description import read_provenance
from panda.run.directory import PROVENANCE
from panda.run.directory import configuration_in

HEADS = {
    *("started", "command", "components", "origins", "packages", "user_files", "earlier_starts", "end"),
    "evaluation_metrics",
}
"""Of provenance.json: what has a heading of its own, follows from what has, or differs between any two runs."""
MISSING = "-"


def main(argv: list[str] | None = None) -> int:
    """Entry point of ``panda diff``."""
    return run_command(_diff, argv)


def parser() -> Parser:
    """The flags of ``panda diff``."""
    parser = Parser(
        prog="panda diff",
        description="Say where two runs part: configuration, data and machine, versions, and the first step at which a"
        " loss, a gradient norm or a rate differs. Figures are compared as they are recorded, to the bit.",
        epilog="example: panda diff runs/first runs/second",
    )
    parser.add_argument("runs", nargs=2, metavar="RUN", help="a run directory")
    return parser


def _diff(argv: list[str]) -> None:
    runs = [run_folder(run) for run in parser().parse_args(argv).runs]
    configs, provenances = [configuration_in(run) for run in runs], [read_provenance(run) for run in runs]
    for run, provenance in zip(runs, provenances, strict=True):
        if not provenance:
            print(f"note: {run / PROVENANCE} is missing or damaged: only configurations and losses are compared.\n")
    same = True
    for title, pair in (
        ("configuration", configs),
        ("data, model and machine", [{k: v for k, v in each.items() if k not in HEADS} for each in provenances]),
        ("components", [_providers(each.get("components")) for each in provenances]),
        ("versions", [_mapping(each.get("packages")) for each in provenances]),
        ("files of the user (sha256)", [_mapping(each.get("user_files")) for each in provenances]),
        ("what a resumed run has to share", [_agreed(*each) for each in zip(provenances, configs, strict=True)]),
    ):
        rows = list(_differences(*pair))
        same &= not rows
        _print(title, rows)
    if same:
        print("Configuration, data, machine and versions are the same.")
    _print_losses(runs)


def _differences(first: Mapping[str, Any], second: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """What the two do not share: keys, and the values of both."""
    for key in [*first, *(key for key in second if key not in first)]:
        before, after = (printable_line(str(each[key])) if key in each else MISSING for each in (first, second))
        if before != after:
            yield key, before, after


def _print(title: str, rows: list[tuple[str, str, str]]) -> None:
    """One row a line where they fit into 100 columns, else each value on a line of its own."""
    if not rows:
        return
    print(f"{title}:")
    key_width, width = (max(len(row[column]) for row in rows) for column in (0, 1))
    short = key_width + width + max(len(row[2]) for row in rows) < 96
    for key, *pair in rows:
        if short:
            print(f"  {key:{key_width}}  {pair[0]:{width}}  {pair[1]}")
        else:
            print(f"  {key}", *pair, sep="\n    ")
    print()


def _print_losses(runs: list[Path]) -> None:
    """The first step of which both have a record and the records differ, of training and of evaluations."""
    from panda.hooks.metrics import read_evaluations
    from panda.hooks.metrics import read_metrics

    for name, read in (("loss", read_metrics), ("eval_loss", read_evaluations)):
        first, second = ({record["step"]: record for record in read(run)} for run in runs)
        shared = sorted(first.keys() & second.keys())
        if not shared:
            if first or second:
                print(f"{name}: no step is recorded of both ({len(first):,} of one, {len(second):,} of the other).")
            continue
        compared = [key for key in (name, "grad_norm", "learning_rate", "tokens") if key in first[shared[0]]]
        parted = [step for step in shared if any(first[step].get(key) != second[step].get(key) for key in compared)]
        if not parted:
            print(
                f"{name}: the same to the bit in {number_of(len(shared), 'step that is', 'steps that are')} recorded"
                " of both."
            )
            continue
        step = parted[0]
        before = [same for same in shared if same < step]
        until = f"the same to the bit to step {before[-1]}, and " if before else ""
        print(f"{name}: {until}different from step {step} on:")
        for key in compared:
            print(f"  {key:14} {first[step].get(key)}  {second[step].get(key)}{_apart(first[step], second[step], key)}")
        last = shared[-1]
        if last != step:
            print(
                f"  {name} of step {last}: {first[last][name]}  {second[last][name]}"
                f"{_apart(first[last], second[last], name)}"
            )


def _apart(first: Mapping[str, Any], second: Mapping[str, Any], key: str) -> str:
    pair = first.get(key), second.get(key)
    if any(each is None for each in pair) or pair[0] == pair[1] or not pair[0]:
        return ""
    return f"  ({(pair[1] - pair[0]) / pair[0]:+.1e})"


def _providers(components: Any) -> dict[str, str]:
    return {
        label: f"{found.get('distribution')} {found.get('version')}"
        for label, found in _mapping(components).items()
        if isinstance(found, Mapping)
    }


def _agreed(provenance: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """The facts of a run that has ended which are no keys of its configuration: hashes of data and tokenizer."""
    agreement = _mapping(_mapping(provenance.get("end")).get("agreement"))
    return {key: value for key, value in agreement.items() if key.rpartition(".")[2] not in config and key != MADE_OF}


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
