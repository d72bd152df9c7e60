"""``panda chat``: a dialogue with a trained model."""

from __future__ import annotations

import argparse
import io
import sys
from typing import TYPE_CHECKING

from panda.cli.answering import RUN_HELP
from panda.cli.answering import add_base
from panda.cli.answering import add_sampling
from panda.cli.answering import answer
from panda.cli.answering import assistant_and_sampling
from panda.cli.answering import note
from panda.cli.answering import opening
from panda.cli.answering import problem_of
from panda.cli.command import run_command
from panda.registry import UserError

if TYPE_CHECKING:
    from panda.answers.assistant import Assistant
    from panda.answers.assistant import Message
    from panda.answers.assistant import Sampling

NEW = "/new"
"""The line that starts a new dialogue."""


def main(argv: list[str] | None = None) -> int:
    """Entry point of ``panda chat``."""
    return run_command(_chat, argv)


def _chat(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="panda chat",
        description=f"Chat with a model, one line a turn, in the chat template that it was trained with. {NEW} starts a"
        " new dialogue; an empty line or the end of input ends the chat. stdout has the answers; all else is on"
        " stderr.",
        epilog="example: panda chat runs/instruct-llama-tiny",
    )
    parser.add_argument("run", metavar="RUN", help=RUN_HELP)
    add_base(parser)
    add_sampling(parser)
    arguments = parser.parse_args(argv)
    assistant, sampling = assistant_and_sampling(arguments, chats=True)
    first = opening(arguments)
    messages = list(first)
    while line := _read():
        if line == NEW:
            messages = list(first)
            continue
        if problem := problem_of(line):
            note(f"not sent: {problem}")
            continue
        try:
            asked = [*messages, {"role": "user", "content": line}]
            messages, ids = _that_fit(assistant, sampling, asked, len(first))
        except UserError as problem:  # the template refuses it
            note(f"not sent: {problem}")
            continue
        messages.append({"role": "assistant", "content": answer(assistant, ids, sampling)})


def _that_fit(
    assistant: Assistant, sampling: Sampling, messages: list[Message], first: int
) -> tuple[list[Message], list[int]]:
    """``messages`` and their ids, without the earliest exchanges where the model has too few positions for all.

    The ``first`` ones, of the system, stay.
    """
    room = assistant.room(sampling)
    ids = assistant.encode(messages)
    left_out = 0
    while room is not None and len(ids) > room and len(messages) > first + 2:
        messages = [*messages[:first], *messages[first + 2 :]]
        ids = assistant.encode(messages)
        left_out += 1
    if left_out:
        note(
            f"the dialogue's first {left_out} exchanges were left out; the model has {assistant.positions:,} positions"
        )
    return messages, ids


def _read() -> str:
    """The user's next line; empty at the end of input. Only a terminal is shown the prompt.

    Bytes that are not text of the terminal's encoding come as surrogates.
    """
    if isinstance(sys.stdin, io.TextIOWrapper) and sys.stdin.errors == "strict":
        sys.stdin.reconfigure(errors="surrogateescape")
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return ""
