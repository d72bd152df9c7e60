"""``check_plugin`` accepts a package that is declared as it should be, and rejects what breaks a promise."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from distributions import Distributions

sys.path.insert(0, str(Path(__file__).parents[1] / "installation"))
from failures import FAILURES
from failures import FINE
from failures import HEADER

from panda.testing import check_plugin

BROKEN = ("no decorator", "name misspelt", "missing dependency", "prints", "heavy", "default none", "no help")
"""Failures, each of another promise; tests/installation tries all that `panda doctor` finds."""


def install(made: Distributions, source: str, kind: str = "model", **metadata: str) -> None:
    made.install("acme-panda", {f"{kind}s": {"tiny": "acme.tiny"}}, {"acme.tiny": HEADER + source}, **metadata)


def test_a_package_as_it_should_be(distributions: Distributions, capsys: pytest.CaptureFixture[str]) -> None:
    install(distributions, FINE)
    check_plugin("Acme_Panda")
    lines = capsys.readouterr().out.splitlines()
    assert lines[:3] == [
        "check_plugin acme-panda 1.0",
        "  ok      installation: metadata and requirements are as they should be",
        "  ok      names: declared and registered (models: 1)",
    ]
    assert lines[3].startswith("  ok      acme.tiny: imported in ") and lines[3].endswith("1 component with 1 option")


@pytest.mark.parametrize("name", BROKEN)
def test_a_package_that_breaks_a_promise(name: str, distributions: Distributions) -> None:
    failure = FAILURES[name]
    install(distributions, failure.source, failure.kind)
    with pytest.raises(AssertionError, match=r"^check_plugin acme-panda 1.0: \d promises? (is|are) broken:") as caught:
        check_plugin("acme-panda")
    assert failure.said in str(caught.value)


def test_a_requirement_that_is_not_met(distributions: Distributions) -> None:
    metadata = "Metadata-Version: 2.1\nName: acme-panda\nVersion: 1\nRequires-Dist: nil-there\n"
    install(distributions, FINE, metadata=metadata)
    with pytest.raises(AssertionError, match="acme-panda 1: it requires nil-there, which is not installed"):
        check_plugin("acme-panda")


def test_a_package_that_is_not_installed() -> None:
    with pytest.raises(AssertionError, match="no installed distribution 'acme-panda' offers anything to panda"):
        check_plugin("acme-panda")
