"""``panda chat``: a dialogue with a trained model."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from panda.cli.answering import RUN_HELP
from panda.cli.answering import add_base
from panda.cli.answering import add_sampling
from panda.cli.answering import assistant_and_sampling
from panda.cli.answering import write
from panda.cli.command import run_command

if TYPE_CHECKING:
    from panda.answers.assistant import Message

NEW = "/new"
"""What begins a new dialogue."""


def main(argv: list[str] | None = None) -> int:
    """Entry point of ``panda chat``."""
    return run_command(_chat, argv)


def _chat(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="panda chat",
        description=f"Talk with a model, a line a turn, in the chat template that training used. {NEW} begins a new"
        " dialogue; an empty line or the end of input ends it.",
        epilog="example: panda chat runs/instruct-llama-tiny",
    )
    parser.add_argument("run", metavar="RUN", help=RUN_HELP)
    add_base(parser)
    add_sampling(parser)
    arguments = parser.parse_args(argv)
    assistant, sampling = assistant_and_sampling(arguments, chats=True)
    messages: list[Message] = []
    while line := _read():
        if line == NEW:
            messages = []
            continue
        messages.append({"role": "user", "content": line})
        answer = assistant.answer(assistant.encode(messages), sampling, write)
        print()
        messages.append({"role": "assistant", "content": answer})


def _read() -> str:
    """A line of the user's; empty at the end of input. The prompt is shown only on a terminal."""
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return ""
