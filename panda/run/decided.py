"""Values that a run decides for itself, once: written to its config.yaml, and kept where it is resumed.

So a run that is resumed on another day, or on another machine, goes on as it began.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from datetime import UTC
from datetime import date
from datetime import datetime
from typing import Any

from panda.configuration.configure import Configuration
from panda.registry.resolve import Resolved
from panda.run.directory import recorded_configuration
from panda.run.fitting import refused
from panda.tasks.dialogue_task import InstructFormat

KEPT = "decided when the run began"
"""The origin of a value that a resumed run keeps."""


def with_decided(
    configuration: Configuration, key: str, undecided: Any, decide: Callable[[], tuple[Any, str]]
) -> Configuration:
    """``configuration`` with a value for ``key`` in place of ``undecided``; unchanged where it has another.

    It is that of the run that this one continues, or the one that ``decide`` returns, with its origin. One that is
    refused beside new values of the other keys is decided again.
    """
    resolved = configuration.resolved
    if resolved.settings[key].value != undecided:
        return configuration
    kept = recorded(resolved, key)
    if kept not in (None, undecided):
        again = resolved.with_values({key: kept}, KEPT)
        if not refused(again):
            return replace(configuration, resolved=again)
    value, origin = decide()
    return replace(configuration, resolved=resolved.with_values({key: value}, origin))


def recorded(resolved: Resolved, key: str) -> Any:
    """The value of ``key``, with or without a prefix, in the configuration of the run that this one continues.

    None if there is none.
    """
    name = key.rpartition(".")[2]
    values = recorded_configuration(resolved)
    found = next((value for written, value in values.items() if written.rpartition(".")[2] == name), None)
    return found.isoformat() if isinstance(found, date) else found


def with_template_date(configuration: Configuration) -> Configuration:
    """``configuration`` with a date for chat templates, if its task has one and none was given: the day of its start.

    In UTC, so that machines in other time zones agree.
    """
    task = configuration.resolved.components["task"]
    if not isinstance(task.options, InstructFormat):
        return configuration
    key = configuration.resolved.key_of(task, "template_date")
    return with_decided(
        configuration, key, None, lambda: (datetime.now(UTC).date().isoformat(), "the day on which the run began")
    )
