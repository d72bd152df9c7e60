"""``panda.train``: a run in this process, from a script or a notebook. Importing this imports nothing heavy."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from typing import Any
from typing import TypeAlias

if TYPE_CHECKING:
    from panda.configuration.arguments import Arguments
    from panda.configuration.configure import Configuration

Value: TypeAlias = bool | int | float | str | os.PathLike[str] | None
"""A value of a key."""


@dataclass(frozen=True)
class Trained:
    """A run that has ended."""

    directory: Path
    """The run directory."""
    step: int
    """Optimizer steps done, those before it was resumed too."""
    records: tuple[dict[str, Any], ...]
    """The log records in its metrics.jsonl, in order; none under `-p no:metrics`."""
    evaluations: tuple[dict[str, Any], ...]
    """The records of its evaluations, in order."""


def train(
    config: str | os.PathLike[str] | Mapping[str, Value | Sequence[Value]] | None = None,
    **flags: Value | Sequence[Value],
) -> Trained:
    """Train what ``config``, the path of a YAML file or a mapping of its keys, and ``flags`` describe.

    The keys are those of the command line, and so are messages, output and files; a flag overrides the file. A key with
    a dot in it is passed as ``**{"model.hidden_size": 64}``. Components that this process has registered can be named.
    Under a launcher, every process calls this. Can be called several times: no process group is left.

    Raises UserError where the command line would print one, and KeyboardInterrupt, whose text is the command that
    continues the run, where a signal or `max_train_hours` ended it and it has saved.
    """
    from panda.configuration.arguments import arguments_of

    return train_arguments(arguments_of(config, flags))


def train_arguments(arguments: Arguments) -> Trained:
    """Train what ``arguments`` describe. Raises UserError."""
    from panda.files.library_warnings import kept_aside
    from panda.files.library_warnings import show_last
    from panda.registry import UserError

    with kept_aside() as kept:
        try:
            return _train_arguments(arguments)
        except UserError:
            raise
        except Exception:
            if kept.file is None:
                show_last(kept)
            raise
        finally:
            speaks = kept.file is not None and not kept.said and os.environ.get("RANK", "0") == "0"
            if speaks and (warned := kept.summary()):
                print(f"{warned}: {kept.file}", file=sys.stderr, flush=True)


def _train_arguments(arguments: Arguments) -> Trained:
    from panda.configuration.configure import configure
    from panda.configuration.launcher import check_launcher

    check_launcher()
    configuration = configure(arguments)

    from panda.data.ingredients import forget_unseen_code
    from panda.run.first_look import let_threads_sleep
    from panda.run.first_look import load
    from panda.run.first_look import look_first
    from panda.run.sources import with_lasting_sources

    forget_unseen_code()
    configuration = with_lasting_sources(configuration)
    look_first(configuration, int(os.environ.get("WORLD_SIZE", 1)))
    let_threads_sleep()
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        # Where a rank ends, torch (2.13) warns in the others with a trace of C++ for each lost connection; panda says
        # what has happened in a line. Read when torch is loaded.
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    if not (arguments.in_process and "deepspeed" in sys.modules):
        load("panda.runner")
    try:
        with own_group():
            return _trained(configuration)
    finally:
        gc.collect()  # an engine is part of cycles


def _trained(configuration: Configuration) -> Trained:
    from panda.hooks.metrics import read_evaluations
    from panda.hooks.metrics import read_metrics
    from panda.run.description import read_end
    from panda.run.directory import find_directory
    from panda.runner import train

    run = train(configuration)
    if run is not None:
        directory, step = run.directory, run.step
    else:  # it had already ended
        directory, _ = find_directory(configuration.resolved)
        step = (read_end(directory) or {})["step"]
    return Trained(directory, step, tuple(read_metrics(directory)), tuple(read_evaluations(directory)))


@contextmanager
def own_group() -> Iterator[None]:
    """Leave the process group that a run joins meanwhile, unless the caller had joined one, and its traces."""
    import torch.distributed

    from panda.configuration.launcher import LostRankError
    from panda.engine.processes import leave_processes
    from panda.registry import UserError
    from panda.run.interruption import Interrupted

    is_callers = torch.distributed.is_initialized()
    is_alone = int(os.environ.get("WORLD_SIZE", 1)) == 1
    before = {name: os.environ.get(name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")}
    leaves = is_alone
    try:
        yield
        leaves = True
    except (UserError, Interrupted) as error:
        # All ranks raise these; after any other failure, others may wait for this one.
        leaves = not isinstance(error, LostRankError)
        raise
    finally:
        if leaves and not is_callers:
            leave_processes()
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
