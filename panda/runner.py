"""The central runner: names -> objects -> engine -> loop. Read it first; each step is a module of ``panda/run``."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from panda.configuration.configure import Configuration
from panda.engine.determinism import deterministic
from panda.engine.memory import explaining_lack_of_memory
from panda.engine.processes import Meeting
from panda.engine.processes import join_processes
from panda.engine.processes import meeting
from panda.files.activity import activity
from panda.files.activity import say
from panda.files.activity import stand
from panda.files.disk_full import writing
from panda.registry.chosen import attributed_by_code
from panda.registry.hooks import add_built
from panda.run.alike import refuse_unlike
from panda.run.assembly import lay_out
from panda.run.assembly import lay_out_evaluation
from panda.run.beginning import NO_ROOM_LEFT
from panda.run.beginning import begin
from panda.run.continuation import continuation_of
from panda.run.description import write_end
from panda.run.directory_lock import RunLock
from panda.run.ending import finish
from panda.run.ending import how_it_ended
from panda.run.ending import work_at_the_end
from panda.run.extra_state import load_state
from panda.run.loop import SECONDS_A_MINUTE
from panda.run.loop import Loop
from panda.run.outlook import announce
from panda.run.preparation import add_plugins
from panda.run.preparation import prepare
from panda.run.state import Run as Run
from panda.run.trained_model import trained_model


def train(configuration: Configuration) -> Run | None:
    """Train what ``configuration`` describes and return the finished run; None if that run was already finished.

    Under a launcher, every process calls this. The caller has to leave the process groups afterwards.
    """
    chosen = [*configuration.resolved.chosen]
    with attributed_by_code(chosen), meeting(configuration.options.timeout * SECONDS_A_MINUTE) as met:
        return _train(configuration, met)


def _train(configuration: Configuration, met: Meeting) -> Run | None:
    begun = time.perf_counter()
    add_plugins(configuration)
    with activity("preparing data and model"):
        prepared = prepare(configuration, int(os.environ.get("WORLD_SIZE", 1)), evaluates=True)
        processes = join_processes(prepared.options.tensor_parallel_size, met)
    stand("making the model")
    refuse_unlike(prepared, processes)
    prepared.decide(processes)
    options = prepared.options
    explained = explaining_lack_of_memory(prepared.explain_lack_of_memory)
    with RunLock() as lock, explained, deterministic(options.deterministic):
        continuation = continuation_of(prepared, processes, lock)
        progress, ranks = continuation.progress, processes.data_ranks
        layout = lay_out(options, prepared.dataset, ranks, progress)
        evaluations = {name: lay_out_evaluation(options, held, ranks) for name, held in prepared.held_out.items()}
        if (finished := continuation.finished(prepared, layout, processes)) is not None:
            if processes.rank == 0:
                print(finished)
            return None
        announced = announce(prepared, continuation, layout, processes)
        model = trained_model(prepared, layout, processes)
        add_built(configuration.hooks, prepared.resolved, model.base)
        run = begin(prepared, continuation, (layout, evaluations), model, processes, lock)
        run.begun = begun
        if announced is not None and announced.absolute() != run.directory.absolute():
            say(f"{'output':12}{run.directory}, since another run has taken {announced}")
        with _to_its_end(run, configuration):
            if run.resumed_from is not None:
                processes.together(partial(load_state, run, run.resumed_from))
            lock.have_read()
            run.at("panda_run_start")
            Loop(run, progress).train()
            finish(run)
            stand("ending")
            run.hook.panda_run_end(run=run)
            if processes.rank == 0:
                done = work_at_the_end(options, prepared.held_out)
                write_end(run.directory, run.step, run.agreement, **how_it_ended(run), **done)
    return run


@contextmanager
def _to_its_end(run: Run, configuration: Configuration) -> Iterator[None]:
    """Report an exception that ends ``run`` to the hooks, and close its engine in any case."""
    try:
        with writing(f"{run.directory}: a file of the run or of a plugin", NO_ROOM_LEFT):
            yield
    except BaseException as error:
        configuration.hooks.exception(run, error)
        raise
    finally:
        run.engine.close()
