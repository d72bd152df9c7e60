"""Components in files of the user, without a package: a folder (``user_dir``), or ``FILE.py:NAME`` in place of a name.

Their names are read in the source, as those of packages are in metadata, and only what a run names is imported. A
module gets the name that Python itself would give it where its folder (or that of its outermost package) is on
``sys.path``, so that files can import each other; that folder comes last there, and takes nothing from what is
installed.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import linecache
import os
import re
import sys
from collections.abc import Collection
from collections.abc import Iterable
from collections.abc import Iterator
from pathlib import Path

from panda.registry.components import forget
from panda.registry.components import registered_in_process
from panda.registry.declarations import declarations
from panda.registry.declarations import forget_sources
from panda.registry.declarations import line_of_hooks
from panda.registry.errors import UserError
from panda.registry.location import resolve_path
from panda.registry.offers import IN_PROCESS
from panda.registry.offers import USER_DIR
from panda.registry.offers import Offer
from panda.registry.offers import all_installed
from panda.registry.offers import can_be_kind
from panda.registry.offers import kinds

_FILE = re.compile(r"(?P<file>.+\.py)(?::(?P<name>[^:/]+))?", re.DOTALL)

MOST_FILES, MOST_NAMES = 1000, 50_000
"""How many Python files a folder of the user's may have, and how many files and folders of any kind."""

_executed: dict[Path, str] = {}
"""The sha256 that each user's file had when this process imported it."""


def named_file(reference: str) -> tuple[Path, str] | None:
    """The absolute path and the component (or an empty text) in a ``reference`` ``FILE.py:NAME``; else None."""
    match = _FILE.fullmatch(reference)
    return (resolve_path(match["file"]).absolute(), match["name"] or "") if match else None


def offers_in_folder(folder: Path, origin: str) -> tuple[list[Offer], list[str]]:
    """What the files in ``folder`` and below offer, and why some of them cannot be read. Imports nothing.

    Raises UserError where it is no folder, has no such file, or more of them than a user writes.
    """
    at = f"{origin}: " if origin.startswith("-") else f"{origin}: user_dir: "
    if not folder.is_dir():
        raise UserError(f"{at}{str(folder)!r} is not a folder.")
    forget_sources()
    files = python_files(folder)
    if not files:
        raise UserError(f"{at}{str(folder)!r} has no Python file. Name the folder that has your components.")
    found = [offer for file in files for offer in _offers(file, USER_DIR)]
    added = {offer.name for offer in found if offer.kind == "kind" and can_be_kind(offer.name)}
    known = [each for each in found if each.kind in {*kinds(), *added} and (each.kind != "kind" or each.name in added)]
    return known, [problem for file in files if (problem := unreadable(file))]


def offers_in_file(file: Path, at: str) -> list[Offer]:
    """What ``file`` offers. Imports nothing. Raises UserError, which begins with ``at``, where it cannot be read."""
    if problem := unreadable(file):
        raise UserError(f"{at}{problem}")
    forget_sources()
    return list(_offers(file, str(file)))


def offers_of_process(known: Collection[Offer]) -> list[Offer]:
    """What this process itself has registered: not what ``known`` are, nor what modules of installed packages do."""
    of_packages = {each.module for each in all_installed()}
    of_files = {(each.kind, each.name.lower(), each.module) for each in known}
    found = []
    for name, component in registered_in_process():
        module = component.module
        if module in of_packages or module.startswith("panda.") or (component.kind, name, module) in of_files:
            continue
        file, line = component.source
        written = next(each for each in (component.name, *component.aliases) if each.lower() == name)
        found.append(Offer(component.kind, written, module, IN_PROCESS, "", file=file, line=line))
    return found


def unreadable(file: Path) -> str:
    """Why the source in ``file`` cannot be read, with its line; empty where it can."""
    try:
        compile(file.read_bytes(), str(file), "exec", dont_inherit=True)
    except FileNotFoundError:
        return f"{file}: no such file."
    except (OSError, ValueError, RecursionError) as problem:
        return f"{file}: cannot be read: {problem}."
    except SyntaxError as problem:
        return f"{file}:{problem.lineno}: {type(problem).__name__}: {problem.msg}."
    return ""


def python_files(folder: Path) -> list[Path]:
    """The Python files in ``folder`` and below, in order, except in hidden folders.

    Raises UserError where there are too many to be files of one user's, such as below `/`: each is read.
    """
    files: list[Path] = []
    seen = 0
    for place, below, names in os.walk(folder):
        below[:] = [name for name in below if not _is_hidden(Path(name))]
        seen += len(names) + len(below)
        if len(files) > MOST_FILES or seen > MOST_NAMES:
            many = f"{MOST_FILES:,} Python files" if len(files) > MOST_FILES else f"{MOST_NAMES:,} files"
            raise UserError(
                f"user_dir: {str(folder)!r} has more than {many} in it and its folders, and each would be read. Name"
                " the folder that has your components, and nothing else."
            )
        files += [Path(place, name) for name in names if name.endswith(".py") and not _is_hidden(Path(name))]
    return sorted(file.absolute() for file in files if file.is_file())


def make_importable(offer: Offer, in_use: Collection[Path]) -> None:
    """Let Python find the module of ``offer``, a user's, as its file is now.

    ``in_use``: the files that the same run has imported. Raises UserError if the name of the module is taken.
    """
    file = Path(offer.file)
    root, module = _place(file)
    if "." in file.stem:
        raise UserError(f"{file}: a module's name has no '.': rename the file.")
    if not any(used.is_relative_to(root) for used in in_use):
        _forget_changed(root)
    if str(root) not in sys.path:
        sys.path.append(str(root))
    importlib.invalidate_caches()
    top = module.partition(".")[0]
    try:
        spec = importlib.util.find_spec(top)
    except ValueError:  # of a module that something put into sys.modules by hand
        spec = None
    origin = spec.origin if spec else None
    expected = [file.resolve() for file in (root / f"{top}.py", root / top / "__init__.py")]
    is_another = origin is None or Path(origin).resolve() not in expected
    if origin is not None and is_another and Path(origin) in _executed and Path(origin) not in in_use:
        _forget_changed(_place(Path(origin))[0], anyway=True)  # of an earlier run in this process
        return make_importable(offer, in_use)
    if is_another:
        taken = f"{origin} has" if origin else "another module has"
        raise UserError(f"{file}: it would be imported as {module!r}, and {taken} the name {top!r}. Rename it.")


def note_executed(offer: Offer) -> None:
    """Remember the content of the files that importing the module of ``offer``, a user's, has executed."""
    for file in filter(Path.is_file, _loaded(_place(Path(offer.file))[0]).values()):
        _executed.setdefault(file, _sha256(file))


def executed_files(offers: Iterable[Offer], folder: Path | None) -> dict[str, str]:
    """The sha256 of each user's file that a run which chose ``offers`` executes, or may, by path.

    These are all in ``folder``, the ``user_dir``, those of ``offers``, and the modules beside them that are imported.
    For code of a notebook it is that of its cell, under the name that Python has for it.
    """
    found: dict[str, str] = {}
    files = set(python_files(folder)) if folder else set()
    for offer in offers:
        if offer.file and not Path(offer.file).exists():
            lines = "".join(linecache.getlines(offer.file))
            found[offer.file] = _sha256_of(lines.encode(errors="surrogateescape")) if lines else "unknown"
        elif offer.file:
            files |= {Path(offer.file).absolute()}
            if offer.distribution != IN_PROCESS:
                files |= set(filter(Path.is_file, _loaded(_place(Path(offer.file))[0]).values()))
    return found | {str(file): _executed.get(file) or _sha256(file) for file in sorted(files)}


def _offers(file: Path, provider: str) -> Iterator[Offer]:
    """What ``file`` offers, of whatever kinds."""
    try:
        source = file.read_bytes()
    except FileNotFoundError:  # since it was listed
        return
    if b"register_" not in source and b"hookimpl" not in source:
        return
    module = _place(file)[1]
    declared = declarations(module, str(file))
    for each in declared:
        for name in each.names:
            yield Offer(each.kind, name, module, provider, "", file=str(file), line=each.line)
    line = None if declared else line_of_hooks(module, str(file))  # hooks beside a component belong to it
    if line is not None:
        yield Offer("plugin", module.rpartition(".")[2], module, provider, "", file=str(file), line=line)


def _place(file: Path) -> tuple[Path, str]:
    """The folder that has to be on ``sys.path`` for ``file`` to be imported, and the name of its module."""
    root, parts = file.parent, [file.stem]
    while (root / "__init__.py").exists():
        root, parts = root.parent, [root.name, *parts]
    return root, ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _loaded(root: Path) -> dict[str, Path]:
    """The modules that have been imported from below ``root``, and their files."""
    found = {}
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if name != "__main__" and isinstance(file, str) and file.endswith(".py"):
            path = Path(file).absolute()
            if path.is_relative_to(root) and not _is_hidden(path.relative_to(root)):
                found[name] = path
    return found


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") or part == "site-packages" for part in path.parts)


def _forget_changed(root: Path, *, anyway: bool = False) -> None:
    """Where a file below ``root`` has changed since it was imported, or ``anyway``, forget all modules from there."""
    loaded = {name: file for name, file in _loaded(root).items() if file in _executed}
    if anyway or any(not file.exists() or _executed[file] != _sha256(file) for file in loaded.values()):
        for name, file in loaded.items():
            sys.modules.pop(name, None)
            _executed.pop(file, None)
        forget(loaded)
        if anyway and str(root) in sys.path:
            sys.path.remove(str(root))


def _sha256(file: Path) -> str:
    return _sha256_of(file.read_bytes())


def _sha256_of(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
