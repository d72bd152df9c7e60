"""Data whose name does not last: a pipe, which is kept as a file, and a data set, which is settled. No torch.

The run's config.yaml names what lasts, so a run that is resumed reads the same data.
"""

from __future__ import annotations

from dataclasses import replace

from panda.configuration.configure import Configuration
from panda.data.data_sets import name_and_commit
from panda.data.data_sets import settled
from panda.data.data_sets import unsettled_name
from panda.data.locations import each_of
from panda.registry import UserError
from panda.registry.resolve import Resolved
from panda.registry.settings import CORE
from panda.registry.settings import Setting
from panda.run.directory import recorded_configuration
from panda.run.pipes import FOLDER
from panda.run.pipes import is_pipe
from panda.run.pipes import keep


def with_lasting_sources(configuration: Configuration) -> Configuration:
    """``configuration`` with what lasts in place of pipes and data sets that its keys of data name.

    Copies of pipes are in the token cache. A name on the hub gets a commit: that of the run that is resumed, or else
    the current one. Raises UserError where another process would have to read a pipe, too, and where there is no such
    data set.
    """
    resolved, settings = configuration.resolved, data_settings(configuration.resolved)
    has_files = any(setting.owner != CORE for setting in settings)  # else the task's data may be anything
    lasting: dict[str, str] = {}
    for setting in settings:
        key = setting.key
        texts = each_of(setting.value)
        has_pipe = False
        for text in texts:
            if text not in lasting and is_pipe(text, key):
                from panda.data.token_cache import cache_folder  # here, since it imports numpy

                lasting[text] = str(keep(text, cache_folder(resolved.core.token_cache) / FOLDER, key))
                has_pipe = True
            elif text not in lasting:
                lasting[text] = _settled(text, key, resolved) if has_files else text
        found = tuple(lasting[text] for text in texts)
        if found != texts:
            origin = "kept of a pipe" if has_pipe else f"{setting.origin}, as it was found"
            value = found[0] if isinstance(setting.value, str) else found
            resolved = resolved.with_values({key: value}, origin)
    return replace(configuration, resolved=resolved)


def data_settings(resolved: Resolved) -> list[Setting]:
    """The settings that name data, where they have a value."""
    settings = resolved.settings.values()
    return [each for each in settings if each.location and each.location.holds_data and each.value is not None]


def _settled(text: str, key: str, resolved: Resolved) -> str:
    """``text``, which ``key`` names, as it always means the same files."""
    try:
        name = unsettled_name(text)
        return settled(text, _recorded(name, key, resolved) if name else None)
    except UserError as problem:
        raise UserError(f"{key}: {problem}") from None


def _recorded(name: str, key: str, resolved: Resolved) -> str | None:
    """The commit of the data set ``name`` in the run that is resumed; None where it has none."""
    recorded = recorded_configuration(resolved)
    for value in (recorded.get(key), *recorded.values()):
        for text in value if isinstance(value, list) else [value]:
            found = name_and_commit(text) if isinstance(text, str) else None
            if found and found[0] == name:
                return found[1]
    return None
