"""The ``auto`` reader: each file by the ending of its name, through the readers of panda's own."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Iterator
from dataclasses import dataclass
from dataclasses import fields
from functools import cached_property
from pathlib import Path

from panda.data.csv_reader import CsvOptions
from panda.data.packed_files import beginning
from panda.data.packed_files import with_packed
from panda.data.reading import BadRow
from panda.data.reading import Reader
from panda.data.reading import Row
from panda.data.text_reader import TextOptions
from panda.registry import Catalog
from panda.registry import register_reader
from panda.registry.choosing import load_component
from panda.registry.components import Component
from panda.registry.contexts import ReaderContext

NAME, OTHERWISE = "auto", "json"
"""The names of this reader, and of the one for a file that is named itself, with an ending and a beginning that no
reader knows."""
DOCUMENTATION = with_packed(".md", ".rst")
"""Endings of files that most often are about the data beside them: read where they are named, or by ``text``."""


@dataclass(frozen=True)
class AutoOptions(TextOptions, CsvOptions):
    """Options of the auto reader: those of the readers that it uses."""


@register_reader("auto", options=AutoOptions)
class AutoReader:
    """Each file by the ending of its name: JSON, CSV, Parquet, Arrow or plain text, also in one folder."""

    def __init__(self, options: AutoOptions, context: ReaderContext) -> None:
        # An installed package changes no run that does not name it: its reader is used where `reader` names it.
        catalog = Catalog()
        own = [offer for offer in catalog.offers("reader") if offer.is_own and offer.name != NAME]
        self._components = {component.name: component for component in (load_component(catalog, each) for each in own)}
        self._options, self._context = options, context
        self._built: dict[str, Reader] = {}

    @cached_property
    def suffixes(self) -> tuple[str, ...]:
        """The endings that all its readers have, but those of documentation."""
        endings = (ending for component in self._components.values() for ending in _suffixes(component))
        return tuple(ending for ending in endings if ending not in DOCUMENTATION)

    def read(self, file: Path) -> Iterator[Row | BadRow]:
        """What the reader for ``file`` reads of it."""
        return self.reader_for(file).read(file)

    def check(self, files: Iterable[Path]) -> None:
        """Raise UserError where what reads one of ``files`` lacks a library."""
        for file in files:
            self.reader_for(file)

    def reader_for(self, file: Path) -> Reader:
        """The reader that reads ``file``."""
        component = self._component_for(file)
        if component.name not in self._built:
            values = {field.name: getattr(self._options, field.name) for field in fields(component.options)}
            self._built[component.name] = component.factory(component.options(**values), self._context)
        return self._built[component.name]

    def _component_for(self, file: Path) -> Component:
        name = file.name.lower()
        for component in self._components.values():
            if name.endswith(_suffixes(component)):
                return component
        begun = beginning(file)
        knowing = (each for each in self._components.values() if begun.startswith(_beginnings(each)))
        return next(knowing, self._components[OTHERWISE])


def _suffixes(component: Component) -> tuple[str, ...]:
    """The endings that a reader of panda's own, a class, reads: it is not built, for which it may lack a library."""
    suffixes: tuple[str, ...] = component.factory.suffixes  # type: ignore[attr-defined]
    return suffixes


def _beginnings(component: Component) -> tuple[bytes, ...]:
    """What files begin with that such a reader reads, whatever their names are."""
    found: tuple[bytes, ...] = getattr(component.factory, "beginnings", ())
    return found
