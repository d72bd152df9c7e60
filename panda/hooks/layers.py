"""The ``layers`` plugin: ``layers.jsonl``, what the optimizer tells of each parameter."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING
from typing import Any

from panda.registry import NoOptions
from panda.registry import UserError
from panda.registry import hookimpl
from panda.registry import register_plugin
from panda.registry.contexts import PluginContext

if TYPE_CHECKING:
    from panda.runner import Run


FILE_NAME = "layers.jsonl"


@register_plugin("layers")
class Layers:
    """Writes layers.jsonl: at each log record, trust ratios and the like by parameter. `--plugins layers`."""

    def __init__(self, options: NoOptions, context: PluginContext) -> None:
        pass

    @hookimpl
    def panda_run_start(self, run: Run) -> None:
        if not run.engine.optimizer_observes:
            raise UserError(
                f"plugins: layers: the optimizer {run.options.optimizer} tells nothing of single parameters;"
                " nvlamb does."
            )
        path = run.directory / FILE_NAME
        if run.processes.rank == 0 and path.exists():
            # Steps that the interrupted run logged behind its last checkpoint are taken again.
            lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
            whole = [line for line in lines if line.endswith("\n")]
            kept = [line for line in whole if json.loads(line)["step"] <= run.step]
            path.write_text("".join(kept), encoding="utf-8")

    @hookimpl
    def panda_log(self, run: Run, record: dict[str, Any]) -> None:
        with (run.directory / FILE_NAME).open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": record["step"], **run.observations}) + "\n")
