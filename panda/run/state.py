"""A run in progress, as hooks see it."""

from __future__ import annotations

from dataclasses import dataclass
from dataclasses import field
from pathlib import Path
from typing import Any

from panda.configuration.options import RunOptions
from panda.data.order import BatchPlan
from panda.data.packing import Layout
from panda.data.token_dataset import SampleSet
from panda.engine.engine import Engine
from panda.engine.processes import Processes
from panda.optim.schedules import Schedule
from panda.registry.resolve import Resolved
from panda.tasks.task import Task
from panda.weights.generation_config import Decoding


@dataclass
class Run:
    """A run in progress, which hooks are given. docs/plugins.md lists the attributes that they may rely on."""

    resolved: Resolved
    """The configuration."""
    directory: Path
    """The run directory."""
    processes: Processes
    """This rank, how many there are, and the device."""
    task: Task
    dataset: SampleSet
    layout: Layout
    """The rows of each step."""
    evaluation: Layout | None
    """The rows of the held-out data; None without any."""
    schedule: Schedule
    """Maps the number of completed optimizer steps to a factor of the peak learning rate."""
    engine: Engine
    hook: Any
    """pluggy's caller: ``run.hook.panda_log(run=run, record=...)``."""
    agreement: dict[str, Any]
    """The facts that must be the same in a run that continues this one."""
    decoding: Decoding
    """How its answers are decoded, and where they end: what the export says too."""
    reference: Any = None
    """The frozen model that the task asked for, called like the model; None for none."""
    generate: Any = None
    """Continues prompts with the model that is trained: a ``panda.tasks.task.Generate``."""
    resumed_from: Path | None = None
    """The checkpoint that the run continues from."""
    step: int = 0
    """Optimizer steps done."""
    checkpoints: list[Path] = field(default_factory=list)
    """Checkpoints that this process has saved."""
    observations: dict[str, dict[str, float]] = field(default_factory=dict)
    """On rank 0, as of the last log record: what the optimizer reports of each parameter, by quantity and name."""
    flops_per_token: float | None = None
    """On rank 0 on a GPU: operations of a forward and backward pass for a token, without what is recomputed."""
    answers: list[dict[str, str]] = field(default_factory=list)
    """At the end of the run: ``prompt`` and ``answer`` for each prompt."""

    @property
    def plan(self) -> BatchPlan:
        """How the data is cut into steps; ``plan.total_steps`` is the length of the run."""
        return self.layout.plan

    @property
    def options(self) -> RunOptions:
        """The options of every run."""
        options: RunOptions = self.resolved.core
        return options
