"""``panda COMMAND``: runs the module of this package that has the command's name."""

from __future__ import annotations

import importlib
import sys

from panda.cli.command import interrupted
from panda.cli.command import print_version
from panda.cli.command import run_command
from panda.files.terminal import fitted
from panda.registry import UserError
from panda.registry.errors import did_you_mean

COMMANDS = {
    "list": "list the installed components, by kind",
    "show": "show one component: its options, and where it comes from",
    "check": "resolve a configuration, check its data and model, train nothing",
    "estimate": "estimate the memory of a configuration, and which GPUs it fits",
    "data": "show a configuration's data: counts, lengths, what carries loss",
    "prepare": "tokenise a configuration's data ahead of time",
    "tokenizer": "train a tokenizer on data, for pretraining",
    "plot": "draw curves of runs, or the learning rate of a configuration",
    "runs": "list runs: how far they are, their losses, speed and age",
    "report": "write an HTML page about runs: curves, samples, answers",
    "train": "train; the same as panda-train",
    "sweep": "train a grid of values, one run after another, or go on with it",
    "export": "write a run's checkpoint as a folder that plain transformers loads",
    "push": "put an export on the Hugging Face hub",
    "eval": "evaluate a model on data: loss, accuracy, scores of its answers",
    "generate": "answer prompts with a trained model",
    "chat": "chat with a trained model",
    "translate": "write a configuration of another tool in panda's keys",
    "delta": "make or apply the difference between a fine-tune and its base",
    "diff": "say where two runs part: configuration, data, versions, steps",
    "replay": "run a step of a run again, and name the samples that spoil it",
    "doctor": "say what is wrong with what is installed, and what to do",
    "completion": "print what has a shell complete commands, flags, names and choices",
    "new": "make a package with a component of your own",
}
"""Each command is a module of this package with ``main(argv)``; where argparse reads its flags, it has ``parser()``."""
HELP = "help"
"""``panda help COMMAND`` is ``panda COMMAND --help``."""

USAGE = (
    "usage: panda COMMAND ...\n\ncommands:\n"
    + "\n".join(f"  {name:10} {what}" for name, what in COMMANDS.items())
    + """

examples:
  panda list archs
  panda show model llama
  panda check panda:configs/instruct-tiny.yaml

`panda COMMAND --help` or `panda help COMMAND` explains a command."""
)


def main(argv: list[str] | None = None) -> int:
    """Entry point of ``panda``."""
    arguments = sys.argv[1:] if argv is None else argv
    if arguments[:1] == [HELP]:
        arguments = [*arguments[1:], "--help"]
    if not arguments or arguments[0] not in COMMANDS:
        return run_command(_without_command, arguments)
    try:
        command = importlib.import_module(f"panda.cli.{arguments[0]}")
    except KeyboardInterrupt:
        return interrupted()
    exit_code: int = command.main(arguments[1:])
    return exit_code


def _without_command(argv: list[str]) -> None:
    if argv and argv[0] not in ("-h", "--help"):
        if argv[0] in ("-V", "--version"):
            print_version()
            return
        raise UserError(
            f"unknown command {argv[0]!r}.{did_you_mean(argv[0], [*COMMANDS, HELP])} `panda --help` lists the commands."
        )
    print("\n".join(fitted(USAGE.split("\n"), 13)))


if __name__ == "__main__":
    sys.exit(main())
