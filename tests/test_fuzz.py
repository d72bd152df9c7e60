"""The short form of tests/fuzz.py: a few cases of each kind are done, or refused in words."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import fuzz
import pytest

CASES = 12


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[fuzz.Bench]:
    folder = tmp_path_factory.mktemp("fuzz")
    (folder / "here").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdin", sys.stdin)
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.chdir(folder / "here")
        yield fuzz.Bench(folder / "work")


@pytest.mark.parametrize("kind", fuzz.FUZZED)
def test_senseless_input_is_done_or_refused(kind: str, bench: fuzz.Bench) -> None:
    found = fuzz.run([kind], bench, seconds=600, cases=CASES, first=0, seed=0)[kind]
    assert {*found} <= {*fuzz.FINE} and sum(found.values()) == CASES, found
    assert found[fuzz.REFUSED], "nothing was damaged"


def test_a_failure_is_found(bench: fuzz.Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of the three kinds of failure."""

    def outside(draw: object, made: fuzz.Bench) -> None:
        Path("left").touch()

    def endless(draw: object, made: fuzz.Bench) -> None:
        while True:
            pass

    monkeypatch.setattr(fuzz, "LATEST", 0.1)
    monkeypatch.setitem(fuzz.FUZZED, "models", lambda draw, made: os.kill(os.getpid(), signal.SIGKILL))
    assert fuzz.outcome_of_process("models", 0, 0, bench) == "ends with -9"
    for case, expected in ((outside, "a file outside: ['left']"), (endless, "_TooLong at"), (len, "TypeError at")):
        monkeypatch.setitem(fuzz.FUZZED, "models", case)
        assert fuzz.outcome("models", 0, 0, bench).startswith(expected)
