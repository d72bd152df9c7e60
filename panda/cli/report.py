"""``panda report``: one HTML page about a run, or about several beside each other."""

from __future__ import annotations

import argparse
import sys
from contextlib import ExitStack
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from panda.cli.answering import assistant_and_sampling
from panda.cli.command import run_command
from panda.cli.parser import Parser
from panda.cli.parser import add_blocking
from panda.cli.passed_over import report_passed_over
from panda.cli.run_folders import run_folders
from panda.cli.run_folders import short_names
from panda.cli.runs import described
from panda.configuration.arguments import arguments_of_run
from panda.configuration.configure import configure
from panda.files.activity import activity
from panda.files.whole import check_can_be_made
from panda.files.whole import write_whole
from panda.hooks.curves import X_AXES
from panda.registry import UserError
from panda.registry.choosing import BLOCK
from panda.registry.location import resolve_path
from panda.run.adapter_run import CKPT_PATH_HELP
from panda.run.adapter_run import trained_adapters
from panda.run.first_look import look_for_inputs

if TYPE_CHECKING:
    from panda.answers.assistant import Assistant
    from panda.configuration.configure import Configuration
    from panda.report.reported import Reported


def main(argv: list[str] | None = None) -> int:
    """Entry point of ``panda report``."""
    return run_command(_report, argv)


def _report(argv: list[str]) -> None:
    arguments = parser().parse_args(argv)
    if min(arguments.samples, arguments.answers) < 0:
        raise UserError("--samples, --answers: expected a number from 0 on.")
    out = resolve_path(arguments.out)
    if out.suffix not in (".html", ".htm") or not out.parent.is_dir():
        raise UserError(f"--out: {arguments.out!r} is not a file in an existing folder that ends in .html.")
    check_can_be_made(out, "--out")
    folders = run_folders(arguments.runs)
    with redirect_stdout(sys.stderr):
        runs = [_reported(folder, name, arguments) for folder, name in zip(folders, short_names(folders), strict=True)]

    from panda.report.page import page

    write_whole(out, page(runs, arguments.x))
    print(f"{out} ({out.stat().st_size / 1000:,.0f} kB)")


def parser() -> Parser:
    """The flags of ``panda report``."""
    parser = Parser(
        prog="panda report",
        description="Write one HTML page about runs, which needs no network: curves that can be enlarged, answers"
        " before and after, samples with the loss of each token, data, time and memory, configuration with its"
        " origins, provenance. The data and the model of a run are read again; what is gone is said on the page. It"
        " shows texts of the data (none with --samples 0 --answers 0), and neither secrets nor home folders.",
        epilog="example: panda report runs/first runs/second --out report.html",
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run directory, also of a run that still trains")
    parser.add_argument("--out", default="report.html", metavar="FILE", help="by default %(default)s")
    parser.add_argument("--x", choices=[*X_AXES], default="steps", help="what curves are over; default %(default)s")
    parser.add_argument("--samples", type=int, default=4, metavar="N", help="samples that are shown; default 4")
    parser.add_argument("--answers", type=int, default=4, metavar="N", help="prompts that are answered; default 4")
    parser.add_argument(
        "--recorded_only", "--recorded-only", action="store_true", help="read neither the data nor the model"
    )
    parser.add_argument("--ckpt_path", "--ckpt-path", help=CKPT_PATH_HELP)
    parser.add_argument("--allow_pickle", "--allow-pickle", action="store_true", help="also read weights from pickles")
    parser.add_argument("--user_dir", "--user-dir", help="the folder of a run that has files of yours")
    add_blocking(parser)
    return parser


def _reported(run: Path, name: str, arguments: argparse.Namespace) -> Reported:
    """All that the page says of ``run``. What cannot be had is said there, and on stderr."""
    from panda.engine.checkpoints.in_use import being_read
    from panda.report.recorded import recorded

    with ExitStack() as reading:
        try:
            checkpoint = reading.enter_context(being_read(run))
        except UserError:  # of a later version, which is said where the model is loaded
            checkpoint = None
        reported = recorded(run, name, described(run, run.parent), arguments.answers, checkpoint)
        if arguments.recorded_only:
            return reported

        with activity("loading torch"):
            from panda.report.gathering import Gathering

        gathering = Gathering(run, reported, arguments.samples, arguments.answers, checkpoint)
        return gathering.done(partial(_configuration, run, arguments), partial(_trained, run, checkpoint, arguments))


def _configuration(run: Path, arguments: argparse.Namespace) -> Configuration:
    flags = ["--ckpt_path", arguments.ckpt_path] if arguments.ckpt_path else []
    flags += ["--allow_pickle", "true"] if arguments.allow_pickle else []
    flags += ["--user_dir", arguments.user_dir] if arguments.user_dir else []
    flags += [word for name in arguments.p for word in ("-p", BLOCK + name)]
    configuration = configure(arguments_of_run(run, flags))
    look_for_inputs(configuration)
    return configuration


def _trained(run: Path, checkpoint: Path | None, arguments: argparse.Namespace) -> Assistant:
    """The model of ``run``: of ``checkpoint``, or its export."""
    if checkpoint is not None:
        report_passed_over(run)
    moved = arguments.ckpt_path if trained_adapters(run) else None
    base = {"ckpt_path": moved, "base_path": None, "allow_pickle": arguments.allow_pickle}
    given = base | {"run": str(checkpoint or run), "p": arguments.p}
    sampling = {"system": None, "max_new_tokens": 1, "temperature": 0.0, "top_p": 1.0, "seed": None}
    return assistant_and_sampling(argparse.Namespace(**given, **sampling))[0]
