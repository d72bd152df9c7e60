"""The kinds of component. Adding a kind is one entry in this table."""

from __future__ import annotations

from dataclasses import dataclass

from panda.registry.errors import UserError
from panda.registry.errors import did_you_mean


@dataclass(frozen=True)
class Kind:
    """A kind of component, and the entry-point group in which packages declare names of it."""

    name: str
    """Singular, and the option that names a component of this kind: ``optimizer``."""
    plural: str
    """``panda list optimizers``."""
    summary: str
    """What a component of this kind is."""

    @property
    def group(self) -> str:
        """The entry-point group in which packages declare components of this kind."""
        return f"panda.{self.plural}"


KINDS: dict[str, Kind] = {
    kind.name: kind
    for kind in (
        Kind("task", "tasks", "what is learned: text to token ids and labels, and the loss"),
        Kind("model", "models", "a network, built from options"),
        Kind("arch", "archs", "a name for option values of a model"),
        Kind("optimizer", "optimizers", "how weights follow gradients"),
        Kind("lr_scheduler", "lr_schedulers", "the learning rate of each optimizer step"),
        Kind("reader", "readers", "files to rows"),
        Kind("plugin", "plugins", "what happens around a step: hook implementations"),
    )
}


def kind_named(text: str) -> Kind:
    """The kind called ``text``, singular or plural. Raises UserError for any other word."""
    for kind in KINDS.values():
        if text in (kind.name, kind.plural, kind.plural.replace("_", "-"), kind.name.replace("_", "-")):
            return kind
    names = [kind.plural for kind in KINDS.values()]
    raise UserError(f"unknown kind {text!r}.{did_you_mean(text, names)} The kinds are: {', '.join(names)}.")
