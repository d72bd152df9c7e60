"""The ``tensorboard`` plugin: each number of a log record as a scalar, and histograms over parameters."""

from __future__ import annotations

from typing import TYPE_CHECKING
from typing import Any

from panda.files.private import private
from panda.hooks.closing import Closing
from panda.registry import NoOptions
from panda.registry import hookimpl
from panda.registry import register_plugin
from panda.registry.contexts import PluginContext

if TYPE_CHECKING:
    from panda.runner import Run


@register_plugin("tensorboard")
class TensorBoard(Closing[Any]):
    """Writes tensorboard/, for `tensorboard --logdir RUN`."""

    def __init__(self, options: NoOptions, context: PluginContext) -> None:
        pass

    @hookimpl
    def panda_run_start(self, run: Run) -> None:
        if run.processes.rank == 0:
            from torch.utils.tensorboard import SummaryWriter

            # purge_step hides what an interrupted run wrote after the checkpoint that this one continues.
            writer = SummaryWriter(str(run.directory / "tensorboard"), purge_step=run.step + 1)
            self.opened = writer
            config = (run.directory / "config.yaml").read_text(encoding="utf-8")
            writer.add_text("config", f"```yaml\n{private(config)}```", run.step)

    @hookimpl
    def panda_log(self, run: Run, record: dict[str, Any]) -> None:
        import torch

        writer: Any = self.opened
        for key, value in record.items():
            if key != "step":
                writer.add_scalar(f"train/{key}", value, record["step"])
        for quantity, values in run.observations.items():
            writer.add_histogram(f"train/{quantity}", torch.tensor(list(values.values())), record["step"])

    @hookimpl
    def panda_evaluation(self, run: Run, record: dict[str, Any]) -> None:
        if self.opened is None or run.evaluation_is_recorded:  # rank 0 has one
            return
        for key, value in record.items():
            if key != "step":
                self.opened.add_scalar(f"eval/{key.removeprefix('eval_')}", value, record["step"])
