"""Each failure of an author names the distribution, its version, the module, and what to do."""

from __future__ import annotations

import importlib.metadata
import io
import os
import re
from collections.abc import Iterator
from contextlib import redirect_stderr
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
from distributions import Distributions
from distributions import forget_installed
from failures import FAILURES
from failures import FINE
from failures import HEADER
from failures import Failure

from panda.cli.main import main

DATA = ("--instruction_tuning_data_dir", "panda:data/sample/instruct", "--max_samples", "8", "--max_seq_length", "32")
ADVICE = re.compile(
    r"\b(Write|Mend|Install|install|Rename|Give|Let|let|Leave|Name|Declare|Print|Import|Change|Require|[Rr]eturn|yield"
    r"|Did you mean|reinstall|a fault of|refuses|Do not|Traceback)\b|`pip|`panda|This came out of"
)
"""Words that say what to do, or whose fault it is."""


@pytest.fixture(autouse=True)
def few_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of what is installed here only panda and acme-panda: `panda doctor` reads the metadata of all."""
    every = importlib.metadata.distributions

    def some(**where: Any) -> Iterator[Any]:
        return (each for each in every(**where) if each._path.name.startswith(("panda_train", "acme")))  # type: ignore[attr-defined]

    monkeypatch.setattr(importlib.metadata, "distributions", some)


def install(made: Distributions, failure: Failure) -> None:
    """Install acme-panda as its author published it."""
    modules = {"acme.tiny": failure.source, **failure.files}
    groups = {f"{failure.kind}s": {failure.name: failure.module}}
    requires = f"Requires-Dist: {failure.requires or 'panda-train'}\n"
    metadata = f"Metadata-Version: 2.1\nName: acme-panda\nVersion: 1.0\n{requires}"
    site = made.install("acme-panda", groups, {}, metadata=metadata)
    for name, source in modules.items():
        file = site.joinpath(*name.split(".")).with_suffix(".py")
        file.parent.mkdir(exist_ok=True)
        (file.parent / "__init__.py").touch()
        file.write_text(HEADER + source)
    made.modules.add("acme")
    if failure.entry_points:
        (site / "acme_panda-1.0.dist-info" / "entry_points.txt").write_text(f"{failure.entry_points}\n")
    forget_installed()


def said(*argv: str) -> tuple[bool, str]:
    """Whether a command fails or finds something, and what it says, with the notes of an exception."""
    out, err = io.StringIO(), io.StringIO()
    folder = Path.cwd()
    with redirect_stdout(out), redirect_stderr(err):
        try:
            code = main(list(argv))
        except Exception as error:  # a bug of the package, which keeps its traceback
            return True, "\n".join([f"Traceback: {error}", *getattr(error, "__notes__", ())])
        finally:
            os.chdir(folder)
    text = out.getvalue() if argv[0] == "doctor" else err.getvalue()
    return code != 0 or "  note  " in text, text


def commands(failure: Failure) -> list[tuple[str, ...]]:
    """The commands that come to what is wrong."""
    key = {"plugin": "plugins"}.get(failure.kind, failure.kind)
    run = ("--arch", "llama-tiny", *(() if failure.kind == "task" else DATA))
    named = (f"--{key}", failure.name)
    given = (*named, *DATA) if failure.kind in ("model", "arch") else (*run, *named)
    found = [("show", failure.kind, failure.name), ("doctor", "acme-panda")]
    return [*found, ("check", *given)] if failure.kind != "kind" else found


@pytest.mark.parametrize("failure", FAILURES.values(), ids=FAILURES)
def test_a_failure_of_an_author_is_explained(failure: Failure, distributions: Distributions) -> None:
    install(distributions, failure)
    assert main(["list", "models"]) == 0, "lists import nothing, and one broken package changes nothing"
    everything = []
    shown = False
    for argv in commands(failure):
        if argv[0] == "check" and shown:
            continue  # it comes no further than `show`
        is_said, text = said(*argv)
        shown = shown or (is_said and argv[0] == "show")
        everything.append(f"$ panda {' '.join(argv)}\n{text}")
        if is_said and argv[0] not in failure.unnamed:
            for part in ("acme-panda 1.0", failure.shown or failure.module):
                assert part in text, (part, everything[-1])
            assert ADVICE.search(text), everything[-1]
    assert failure.said in "\n".join(everything), "\n".join(everything)


def test_nothing_is_wrong_with_one_that_is_right(distributions: Distributions) -> None:
    install(distributions, Failure("", FINE))
    for argv in commands(Failure("", FINE)):
        assert not said(*argv)[0]
    assert said("doctor", "acme-panda")[1].endswith("\nnothing is wrong\n")
