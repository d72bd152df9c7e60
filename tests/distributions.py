"""Distributions that look installed, gone after the test; and the packages of this environment out of sight."""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from panda.registry import offers
from panda.testing.distributions import Distributions as Distributions
from panda.testing.distributions import fake_distributions
from panda.testing.distributions import forget_installed as forget_installed

IMPORTS = """\
from dataclasses import dataclass
from typing import Annotated
from typing import Literal
from panda.registry import *
"""
"""The beginning of every module that these tests install."""


def hide_other_packages(patch: pytest.MonkeyPatch) -> None:
    """In this process, let panda see no packages of others that are installed here: tests say what there is."""
    found = list(importlib.metadata.distributions())
    hidden = {each.name for each in found if "panda." in (each.read_text("entry_points.txt") or "")}
    hidden -= {offers.OWN_DISTRIBUTION}
    if hidden:
        original = importlib.metadata.distributions
        patch.setattr(
            importlib.metadata,
            "distributions",
            lambda **where: (each for each in original(**where) if each.name not in hidden),
        )
        forget_installed()


def installed_for_runs(
    folder: Path, name: str, entry_points: dict[str, dict[str, str]], modules: dict[str, str], *, version: str = "1.0"
) -> dict[str, str]:
    """A distribution below ``folder`` that this process does not see: the environment of runs that do."""
    with fake_distributions(folder, IMPORTS) as made:
        made.install(name, entry_points, modules, version=version)
        return {"PYTHONPATH": os.environ["PYTHONPATH"]}


@pytest.fixture
def distributions(tmp_path: Path) -> Iterator[Distributions]:
    with fake_distributions(tmp_path / "site", IMPORTS) as made:
        yield made
