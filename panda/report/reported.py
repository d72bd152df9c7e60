"""What a page says of a run. Each part that needs its data or its model may be missing, with the reason."""

from __future__ import annotations

import re
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import field
from pathlib import Path
from typing import Any

from panda.files.private import private
from panda.hooks.curves import Recorded

_HOMES = re.compile(r"(?<![\w.~-])(?:/home|/Users)/[^/\s'\",:]+")
"""Home folders of anybody: a run may be reported by somebody else than who trained it."""


@dataclass(frozen=True)
class Missing:
    """A part that the page lacks."""

    why: str


@dataclass(frozen=True)
class Data:
    """The data that a run trains on, as it is found now."""

    counts: Mapping[str, str]
    """What is said of it, by what it is about."""
    remarks: Sequence[str]
    """Rows that cannot be used, fields that are not used, what is held out, a line each."""
    lengths: Sequence[tuple[int, int, int]]
    """A histogram of the tokens of a sample: the least and the most of each bar, and the samples."""
    limit: int
    """max_seq_length."""
    cut: str
    """How many samples are cut to it, in words."""


@dataclass(frozen=True)
class Piece:
    """Text of one token, or of several that only together are characters."""

    text: str
    tokens: int
    supervised: bool
    loss: float | None
    """In nats, summed over the tokens; None where it is not known, or nothing precedes the token."""


@dataclass(frozen=True)
class ShownSample:
    """A sample, or a part of one, with what the model makes of each token."""

    name: str
    pieces: Sequence[Piece]
    left_out: int = 0
    """Tokens after these."""
    loss: float | None = None
    """The mean over its supervised tokens."""
    before: float | None = None
    """The same of the model that training began with."""


@dataclass(frozen=True)
class Answer:
    """What the models say to a prompt."""

    prompt: str
    answers: Mapping[str, str]
    """By whose it is."""


@dataclass(frozen=True)
class Reported:
    """A run, as a page shows it."""

    recorded: Recorded
    row: Mapping[str, Any]
    """What ``panda runs`` says of it."""
    configuration: Mapping[str, Any]
    provenance: Mapping[str, Any]
    weights: str = ""
    """Which weights answer, and give tokens their losses, in words."""
    damaged: int = 0
    """Lines of its records that are damaged."""
    data: Data | Missing = field(default=Missing("it was not read"))
    samples: Sequence[ShownSample] | Missing = field(default=Missing("the data was not read"))
    which_samples: str = ""
    no_losses: str = ""
    """Why the losses of their tokens are not known, if they are not."""
    answers: Sequence[Answer] | Missing = field(default=Missing("the model was not loaded"))
    which_answers: str = ""
    evaluation_answers: Sequence[Answer] = ()
    """What the run answered to evaluation data while it trained."""
    memory: Mapping[str, float] = field(default_factory=dict)
    """The estimate of a GPU's memory by part, in GiB."""
    skipped: Sequence[Mapping[str, Any]] = ()
    """Steps that were skipped, as the plugin ``guard`` wrote them."""
    profile: str = ""
    """What the plugin ``profile`` measured."""


def public(content: Any) -> Any:
    """``content``, as of JSON, without secrets, and with ``~`` for home folders: pages are sent to others."""
    return _without_homes(private(content))


def _without_homes(content: Any) -> Any:
    if isinstance(content, str):
        return _HOMES.sub("~", content)
    if isinstance(content, dict):
        return {_without_homes(key): _without_homes(value) for key, value in content.items()}
    return [_without_homes(each) for each in content] if isinstance(content, list) else content


def shown_path(path: Path) -> str:
    """``path`` as a page names it."""
    text: str = public(str(path))
    return text
