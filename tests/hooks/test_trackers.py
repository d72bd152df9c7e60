"""Trackers, with clients that only note what they are told: ``tests/trackers.py`` tries the real ones."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from types import ModuleType
from types import SimpleNamespace
from typing import Any

import pytest

from panda.hooks import trackers
from panda.hooks.trackers import Comet
from panda.hooks.trackers import CometOptions
from panda.hooks.trackers import Mlflow
from panda.hooks.trackers import MlflowOptions
from panda.hooks.trackers import Tracker
from panda.hooks.trackers import Trackio
from panda.hooks.trackers import TrackioOptions
from panda.hooks.trackers import Wandb
from panda.hooks.trackers import WandbOptions
from panda.registry import UserError
from panda.registry.contexts import PluginContext

KINDS: list[tuple[type[Tracker], Any]] = [
    (Wandb, WandbOptions()),
    (Mlflow, MlflowOptions()),
    (Trackio, TrackioOptions()),
    (Comet, CometOptions()),
]


ENDS = {Mlflow: "set_terminated", Comet: "end"}
"""What closes a run there, where it is not `finish`."""


class Client(ModuleType):
    """Notes calls, and answers each with something that can be called."""

    def __init__(self, name: str, said: list[tuple[str, tuple[Any, ...], dict[str, Any]]]) -> None:
        super().__init__(name)
        self.said = said

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)

        def call(*arguments: Any, **keywords: Any) -> Any:
            self.said.append((name, arguments, keywords))
            if name in ("Param", "Metric"):
                return arguments
            if name == "get_experiment_by_name":
                return None
            if name == "get_key":
                return "run-of-comet"
            if name == "create_run":
                return SimpleNamespace(info=SimpleNamespace(run_id="run-of-mlflow"))
            return (
                self
                if name in ("init", "start", "MlflowClient")
                else SimpleNamespace(wait=lambda: None, _operation_futures=[])
            )

        return "run-of-wandb" if name == "id" else call


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, tuple[Any, ...], dict[str, Any]]]:
    """What the clients were told."""
    found: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []
    for name in ("wandb", "mlflow", "mlflow.entities", "trackio", "comet_ml"):
        monkeypatch.setitem(sys.modules, name, Client(name, found))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    return found


def of(make_run: Any, **more: Any) -> Any:
    run = make_run(**more)
    settings = {"learning_rate": 1e-3, "plugins": ("wandb",), "hf_home": "https://me:secret@host"}
    run.resolved = SimpleNamespace(settings={key: SimpleNamespace(value=value) for key, value in settings.items()})
    return run


@pytest.mark.parametrize(("kind", "options"), KINDS, ids=lambda each: getattr(each, "name", ""))
def test_every_record_is_sent_with_its_step_and_the_run_is_opened_and_closed(
    kind: Any, options: Any, said: Any, make_run: Any, record: Any, evaluation: Any
) -> None:
    run = of(make_run)
    tracker = kind(options, PluginContext())
    tracker.panda_run_start(run)
    opened = str(said)
    assert "my-run" in opened and "0.001" in opened and "secret" not in opened
    assert json.loads((run.directory / "trackers.json").read_text()).keys() == {kind.name}
    said.clear()
    logged, evaluated = record(1, grad_norm=math.inf, note="text"), evaluation(1)
    tracker.panda_log(logged)
    tracker.panda_evaluation(run, evaluated)
    sent: dict[str, float] = {}
    for name, arguments, keywords in said:
        if name == "Metric":
            sent[arguments[0]] = arguments[1]
            assert arguments[3] == 1
        elif name in ("log", "log_metrics"):
            sent |= arguments[0]
            assert keywords.get("step", arguments[0].get("step")) == 1
    numbers = {**logged, **evaluated}
    del numbers["step"], numbers["note"]
    assert {key: value for key, value in sent.items() if key != "step"} == numbers
    said.clear()
    tracker.panda_run_end()
    tracker.panda_exception()
    assert [name for name, *_ in said] == [ENDS.get(kind, "finish")]


@pytest.mark.parametrize(("kind", "options"), KINDS, ids=lambda each: getattr(each, "name", ""))
def test_a_resumed_run_goes_on_with_its_run_there(kind: Any, options: Any, said: Any, make_run: Any) -> None:
    run = of(make_run)
    kind(options, PluginContext()).panda_run_start(run)
    before = (run.directory / "trackers.json").read_text()
    said.clear()
    kind(options, PluginContext()).panda_run_start(of(make_run, step=3))
    assert (run.directory / "trackers.json").read_text() == before
    assert json.loads(before)[kind.name] in str(said) and "create_run" not in [name for name, *_ in said]


@pytest.mark.parametrize(("kind", "options"), KINDS, ids=lambda each: getattr(each, "name", ""))
def test_a_run_that_fails_is_said_to_and_other_ranks_say_nothing(
    kind: Any, options: Any, said: Any, make_run: Any, record: Any
) -> None:
    tracker = kind(options, PluginContext())
    tracker.panda_run_start(of(make_run))
    said.clear()
    tracker.panda_exception()
    if kind is not Trackio:  # which knows no failed runs
        assert any(word in str(said) for word in ("FAILED", "'exit_code': 1", "'failed'"))
    said.clear()
    tracker = kind(options, PluginContext())
    tracker.panda_run_start(of(make_run, rank=1))
    tracker.panda_log(record(1))
    tracker.panda_run_end()
    assert said == []


@pytest.mark.parametrize(("kind", "options"), KINDS, ids=lambda each: getattr(each, "name", ""))
def test_a_client_that_is_not_installed_is_said_before_anything_else(
    kind: Any, options: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        UserError, match=rf"plugin {kind.name}: its client is not installed.*pip install {kind.package}"
    ):
        kind(options, PluginContext())


def test_a_key_that_comet_lacks_is_said_with_what_to_do(
    said: Any, make_run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(**_: Any) -> None:
        raise ValueError("Comet.ml requires an API key.")

    monkeypatch.setattr(sys.modules["comet_ml"], "start", start, raising=False)
    with pytest.raises(UserError, match=r"plugin comet: Comet.ml requires an API key\. COMET_START_ONLINE=0"):
        Comet(CometOptions(), PluginContext()).panda_run_start(of(make_run))
