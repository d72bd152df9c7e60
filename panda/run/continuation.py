"""What a run continues: a run directory, a checkpoint, and the facts that must not change between the two."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from panda.configuration.options import LORA_KEYS
from panda.data.origin import origins_of
from panda.data.packing import Layout
from panda.data.token_dataset import SampleSet
from panda.engine.checkpoints.agreement import MADE_OF
from panda.engine.checkpoints.agreement import refuse_differing
from panda.engine.checkpoints.folders import checkpoints
from panda.engine.checkpoints.folders import damage
from panda.engine.checkpoints.in_use import set_aside_once_unread
from panda.engine.checkpoints.manifest import START
from panda.engine.checkpoints.manifest import Progress
from panda.engine.checkpoints.manifest import read_progress
from panda.engine.checkpoints.writing import check_shared
from panda.engine.processes import Processes
from panda.files.terminal import number_of
from panda.files.terminal import printable
from panda.registry import UserError
from panda.registry.options import options_of
from panda.registry.resolve import Resolved
from panda.run.description import read_end
from panda.run.description import refuse_later
from panda.run.directory import EXPORT
from panda.run.directory import checkpoint_to_continue
from panda.run.directory import hold_continued
from panda.run.directory import is_own
from panda.run.directory import names_checkpoint
from panda.run.directory_lock import RunLock
from panda.run.ending import options_of_stopper
from panda.run.ending import work_at_the_end
from panda.run.model import base_weights
from panda.run.preparation import Preparation
from panda.run.reference import reference_config
from panda.run.reference import reference_weights
from panda.weights.model_config import architecture_of
from panda.weights.pretrained import Pretrained
from panda.weights.run_folders import CHECKPOINTS


@dataclass(frozen=True)
class Continuation:
    """The run directory and the checkpoint that a run continues; a new run has neither."""

    directory: Path | None
    """The run directory that is continued; None for a new one."""
    checkpoint: Path | None
    progress: Progress
    agreement: dict[str, Any]
    """The facts that must be the same in a run that continues this one."""
    seconds: float = 0.0
    """That comparing the checkpoint with what was written took."""

    def finished(self, prepared: Preparation, layout: Layout, processes: Processes) -> str | None:
        """A line for a run that has taken all steps, or was stopped, and has finished the work at its end; else None.

        Every rank has to call it. Raises UserError if the run ended without a checkpoint of its last step, and cannot
        do from an earlier one what is still to do.
        """
        return processes.from_rank_0(lambda: self._finished(prepared, layout.plan.total_steps))

    def _finished(self, prepared: Preparation, total: int) -> str | None:
        directory = self.directory
        end = read_end(directory) if directory else None
        if directory is None or end is None:
            return None
        steps: int = end["step"]
        expected = work_at_the_end(prepared.options, prepared.held_out)
        is_done = all(end.get(key) == value for key, value in expected.items() if value)
        if self.checkpoint is None:
            refuse_differing(directory, end.get("agreement", {}), self.agreement)
        of_the_end = prepared.options.resume == "auto" or steps == self.progress.step
        stopped = end.get("stopped") if steps < total and of_the_end else None
        stands = stopped and options_of_stopper(prepared.resolved, stopped["by"]) == stopped["options"]
        # From a checkpoint that was chosen, the run is trained and ends again, unless it is that of the end.
        if is_done and of_the_end and (steps >= total or stands):
            return _finished_line(directory, steps, total, stopped)
        if self.checkpoint is None:
            raise UserError(
                f"resume: the run in {directory} ended after {number_of(steps, 'step')} without a checkpoint"
                " (`save_final: false`), so it can be neither trained further nor evaluated or asked again. Its weights"
                f" are in {directory / EXPORT}: `panda generate {directory}` asks them, and with `ckpt_path` another"
                " run starts from them. To train this one again from its first step, remove the export."
            )
        if stopped and not stands:
            print(
                printable(
                    f"note: the run was stopped after step {steps:,} by {stopped['by']}: {stopped['reason']}. It goes"
                    " on, since that is now left out or has other options."
                )
            )
        return None


def _finished_line(directory: Path, steps: int, total: int, stopped: dict[str, Any] | None) -> str:
    asked = f"to get answers, run `panda generate {directory} --prompt TEXT`."
    if stopped is None:
        return (
            f"{directory}: nothing is left to do: {number_of(steps, 'step is', 'steps are')} done and exported. To"
            f" train further, raise `max_steps` or `num_train_epochs`; {asked}"
        )
    kind, _, name = stopped["by"].partition(" ")
    without = (
        f"leave it out by `-p no:{name}`, or give it other options" if kind == "plugin" else "give it other options"
    )
    return printable(
        f"{directory}: nothing is left to do: the run was stopped after step {steps:,} of {total:,} by"
        f" {stopped['by']}: {stopped['reason']}; it is exported. To train further, {without}, and resume again; {asked}"
    )


def continuation_of(prepared: Preparation, processes: Processes, lock: RunLock) -> Continuation:
    """What the run of ``prepared`` continues, its directory or the checkpoint of another run held by ``lock``.

    Every rank has to call it.

    Raises UserError if a fact that must stay the same differs from the run that made the checkpoint.
    """
    resolved = prepared.resolved
    directory, checkpoint = processes.from_rank_0(lambda: hold_continued(resolved, lock))
    if directory is not None:
        refuse_later(directory)
    begun = time.perf_counter()
    checkpoint = _whole(resolved, directory, checkpoint, processes, lock)
    agreement = agreement_of(resolved, prepared.pretrained, prepared.dataset)
    progress = processes.together(lambda: read_progress(checkpoint, agreement)) if checkpoint else START
    return Continuation(directory, checkpoint, progress, agreement, time.perf_counter() - begun)


def _whole(
    resolved: Resolved, directory: Path | None, checkpoint: Path | None, processes: Processes, lock: RunLock
) -> Path | None:
    """``checkpoint``, or the newest before it whose files have the content that was written, in ``directory``.

    Damaged ones that are newer are set aside. Raises DamagedError for one that the user named, or of another run.
    """
    while checkpoint is not None:
        try:
            check_shared(processes, checkpoint)
            break
        except UserError as problem:
            if directory is None or names_checkpoint(resolved, checkpoint) or not is_own(checkpoint, directory):
                raise
            processes.from_rank_0(partial(_report_aside, checkpoint, str(problem)))
            checkpoint = processes.from_rank_0(partial(checkpoint_to_continue, resolved, directory, lock))
    if checkpoint is None and directory is not None:
        processes.from_rank_0(lambda: _begin_again(directory, resolved.core.if_damaged))
    return checkpoint


def _begin_again(directory: Path, if_damaged: str) -> None:
    """Set all checkpoints of ``directory`` aside, none of which is whole. Raises UserError if the run is to stop."""
    damaged = checkpoints(directory / CHECKPOINTS)
    aside = sorted((directory / CHECKPOINTS).glob("damaged-*"))
    if not damaged and not aside:
        return
    if if_damaged == "stop":
        raise UserError(
            f"{directory}: all of its checkpoints are damaged: {', '.join(path.name for path in [*damaged, *aside])}."
            " `if_damaged: begin` sets them aside, and trains from the first step again."
        )
    for path in damaged:
        _report_aside(path, f"it is damaged: {damage(path)}")
    if damaged:
        print(f"{directory}: none of its checkpoints is whole: the run begins again, from its first step", flush=True)


def _report_aside(checkpoint: Path, why: str) -> None:
    print(printable(f"set aside: {set_aside_once_unread(checkpoint, 'damaged')}, since {why}"), flush=True)


def agreement_of(resolved: Resolved, pretrained: Pretrained | None, dataset: SampleSet) -> dict[str, Any]:
    """The facts that a run and its continuation have to share."""
    options = resolved.core
    adapters = ", ".join(f"{key} {getattr(options, key)}" for key in LORA_KEYS)
    names = {kind: chosen.component.name for kind, chosen in resolved.components.items() if kind != "arch"}
    return {
        **names,
        **{
            f"{kind}.{key}": value
            for kind in ("task", "model", "optimizer")
            for key, value in asdict(resolved.components[kind].options).items()
            if options_of(resolved.components[kind].component.options)[key].location is None
        },
        "weight_decay": options.weight_decay,
        "tensor_parallel_size": options.tensor_parallel_size,
        "precision": options.precision,
        "bit_training": options.bit_training,
        "weight_decay_on": options.weight_decay_on,
        "lr_multipliers": list(options.lr_multipliers),
        "adapters": adapters if options.use_lora else "none",
        "base": f"quantised to {options.quant_bits} bits" if options.use_quant else "whole",
        **({"base_weights": base_weights(pretrained)} if options.use_lora else {}),
        **({"reference_weights": frozen} if (frozen := reference_weights(resolved, pretrained)) else {}),
        # The same weights compute something else with other heads or another RoPE.
        **_computed("ckpt_path", _config_in_use(resolved, pretrained)),
        **_computed("reference", reference_config(resolved)),
        "seed": options.seed,
        "samples": len(dataset),
        "samples_per_epoch": sum(source.per_epoch for source in dataset.sources),
        "tokens": dataset.tokens,
        "data": dataset.fingerprint,
        # What the hashes above are of, for whoever has to know why they differ.
        MADE_OF: {
            "max_samples": options.max_samples,
            "eval_fraction": options.eval_fraction,
            "base": pretrained.describe() if pretrained else "random weights",
            "data_sets": origins_of(dataset),
        },
    }


def _config_in_use(resolved: Resolved, pretrained: Pretrained | None) -> Mapping[str, Any]:
    """The config.json that the model is built by; empty where options of the model say all that it would."""
    model = resolved.components["model"].component
    if pretrained is None or "panda_model" in pretrained.config or hasattr(model.options, "of_checkpoint"):
        return {}
    return pretrained.config


def _computed(name: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """What ``config``, of the model called ``name``, says of what it computes; nothing of an empty one."""
    return {f"{name}.{key}": value for key, value in architecture_of(config).items()} if config else {}
