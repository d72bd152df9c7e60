"""``panda generate``: answers prompts with a trained model, and prints each token as it is generated."""

from __future__ import annotations

import argparse

from panda.cli.answering import RUN_HELP
from panda.cli.answering import add_base
from panda.cli.answering import add_sampling
from panda.cli.answering import assistant_and_sampling
from panda.cli.answering import write
from panda.cli.command import run_command


def main(argv: list[str] | None = None) -> int:
    """Entry point of ``panda generate``."""
    return run_command(_generate, argv)


def _generate(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="panda generate",
        description="Answer prompts, in the form in which the model saw them in training: in its chat template if it"
        " has one, and otherwise as the beginning of a text.",
        epilog='example: panda generate runs/instruct-llama-tiny --prompt "Write panda in capitals."',
    )
    parser.add_argument("run", metavar="RUN", help=RUN_HELP)
    parser.add_argument("--prompt", nargs="+", required=True, help="one or more prompts")
    add_base(parser)
    add_sampling(parser)
    arguments = parser.parse_args(argv)
    assistant, sampling = assistant_and_sampling(arguments)
    for prompt in arguments.prompt:
        if len(arguments.prompt) > 1:
            print(f"> {prompt}")
        assistant.answer(assistant.encode([{"role": "user", "content": prompt}]), sampling, write)
        print()
