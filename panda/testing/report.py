"""What a check found: a line for each promise, and one error at the end that names all that are broken."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from panda.files.terminal import number_of

Result = TypeVar("Result")

LAST_LINES = 25
"""Lines of what a failed command printed that a report repeats."""


class Report:
    """Prints what a check of ``subject`` finds, as it is found."""

    def __init__(self, subject: str) -> None:
        self.subject = subject
        self._broken: list[str] = []
        print(subject, flush=True)

    def kept(self, promise: str, found: str) -> None:
        """``promise`` is kept: ``found`` says what was compared, and how close it was."""
        print(f"  ok      {promise}: {found}", flush=True)

    def note(self, promise: str, found: str) -> None:
        """``promise`` does not apply, or could not be tried: ``found`` says why, and what follows for users."""
        print(f"  note    {promise}: {found}", flush=True)

    def broken(self, promise: str, found: str, advice: str) -> None:
        """``promise`` is broken: what was ``found``, and the ``advice`` what to do."""
        text = f"{promise}: {found}\n          {advice}"
        self._broken.append(text)
        print(f"  BROKEN  {text}", flush=True)

    def judge(self, promise: str, is_kept: bool, found: str, advice: str) -> None:
        """``promise`` is kept or broken, by what was ``found``."""
        if is_kept:
            self.kept(promise, found)
        else:
            self.broken(promise, found, advice)

    def tried(self, promise: str, advice: str, attempt: Callable[[], Result]) -> Result | None:
        """The result of ``attempt``; None where it raises, which breaks ``promise``."""
        try:
            return attempt()
        except Exception as problem:
            self.failed(promise, problem, advice)
            return None

    def failed(self, promise: str, problem: Exception, advice: str) -> None:
        """``promise`` is broken, since ``problem`` was raised."""
        lines = str(problem).splitlines() or [""]
        shown = [f"{type(problem).__name__}: {lines[0]}", *(["..."] if len(lines) > LAST_LINES else [])]
        self.broken(promise, "\n            ".join([*shown, *lines[1:][-LAST_LINES:]]), advice)

    def finish(self) -> None:
        """Raise AssertionError where a promise is broken."""
        if self._broken:
            problems = "\n".join(f"- {text}" for text in self._broken)
            raise AssertionError(
                f"{self.subject}: {number_of(len(self._broken), 'promise is', 'promises are')} broken:\n{problems}"
            )
