"""What the directory of a run says of it: this needs neither its data nor its model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from panda.files.records import damaged_lines
from panda.files.records import read_records
from panda.hooks.curves import Recorded
from panda.hooks.guard import read_skipped
from panda.hooks.metrics import FILE_NAME
from panda.report.reported import Answer
from panda.report.reported import Missing
from panda.report.reported import Reported
from panda.report.reported import public
from panda.run.description import read_provenance
from panda.run.directory import configuration_in

ANSWERS = "answers.json"
EVAL_ANSWERS = "eval_answers.jsonl"
"""What the plugin ``eval_generate`` keeps: answers to evaluation data at each evaluation."""
TRAINED, REFERENCE = "after training", "in the data"
PROFILES = "profile/parts-step*.txt"


def recorded(run: Path, name: str, row: Mapping[str, Any], answers: int) -> Reported:
    """The part of a page about ``run``, which it calls ``name``, that is on record.

    ``row``: that of ``panda runs``; ``answers``: how many questions are shown.
    """
    profiles = [path.read_text(encoding="utf-8", errors="replace") for path in sorted(run.glob(PROFILES))]
    return Reported(
        recorded=Recorded.read(run, public(name)),
        row=row,
        configuration=public(configuration_in(run)),
        provenance=public(read_provenance(run)),
        damaged=len(damaged_lines(run / FILE_NAME)),
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
    return [
        Answer(prompt, {TRAINED: answer})
        for prompt, answer in pairs[:count]
        if isinstance(prompt, str) and isinstance(answer, str)
    ]


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
