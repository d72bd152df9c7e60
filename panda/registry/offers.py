"""Installed names and the modules that register them, read from package metadata. Imports none of them."""

from __future__ import annotations

import functools
import importlib.metadata
import re
from collections.abc import Iterable
from collections.abc import Iterator
from collections.abc import Mapping
from contextlib import contextmanager
from contextlib import suppress
from dataclasses import dataclass
from types import FrameType

from panda.registry.api import API_GROUP
from panda.registry.declarations import Declaration
from panda.registry.declarations import declarations
from panda.registry.errors import EndedBySignal
from panda.registry.errors import UserError
from panda.registry.errors import did_you_mean
from panda.registry.kinds import KINDS
from panda.registry.kinds import Kind

OWN_DISTRIBUTION = "panda-train"
"""The name under which panda itself is installed."""

USER_DIR = "user_dir"
"""Stands where a distribution does for components in the folder of ``user_dir``: ``user_dir:rwkv``."""

IN_PROCESS = "in_process"
"""The same for components that the process which calls ``panda.train`` has registered."""

SOURCES_READ = 50
"""Modules of other packages of which the sources are read to answer one question.

A source takes ten times as long to read as the metadata that names it, so with more than these none is read.
"""

ORIGIN = "This came out of "
"""How a note begins that says where an exception came from."""


@dataclass(frozen=True)
class Offer:
    """An entry point: a distribution says that one of its modules registers this name."""

    kind: str
    name: str
    module: str
    distribution: str
    """What provides it: a distribution, a user's file by its path, ``USER_DIR`` or ``IN_PROCESS``."""
    version: str
    api: str = ""
    """The version of panda's API that its distribution states; empty where it states none."""
    file: str = ""
    """The source of a component that no distribution provides; else empty."""
    line: int = 0
    """The line in ``file``."""

    @property
    def qualified(self) -> str:
        """The spelling that means this offer and no other: ``acme-panda:rwkv``."""
        return f"{self.distribution}:{self.name}"

    @property
    def label(self) -> str:
        """``plugin early_stopping``."""
        return f"{self.kind} {self.name}"

    @property
    def is_own(self) -> bool:
        """Whether it is one of panda's own."""
        return self.distribution == OWN_DISTRIBUTION

    @property
    def declaration(self) -> Declaration | None:
        """The declaration of this name in the module's source, which is not imported."""
        for declared in declarations(self.module, self.file):
            if declared.kind == self.kind and self.name.lower() in map(str.lower, declared.names):
                return declared
        return None

    @property
    def provider(self) -> str:
        """What provides it, for messages and lists."""
        return f"{self.distribution} {self.version}".rstrip()

    def describe(self) -> str:
        if self.file:
            return f"{self.file}:{self.line} ({self.kind} {self.name!r})"
        group = KINDS[self.kind].group if self.kind in KINDS else f"panda.{self.kind}s"
        return f"{self.provider} (entry point {group}: {self.name} = {self.module})"

    @contextmanager
    def attributed(self, part: str) -> Iterator[None]:
        """Goes around a call of ``part`` of this component: an exception gets a note that names its distribution.

        Components call each other, and the innermost one is what failed: an exception that has such a note keeps
        it. A UserError has no notes: one that the component itself raises gets a line, and one of panda's is complete.
        Raises UserError in place of SystemExit.
        """
        try:
            yield
        except EndedBySignal:
            raise
        except SystemExit as ended:  # with 0 a run that was cut off would look like one that has ended well
            instead = " A hook stops a run by `run.stop(reason)`." if part.startswith("the hook") else ""
            raise UserError(
                f"{part} of {self.label} ended the process (SystemExit: {ended}).{instead} This is a fault of"
                f" {self.describe()}."
            ) from ended
        except Exception as error:
            self.note(error, part)
            raise

    def note(self, error: Exception, part: str) -> None:
        """Say in ``error`` that it came out of ``part`` of this component, unless it has such a note."""
        if isinstance(error, UserError):
            if not self.is_own and not _raised_by_panda(error) and ORIGIN not in str(error):
                error.args = (f"{error}\n{ORIGIN}{part} of {self._origin()}",)
        elif not any(note.startswith(ORIGIN) for note in getattr(error, "__notes__", ())):
            error.add_note(f"{ORIGIN}{part} of {self._origin()}")

    def has(self, frame: FrameType) -> bool:
        """Whether ``frame`` runs code of the package or the file that this component is in."""
        if self.file:
            return frame.f_code.co_filename == self.file
        package = str(frame.f_globals.get("__name__", "")).partition(".")[0]
        return package == self.module.partition(".")[0]

    def _origin(self) -> str:
        component = f"{self.kind} {self.name!r}"
        if self.file:
            return f"{component}, {self.file}:{self.line}."
        source = f"{component}, panda's own." if self.is_own else f"{component}: {self.describe()}."
        return source + (f" `-p no:{self.name}` runs without it." if self.kind == "plugin" else "")


def _raised_by_panda(error: UserError) -> bool:
    """Whether code of panda's own raised ``error``, perhaps called by a component."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and trace.tb_frame.f_globals.get("__name__", "").partition(".")[0] == "panda"


def made_by(offer: Offer, built: object) -> None:
    """Remember on ``built``, for ``maker``, that it came with ``offer``. Copies of it remember that, too."""
    with suppress(AttributeError, TypeError):  # one without a __dict__ cannot remember, nor can a class or a module
        object.__setattr__(built, _MAKER, offer)


def maker(built: object) -> Offer | None:
    """The offer that ``built`` came with; None where that is not known."""
    offer: Offer | None = getattr(built, "__dict__", {}).get(_MAKER)
    return offer


_MAKER = "_panda_offer"


@functools.cache
def installed() -> Mapping[str, Mapping[str, tuple[Offer, ...]]]:
    """Every offer, by kind and by its name in lower case: the one metadata scan of a process.

    ``installed.cache_clear()`` forgets it. A distribution whose files cannot be read offers nothing.
    """
    texts: list[tuple[str, str, str]] = []  # a distribution's name, its version, its entry points
    seen: set[str] = set()
    for distribution in importlib.metadata.distributions():
        name = _name(distribution)
        if name in seen:  # the first on sys.path is the one that is imported
            continue
        seen.add(name)
        try:
            text = distribution.read_text("entry_points.txt") or ""
        except Exception:  # no text, or a finder of somebody else's
            continue
        if "panda." in text:
            texts.append((name, _version(distribution), text))
    groups = {kind.group: kind.name for kind in KINDS.values()}
    added = [kind for _, _, text in texts if "panda.kinds" in text for kind in _added_kinds(text)]
    groups |= {f"panda.{kind}s": kind for kind in added}
    offers: dict[Offer, None] = {}  # ordered, and a distribution that repeats itself says a thing once
    for name, version, text in texts:
        stated = [value for _, entry, value in _entry_points(text, {API_GROUP: "api"}) if entry == "version"]
        api = stated[0].removeprefix("v") if stated else ""  # pyproject.toml takes no number there, but `v1`
        for kind, entry, module in _entry_points(text, groups):
            if kind != "kind" or entry in added:
                offers[Offer(kind, entry, module, name, version, api)] = None
    return by_name(offers, groups.values())


def by_name(offers: Iterable[Offer], among: Iterable[str]) -> dict[str, dict[str, tuple[Offer, ...]]]:
    """``offers``, each of a kind ``among`` these, by kind and by name in lower case; of one name by distribution."""
    found: dict[str, dict[str, tuple[Offer, ...]]] = {kind: {} for kind in among}
    for offer in sorted(offers, key=lambda offer: (offer.name.lower(), offer.distribution)):
        names = found[offer.kind]
        names[offer.name.lower()] = (*names.get(offer.name.lower(), ()), offer)
    return found


def kinds() -> Mapping[str, Kind]:
    """Every kind of component by name: panda's own, then those that packages add. Imports nothing."""
    return kinds_of(installed()["kind"])


def kinds_of(added: Mapping[str, tuple[Offer, ...]]) -> Mapping[str, Kind]:
    """Panda's own kinds, and those that the offers of ``added`` add, by name."""
    return KINDS | {offers[0].name: _kind_of(offers) for offers in added.values()}


def kind_named(text: str, known: Mapping[str, Kind] | None = None) -> Kind:
    """The kind called ``text``, singular or plural, of those that are ``known``, by default all that are installed.

    Raises UserError for any other word.
    """
    known = kinds() if known is None else known
    for kind in known.values():
        if text in (kind.name, kind.plural, kind.plural.replace("_", "-"), kind.name.replace("_", "-")):
            return kind
    names = [kind.plural for kind in known.values()]
    raise UserError(f"unknown kind {text!r}.{did_you_mean(text, names)} The kinds are: {', '.join(names)}.")


def _kind_of(offers: tuple[Offer, ...]) -> Kind:
    """The kind that ``offers`` of one name add."""
    declaration = offers[0].declaration
    summary = declaration.summary if declaration else ""
    return Kind(offers[0].name, f"{offers[0].name}s", summary, tuple(offer.distribution for offer in offers))


def _added_kinds(text: str) -> list[str]:
    """The kinds that the entry points in ``text`` add.

    A name of panda's own adds nothing: installing a package changes no kind. Nor does one that cannot be a key.
    """
    names = [name for _, name, _ in _entry_points(text, {"panda.kinds": "kind"})]
    return [name for name in names if can_be_kind(name)]


def can_be_kind(name: str) -> bool:
    """Whether a kind that is added can have ``name``: it is a key, and none of panda's own."""
    return name not in KINDS and re.fullmatch("[a-z][a-z0-9_]*", name) is not None


def all_installed() -> Iterator[Offer]:
    """Every offer, by kind, name and distribution."""
    return (offer for names in installed().values() for offers in names.values() for offer in offers)


def strays(reference: str) -> str:
    """What to say of entry points named ``reference`` in groups that panda does not read: an author may misspell one.

    Reads metadata, for the message of a name that is unknown.
    """
    groups = {kind.group for kind in kinds().values()}
    found = []
    for distribution in importlib.metadata.distributions():
        try:
            text = distribution.read_text("entry_points.txt") or ""
        except Exception:  # as in installed()
            continue
        named = set(re.findall(r"^\s*\[\s*(panda[^\]]*?)\s*\]", text, re.MULTILINE | re.IGNORECASE)) - groups
        if not named and "panda." not in text:
            continue
        for line in map(str.strip, text.splitlines()):
            if line and "=" not in line and line.split()[0].lower() == reference.rpartition(":")[2].lower():
                found.append(
                    f" {_name(distribution)} {_version(distribution)} declares {line!r}, which is no `name = module`:"
                    f" mend its entry points, and install it again."
                )
        for group, name, module in _entry_points(text, {group: group for group in named}):
            if name.lower() == reference.rpartition(":")[2].lower():
                found.append(
                    f" {_name(distribution)} {_version(distribution)} declares {name} = {module} under {group!r}, which"
                    f" panda does not read: `panda doctor {_name(distribution)}` says what to write."
                )
    return "".join(dict.fromkeys(found))


def with_readable_source(offers: Iterable[Offer]) -> list[Offer]:
    """Those of ``offers`` whose ``declaration`` one answer may ask for.

    All of them, or only panda's own where the others are in more than ``SOURCES_READ`` modules.
    """
    offers = list(offers)
    modules = {offer.module for offer in offers if not offer.is_own}
    return offers if len(modules) <= SOURCES_READ else [offer for offer in offers if offer.is_own]


def _entry_points(text: str, groups: Mapping[str, str]) -> Iterator[tuple[str, str, str]]:
    """Kind, name and module of the entry points in ``text`` of ``groups``, with their kinds. Skips a line without `=`.

    importlib.metadata reads the file in the same way, but makes more objects of it, and fails at such a line.
    """
    kind = None
    for line in map(str.strip, text.splitlines()):
        if line.startswith("["):
            kind = groups.get(line.strip("[] "))
        elif kind and not line.startswith("#"):
            name, equals, value = line.partition("=")
            module = value.partition(":")[0].partition("[")[0].strip()
            if equals:
                yield kind, name.strip(), module


def _name(distribution: importlib.metadata.Distribution) -> str:
    """The name of ``distribution``, from its folder: METADATA is long, and may be missing."""
    stem, _ = _folder(distribution)
    return normalised(stem.partition("-")[0] or _stated(distribution, "Name"))


def _version(distribution: importlib.metadata.Distribution) -> str:
    stem, is_wheel = _folder(distribution)
    return stem.partition("-")[2] if is_wheel and "-" in stem else _stated(distribution, "Version")


def _folder(distribution: importlib.metadata.Distribution) -> tuple[str, bool]:
    """The stem of its folder, and whether that is a ``.dist-info``, which by specification is ``NAME-VERSION``.

    The stem of an ``.egg-info`` begins with the name, too. Empty for a distribution without such a folder.
    """
    stem, _, suffix = getattr(getattr(distribution, "_path", None), "name", "").rpartition(".")
    return (stem, suffix == "dist-info") if suffix in ("dist-info", "egg-info") else ("", False)


def _stated(distribution: importlib.metadata.Distribution, field: str) -> str:
    """``field`` of the METADATA of ``distribution``; ``?`` where there is none."""
    try:
        return distribution.metadata[field] or "?"
    except Exception:
        return "?"


def normalised(distribution: str) -> str:
    """The name of a distribution as it is compared: ``Acme_Panda`` is ``acme-panda``."""
    return re.sub(r"[-_.]+", "-", distribution).lower()
