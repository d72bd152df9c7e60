"""Lines of stdin: in a terminal edited, with a history that is kept from one chat to the next; else as they are."""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from panda.files.terminal import printable
from panda.registry import UserError

KEPT = 1000
"""Messages in the history."""
PROMPT, CONTINUED = "> ", ". "


class TypedLines:
    """What a user types, or what a file or pipe says, message by message."""

    def __init__(self, commands: Sequence[str], *, keeps: bool) -> None:
        """``commands`` are completed by the tabulator; with ``keeps``, the history is also in a file."""
        self.commands = commands
        if sys.stdin is None:
            raise UserError("stdin is closed, and so there is nothing to read.")
        self.are_typed = sys.stdin.isatty()
        # Bytes that are not text of the terminal's encoding come as surrogates.
        if isinstance(sys.stdin, io.TextIOWrapper) and sys.stdin.errors == "strict":
            sys.stdin.reconfigure(errors="surrogateescape")
        self.readline = _readline() if self.are_typed and sys.stdout.isatty() else None
        self.file = history_file() if keeps and self.readline else None
        if self.readline:
            self._prepare(self.readline)

    def read(self, fence: str) -> str:
        """The next message: a line, or all lines between two that begin and end with ``fence``.

        Raises EOFError at the end of input, also within such lines, after a line about it on stderr.
        """
        text = self._line(PROMPT)
        if text.lstrip().startswith(fence):
            text = self._until(fence, text.lstrip()[len(fence) :])
        if text.strip():
            self._remember(text)
        return text

    def _until(self, fence: str, text: str) -> str:
        while not text.rstrip().endswith(fence):
            try:
                text += "\n" + self._line(CONTINUED)
            except EOFError:
                print(f"not sent: the input ended before the {fence} that ends the message.", file=sys.stderr)
                raise
        # A space, so that a message is none of the commands.
        return " " + text.rstrip()[: -len(fence)].strip("\n")

    def _line(self, prompt: str) -> str:
        if not self.are_typed:
            return input()
        if self.readline is None:  # else `input` would write the prompt to stdout, which may be a file
            print(prompt, end="", file=sys.stderr, flush=True)
            prompt = ""
        return input(prompt)

    def _prepare(self, readline: ModuleType) -> None:
        readline.set_auto_history(False)  # a message of several lines is one entry
        if "libedit" in (readline.__doc__ or ""):  # macOS
            readline.parse_and_bind("bind ^I rl_complete")
        else:
            readline.parse_and_bind("tab: complete")
            # Lines that are pasted together are one message. Python (3.11) switches it off for its own prompt.
            readline.parse_and_bind("set enable-bracketed-paste on")
        readline.set_completer_delims("")
        readline.set_completer(self._completion)
        for text in self._kept():
            readline.add_history(text)

    def _completion(self, begun: str, number: int) -> str | None:
        found = [command for command in self.commands if begun.startswith("/") and command.startswith(begun)]
        return found[number] if number < len(found) else None

    def _kept(self) -> list[str]:
        """The messages in the file, the latest last; a file that has grown to twice as many is cut to these."""
        if self.file is None:
            return []
        try:
            lines = self.file.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
            if len(lines) > 2 * KEPT:
                new = self.file.with_suffix(".new")
                _write(new, "\n".join(lines[-KEPT:]) + "\n", os.O_TRUNC)
                new.replace(self.file)
        except FileNotFoundError:
            return []
        except OSError as problem:
            self._without_file(problem)
            return []
        return [text for line in lines[-KEPT:] if isinstance(text := _of_json(line), str)]

    def _remember(self, text: str) -> None:
        if self.readline is None:
            return
        self.readline.add_history(text)
        if self.file is None:
            return
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            _write(self.file, json.dumps(text) + "\n", os.O_APPEND)
        except OSError as problem:
            self._without_file(problem)

    def _without_file(self, problem: OSError) -> None:
        """Say once that the history is of this chat only."""
        print(printable(f"{self.file}: {problem.strerror}: what you type is not kept."), file=sys.stderr)
        self.file = None


def history_file() -> Path | None:
    """Where the history is kept, as the XDG Base Directory Specification says for the state of a program.

    None for a user without a home folder.
    """
    state = os.environ.get("XDG_STATE_HOME", "")
    folder = Path(state if os.path.isabs(state) else os.path.expanduser("~/.local/state"))
    return folder / "panda" / "chat_history.jsonl" if folder.is_absolute() else None


def _readline() -> ModuleType | None:
    try:
        import readline
    except ImportError:  # Windows, or a Python that was built without it
        return None
    return readline


def _write(path: Path, text: str, how: int) -> None:
    """Write ``text`` to ``path``, which only its owner may read: what is typed may be private."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | how, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        os.fchmod(file.fileno(), 0o600)
        file.write(text)


def _of_json(line: str) -> object:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):  # not written by this program
        return None
