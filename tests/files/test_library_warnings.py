"""What libraries warn of is kept in a file; what packages with components and users' files say stays on the screen."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from distributions import Distributions

from panda.cli.command import run_command
from panda.files import library_warnings
from panda.files.library_warnings import LibraryWarnings
from panda.files.library_warnings import current
from panda.files.library_warnings import kept_aside
from panda.files.library_warnings import owner_of
from panda.registry import UserError

SOURCE = """
import logging, warnings
def warn(text): warnings.warn(text, FutureWarning)
def log(text, level=logging.WARNING): logging.getLogger(__name__).log(level, text)
"""
Captured = pytest.CaptureFixture[str]


@pytest.fixture
def modules(distributions: Distributions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """Modules with ``warn`` and ``log``: of a library, of a package with a component, and of a user."""
    site, names = tmp_path / "site-packages", ("alib", "acme", "mine")
    site.mkdir()
    for name in names:
        folder = tmp_path if name == "mine" else site
        (folder / f"{name}.py").write_text(SOURCE)
        monkeypatch.delitem(sys.modules, name, raising=False)  # another test's
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.syspath_prepend(str(site))
    distributions.install("acme", {"optimizers": {"a": "acme.o"}}, {})
    cached = (library_warnings._installed, library_warnings._with_components)
    for each in cached:
        each.cache_clear()
    yield [import_module(name) for name in names]
    for name in names:
        sys.modules.pop(name)
    for each in cached:
        each.cache_clear()


@contextmanager
def printed() -> Iterator[None]:
    """Warnings and records go to stderr, as they do outside of pytest."""
    handler = logging.StreamHandler(sys.stderr)
    logging.getLogger().addHandler(handler)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.showwarning = lambda message, *rest, **more: print(message, file=sys.stderr)
            yield
    finally:
        logging.getLogger().removeHandler(handler)


def test_those_of_a_library_are_kept_and_all_else_is_shown(modules: list[Any], capsys: Captured) -> None:
    library = modules[0]
    with printed():
        with kept_aside() as kept:
            for module in modules:
                module.warn(f"{module.__name__} warns")
                module.log(f"{module.__name__} logs")
            library.log("alib fails", logging.ERROR)
        library.warn("later")
    shown = capsys.readouterr().err.splitlines()
    assert shown == ["acme warns", "acme logs", "mine warns", "mine logs", "alib fails", "later"]
    assert kept.owners == {"alib": 3} and kept.summary() == "3 warnings of alib"
    assert [*kept.counts] == [
        f"{library.__file__}:3: FutureWarning: alib warns",
        f"{library.__file__}:4: WARNING: alib logs",
        f"{library.__file__}:4: ERROR: alib fails",
    ]


def test_what_others_warn_of_through_a_library_is_shown(
    modules: list[Any], tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By ``stacklevel``, a helper of a library, or what captures warnings."""
    library, package, _ = modules
    helper = tmp_path / "site-packages/alib_logging/logging.py"
    helper.parent.mkdir()
    helper.write_text("import logging\ndef warn_once(text): logging.getLogger('alib').warning(text)\n")
    (helper.parent / "__init__.py").touch()
    warn_once = import_module("alib_logging.logging").warn_once
    source = """
import logging, warnings
def above(text): warnings.warn(text, FutureWarning, stacklevel=2)
def once(helper, text): helper(text)
"""
    for module in (library, package):
        exec(compile(source, module.__file__, "exec"), vars(module))
    caller: dict[str, Any] = {}
    exec(compile("def call(warn, *given): warn(*given)", library.__file__, "exec"), caller)
    with printed():
        with kept_aside() as kept:
            for module in (library, package):
                caller["call"](module.above, f"{module.__name__} warns above")
                module.once(warn_once, f"{module.__name__} logs once")
            caller["call"](logging.getLogger("acme").handle, record("acme", library.__file__, "by name"))
            logging.captureWarnings(True)
            for module in (library, package):
                module.warn(f"{module.__name__} is captured")
        library.warn("alib after")
        logging.captureWarnings(False)
        library.warn("alib later")
    shown = [line for line in capsys.readouterr().err.splitlines() if line.strip() and "def warn" not in line]
    assert [line.rpartition(": ")[2] for line in shown] == [
        *("acme warns above", "acme logs once", "by name", "acme is captured", "alib after", "alib later")
    ]
    assert kept.owners == {"alib": 2, "alib_logging": 1}
    sys.modules.pop("alib_logging.logging"), sys.modules.pop("alib_logging")


def record(name: str, file: str, text: str) -> logging.LogRecord:
    return logging.LogRecord(name, logging.WARNING, file, 1, text, (), None)


def test_those_of_other_ranks_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, first = tmp_path / "log.txt", LibraryWarnings()
    file.write_text("2020-01-01 10:00:00  rank 1  of an earlier start\n")
    first.keep_in(file)
    assert first.summary() == ""
    other = LibraryWarnings()
    monkeypatch.setenv("RANK", "1")
    other.keep_in(file)
    for text in ("once", "twice\nand more", "twice\nand more"):
        other.add("torch", text)
    other.close()
    monkeypatch.setenv("RANK", "0")
    assert first.summary() == "2 warnings of other ranks"
    first.add("torch", "here")
    assert first.summary() == "1 warning of torch, and 2 warnings of other ranks"


def test_a_file_has_each_text_once_and_how_often_it_came(
    modules: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library, file = modules[0], tmp_path / "log.txt"
    with printed(), kept_aside() as kept:
        library.warn("before there is a run")
        kept.keep_in(tmp_path / "gone" / "log.txt")
        kept.keep_in(file)
        for _ in range(3):
            library.warn("again and again\nand more")
        monkeypatch.setenv("RANK", "1")
        library.warn("\udcff elsewhere")
    lines = [line.split("  ", 1)[-1].replace(library.__file__, "FILE") for line in file.read_text().splitlines()]
    assert lines == [
        "FILE:3: FutureWarning: before there is a run",
        "FILE:3: FutureWarning: again and again",
        "and more",
        "rank 1  FILE:3: FutureWarning: \\udcff elsewhere",
        "rank 1  3 times: FILE:3: FutureWarning: again and again",
    ]
    assert kept.summary() == "5 warnings of alib"
    with kept_aside() as kept:
        kept.keep_in(tmp_path / "none.txt")
    assert not (tmp_path / "none.txt").exists(), "nothing was said"


def test_files_of_a_librarys_own_log_are_written_and_nothing_is_kept_where_all_is_asked_for(
    modules: list[Any], tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    library, handler = modules[0], logging.FileHandler(tmp_path / "own.log")
    logging.getLogger("alib").addHandler(handler)
    with printed(), kept_aside():
        library.log("one")
        monkeypatch.setenv("PANDA_DEBUG", "1")
        library.log("two")
        library.warn("three")
    logging.getLogger("alib").removeHandler(handler)
    handler.close()
    assert (tmp_path / "own.log").read_text() == "one\ntwo\n"
    assert capsys.readouterr().err == "two\nthree\n"


def test_a_command_shows_them_with_what_is_no_users_error(modules: list[Any], capsys: Captured) -> None:
    library = modules[0]

    def command(argv: list[str]) -> None:
        library.warn("the reason")
        if argv:
            raise {"user": UserError("no"), "file": PermissionError(13, "no", "/x")}.get(argv[0], ZeroDivisionError())

    with printed():
        assert run_command(command, []) == 0
        assert run_command(command, ["user"]) == 2
        assert capsys.readouterr().err == "error: no\n"
        with pytest.raises(ZeroDivisionError):
            run_command(command, ["bug"])
        warned = (
            "1 warning of alib before this error, which may explain it:\n"
            f"  {library.__file__}:3: FutureWarning: the reason\n"
        )
        assert capsys.readouterr().err == warned
        assert run_command(command, ["file"]) == 2
    assert capsys.readouterr().err.startswith(f"{warned}error: /x: this user may not read or enter it")


def test_whose_a_file_is() -> None:
    import numpy
    import yaml

    assert [owner_of(module.__file__) for module in (numpy, yaml, logging, library_warnings)] == [
        "numpy",
        "yaml",
        "Python",
        "panda",
    ]
    assert owner_of("<string>") is None and owner_of(__file__) is None


def test_those_of_a_run_are_not_those_of_the_command(modules: list[Any]) -> None:
    library = modules[0]
    with printed(), kept_aside() as outer:
        library.warn("first")
        with kept_aside() as inner:
            assert current() is inner
            library.warn("second")
        assert current() is outer
        library.warn("third")
    assert len(inner.counts) == 1 and len(outer.counts) == 2
