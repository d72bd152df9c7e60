"""The beginning of a run: loads the state to continue from, and makes and describes the run directory."""

from __future__ import annotations

import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

from panda.data.locations import data_sets
from panda.data.packing import Layout
from panda.engine.checkpoints.folders import checkpoints
from panda.engine.checkpoints.folders import damage
from panda.engine.checkpoints.folders import step_of
from panda.engine.checkpoints.in_use import set_aside_once_unread
from panda.engine.checkpoints.writing import load_checkpoint
from panda.engine.checkpoints.writing import remove_interrupted
from panda.engine.determinism import how_alike
from panda.engine.processes import Processes
from panda.engine.processes import dump_collectives_in
from panda.files.activity import stand
from panda.files.disk_full import writing
from panda.files.library_warnings import current
from panda.files.terminal import printable
from panda.run.continuation import Continuation
from panda.run.description import BEGUN_FROM
from panda.run.description import changes
from panda.run.description import write_description
from panda.run.directory import EXPORT
from panda.run.directory import MODEL_FOLDER
from panda.run.directory import configuration_in
from panda.run.directory import make_directory
from panda.run.directory import make_directory_again
from panda.run.directory_lock import RunLock
from panda.run.disk_needs import check_disk
from panda.run.disk_needs import disk_needs
from panda.run.generating import Generation
from panda.run.model import base_weights
from panda.run.model import seed_random
from panda.run.preparation import Preparation
from panda.run.sources import data_settings
from panda.run.state import Run
from panda.run.trained_model import TrainedModel
from panda.weights.export import decoding_of
from panda.weights.export import describe_model
from panda.weights.export import refuse_replacing
from panda.weights.run_folders import CHECKPOINTS
from panda.weights.run_folders import LOG

NO_ROOM_LEFT = "Complete checkpoints are untouched: continue from the newest one with `--resume auto`."


def begin(
    prepared: Preparation,
    continuation: Continuation,
    layouts: tuple[Layout, dict[str, Layout]],
    model: TrainedModel,
    processes: Processes,
    lock: RunLock,
) -> Run:
    """The run, ready for its next step, with a directory that describes it. Every rank has to call it.

    ``layouts``: the rows to train on, and those to evaluate on, by the name of their set.
    """
    resolved, options, checkpoint = prepared.resolved, prepared.options, continuation.checkpoint
    resume_seconds = _load(prepared, continuation, model, processes)
    directory = continuation.directory or processes.from_rank_0(lambda: make_directory(resolved, lock))
    if processes.world_size > 1:
        dump_collectives_in(directory)
    layout, evaluations = layouts
    decoding = decoding_of(model.base, prepared.tokenizer, prepared.pretrained, prepared.task.end_tokens)
    run = Run(
        resolved,
        directory,
        processes,
        prepared.task,
        prepared.dataset,
        layout,
        evaluations,
        model.schedule,
        model.engine,
        prepared.configuration.hooks,
        continuation.agreement,
        decoding,
        reference=model.reference,
        generate=Generation(model.engine, options, prepared.task.pad_token_id, decoding.ends),
        lock=lock,
        resumed_from=checkpoint,
        spent={"resume_seconds": resume_seconds} if checkpoint else {},
        step=continuation.progress.step,
        learning_rate_factor=continuation.progress.learning_rate_factor,
        flops_per_token=prepared.flops_per_token if processes.rank == 0 else None,
        higher_is_better=prepared.evaluation_entries.higher_is_better if evaluations else set(),
    )

    current().keep_in(directory / LOG)
    describe = writing(f"{directory}: the description of the run", NO_ROOM_LEFT)(_describe)
    processes.together(partial(describe, run, prepared, model))

    def make_again() -> Path:
        run.directory = make_directory_again(run.directory, lock)
        current().keep_in(run.directory / LOG)
        describe(run, prepared, model)
        return run.directory

    run.make_again = make_again
    return run


def _describe(run: Run, prepared: Preparation, model: TrainedModel) -> None:
    """Write what the run directory says of the run, on rank 0."""
    if run.processes.rank != 0:
        return
    resolved, directory = run.resolved, run.directory
    refuse_replacing(directory / EXPORT)  # now, and not when the run has been trained
    remove_interrupted(directory / CHECKPOINTS)  # it takes up room
    _set_aside(directory, run.resumed_from)
    needs = disk_needs(resolved, model.parameters, model.trained_parameters, run.plan, prepared.task.tokenizer)
    if few := check_disk(directory, needs):
        print(printable(f"note: {few}"), file=sys.stderr, flush=True)
    write_description(directory, resolved, model.config, _facts(run, prepared, model))
    describe_model(
        directory / MODEL_FOLDER,
        model.base,
        next(model.engine.module.parameters()).dtype,
        prepared.task.tokenizer,
        model=resolved.components["model"],
        context=prepared.context,
        pretrained=prepared.pretrained,
        generation=run.decoding,
        parts=model.parts,
    )
    if note := run.decoding.note(prepared.pretrained.folder if prepared.pretrained else "model"):
        print(printable(note), file=sys.stderr, flush=True)


def _load(prepared: Preparation, continuation: Continuation, model: TrainedModel, processes: Processes) -> float:
    """Load the checkpoint that the run continues from, if there is one; returns the seconds, with those of checking."""
    begun, checkpoint = time.perf_counter(), continuation.checkpoint
    if checkpoint:
        stand(f"loading {checkpoint.name}")
    if checkpoint and not load_checkpoint(model.engine, checkpoint, is_checked=True):
        # The random states in the checkpoint are those of other ranks: reseed, differently at each step and rank.
        step, ranks = continuation.progress.step, processes.data_ranks
        seed_random(prepared.options.seed + processes.data_rank + step * ranks)
        if processes.rank == 0:
            print(f"{checkpoint}: redistributed over other ranks or another ZeRO stage: exact to rounding", flush=True)
    return round(continuation.seconds + time.perf_counter() - begun, 3)


def _set_aside(directory: Path, checkpoint: Path | None) -> None:
    """Rename the checkpoints in ``directory`` that are later than ``checkpoint``, from which the run continues.

    It takes another course from there, and the newest checkpoint must be one of its own. Where it continues from that
    of another run, all that it has are damaged.
    """
    if checkpoint:
        for later in checkpoints(directory / CHECKPOINTS):
            if step_of(later) > step_of(checkpoint):
                problem = damage(later)
                path = set_aside_once_unread(later, "damaged" if problem else "abandoned")
                why = f"it is damaged: {problem}" if problem else "the run continues from an earlier one"
                print(printable(f"set aside: {path}, since {why}"), flush=True)


def _facts(run: Run, prepared: Preparation, model: TrainedModel) -> dict[str, Any]:
    """What provenance.json records of a run besides its configuration."""
    dataset, pretrained, begun_from = run.dataset, prepared.pretrained, run.resumed_from
    changed = changes(run.resolved, configuration_in(begun_from.absolute().parent.parent)) if begun_from else {}
    return {
        **({"changed": changed} if changed else {}),
        "ranks": run.processes.world_size,
        "device": str(run.processes.device),
        **({"deterministic": how_alike()} if run.options.deterministic else {}),
        "parameters": model.parameters,
        "trained_parameters": model.trained_parameters,
        "attention": getattr(getattr(model.base, "config", None), "_attn_implementation", None),
        "total_steps": run.plan.total_steps,
        "step_samples": run.plan.step_samples,
        "samples": len(dataset),
        "tokens": dataset.tokens,
        "supervised_tokens": dataset.supervised_tokens,
        "data_sets": [found.record() for each in data_settings(run.resolved) for found in data_sets(each.value)],
        "bad_rows": dataset.report.bad_rows,
        "evaluation_metrics": prepared.evaluation_entries.better if run.evaluations else None,
        "eval_samples": sum(len(each.dataset) for each in run.evaluations.values()) or None,
        "checkpoint": pretrained.describe() if pretrained else None,
        **({"base_weights": base_weights(pretrained)} if run.options.use_lora else {}),
        "vocabulary": (prepared.context.config or {}).get("vocab_size"),
        BEGUN_FROM: str(run.resumed_from.absolute()) if run.resumed_from else None,
    }
