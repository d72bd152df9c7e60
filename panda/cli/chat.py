"""``panda chat``: a dialogue with a trained model."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from panda.cli.answering import RUN_HELP
from panda.cli.answering import Answered
from panda.cli.answering import add_base
from panda.cli.answering import add_sampling
from panda.cli.answering import answer
from panda.cli.answering import assistant_and_sampling
from panda.cli.answering import note
from panda.cli.answering import opening
from panda.cli.answering import problem_of
from panda.cli.command import run_command
from panda.cli.parser import Parser
from panda.cli.typed_lines import TypedLines
from panda.files.terminal import number_of
from panda.files.whole import write_whole
from panda.registry import UserError
from panda.registry.errors import did_you_mean
from panda.registry.location import resolve_path

if TYPE_CHECKING:
    from panda.answers.assistant import Assistant
    from panda.answers.assistant import Message
    from panda.answers.assistant import Sampling

FENCE = '"""'
"""What begins and ends a message of several lines."""
COMMANDS = {
    "/reset": "forget the dialogue, and begin a new one",
    "/system TEXT": "begin a new one with the system turn TEXT, or with none",
    "/save FILE": "write the dialogue, as a row of JSON that training reads",
    "/help": "show this",
    "/quit": "end the chat, as Ctrl-D does",
}
OTHER_INPUT = f"""\
{FENCE} begins a message of several lines, and {FENCE} ends it.
A message that begins with / is written with a space before it.
Ctrl-C stops an answer; what it has said until then stays in the dialogue."""


def main(argv: list[str] | None = None) -> int:
    """Entry point of ``panda chat``."""
    return run_command(_chat, argv)


def parser() -> Parser:
    """The flags of ``panda chat``."""
    parser = Parser(
        prog="panda chat",
        description="Chat with a model, in the chat template that it was trained with. stdout has the answers; all"
        " else is on stderr.",
        epilog=f"In the chat:\n{command_help()}\n\nexample: panda chat runs/instruct-llama-tiny",
    )
    parser.add_argument("run", metavar="RUN", help=RUN_HELP)
    parser.add_argument("--no_history", "--no-history", action="store_true", help="keep no file of what was typed")
    add_base(parser)
    add_sampling(parser)
    return parser


def _chat(argv: list[str]) -> None:
    arguments = parser().parse_args(argv)
    assistant, sampling = assistant_and_sampling(arguments, chats=True)
    lines = TypedLines([command.partition(" ")[0] for command in COMMANDS], keeps=not arguments.no_history)
    if lines.are_typed:
        note("/help lists the commands; Ctrl-D ends the chat.")
    Chat(assistant, sampling, opening(arguments)).go_on(lines)


def command_help() -> str:
    """What can be written in a chat besides messages, in lines."""
    return "\n".join([*(f"  {command:14} {what}" for command, what in COMMANDS.items()), OTHER_INPUT])


class Chat:
    """A dialogue with ``assistant``, which begins with ``first``: the system turn, or nothing."""

    def __init__(self, assistant: Assistant, sampling: Sampling, first: list[Message]) -> None:
        self.assistant, self.sampling = assistant, sampling
        self.first = first
        self.messages = list(first)
        self.saved: dict[Path, list[Message]] = {}
        """What this chat has written into files, which it may write again as the dialogue goes on."""
        self.commands: dict[str, Callable[[str], None]] = {
            "/reset": self.reset,
            "/system": self.system,
            "/save": self.save,
            "/help": lambda _: note(command_help()),
        }

    def go_on(self, lines: TypedLines) -> None:
        """Answer what ``lines`` say, until they end."""
        while True:
            try:
                text = lines.read(FENCE)
            except EOFError:
                return
            except KeyboardInterrupt:  # at the prompt: the line is given up
                note("\nCtrl-D ends the chat.")
                continue
            command, _, argument = text.partition(" ")
            if command in ("/quit", "/exit"):
                return
            try:
                if text.startswith("/"):
                    self.obey(command, argument.strip())
                elif text.strip():
                    self.reply(text.strip())
            except UserError as problem:
                note(str(problem))

    def obey(self, command: str, argument: str) -> None:
        """Do what a command says. Raises UserError."""
        if command not in self.commands:
            raise UserError(
                f"unknown command {printable_command(command)}.{did_you_mean(command, self.commands)} /help lists the"
                " commands; a message that begins with / is written with a space before it."
            )
        if argument and command in ("/reset", "/help"):
            raise UserError(f"{command} takes nothing after it, and {argument!r} is there. Nothing was done.")
        self.commands[command](argument)

    def reset(self, _: str = "") -> None:
        """Forget the dialogue."""
        self.messages = list(self.first)
        note("a new dialogue" + (", with the system turn" if self.first else ""))

    def system(self, text: str) -> None:
        """Begin a new dialogue with ``text`` as its system turn; none where it is empty. Raises UserError."""
        first = [{"role": "system", "content": text}] if text else []
        if text and (problem := problem_of(text)):
            raise UserError(f"/system: {problem}")
        try:
            self.assistant.encode([*first, {"role": "user", "content": "?"}])
        except UserError as problem:
            raise UserError(f"/system: not taken, the dialogue goes on as it was: {problem}") from None
        self.first = first
        self.reset()

    def save(self, where: str) -> None:
        """Write the dialogue to the file ``where``. Raises UserError."""
        if not where:
            raise UserError("/save needs the name of a file: /save chat.jsonl")
        if len(self.messages) == len(self.first):
            raise UserError("/save: nothing has been said yet.")
        path = resolve_path(where).absolute()
        before = self.saved.get(path)
        if path.exists() and (before is None or not holds(path, before)):
            raise UserError(f"/save: {path} exists, and is not replaced. Name another file.")
        if path.exists() and self.messages[: len(before or [])] != before:
            raise UserError(f"/save: {path} has an earlier dialogue of this chat, and keeps it. Name another file.")
        try:
            write_whole(path, as_row(self.messages))
        except OSError as problem:
            raise UserError(f"/save: {path}: {problem.strerror}. Name a file that can be written.") from None
        self.saved[path] = list(self.messages)
        note(f"{path}: {number_of(len(self.messages), 'message')}")

    def reply(self, text: str) -> None:
        """Answer ``text``, and remember both. Raises UserError where it cannot be given to the model."""
        if problem := problem_of(text):
            raise UserError(f"not sent: {problem}")
        asked = [*self.messages, {"role": "user", "content": text}]
        try:
            ids = that_fit(self.assistant, self.sampling, asked, len(self.first))
        except UserError as problem:  # the template refuses it
            raise UserError(f"not sent: {problem}") from None
        said = Answered()
        try:
            answer(self.assistant, ids, self.sampling, said)
        except KeyboardInterrupt:
            sys.stdout.write("\n")
            sys.stdout.flush()
            if not said.text:
                note("stopped before the first word; the dialogue is as it was.")
                return
            note("stopped; the dialogue goes on from here.")
        self.messages = [*asked, {"role": "assistant", "content": said.text}]


def as_row(messages: list[Message]) -> str:
    """``messages`` as a line that training reads."""
    return json.dumps({"messages": messages}, ensure_ascii=False) + "\n"


def holds(path: Path, messages: list[Message]) -> bool:
    """Whether the file ``path`` has nothing but ``messages``."""
    try:
        return path.read_bytes() == as_row(messages).encode()
    except OSError:
        return False


def printable_command(command: str) -> str:
    """``command`` as a message shows it."""
    return repr(command if len(command) <= 40 else f"{command[:40]}...")


def that_fit(assistant: Assistant, sampling: Sampling, messages: list[Message], first: int) -> list[int]:
    """The ids of ``messages``, without the earliest exchanges where the model has too few positions for all.

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
        what = "exchange was" if left_out == 1 else f"{left_out:,} exchanges were"
        note(f"the dialogue's first {what} left out; the model has {assistant.positions:,} positions")
    return ids
