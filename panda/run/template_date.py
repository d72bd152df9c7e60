"""The date that a chat template writes: the day on which a run began, also where the run is resumed on another."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC
from datetime import datetime

from panda.configuration.configure import Configuration
from panda.registry.resolve import Resolved
from panda.run.directory import recorded_configuration
from panda.tasks.instruct import InstructFormat

KEY = "template_date"


def with_template_date(configuration: Configuration) -> Configuration:
    """``configuration`` with a date for chat templates, if its task has one and none was given."""
    resolved = configuration.resolved
    task = resolved.components["task"]
    if not isinstance(task.options, InstructFormat) or task.options.template_date is not None:
        return configuration
    # In UTC, so that machines in other time zones agree.
    day = _recorded(resolved) or datetime.now(UTC).date().isoformat()
    dated = resolved.with_values({resolved.key_of(task, KEY): day}, "the day on which the run began")
    return replace(configuration, resolved=dated)


def _recorded(resolved: Resolved) -> str | None:
    """The date in the configuration of the run that this one continues."""
    values = recorded_configuration(resolved)
    return next((str(value) for key, value in values.items() if key.rpartition(".")[2] == KEY and value), None)
