"""What the directory of a run says of it: this needs neither its data nor its model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from panda.engine.checkpoints.folders import step_of
from panda.files.records import damaged_lines
from panda.files.records import read_records
from panda.hooks.curves import Recorded
from panda.hooks.guard import read_skipped
from panda.hooks.metrics import FILE_NAME
from panda.hooks.metrics import read_evaluations
from panda.report.reported import Answer
from panda.report.reported import Missing
from panda.report.reported import Reported
from panda.report.reported import public
from panda.run.best_evaluation import best_checkpoint
from panda.run.best_evaluation import best_evaluation
from panda.run.best_evaluation import ended_step
from panda.run.best_evaluation import exported_step
from panda.run.description import read_provenance
from panda.run.directory import configuration_in

ANSWERS = "answers.json"
EVAL_ANSWERS = "eval_answers.jsonl"
"""What the plugin ``eval_generate`` keeps: answers to evaluation data at each evaluation."""
TRAINED, REFERENCE = "after training", "in the data"
PROFILES = "profile/parts-step*.txt"


def recorded(run: Path, name: str, row: Mapping[str, Any], answers: int, checkpoint: Path | None) -> Reported:
    """The part of a page about ``run``, which it calls ``name``, that is on record.

    ``row``: that of ``panda runs``; ``answers``: how many questions are shown; ``checkpoint``: the one that answers.
    """
    profiles = [path.read_text(encoding="utf-8", errors="replace") for path in sorted(run.glob(PROFILES))]
    return Reported(
        recorded=Recorded.read(run, public(name)),
        row=row,
        configuration=public(configuration_in(run)),
        provenance=public(read_provenance(run)),
        damaged=len(damaged_lines(run / FILE_NAME)),
        weights=weights_of(run, checkpoint),
        answers=recorded_answers(run, answers) or Missing("the run has recorded none"),
        evaluation_answers=evaluation_answers(run, answers),
        skipped=public(list(read_skipped(run).values())),
        profile="\n".join(profiles),
    )


def recorded_answers(run: Path, count: int) -> list[Answer]:
    """What ``run`` answered to ``count`` prompts at its end; nothing where it did not come so far."""
    try:
        found = json.loads((run / ANSWERS).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return []
    each = found if isinstance(found, list) else []
    pairs = [(one.get("prompt"), one.get("answer")) for one in each if isinstance(one, dict)]
    step = ended_step(run)
    when = "" if step is None else f", step {step:,}"
    whose = TRAINED if has_ended(run) else f"at the end of an earlier start{when}"
    return [
        Answer(prompt, {whose: answer})
        for prompt, answer in pairs[:count]
        if isinstance(prompt, str) and isinstance(answer, str)
    ]


def has_ended(run: Path) -> bool:
    """Whether ``run`` is at its end, or was stopped: it is not to go on by itself."""
    return isinstance(read_provenance(run).get("end"), dict)


def step_of_weights(run: Path, checkpoint: Path | None) -> int | None:
    """The step after which the weights were that answer for ``run``: of ``checkpoint``, or its export."""
    return step_of(checkpoint) if checkpoint else exported_step(run)


def whose_answers(run: Path, checkpoint: Path | None) -> str:
    """What the answers of the model of ``run``, in ``checkpoint``, are headed."""
    step = step_of_weights(run, checkpoint)
    if step is None or (has_ended(run) and step == ended_step(run)):
        return TRAINED
    return f"after step {step:,}"


def weights_of(run: Path, checkpoint: Path | None) -> str:
    """Which weights answer for ``run``, and whether its best evaluation is of others; empty where none are known."""
    step, best = step_of_weights(run, checkpoint), best_evaluation(run, read_evaluations(run))
    if step is None:
        return ""
    said = f"those after step {step:,}"
    if best is None or best.step == step:
        return said + ", the best by its evaluations" * (best is not None)
    kept = best_checkpoint(run, best)
    return f"{said}; the best evaluation was {best}" + (f", kept as {kept.name}" if kept else "")


def evaluation_answers(run: Path, count: int) -> list[Answer]:
    """What ``run`` answered to the first ``count`` questions of its evaluation data, at first and at last."""
    asked: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for record in read_records(run / EVAL_ANSWERS):
        if all(isinstance(record.get(key), str) for key in ("prompt", "answer", "reference")):
            # after another start the data may have other samples, of the same numbers
            sample = str(record.get("set")), str(record.get("sample")), record["prompt"]
            asked.setdefault(sample, []).append(record)
    found = []
    for records in [*asked.values()][:count]:
        first, last = records[0], records[-1]
        answers = {_when(record): record["answer"] for record in (first, last)}
        found.append(Answer(first["prompt"], {**answers, REFERENCE: first["reference"]}))
    return found


def _when(record: Mapping[str, Any]) -> str:
    scores = record.get("scores")
    numbers = scores.items() if isinstance(scores, dict) else ()
    shown = [f"{name} {value:.3g}" for name, value in numbers if isinstance(value, (int, float))]
    when = f"after step {record['step']:,}" if record["step"] else "before training"
    return f"{when} ({', '.join(shown)})" if shown else when
