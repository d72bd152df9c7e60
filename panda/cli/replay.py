"""``panda replay``: a step of a run again, and which of its samples spoil it."""

from __future__ import annotations

import os
import shlex
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING
from typing import Any

from panda.cli.command import run_command
from panda.cli.parser import in_short
from panda.cli.run_folders import run_folder
from panda.configuration.arguments import Arguments
from panda.configuration.arguments import arguments_of_run
from panda.files.terminal import fitted
from panda.files.terminal import number_of
from panda.files.terminal import printable_line
from panda.registry import UserError
from panda.registry.options import Given
from panda.run.directory import PROVENANCE
from panda.run.directory import RUN_CONFIG
from panda.run.directory import begun_from_another
from panda.run.directory import configuration_in

if TYPE_CHECKING:
    from panda.run.replaying import Part
    from panda.run.replaying import Replayed

USAGE = """\
usage: panda replay RUN STEP [--nearest] [--all] [--KEY VALUE ...]

Run step STEP of RUN again, as the run did, from the newest checkpoint before
it: the steps between are taken, too. Prints the loss and the gradient norm of
each sample of the step, with FILE:ROW and the beginning of its text, and
names the samples that are not finite, or far above the others. Nothing is
written into RUN. Hooks are not called. It runs in one process, or under
torchrun on several, with the same samples; with `tensor_parallel_size` on as
many ranks as the run had.

  --nearest     do not take the steps between: run STEP on the weights of the
                checkpoint
  --all         print every sample, and not only the first 20
  --KEY VALUE   keys to change, such as --user_dir, which a run that has files
                of yours needs again

example: panda replay runs/instruct-llama-tiny 37"""

SHOWN = 20


def main(argv: list[str] | None = None) -> int:
    """Entry point of ``panda replay``."""
    return run_command(_replay, argv)


def _replay(argv: list[str]) -> None:
    if {"-h", "--help"} & set(argv):
        print(USAGE)
        return
    words = [word for word in argv if word not in ("--nearest", "--all")]
    if len(words) < 2 or words[0].startswith("-") or not words[1].isdecimal() or int(words[1]) < 1:
        raise UserError(f"expected a run directory and the number of a step, counted from 1.\n{in_short(USAGE)}")
    run, step = run_folder(words[0]), int(words[1])

    from panda.hooks.guard import read_skipped

    skipped = read_skipped(run)
    micro_batches = _micro_batches(run, f"panda.cli.main replay {shlex.join(argv)}")
    rank = int(os.environ.get("RANK", 0))
    with read_before(run, step) as checkpoint, tempfile.TemporaryDirectory(prefix="panda-replay-") as folder:
        # Only rank 0's is written to.
        arguments = _arguments(run, words[2:], checkpoint, micro_batches, Path(folder) / "run")
        replayed = _replayed(arguments, step, frozenset(skipped), between="--nearest" not in argv)
    if rank == 0:
        recorded = skipped.get(step) or _recorded(run, step)
        _print(run, step, checkpoint, replayed, recorded, all_parts="--all" in argv)


@contextmanager
def read_before(run: Path, step: int) -> Iterator[Path | None]:
    """``_checkpoint_before``, which the run leaves in place meanwhile, should it still train."""
    from panda.engine.checkpoints.in_use import being_read

    while True:
        before = _checkpoint_before(run, step)
        if before is None:
            yield None
            return
        with being_read(before) as checkpoint:
            if checkpoint is not None:  # else it was removed since
                yield checkpoint
                return


def _checkpoint_before(run: Path, step: int) -> Path | None:
    """The newest whole checkpoint that ``run`` had before ``step``; None for the start of the run."""
    from panda.engine.checkpoints.folders import complete_checkpoints
    from panda.engine.checkpoints.folders import find_checkpoint
    from panda.engine.checkpoints.folders import step_of

    found = [path for path in complete_checkpoints(run / "checkpoints") if step_of(path) < step]
    if found:
        return found[-1]
    begun_from = begun_from_another(run)
    if begun_from is None:
        return None
    before = find_checkpoint(begun_from)
    if before is None or step_of(before) >= step:
        raise UserError(f"{run}: it began from {begun_from}, and there is no checkpoint before step {step:,} any more.")
    return before


def _arguments(run: Path, flags: list[str], checkpoint: Path | None, micro_batches: int, output: Path) -> Arguments:
    """The arguments of a run in ``output`` that repeats steps of ``run``, from ``checkpoint`` on."""
    arguments = arguments_of_run(run, flags)
    given = arguments.given
    origin = "panda replay"
    others: dict[str, Any] = {
        "gradient_accumulation_steps": micro_batches,
        "output_dir": str(output),
        "num_workers": 0,
        **({"resume": str(checkpoint.absolute())} if checkpoint else {}),
    }
    for key, value in others.items():
        given[key] = Given(value, origin, str(value))
        arguments.recorded.pop(key, None)
    return arguments


def _micro_batches(run: Path, command: str) -> int:
    """How many each rank of this ``command`` runs in a step, so that a step has the samples that it had in ``run``.

    Raises UserError where so many ranks cannot repeat the steps of ``run``.
    """
    from panda.run.description import read_provenance

    recorded = {key.removeprefix("run."): value for key, value in configuration_in(run).items()}
    numbers = {
        "ranks": read_provenance(run).get("ranks"),
        **{key: recorded.get(key) for key in ("tensor_parallel_size", "gradient_accumulation_steps")},
    }
    for name, value in numbers.items():
        if not isinstance(value, int) or value < 1:
            raise UserError(f"{run}: {RUN_CONFIG} and {PROVENANCE} do not say {name!r}, so its steps are not known.")
    ranks, together, accumulation = (int(value or 1) for value in numbers.values())
    here = int(os.environ.get("WORLD_SIZE", 1))
    if together > 1 and here != ranks:
        raise UserError(
            f"{run}: it ran on {ranks} ranks with tensor_parallel_size {together}, and its checkpoints load on as many"
            f" only; here {'is 1' if here == 1 else f'are {here}'}. Start {ranks}:"
            f" torchrun --nproc_per_node {ranks} -m {command}"
        )
    micro_batches, rest = divmod(accumulation * (ranks // together), here // together)
    if rest:
        raise UserError(
            f"{run}: a step has {number_of(accumulation * (ranks // together), 'micro batch', 'micro batches')}, which"
            f" {here // together} ranks cannot share evenly. Start one rank."
        )
    return micro_batches


def _replayed(arguments: Arguments, step: int, skipped: frozenset[int], *, between: bool) -> Replayed:
    from panda.configuration.configure import configure
    from panda.configuration.launcher import check_launcher

    check_launcher()
    configuration = configure(arguments)

    from panda.run.first_look import let_threads_sleep
    from panda.run.first_look import load
    from panda.run.first_look import look_first
    from panda.run.sources import with_lasting_sources
    from panda.training import own_group

    configuration = with_lasting_sources(configuration)
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    look_first(configuration, world_size)
    let_threads_sleep()
    load("panda.run.replaying")
    with own_group():
        from panda.run.replaying import replay

        return replay(configuration, world_size, step, skipped, between=between)


def _recorded(run: Path, step: int) -> dict[str, Any] | None:
    """The log record of ``step``, if the run has one."""
    from panda.hooks.metrics import read_metrics

    return next((record for record in read_metrics(run) if record["step"] == step), None)


def _print(
    run: Path, step: int, checkpoint: Path | None, found: Replayed, recorded: dict[str, Any] | None, *, all_parts: bool
) -> None:
    weights = f"on the weights after step {found.after:,}"
    begun = f"from {checkpoint.name}" if checkpoint else "from the start of the run"
    print(f"\nstep {step:,} of {run} again, {weights}, {begun}")
    print(f"  now      loss {found.loss:.4g}, gradient norm {found.grad_norm:.4g}")
    if recorded is not None:
        loss, norm = (_number(recorded.get(key)) for key in ("loss", "grad_norm"))
        why = f" (skipped: {recorded['why']})" if "why" in recorded else ""
        print(printable_line(f"  the run  loss {loss}, gradient norm {norm}{why}"))
    responsible = found.responsible
    others = sorted((part for part in found.parts if part not in responsible), key=lambda part: -part.grad_norm)
    parts = [*responsible, *others]
    shown = parts if all_parts else parts[: max(SHOWN, len(responsible))]
    unit = found.unit.replace("_", " ")
    print(f"\n  {'loss':>10}  {'gradient':>10}  {unit:>7}  sample")
    for part in shown:
        text = f"  {part.text!r}" if part.text else ""
        line = f"{part.loss:10.4g}  {part.grad_norm:10.4g}  {part.units:{max(7, len(unit))}g}  {part.where}{text}"
        print("\n".join(fitted([f"  {printable_line(line)}"], 12)))
    if len(shown) < len(parts):
        print(f"  and {len(parts) - len(shown):,} more with smaller gradients (--all)")
    print(f"\n{_conclusion(responsible, others)}")


def _conclusion(responsible: list[Part], others: list[Part]) -> str:
    if not responsible:
        return "All samples are finite, and none stands out."
    finite = responsible[0].is_finite
    several = len(responsible) > 1
    if not others and several and not finite:
        return f"None of the {len(responsible):,} samples is finite: look for the reason in the weights, not in a row."
    if finite:
        what = "have losses or gradients" if several else "has a loss or a gradient"
        what += " far above the others"
    else:
        what = "are not finite" if several else "is not finite"
    return printable_line(f"responsible: {', '.join(part.where for part in responsible)}, which {what}.")


def _number(value: Any) -> str:
    """A number of a record, where null means not finite, as text."""
    return f"{value:.4g}" if isinstance(value, (int, float)) else "not finite"
