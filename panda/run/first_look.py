"""Checks that need no torch: what a run lacks is reported before anything slow is imported."""

from __future__ import annotations

import importlib
import os
import sys

from panda.configuration.configure import Configuration
from panda.data.auto_reader import AutoReader
from panda.data.data_sets import name_and_commit
from panda.data.locations import data_files
from panda.data.locations import each_of
from panda.data.reading import Reader
from panda.engine.deepspeed_config import deepspeed_config
from panda.files.activity import activity
from panda.files.whole import check_can_be_made
from panda.registry import UserError
from panda.registry.contexts import ReaderContext
from panda.registry.settings import CORE
from panda.registry.settings import Setting
from panda.run.cards import GPUS
from panda.run.directory import continues_in_place
from panda.run.directory import find_directory
from panda.run.directory_lock import check_free
from panda.run.sources import data_settings
from panda.weights.tokenizers import tokenizer_folder

NO_FP16 = "precision: fp16 needs a GPU. Write `precision: bf16` or `fp32`."


def let_threads_sleep() -> None:
    """Has an effect before torch is loaded.

    By default the OpenMP threads of torch (2.13, 2026-11) spin while they wait for each other, which makes them up to a
    hundred times slower, measured, as soon as another process wants one of their cores. OpenMP reads this variable when
    torch loads it; it can go when torch's threads sleep by default.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def load(module: str) -> None:
    """Import ``module``, of panda, which imports torch, and takes seconds; and say so."""
    with activity("loading torch and DeepSpeed", announced=True):
        importlib.import_module(module)


def planned_world_size(configuration: Configuration) -> int:
    """The processes that a run will have: as many as a launcher started, else the fewest that hold the model.

    Raises UserError where the variable of a launcher, which users set for that, too, is no such number.
    """
    given = os.environ.get("WORLD_SIZE", str(configuration.options.tensor_parallel_size)).strip()
    if not given.isdecimal() or int(given) < 1:
        raise UserError(f"WORLD_SIZE={given} in the environment: expected a number of ranks, from 1 on.")
    return int(given)


def look_for_inputs(configuration: Configuration) -> None:
    """Raise UserError if the data or the tokenizer that the configuration names is missing."""
    resolved = configuration.resolved
    context = ReaderContext(max_row_bytes=resolved.core.max_row_bytes)
    reader = resolved.components["reader"].build(context, Reader)
    settings = data_settings(resolved)
    if all(setting.owner == CORE for setting in settings):
        settings = []  # the task has no files for the reader, so what it is evaluated on need not be such files
    _look_for_data(settings, reader, on_hub=False)
    tokenizer_folder(resolved.core.tokenizer)
    _look_for_data(settings, reader, on_hub=True)  # which are fetched: last, since that may take long


def _look_for_data(settings: list[Setting], reader: Reader, *, on_hub: bool) -> None:
    """Raise UserError if files that ``settings`` name are missing: those of data sets on the hub, or the others."""
    for setting in settings:
        texts = [text for text in each_of(setting.value) if (name_and_commit(text) is not None) == on_hub]
        if texts or not (setting.value or on_hub):
            files = data_files(texts, reader.suffixes, setting.key)
            if isinstance(reader, AutoReader):
                reader.check(files)


def look_first(configuration: Configuration, world_size: int) -> None:
    """Raise UserError if a run of ``world_size`` processes cannot work: settings, inputs, or a place to write."""
    resolved = configuration.resolved
    if resolved.core.precision == "fp16" and sys.platform == "linux" and not any(map(os.path.exists, GPUS)):
        raise UserError(NO_FP16)
    deepspeed_config(configuration.options, world_size=world_size, on_gpu=False)
    directory, checkpoint = find_directory(resolved)
    check_can_be_made(directory, "output_dir")
    look_for_inputs(configuration)
    if continues_in_place(resolved, directory, checkpoint):
        check_free(directory)
