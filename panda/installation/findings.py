"""What an examination finds wrong."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """Something that is wrong with what is installed."""

    subject: str
    """What it is about: a distribution with its version, and the entry point or module."""
    problem: str
    advice: str
    """What to do about it."""
    is_broken: bool = True
    """Whether something does not work; otherwise it is slow, unclear or about to break."""

    def __str__(self) -> str:
        return f"{self.subject}: {self.problem}\n    {self.advice}"
