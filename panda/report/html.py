"""HTML that escapes by construction: only what ``element`` made is markup, every other text is shown as it is."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Mapping
from collections.abc import Sequence
from html import escape
from typing import Any

from panda.files.terminal import printable

VOID = ("meta", "link", "wbr")
"""Elements that have no end."""


FOLDED = 10
"""Entries of a list, at most, that are shown without being asked for."""


class Html(str):
    """Text that is HTML already."""


def html(*parts: object) -> Html:
    """``parts`` one after another: HTML as it is, anything else as text, with what would steer it as escapes."""
    return Html("".join(part if isinstance(part, Html) else escape(printable(str(part))) for part in parts))


def element(name: str, /, *children: object, **attributes: object) -> Html:
    """An element. Of ``attributes``, ``class_`` is ``class``, ``data_low`` is ``data-low``; None leaves one out."""
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(printable(str(value)))}"'
        for key, value in attributes.items()
        if value is not None
    )
    return Html(f"<{name}{written}>" if name in VOID else f"<{name}{written}>{html(*children)}</{name}>")


def joined(between: str, parts: Iterable[object]) -> Html:
    """``parts`` with the text ``between`` between two of them."""
    return Html(html(between).join(html(part) for part in parts))


def table(rows: Iterable[Sequence[object]], head: Sequence[object] = ()) -> Html:
    """A table that scrolls by itself where it is wider than the page. The first cell of a row names it."""
    top = element("thead", element("tr", *(element("th", cell, scope="col") for cell in head))) if head else ""
    lines = [
        element("tr", element("th", breakable(first), scope="row"), *(element("td", cell) for cell in others))
        for first, *others in rows
    ]
    # One that scrolls has to be reached from the keyboard.
    return element("div", element("table", top, element("tbody", *lines)), class_="wide", tabindex="0")


def breakable(name: object) -> Html:
    """``name``, which a line may end in after an underscore."""
    return html(name) if isinstance(name, Html) else Html(html(name).replace("_", "_" + element("wbr")))


def nested(content: Any) -> Html:
    """``content``, as of JSON, as text: mappings and lists as lists within lists."""
    if isinstance(content, Mapping) and content:
        return element("ul", *(element("li", element("b", key), " ", folded(each)) for key, each in content.items()))
    if isinstance(content, (list, tuple)) and content:
        if not any(isinstance(each, (Mapping, list, tuple)) for each in content):
            return joined(" ", content)
        return element("ul", *(element("li", nested(each)) for each in content))
    return html("–" if content is None or content in ({}, [], "") else as_written(content))


def folded(content: Any) -> Html:
    """``content`` as ``nested`` shows it, behind a line to open where that is long."""
    shown = nested(content)
    if shown.count("<li>") <= FOLDED:
        return shown
    return element("details", element("summary", f"{shown.count('<li>'):,} entries"), shown)


def as_written(value: Any) -> str:
    """A value of a configuration as YAML has it."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        return ", ".join(map(as_written, value))
    return "null" if value is None else str(value)
