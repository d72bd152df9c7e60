"""A component that a run named, with its options: builds what its factory makes, and says whose it is."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Sequence
from contextlib import AbstractContextManager
from contextlib import contextmanager
from dataclasses import dataclass
from dataclasses import field
from typing import Any

from panda.registry.components import Component
from panda.registry.errors import UserError
from panda.registry.hooks import has_hooks
from panda.registry.offers import Offer
from panda.registry.offers import made_by


@dataclass(frozen=True)
class Chosen:
    """A component that the run named, with its options."""

    offer: Offer
    component: Component
    options: Any
    built: list[Any] = field(default_factory=list, repr=False, compare=False)
    """Those of the objects that ``build`` has made that have hooks. Copies of this share it."""

    @property
    def name(self) -> str:
        return self.component.name

    @property
    def label(self) -> str:
        return f"{self.component.kind} {self.component.name}"

    def attributed(self, part: str) -> AbstractContextManager[None]:
        """Goes around a call of ``part`` of this component, or of what it made: an exception names the distribution."""
        return self.offer.attributed(part)

    def build(self, context: Any, expected: Any) -> Any:
        """The product of the component's factory, given its options and ``context``.

        Raises UserError where it is not of the type ``expected``, or None.
        """
        with self.attributed("the factory"):
            built = self.component.factory(self.options, context)
        if built is None or not isinstance(built, expected):
            wanted = "an object" if expected is object else f"a {expected.__qualname__}{_lacking(built, expected)}"
            raise UserError(
                f"{self.component.describe()} returned {_shortened(built)}, and not {wanted}."
                f" This is a fault of {self.offer.describe()}."
            )
        if has_hooks(type(built)) and not any(built is each for each in self.built):
            self.built.append(built)
        if self.component.kind == "lr_scheduler":  # hooks, too, call a schedule
            return _attributed_schedule(built, self)
        if self.component.kind == "reader":  # tasks call it, and do not know where it is from
            made_by(self.offer, built)
        return built


@contextmanager
def attributed_by_code(chosen: Sequence[Chosen]) -> Iterator[None]:
    """Goes around a whole run: an exception out of the code of one of the ``chosen`` names its distribution.

    What panda itself calls of a component names it already (``attributed``), and is left as it is: this is for what
    others call of it, such as a layer, or the ``step`` of an optimizer.
    """
    try:
        yield
    except Exception as error:
        frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
        others = [each.offer for each in chosen if not each.offer.is_own]
        found = ((offer, frame) for frame in reversed(frames) for offer in others if offer.has(frame))
        offer, frame = next(found, (None, None))
        if offer is not None and frame is not None:
            offer.note(error, f"`{frame.f_code.co_qualname}`")
        raise


def _attributed_schedule(schedule: Callable[[int], float], chosen: Chosen) -> Callable[[int], float]:
    def factor(completed_steps: int) -> float:
        with chosen.attributed("the schedule"):
            return schedule(completed_steps)

    return factor


def _lacking(built: object, expected: Any) -> str:
    """What ``built`` lacks of a protocol that is ``expected``."""
    if not getattr(expected, "_is_protocol", False) or built is None:
        return ""
    members = [name for name in {**vars(expected), **expected.__annotations__} if not name.startswith("_")]
    return f", which has {' and '.join(f'`{name}`' for name in members if not hasattr(built, name))}"


def _shortened(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"a {type(value).__qualname__}"
