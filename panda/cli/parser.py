"""The flags of a command: read by argparse, explained in a help that fits the terminal, completed by a shell."""

from __future__ import annotations

import argparse
import re
import textwrap
from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Sequence
from typing import Any
from typing import NoReturn
from typing import TypeAlias

from panda.configuration.arguments import blocked_name
from panda.registry import UserError
from panda.registry.catalog import catalog_with
from panda.registry.choosing import BLOCK
from panda.registry.errors import did_you_mean

Values: TypeAlias = Callable[[Sequence[str]], Iterable[str]]
"""What a value can be, of the words before it on the command line."""


class _Help(argparse.HelpFormatter):
    """Wraps each line of a text by itself, so that lists and examples keep their lines; one spelling of each flag."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return "\n".join(
            textwrap.fill(
                line,
                width,
                initial_indent=indent,
                subsequent_indent=indent + " " * (len(line) - len(line.lstrip())),
                break_long_words=False,
                break_on_hyphens=False,
            )
            for line in text.splitlines()
        )

    def _format_action_invocation(self, action: argparse.Action) -> str:
        spellings = {text.replace("-", "_"): text for text in reversed(action.option_strings)}
        if len(spellings) == len(action.option_strings):
            return super()._format_action_invocation(action)
        value = "" if action.nargs == 0 else " " + self._format_args(action, action.dest.upper())
        return ", ".join(reversed(spellings.values())) + value


class Parser(argparse.ArgumentParser):
    """The parser of ``panda COMMAND``."""

    def __init__(self, **options: Any) -> None:
        super().__init__(formatter_class=_Help, **options)
        self.values: dict[str, Values] = {}
        """What a shell completes as the value of an option or a positional argument that argparse gives no choices, by
        its ``dest``."""

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """The values of ``args``. Raises UserError, which says what was meant, for what cannot be read."""
        found, rest = self.parse_known_args(args, namespace)
        if rest:
            self.error(f"{rest[0]!r} is not expected here.{did_you_mean(rest[0].partition('=')[0], self.flags())}")
        return found

    def error(self, message: str) -> NoReturn:
        """Raise UserError."""
        raise UserError(f"{message.removeprefix('argument ')}\n{in_short(self.format_usage())}")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            names = [*map(str, action.choices)]
            near = did_you_mean(str(value), names)
            raise argparse.ArgumentError(action, f"{value!r} is none of {', '.join(names)}.{near}")

    def values_of(self, action: argparse.Action, before: Sequence[str]) -> list[str]:
        """What the value of ``action`` can be, after the words ``before``; empty for what is no closed set."""
        if action.dest in self.values:
            return [*self.values[action.dest](before)]
        return [*map(str, action.choices or ())]

    def flags(self) -> list[str]:
        """Its flags, each in one spelling."""
        spellings = {text.replace("-", "_"): text for text in reversed(self._option_string_actions)}
        return [text for text in reversed(spellings.values()) if text.startswith("--")]

    def next_word(self, words: Sequence[str]) -> tuple[Parser, list[argparse.Action], bool]:
        """What comes after ``words``: the parser that reads it, the arguments whose value it can be, and whether it can
        be a flag."""
        positional = [action for action in self._actions if not action.option_strings]
        option, left, taken = None, 0.0, 0
        for number, word in enumerate(words):
            flag, equals, _ = word.partition("=")
            if word.startswith("-") and flag in self._option_string_actions:
                option = self._option_string_actions[flag]
                left = 0 if equals else _most(option)
            elif option is not None and left:
                left -= 1
            elif positional:
                chosen = positional[0]
                if isinstance(chosen, argparse._SubParsersAction) and word in chosen.choices:
                    inner: Parser = chosen.choices[word]
                    return inner.next_word(words[number + 1 :])
                taken += 1
                if taken == _most(chosen):
                    positional.pop(0)
                    taken = 0
        if option is not None and left:
            several = option.nargs in ("+", "*")
            return self, [option, *(positional[:1] if several else [])], several or option.nargs == "?"
        return self, positional[:1], True


def in_short(usage: str) -> str:
    """The lines of ``usage`` that show how to call its command, for a message, and where the rest is."""
    lines = usage.strip().partition("\n\n")[0]
    command = re.match(r"usage: (panda [\w-]+( [a-z]+(?= \[-h\]))?)", lines)
    return f"{lines}\n`{command[1] if command else 'panda'} --help` explains it."


def add_blocking(parser: Parser) -> None:
    """Add ``-p no:NAME``."""
    what = "leave out a plugin, or what a distribution provides"
    parser.add_argument("-p", action="append", default=[], type=_blocked, metavar="no:NAME", help=what)
    parser.values["p"] = that_can_be_left_out


def _blocked(text: str) -> str:
    try:
        return blocked_name(text)
    except UserError as problem:
        raise argparse.ArgumentTypeError(str(problem)) from None


def that_can_be_left_out(before: Sequence[str]) -> list[str]:
    """What ``-p`` can be given."""
    offers = catalog_with(None).offers("plugin")
    return [
        BLOCK + name for name in dict.fromkeys([each.name for each in offers] + [each.distribution for each in offers])
    ]


def _most(action: argparse.Action) -> float:
    """The most words that the value of ``action`` has."""
    if action.nargs in ("+", "*"):
        return float("inf")
    return action.nargs if isinstance(action.nargs, int) else 1
