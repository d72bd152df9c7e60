"""The ``tensorboard`` plugin: each number of a log record as a scalar, and histograms over parameters."""

from __future__ import annotations

from typing import TYPE_CHECKING
from typing import Any

from panda.files.private import private
from panda.registry import NoOptions
from panda.registry import hookimpl
from panda.registry import register_plugin
from panda.registry.contexts import PluginContext

if TYPE_CHECKING:
    from panda.runner import Run


@register_plugin("tensorboard")
class TensorBoard:
    """Writes tensorboard/, for `tensorboard --logdir RUN`."""

    acts = False  # it only watches

    def __init__(self, options: NoOptions, context: PluginContext) -> None:
        self.writer: Any = None

    @hookimpl
    def panda_run_start(self, run: Run) -> None:
        if run.processes.rank == 0:
            from torch.utils.tensorboard import SummaryWriter

            # purge_step hides what an interrupted run wrote after the checkpoint that this one continues.
            self.writer = SummaryWriter(str(run.directory / "tensorboard"), purge_step=run.step + 1)
            config = (run.directory / "config.yaml").read_text(encoding="utf-8")
            self.writer.add_text("config", f"```yaml\n{private(config)}```", run.step)

    @hookimpl
    def panda_log(self, run: Run, record: dict[str, Any]) -> None:
        import torch

        for key, value in record.items():
            if key != "step":
                self.writer.add_scalar(f"train/{key}", value, record["step"])
        for quantity, values in run.observations.items():
            self.writer.add_histogram(f"train/{quantity}", torch.tensor(list(values.values())), record["step"])

    @hookimpl
    def panda_evaluation(self, record: dict[str, Any]) -> None:
        if self.writer is None:  # rank 0 has one
            return
        for key, value in record.items():
            if key != "step":
                self.writer.add_scalar(f"eval/{key.removeprefix('eval_')}", value, record["step"])

    @hookimpl
    def panda_run_end(self) -> None:
        self._close()

    @hookimpl
    def panda_exception(self) -> None:
        self._close()

    def _close(self) -> None:
        if self.writer is not None:
            self.writer.close()
            self.writer = None
