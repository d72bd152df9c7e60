"""The ``best_checkpoint`` plugin: saves and keeps the checkpoint of the best evaluation."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from typing import Annotated
from typing import Any

from panda.engine.checkpoints.folders import BEST
from panda.engine.checkpoints.folders import checkpoint_name
from panda.engine.checkpoints.folders import step_of
from panda.files.whole import write_whole
from panda.hooks.watched import Watched
from panda.registry import OfEvaluations
from panda.registry import hookimpl
from panda.registry import register_plugin
from panda.registry.contexts import PluginContext
from panda.run.directory import is_own
from panda.weights.run_folders import CHECKPOINTS

if TYPE_CHECKING:
    from panda.runner import Run


@dataclass(frozen=True)
class BestCheckpointOptions:
    """Options of the best_checkpoint plugin."""

    best_metric: Annotated[str, OfEvaluations()] = "eval_loss"
    """What evaluations are compared by: a number of their records."""
    best_higher_is_better: bool | None = None
    """Whether a higher value of it is the better one. By default as its task or metric states; else the lower one."""


@register_plugin("best_checkpoint", options=BestCheckpointOptions)
class BestCheckpoint:
    """Saves the checkpoint of the best evaluation, keeps it whatever `save_total_limit` says, and names it at the end.

    Of equal evaluations the first is the best. `--plugins best_checkpoint`. `checkpoints/best` has its name: `panda
    export RUN/checkpoints/best --output FOLDER`.
    """

    def __init__(self, options: BestCheckpointOptions, context: PluginContext) -> None:
        self.watched = Watched("best_checkpoint", options.best_metric, higher_is_better=options.best_higher_is_better)
        self.path: Path | None = None
        """The checkpoint of the best evaluation, once it is on disk."""

    @hookimpl
    def panda_run_start(self, run: Run) -> None:
        self._keep(run)

    @hookimpl
    def panda_evaluation(self, run: Run, record: dict[str, Any]) -> None:
        if self.watched.take(run, record):
            run.save_checkpoint()

    @hookimpl
    def panda_checkpoint_saved(self, run: Run, path: Path) -> None:
        if self.watched.best is not None and self.watched.best_step == run.step:
            if self.path is not None:
                run.release_checkpoint(step_of(self.path))
            self.path = path
            self._keep(run)

    def _keep(self, run: Run) -> None:
        """Keep the best checkpoint, and have ``checkpoints/best`` name it; no other, where this run has none."""
        found = self.path if self.path is not None and is_own(self.path, run.directory) else None
        if found is not None:
            run.keep_checkpoint(step_of(found))
        pointer = run.directory / CHECKPOINTS / BEST
        if run.processes.rank == 0 and found is not None:
            write_whole(pointer, found.name + "\n")
        elif run.processes.rank == 0:
            pointer.unlink(missing_ok=True)

    @hookimpl
    def panda_run_end(self, run: Run) -> None:
        if run.processes.rank != 0 or self.path is None:
            return
        print(
            f"best checkpoint: {self.path} ({self.watched}); `panda export {self.path} --output FOLDER` exports it, and"
            f" {run.directory / 'export'} has the last weights",
            flush=True,
        )

    @hookimpl
    def panda_save_state(self, run: Run) -> dict[str, Any]:
        is_this = self.watched.best_step == run.step  # which is not on disk yet
        place = str(self.path.parent.resolve()) if self.path and not is_this else None
        return {**self.watched.state(run), "elsewhere": place}

    @hookimpl
    def panda_load_state(self, run: Run, state: dict[str, Any]) -> None:
        assert run.resumed_from is not None
        if state["best"] is None:
            return
        name = checkpoint_name(state["best_step"])
        folders = [run.resumed_from.parent, run.directory / CHECKPOINTS, Path(state["elsewhere"] or ".")]
        found = [folder / name for folder in folders if (folder / name / "manifest.json").exists()]
        if found:
            self.path = found[0]  # also where others are compared with each other from here on: until there is one
            self.watched.load(run, state)
        elif run.processes.rank == 0:
            print(f"note: best_checkpoint: {name}, the best until now, is gone; it starts afresh", flush=True)
