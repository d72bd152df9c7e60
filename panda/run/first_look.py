"""Checks that need no torch: what a run lacks is reported before anything slow is imported."""

from __future__ import annotations

import os
from pathlib import Path

from panda.configuration.configure import Configuration
from panda.data.reading import Reader
from panda.data.reading import data_files
from panda.engine.deepspeed_config import deepspeed_config
from panda.registry import UserError
from panda.registry.contexts import ReaderContext
from panda.run.directory import continues_in_place
from panda.run.directory import find_directory
from panda.run.directory_lock import check_free
from panda.weights.tokenizers import tokenizer_folder


def look_for_inputs(configuration: Configuration) -> None:
    """Raise UserError if the data or the tokenizer that the configuration names is missing."""
    resolved = configuration.resolved
    reader = resolved.components["reader"].build(ReaderContext(), Reader)
    for setting in resolved.settings.values():
        if setting.location and setting.location.holds_data and setting.value is not None:
            data_files(setting.value, reader.suffixes, setting.key)
    tokenizer_folder(resolved.core.tokenizer)


def look_first(configuration: Configuration, world_size: int) -> None:
    """Raise UserError if a run of ``world_size`` processes cannot work: settings, inputs, or a place to write."""
    resolved = configuration.resolved
    deepspeed_config(configuration.options, world_size=world_size, on_gpu=False)
    directory, checkpoint = find_directory(resolved)
    _check_can_be_made(directory)
    look_for_inputs(configuration)
    if continues_in_place(resolved, directory, checkpoint):
        check_free(directory)


def _check_can_be_made(directory: Path) -> None:
    nearest = next(path for path in (directory.absolute(), *directory.absolute().parents) if path.exists())
    if not nearest.is_dir():
        raise UserError(f"output_dir: cannot make {str(directory)!r}: {nearest} is a file.")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise UserError(f"output_dir: cannot make {str(directory)!r}: {nearest} cannot be written to.")
