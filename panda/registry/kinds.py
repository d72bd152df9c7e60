"""The kinds of component. Adding a kind of panda's own is one entry in this table.

Packages add kinds as components of the kind ``kind``: one entry in their metadata.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Kind:
    """A kind of component, and the entry-point group in which packages declare names of it."""

    name: str
    """Singular, and the option that names a component of this kind: ``optimizer``."""
    plural: str
    """``panda list optimizers``."""
    summary: str
    """What a component of this kind is."""
    providers: tuple[str, ...] = ()
    """The distributions that add it; none for a kind of panda's own."""

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
        Kind("kind", "kinds", "kinds of component that packages add"),
    )
}

"""Panda's own kinds by name. ``offers.kinds()`` has those that packages add, too."""
