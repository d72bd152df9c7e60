"""The one exception that a user sees without a traceback, and the one that is nobody's fault."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """An error that the user can correct.

    The text says what was given, what was expected and what to do. The command line prints it
    without a traceback and exits with 2; anything else that is raised is a bug and keeps its own.
    """

    is_everywhere = False
    """Whether every process of the run raises it."""
    says_how_to_go_on = False
    """Whether the text has the line that continues the run: continued as it is, it would end in the same way."""
    is_said = False
    """Whether another process of the run prints the same error."""


class EndedBySignal(SystemExit):
    """A signal ends the process: raised in whatever code runs when it arrives, so that code is not at fault."""


def in_brief(problem: BaseException, most: int = 300) -> str:
    """The message of ``problem`` on one line, without the full stop; cut after ``most`` characters.

    Some libraries list all that they know.
    """
    text = " ".join(str(problem).split())
    return text.rstrip(".") if len(text) <= most else f"{text[:most]}..."


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """` Did you mean 'a' or 'b'?` for the names nearest to ``name``; empty where none is near."""
    spelling = {known_name.lower(): known_name for known_name in known}
    near = [spelling[match] for match in difflib.get_close_matches(name.lower(), spelling, n=3, cutoff=0.6)]
    return f" Did you mean {' or '.join(repr(match) for match in near)}?" if near else ""
