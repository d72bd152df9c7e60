"""What hooks ask of a run, and how its ranks agree on it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from dataclasses import field
from math import prod
from typing import Any

from panda.engine.processes import Processes
from panda.registry import UserError
from panda.registry.hooks import Caller
from panda.registry.hooks import caller

MOMENTS = (
    *("panda_run_start", "panda_step_start", "panda_gradients", "panda_step_end", "panda_epoch_end"),
    *("panda_evaluation_start", "panda_evaluation", "panda_checkpoint_saved"),
)
"""Hooks that every rank calls while a run trains."""


@dataclass(frozen=True)
class Stop:
    """Why a run ends before its last step."""

    by: str
    """Who asked for it: `plugin early_stopping`."""
    reason: str


@dataclass
class Asked:
    """What was asked for at a moment, by who asked for it."""

    stop: dict[str, str] = field(default_factory=dict)
    """The reason."""
    skip: dict[str, str] = field(default_factory=dict)
    """The reason."""
    rate: dict[str, float] = field(default_factory=dict)
    """A factor of the learning rate."""
    save: dict[str, bool] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.stop or self.skip or self.rate or self.save)


class Asking:
    """What the hooks of this rank ask for, until all ranks have agreed on it."""

    def __init__(self) -> None:
        self.moment: str | None = None
        """The hook that every rank calls now; None while there is none."""
        self.asked = Asked()

    @contextmanager
    def at(self, moment: str) -> Iterator[None]:
        """Goes around the calls of the hook ``moment``, which every rank makes."""
        self.moment = moment
        try:
            yield
        finally:
            self.moment = None

    def called(self, what: str, moments: tuple[str, ...] = MOMENTS) -> Caller:
        """Whose hook calls ``what`` of the run. Raises RuntimeError outside of ``moments``."""
        called = caller()
        if called is None or self.moment not in moments:
            raise RuntimeError(
                f"run.{what} was called where ranks do not meet. Call it in a hook that is called on every rank:"
                f" {', '.join(moments)}."
            )
        return called

    def allowed(self, what: str, moments: tuple[str, ...] = MOMENTS) -> Caller:
        """Whose hook asks for ``what``. Raises RuntimeError outside of ``moments``, and where it has
        ``acts = False``.
        """
        called = self.called(what, moments)
        if not called.acts:
            raise RuntimeError(f"run.{what} was called by {called.label}, which says `acts = False`. Leave that out.")
        return called

    def agreed(self, processes: Processes) -> Asked:
        """What was asked on any rank since the last call, the same on all of them. Every rank has to call it."""
        asked, self.asked = self.asked, Asked()
        if not processes.any_(bool(asked)):
            return asked
        everywhere = processes.from_all(asked)
        whole = Asked()
        for each in everywhere:
            for name in ("stop", "skip", "save"):
                first = getattr(whole, name)
                first |= {who: what for who, what in getattr(each, name).items() if who not in first}
            for who, factor in each.rate.items():
                if whole.rate.setdefault(who, factor) != factor:
                    factors = sorted({each.rate[who] for each in everywhere if who in each.rate})
                    raise UserError(
                        f"{who} scales the learning rate by {' and by '.join(map(str, factors))} on different ranks of"
                        " one run. This is a fault of that package: it has to ask for the same factor on each of them."
                    )
        return whole


def product(rates: dict[str, float]) -> float:
    """The product of the factors of ``rates``, in an order that is the same on all ranks."""
    return prod(rates[who] for who in sorted(rates))


@dataclass(frozen=True)
class Added:
    """A number that a hook adds to the next record."""

    by: str
    value: Any
    """A number, of numpy too, or a tensor of one element, which is read when the record is made."""
