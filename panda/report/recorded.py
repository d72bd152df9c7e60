"""What the directory of a run says of it: this needs neither its data nor its model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from panda.files.records import damaged_lines
from panda.hooks.curves import Recorded
from panda.hooks.guard import read_skipped
from panda.hooks.metrics import FILE_NAME
from panda.report.reported import Reported
from panda.report.reported import public
from panda.run.description import read_provenance
from panda.run.directory import configuration_in

ANSWERS = "answers.json"
PROFILES = "profile/parts-step*.txt"


def recorded(run: Path, name: str, row: Mapping[str, Any]) -> Reported:
    """The part of a page about ``run``, which it calls ``name``, that is on record. ``row``: that of ``panda runs``."""
    profiles = [path.read_text(encoding="utf-8", errors="replace") for path in sorted(run.glob(PROFILES))]
    return Reported(
        recorded=Recorded.read(run, public(name)),
        row=row,
        configuration=public(configuration_in(run)),
        provenance=public(read_provenance(run)),
        damaged=len(damaged_lines(run / FILE_NAME)),
        skipped=public(list(read_skipped(run).values())),
        profile="\n".join(profiles),
    )


def recorded_answers(run: Path) -> list[tuple[str, str]]:
    """The prompts that ``run`` answered at its end, and its answers; none where it did not come so far."""
    try:
        found = json.loads((run / ANSWERS).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return []
    each = found if isinstance(found, list) else []
    pairs = [(one.get("prompt"), one.get("answer")) for one in each if isinstance(one, dict)]
    return [(prompt, answer) for prompt, answer in pairs if isinstance(prompt, str) and isinstance(answer, str)]
