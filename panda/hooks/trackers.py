"""Trackers: plugins that send what metrics.jsonl says to where people already look, each through its own client.

The clients are no requirements of panda: a plugin that is named, and whose client is not installed, says so at once.
Records are sent as they are, under their own names: ``loss``, ``eval_loss``, ``tokens_per_second``.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import time
from abc import abstractmethod
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING
from typing import Any

from panda.files.private import private
from panda.files.whole import write_whole
from panda.hooks.closing import Closing
from panda.registry import UserError
from panda.registry import hookimpl
from panda.registry import register_plugin
from panda.registry.contexts import PluginContext
from panda.registry.errors import in_brief

if TYPE_CHECKING:
    from pathlib import Path

    from panda.runner import Run

FILE_NAME = "trackers.json"
"""In a run directory: by tracker, its name for the run. A resumed run goes on with it there, too."""
MOST_CHARACTERS, MOST_PARAMETERS = 6000, 100
"""Of a value of the configuration, and of these in a request, that MLflow takes (3.17)."""

MOST_WAITED_FOR = 100
"""Last requests to MLflow whose answers are awaited at the end: they are sent in order."""


class Tracker(Closing[Any]):
    """Opens a run at a tracker when the run begins, sends every record, and closes it when the run ends."""

    name: str
    package: str
    """The client, as pip knows it and as it is imported."""

    def __init__(self, options: Any, context: PluginContext) -> None:
        if importlib.util.find_spec(self.package) is None:
            raise UserError(
                f"plugin {self.name}: its client is not installed. Install it (`pip install {self.package}`), or leave"
                f" {self.name} out of `plugins`."
            )
        self.options = options

    @abstractmethod
    def open(self, run: Run, configuration: dict[str, Any], earlier: str | None) -> str:
        """Open a run, or the one called ``earlier`` again, as ``opened``; returns its name there."""

    @abstractmethod
    def send(self, opened: Any, values: dict[str, float], step: int) -> None:
        """Send the entries of a record of ``step``. Must not wait for a network."""

    @abstractmethod
    def close(self, opened: Any, *, failed: bool) -> None:
        """Send what is left, and close the run."""

    @hookimpl
    def panda_run_start(self, run: Run) -> None:
        if run.processes.rank != 0:
            return
        configuration = {key: _plain(setting.value) for key, setting in run.resolved.settings.items()}
        known = _known(run.directory)
        known[self.name] = self.open(run, private(configuration), known.get(self.name))
        write_whole(run.directory / FILE_NAME, json.dumps(known, indent=1) + "\n")

    @hookimpl
    def panda_log(self, record: dict[str, Any]) -> None:
        if self.opened is not None:
            self.send(self.opened, _numbers(record), record["step"])

    @hookimpl
    def panda_evaluation(self, run: Run, record: dict[str, Any]) -> None:
        if not run.evaluation_is_recorded:
            self.panda_log(record)


@dataclass(frozen=True)
class WandbOptions:
    """Options of the wandb plugin."""

    wandb_project_name: str = "panda"
    """Project at Weights & Biases. Its variables hold as elsewhere: WANDB_API_KEY, WANDB_MODE=offline."""
    wandb_team: str | None = None
    """User or team; by default that of the API key."""


@register_plugin("wandb", options=WandbOptions)
class Wandb(Tracker):
    """Sends records to Weights & Biases, or with WANDB_MODE=offline to RUN/wandb."""

    name = package = "wandb"

    def open(self, run: Run, configuration: dict[str, Any], earlier: str | None) -> str:
        wandb = importlib.import_module("wandb")
        self.opened = wandb.init(
            project=self.options.wandb_project_name,
            entity=self.options.wandb_team,
            name=run.directory.name,
            dir=str(run.directory),
            config=configuration,
            id=earlier,
            resume="allow" if earlier else None,
            settings=wandb.Settings(console="off"),  # it would take stdout, which the progress line needs
        )
        # By a metric of its own: steps after an older checkpoint are sent again, and those of wandb must only grow.
        self.opened.define_metric("*", step_metric="step")
        return str(self.opened.id)

    def send(self, opened: Any, values: dict[str, float], step: int) -> None:
        opened.log({**values, "step": step})

    def close(self, opened: Any, *, failed: bool) -> None:
        opened.finish(exit_code=int(failed))


@dataclass(frozen=True)
class MlflowOptions:
    """Options of the mlflow plugin."""

    mlflow_experiment: str = "panda"
    """Experiment, which is made where there is none."""
    mlflow_tracking_uri: str | None = None
    """Address of the server, or a folder; by default MLFLOW_TRACKING_URI of the environment."""


@register_plugin("mlflow", options=MlflowOptions)
class Mlflow(Tracker):
    """Sends records to an MLflow server."""

    name = package = "mlflow"

    def __init__(self, options: MlflowOptions, context: PluginContext) -> None:
        super().__init__(options, context)
        self.client: Any = None
        self.sending: deque[Any] = deque(maxlen=MOST_WAITED_FOR)

    def open(self, run: Run, configuration: dict[str, Any], earlier: str | None) -> str:
        mlflow = importlib.import_module("mlflow")
        self.client = mlflow.MlflowClient(tracking_uri=self.options.mlflow_tracking_uri)
        name = self.options.mlflow_experiment
        experiment = self.client.get_experiment_by_name(name)
        number = experiment.experiment_id if experiment else self.client.create_experiment(name)
        if earlier:
            self.client.set_terminated(earlier, "RUNNING")
            self.opened = earlier
            return earlier
        self.opened = self.client.create_run(number, run_name=run.directory.name).info.run_id
        entities = importlib.import_module("mlflow.entities")
        parameters = [entities.Param(key, str(value)[:MOST_CHARACTERS]) for key, value in configuration.items()]
        for begin in range(0, len(parameters), MOST_PARAMETERS):
            self.client.log_batch(self.opened, params=parameters[begin : begin + MOST_PARAMETERS])
        return str(self.opened)

    def send(self, opened: Any, values: dict[str, float], step: int) -> None:
        entities, now = importlib.import_module("mlflow.entities"), int(time.time() * 1000)
        metrics = [entities.Metric(key, value, now, step) for key, value in values.items()]
        self.sending.append(self.client.log_batch(opened, metrics=metrics, synchronous=False))

    def close(self, opened: Any, *, failed: bool) -> None:
        for each in self.sending:
            each.wait()
        self.client.set_terminated(opened, "FAILED" if failed else "FINISHED")


@dataclass(frozen=True)
class TrackioOptions:
    """Options of the trackio plugin."""

    trackio_project: str = "panda"
    """Project: `trackio show --project panda` draws it."""
    trackio_space_id: str | None = None
    """Space of the Hugging Face hub that has the dashboard; by default it is on this machine."""


@register_plugin("trackio", options=TrackioOptions)
class Trackio(Tracker):
    """Sends records to trackio, on this machine or in a Space of the Hugging Face hub."""

    name = package = "trackio"

    def open(self, run: Run, configuration: dict[str, Any], earlier: str | None) -> str:
        trackio = importlib.import_module("trackio")
        name = earlier or f"{run.directory.name}-{time.strftime('%Y%m%d-%H%M%S')}"  # it has one run of each name
        self.opened = trackio.init(
            project=self.options.trackio_project,
            name=name,
            space_id=self.options.trackio_space_id,
            config=configuration,
            resume="allow",
            embed=False,  # no window of a notebook
        )
        return name

    def send(self, opened: Any, values: dict[str, float], step: int) -> None:
        opened.log(values, step=step)

    def close(self, opened: Any, *, failed: bool) -> None:
        opened.finish()


@dataclass(frozen=True)
class CometOptions:
    """Options of the comet plugin."""

    comet_project: str = "panda"
    """Project at Comet. Its variables hold as elsewhere: COMET_API_KEY, COMET_WORKSPACE, COMET_START_ONLINE=0."""


@register_plugin("comet", options=CometOptions)
class Comet(Tracker):
    """Sends records to Comet, or with COMET_START_ONLINE=0 to an archive in RUN/comet."""

    name = "comet"
    package = "comet_ml"

    def open(self, run: Run, configuration: dict[str, Any], earlier: str | None) -> str:
        os.environ.setdefault("COMET_DISABLE_AUTO_LOGGING", "1")  # it would want to be imported before torch
        comet = importlib.import_module("comet_ml")
        settings = comet.ExperimentConfig(
            name=run.directory.name,
            offline_directory=str(run.directory / "comet"),
            # Records and the configuration, and nothing that it would find by itself: code, patches, the command line.
            **dict.fromkeys(("log_code", "log_graph", "parse_args", "log_git_metadata", "log_git_patch"), False),
            **dict.fromkeys(("auto_param_logging", "auto_metric_logging", "auto_output_logging"), False),
            display_summary_level=0,
        )
        try:
            self.opened = comet.start(
                project_name=self.options.comet_project,
                experiment_key=earlier,
                mode="get_or_create" if earlier else "create",
                experiment_config=settings,
            )
        except ValueError as problem:  # a key that is missing or wrong
            raise UserError(
                f"plugin comet: {in_brief(problem)}. COMET_START_ONLINE=0 in the environment writes an archive in"
                " RUN/comet instead."
            ) from problem
        if not earlier:
            self.opened.log_parameters(configuration, nested_support=False)
        return str(self.opened.get_key())

    def send(self, opened: Any, values: dict[str, float], step: int) -> None:
        opened.log_metrics(values, step=step)

    def close(self, opened: Any, *, failed: bool) -> None:
        if failed:
            opened.add_tag("failed")  # it has no word for it
        opened.end()


def _known(directory: Path) -> dict[str, str]:
    """The names that trackers have for the run in ``directory``."""
    try:
        found = json.loads((directory / FILE_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _numbers(record: Mapping[str, Any]) -> dict[str, float]:
    return {key: value for key, value in record.items() if key != "step" and isinstance(value, (int, float))}


def _plain(value: Any) -> Any:
    return [*value] if isinstance(value, tuple) else value
