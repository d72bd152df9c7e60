"""Ends and disturbs small runs, resumes them, and compares every bit with a run that nothing disturbed.

    python tests/crash.py --kills 500 --calls all --fault_ranks 2 3 --flips 10000 [--ranks 1 2] [--seed 1] [--jobs 14]

Runs are forks of this process, which has imported what they need: one takes a second on an idle core. After each kill
or disturbance at most one step may be lost, and the run that goes on may differ in no bit. It prints a table, and exits
with 1 where anything is not as it should be. docs/trust.md has that of the last campaign. With `--jobs`, so many forks
share the cases.

kills   SIGKILL at random moments, to all ranks or to one first, and `--resume auto` again and again until the run ends
calls   the process ends, the disk is full (ENOSPC) or fails (EIO) at each call of rank 0 that writes to the run
faults  an exception in each stage of saving and loading, on each subset of the ranks
flips   one bit of a checkpoint changed: every bit of the manifest, and so many of each other file
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import os
import pickle
import random
import re
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Sequence
from contextlib import contextmanager
from contextlib import suppress
from dataclasses import dataclass
from dataclasses import field
from pathlib import Path
from typing import Any
from typing import TypeVar

from failing_calls import EXIT_CODE
from failing_calls import WAYS
from failing_calls import FailingCalls
from failing_stages import LOADING
from failing_stages import SAVING
from failing_stages import Stage

RUN: tuple[str, ...] = (
    *("--arch", "llama-tiny", "--num_layers", "1", "--hidden_size", "16", "--intermediate_size", "24"),
    *("--num_heads", "2", "--instruction_tuning_data_dir", "panda:data/sample/instruct", "--max_seq_length", "32"),
    *("--gradient_accumulation_steps", "1", "--num_workers", "0", "--save_steps", "1", "--save_total_limit", "2"),
    *("--max_samples", "40", "--eval_fraction", "0.1", "--eval_steps", "2", "--prompts", "a"),
    *("--learning_rate", "1e-3", "--zero_stage", "1"),
    *("--plugins", "ema", "-p", "no:plot", "-p", "no:tensorboard", "-p", "no:progress"),
)
STEPS = ("--max_steps", "8")
FEW_STEPS = ("--max_steps", "3")
LONGEST = 60.0
"""Seconds after which a start of a run hangs."""
MOST_KILLS = 6
"""Of one run, before it may end."""
T = TypeVar("T")
TIMES = re.compile(r"seconds|per_second|data_wait|mfu|memory|flops")


def free_port() -> int:
    """A port below those that the system gives out, which another fork could be given before rank 0 opens it."""
    while True:
        port = random.SystemRandom().randrange(10_000, 32_000)
        with socket.socket() as tried, suppress(OSError):
            tried.bind(("127.0.0.1", port))
            return port


# -- runs, as forks


@dataclass
class Ended:
    """A start of a run that has ended."""

    codes: list[int]
    printed: str
    hung: bool = False


class Runs:
    """Starts runs in a folder, each in one of its folders, for job ``job`` of ``jobs``."""

    def __init__(self, folder: Path, seconds: float, job: int = 0, jobs: int = 1) -> None:
        self.folder, self.seconds = folder, seconds
        self.job, self.jobs = job, jobs
        self.names = itertools.count()

    def share(self, cases: Sequence[T]) -> Sequence[T]:
        """Those of ``cases`` that this job takes."""
        return cases[self.job :: self.jobs]

    def within(self, begun: float) -> bool:
        """Whether a campaign that ``begun`` then may go on."""
        return time.monotonic() - begun < self.seconds

    def new(self) -> Path:
        return self.folder / f"run-{next(self.names)}"

    def start(self, run: Path, argv: Sequence[str], ranks: int, prepare: Callable[[int], object] | None) -> list[int]:
        """Process ids of the ranks of ``panda-train argv``, in ``run``. In each, ``prepare`` is called first."""
        port = str(free_port())
        sizes = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
        pids = []
        for rank in range(ranks):
            environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, **sizes}
            environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            pids.append(os.fork())
            if not pids[-1]:
                _become([*argv, "--output_dir", str(run)], self.output(run), environment if ranks > 1 else {}, prepare)
        return pids

    def output(self, run: Path) -> Path:
        return run.with_name(f"{run.name}.txt")

    def ended(self, run: Path, pids: list[int], until: float | None = None) -> Ended | None:
        """How the ranks ended; None if ``until``, a time, comes first. They are killed where they hang."""
        codes: dict[int, int] = {}
        deadline = time.monotonic() + LONGEST
        while len(codes) < len(pids):
            for pid in set(pids) - set(codes):
                found, status = os.waitpid(pid, os.WNOHANG)
                if found:
                    codes[pid] = os.waitstatus_to_exitcode(status)
            if len(codes) == len(pids):
                break
            if until is not None and time.monotonic() >= until:
                if not codes:
                    return None
                until = None  # some have ended by themselves
            if time.monotonic() > deadline:
                _kill([pid for pid in pids if pid not in codes])
                return Ended([codes.get(pid, -signal.SIGKILL) for pid in pids], self.printed(run), hung=True)
            time.sleep(0.001)
        return Ended([codes[pid] for pid in pids], self.printed(run))

    def printed(self, run: Path) -> str:
        file = self.output(run)
        return file.read_text(errors="replace") if file.exists() else ""

    def whole(
        self, run: Path, argv: Sequence[str], ranks: int, prepare: Callable[[int], object] | None = None
    ) -> Ended:
        """A start of a run that is left to end."""
        self.output(run).unlink(missing_ok=True)
        ended = self.ended(run, self.start(run, argv, ranks, prepare))
        assert ended is not None
        return ended

    def forget(self, run: Path) -> None:
        shutil.rmtree(run, ignore_errors=True)
        self.output(run).unlink(missing_ok=True)


def _become(
    argv: list[str], output: Path, environment: dict[str, str], prepare: Callable[[int], object] | None
) -> None:
    """Make this fork a start of ``panda-train``, to its end."""
    code = 1
    try:
        os.environ.update(environment)
        descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, 1), os.dup2(descriptor, 2)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
        if prepare is not None:
            prepare(int(environment.get("RANK", 0)))
        from panda.cli.train import main

        code = main(argv)
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        with suppress(Exception):
            sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)


def _kill(pids: Sequence[int]) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def warm_up() -> None:
    """Import what a run imports. Raises AssertionError where that leaves a thread of Python."""
    import panda.cli.train
    import panda.hooks.metrics
    import panda.models.llama
    import panda.runner
    import panda.tasks.instruct  # noqa: F401
    from panda.testing.warm import native_threads

    with suppress(ImportError):
        import transformers.models.llama.modeling_llama  # noqa: F401
    deadline = time.monotonic() + 10
    while len(threading.enumerate()) > 1 and time.monotonic() < deadline:  # some end soon
        time.sleep(0.1)
    if native := native_threads():
        print(f"beside native threads {native}", file=sys.stderr)
    gc.collect()
    gc.freeze()


# -- the same bits


def difference(run: Path, plain: Path) -> str | None:
    """The first thing in which ``run`` has ended otherwise than ``plain``; None for the same bits."""
    from same_bits import different  # which imports torch, for which `own_folder` sets variables first

    names = [sorted(path.name for path in (each / "checkpoints").iterdir()) for each in (run, plain)]
    if names[0] != names[1]:
        return f"checkpoints {names[0]}, not {names[1]}"
    for name in names[1]:
        folders = [each / "checkpoints" / name for each in (run, plain)]
        if folders[1].is_dir() and (problem := different(*folders)):
            return f"{name}: {problem}"
    for name in (
        "checkpoints/latest",
        "answers.json",
        # The model card has the name of the run, and panda.json the hash of a checkpoint, whose content was compared.
        *(
            f"export/{file.name}"
            for file in (plain / "export").iterdir()
            if file.name not in ("README.md", "panda.json")
        ),
    ):
        if (run / name).read_bytes() != (plain / name).read_bytes():
            return name
    for number, (found, expected) in enumerate(itertools.zip_longest(_records(run), _records(plain)), 1):
        if found != expected:
            return f"metrics.jsonl, record {number}: {found}, not {expected}"
    left = [str(path.relative_to(run)) for path in run.rglob(".tmp-*")]
    return f"left: {left}" if left else None


def lost(run: Path) -> str | None:
    """What a start of ``run``, which saves each step and was ended or disturbed, has lost; None for at most one step.

    A run that begins from the start again ends with the same bits, too.
    """
    from panda.engine.checkpoints.folders import complete_checkpoints
    from panda.engine.checkpoints.folders import step_of
    from panda.hooks.metrics import read_metrics

    taken = max((record["step"] for record in read_metrics(run)), default=0)
    kept = max(map(step_of, complete_checkpoints(run / "checkpoints")), default=0)
    return f"step {taken} was taken, and the newest checkpoint is of step {kept}" if kept < taken - 1 else None


def _records(run: Path) -> list[dict[str, Any]]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if not TIMES.search(key)} for line in lines]


# -- campaigns


@dataclass
class Row:
    """A line of the table."""

    what: str
    cases: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    failures: Counter[str] = field(default_factory=Counter)

    def fail(self, why: str, printed: str = "") -> None:
        self.failures[why] += 1
        if self.failures[why] == 1:
            print(f"FAILED: {self.what}: {why}\n{printed[-3000:]}", flush=True)

    def add(self, other: Row) -> None:
        self.cases += other.cases
        self.counts += other.counts
        self.failures += other.failures

    def __str__(self) -> str:
        counts = ", ".join(f"{count:,} {what}" for what, count in self.counts.most_common())
        return f"| {self.what} | {self.cases:,} | {counts} | {sum(self.failures.values())} |"


def plain_run(runs: Runs, argv: Sequence[str], ranks: int) -> tuple[Path, float]:
    """A run that nothing disturbs, and the seconds that it takes."""
    runs.whole(warming := runs.new(), argv, ranks)  # makes the token cache
    runs.forget(warming)
    plain, begun = runs.new(), time.monotonic()
    ended = runs.whole(plain, argv, ranks)
    assert ended.codes == [0] * ranks, ended.printed
    return plain, time.monotonic() - begun


def resume(runs: Runs, run: Path, argv: Sequence[str], ranks: int, plain: Path, row: Row) -> None:
    """Let ``run`` go on to its end, and compare it with ``plain``."""
    ended = runs.whole(run, [*argv, "--resume", "auto"], ranks)
    if ended.hung or any(ended.codes):
        row.fail("a resumed run hangs" if ended.hung else f"a resumed run ends with {ended.codes}", ended.printed)
    elif problem := difference(run, plain):
        row.fail(f"other bits: {problem}", ended.printed)
    else:
        row.counts["ended with the same bits"] += 1


def kills(runs: Runs, count: int, ranks: int, seed: int) -> Row:
    """SIGKILL at random moments of the run, ``count`` times."""
    count, draw = len(runs.share(range(count))), random.Random(f"{seed} {ranks} {runs.job}")
    argv = (*RUN, *STEPS)
    plain, seconds = plain_run(runs, argv, ranks)
    row, started = Row(f"SIGKILL at a random moment, {ranks} rank{'s' * (ranks > 1)}"), time.monotonic()
    while row.cases < count and runs.within(started):
        run = runs.new()
        for _ in range(min(draw.randrange(1, MOST_KILLS + 1), count - row.cases)):
            runs.output(run).unlink(missing_ok=True)
            begun = time.monotonic()
            pids = runs.start(run, [*argv, "--resume", "auto"], ranks, None)
            if (ended := runs.ended(run, pids, begun + draw.uniform(0, seconds))) is not None:
                if ended.hung or any(ended.codes):
                    row.fail(f"a resumed run ends with {ended.codes}", ended.printed)
                break
            order = draw.sample(pids, ranks)
            os.kill(order[0], signal.SIGKILL)
            if draw.random() < 0.3:
                time.sleep(draw.uniform(0, 0.3))  # as a launcher takes, or another machine
            row.counts[f"killed {_moment(run)}"] += 1
            _kill(order)
            row.cases += 1
            if problem := lost(run):
                row.fail(problem)
        resume(runs, run, argv, ranks, plain, row)
        runs.forget(run)
    return row


def _moment(run: Path) -> str:
    if not (run / "metrics.jsonl").exists():
        return "before its first step"
    temporary = [*run.glob("checkpoints/.tmp-*")]
    if temporary:
        return "in a save"
    return "in or after the export" if (run / "export").exists() or (run / ".tmp-export").exists() else "elsewhere"


def calls(runs: Runs, most: int | None, way: str, ranks: int, seed: int) -> Row:
    """``way`` at each of the calls that write to the run directory, or at ``most`` of them, on rank 0."""
    argv = (*RUN, *FEW_STEPS)
    plain, _ = plain_run(runs, argv, ranks)
    counted = runs.new()
    listing = runs.folder / "calls.json"

    def count(rank: int) -> None:
        made = FailingCalls(counted)
        made.install()
        if rank == 0:
            end = os._exit

            def written(code: int) -> None:
                listing.write_text(json.dumps(made.made))
                end(code)

            os._exit = written  # type: ignore[assignment]

    ended = runs.whole(counted, argv, ranks, count)
    assert ended.codes == [0] * ranks, ended.printed
    assert difference(counted, plain) is None, difference(counted, plain)
    made = json.loads(listing.read_text())
    total = len(made)
    numbers = random.Random(seed).sample(range(1, total + 1), total if most is None else min(most, total))
    meant = {"exit": "the process ends"}.get(way, way)
    row = Row(f"{meant} at a call of {total}, {ranks} rank{'s' * (ranks > 1)}")
    started = time.monotonic()
    for number in runs.share(numbers):
        if not runs.within(started):
            break
        run = runs.new()

        def fail(rank: int, number: int = number, run: Path = run) -> None:
            if rank == 0:
                FailingCalls(run, number, way).install()

        ended = runs.whole(run, argv, ranks, fail)
        row.cases += 1
        _judge(row, ended, way, made[number - 1])
        if problem := lost(run):
            row.fail(f"{problem}, after {made[number - 1]}", ended.printed)
        resume(runs, run, argv, ranks, plain, row)
        runs.forget(run)
    return row


def _judge(row: Row, ended: Ended, way: str, call: str) -> None:
    """Whether a run ended as it should where ``way`` happened at ``call``."""
    where = re.sub(r"\d{2,}", "N", call)
    if ended.hung:
        row.fail(f"hangs at {where}", ended.printed)
    elif way == "exit":
        if ended.codes[0] != EXIT_CODE:
            row.fail(f"{where} does not come", ended.printed)
    elif "Traceback" in ended.printed or set(ended.codes) - {0, 2}:
        row.fail(f"not in words at {where}", ended.printed)
    else:
        row.counts["goes on" if not any(ended.codes) else "an error in words"] += 1


def faults(runs: Runs, stages: Sequence[Stage], ranks: int, what: str) -> Row:
    """An exception in each of ``stages``, on each subset of the ranks that come to it."""
    argv = (*RUN, *FEW_STEPS)
    row = Row(f"an exception in {len(stages)} stages of {what}, on each subset of {ranks} ranks")
    begun = runs.new()
    begun.mkdir()
    if what == "loading":
        for each, saved_by in (("same", ranks), ("other", ranks - 1)):
            ended = runs.whole(begun / each, [*RUN, "--max_steps", "1"], saved_by)
            assert not any(ended.codes), ended.printed
    subsets = [each for size in range(1, ranks + 1) for each in itertools.combinations(range(ranks), size)]
    for stage, failing in runs.share([(s, f) for s in stages for f in subsets if f == (0,) or not s.on_rank_0]):
        run = runs.new()
        if what == "loading":
            shutil.copytree(begun / ("other" if stage.redistributes else "same"), run)
        ended = runs.whole(run, [*argv, "--resume", "auto"], ranks, stage.failing_on(failing))
        row.cases += 1
        _judge_fault(row, stage, failing, ended)
        runs.forget(run)
    return row


NAMED = re.compile(r"\branks? (\d+(?:(?:, | and | to )\d+)*)(?= failed|:)")
"""As ``panda.engine.meeting.spoken`` writes them."""


def _judge_fault(row: Row, stage: Stage, failing: tuple[int, ...], ended: Ended) -> None:
    printed = ended.printed
    of_fault = [re.sub(r"^error on rank \d+: ", "", line) for line in printed.splitlines() if stage.SAID in line]
    named = {number for line in of_fault for found in NAMED.findall(line) for number in _spelt(found)}
    if ended.hung:
        row.fail(f"{stage.name} on {failing}: hangs", printed)
    elif not all(ended.codes):
        row.fail(f"{stage.name} on {failing}: ends with {ended.codes}", printed)
    elif named != set(failing):
        row.fail(f"{stage.name} on {failing}: names {sorted(named)}", printed)
    else:
        row.counts["named exactly the failing ranks"] += 1


def _spelt(ranks: str) -> Iterator[int]:
    """The numbers in `0, 2 to 5 and 7`."""
    for first, last in re.findall(r"(\d+)(?: to (\d+))?", ranks):
        yield from range(int(first), int(last or first) + 1)


def flips(runs: Runs, count: int, ranks: int, seed: int) -> Iterator[Row]:
    """Every bit of a manifest, and ``count`` bits of each kind of other file of a checkpoint."""
    from flipping import flipped
    from flipping import is_found

    from panda.engine.checkpoints.folders import damage
    from panda.engine.checkpoints.manifest import MANIFEST
    from panda.engine.checkpoints.manifest import read_manifest

    run = runs.new()
    ended = runs.whole(run, [*RUN, "--max_steps", "1"], ranks)
    assert not any(ended.codes), ended.printed
    checkpoint = run / "checkpoints/step-00000001"
    row = Row(f"every bit of the manifest, {ranks} ranks")
    for bit in runs.share(range(8 * (checkpoint / MANIFEST).stat().st_size)):
        with flipped(checkpoint / MANIFEST, bit):
            _count_flip(row, damage(checkpoint) is not None, f"bit {bit}")
    yield row
    kinds: dict[str, list[Path]] = {}
    for name in read_manifest(checkpoint).files:
        kinds.setdefault(re.sub(r"\d+", "N", name), []).append(checkpoint / name)
    for kind, files in kinds.items():
        row = Row(f"{kind}: a bit of it")
        bits = [(file, bit) for file in files for bit in range(8 * file.stat().st_size)]
        for file, bit in runs.share(bits if len(bits) <= count else random.Random(seed).sample(bits, count)):
            with flipped(file, bit):
                _count_flip(row, is_found(checkpoint, file), f"bit {bit} of {file.name}")
        yield row
    assert damage(checkpoint) is None


def _count_flip(row: Row, found: bool, what: str) -> None:
    row.cases += 1
    if found:
        row.counts["damage"] += 1
    else:
        row.fail(what)


# -- the command


@contextmanager
def own_folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="panda-crash-") as folder:
        os.environ |= {"PANDA_CACHE": f"{folder}/cache", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        os.environ["DS_ACCELERATOR"] = "cpu"
        yield Path(folder)


def table(runs: Runs, given: argparse.Namespace) -> Iterator[Row]:
    """The rows that were asked for, each when it is done."""
    runs.seconds /= max(1, len(given.ranks) * bool(given.kills) + len(given.ways) * bool(given.calls))
    for ranks in given.ranks:
        if given.kills:
            yield kills(runs, given.kills, ranks, given.seed)
    if given.calls:
        for way in given.ways:
            yield calls(runs, None if given.calls == "all" else int(given.calls), way, given.ranks[0], given.seed)
    for ranks in given.fault_ranks:
        for what, stages in (("saving", SAVING), ("loading", LOADING)):
            chosen = stages if given.stages is None else [stage for stage in stages if stage.name in given.stages]
            if chosen:
                yield faults(runs, chosen, ranks, what)
    if given.flips:
        yield from flips(runs, given.flips, 2, given.seed)


def table_of_jobs(folder: Path, given: argparse.Namespace) -> list[Row]:
    """The rows of ``given.jobs`` forks, each of which takes its share of the cases, added up."""
    children: dict[Path, int] = {}
    for job in range(given.jobs):
        own = folder / f"job-{job}"
        own.mkdir()
        if not (pid := os.fork()):
            try:
                os.environ["PANDA_CACHE"] = str(own / "cache")
                for number, row in enumerate(table(Runs(own, given.seconds, job, given.jobs), given)):
                    print(f"job {job}: {row}", file=sys.stderr, flush=True)  # what is done, if this is ended
                    (own / f"row-{number}").write_bytes(pickle.dumps(row))
                (own / "ended").touch()
            except BaseException:
                traceback.print_exc()
            os._exit(0)
        children[own] = pid
    summed: dict[str, Row] = {}
    for own, pid in children.items():
        os.waitpid(pid, 0)
        rows = [pickle.loads(file.read_bytes()) for file in sorted(own.glob("row-*"))]
        if not (own / "ended").exists():
            rows.append(Row(f"{own.name} of {given.jobs}", failures=Counter(["did not come to its end"])))
        for row in rows:
            summed.setdefault(row.what, Row(row.what)).add(row)
    return [*summed.values()]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=0, help="for each number of ranks")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--calls", help="`all`, or a number of calls, drawn")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS, help="what happens at calls")
    parser.add_argument("--fault_ranks", type=int, nargs="*", default=[], help="numbers of ranks to fail on")
    parser.add_argument("--stages", nargs="+", help="names of stages; by default all")
    parser.add_argument("--flips", type=int, default=0, help="bits of each kind of file")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="most seconds of all kills and calls")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1, help="forks that share the cases; rows come at the end then")
    given = parser.parse_args(argv)
    print("| what | cases | | failures |\n|---|---|---|---|")
    failures = 0
    with own_folder() as folder:
        warm_up()
        alone = given.jobs == 1
        for row in table(Runs(folder, given.seconds), given) if alone else table_of_jobs(folder, given):
            print(row, flush=True)
            failures += sum(row.failures.values())
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
