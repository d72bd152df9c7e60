"""A certificate for an optimizer: where it gives what it gives in one process, and what it refuses.

``check_optimizer("muon")``, or from a shell ``python -m panda.testing.optimizers muon``. Small models are trained for
ten steps, as `panda-train` does, on CPUs: one process in fp32 without ZeRO, and the same samples under every ZeRO
stage, on several ranks, with tensor parallelism and with the optimizer offloaded. Each run is continued from its
middle, and again on another number of ranks.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from collections.abc import Sequence
from dataclasses import asdict
from dataclasses import dataclass
from dataclasses import field
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from panda.registry import UserError
from panda.testing.forked_ranks import on_ranks

LIMIT = 1e-4
"""How far a parameter may end from where one process takes it, relative to the distance that it has moved."""
STEPS, SAVED, STEP_SAMPLES = 10, 5, 12
RUN: tuple[str, ...] = (
    *("--arch", "llama-tiny", "--num_layers", "2", "--hidden_size", "32", "--intermediate_size", "48"),
    *("--num_heads", "4", "--num_key_value_heads", "2", "--vocab_size", "264"),
    *("--instruction_tuning_data_dir", "panda:data/sample/instruct", "--max_seq_length", "48", "--num_workers", "0"),
    *("--lr_scheduler", "constant", "--warmup_steps", "3", "--weight_decay", "0.1", "--max_grad_norm", "1.5"),
    *("--max_steps", str(STEPS), "--save_steps", str(SAVED), "--prompts", "a"),
    *("-p", "no:plot", "-p", "no:tensorboard"),
)
ZERO: dict[int, dict[str, Any]] = {
    # By default the weights of such small models stay whole, and are one sub-group.
    3: {"stage3_param_persistence_threshold": 0, "sub_group_size": 5000},
}
NEEDED = {
    "offload_optimizer on NVMe": {"offload_optimizer": {"device": "nvme", "nvme_path": "/tmp"}},
    "offload_optimizer.ratio below 1": {"offload_optimizer": {"device": "cpu", "ratio": 0.5}},
    "ZenFlow": {"offload_optimizer": {"device": "cpu"}, "zenflow": {"topk_ratio": 0.1}},
}
"""What an optimizer that needs norms or whole parameters has to refuse: `zero_optimization`, for stage 3."""
IMPORTED = (
    "deepspeed",
    "panda.runner",
    "panda.cli.train",
    "safetensors.torch",
    "transformers.models.auto.modeling_auto",
    "transformers.models.llama.modeling_llama",
)
SAME_BITS = "same bits"
RUNS_OF_A_CASE = 3
"""The whole one, one that is continued from its middle, and one continued on other ranks."""
SECONDS_BETWEEN_WORDS = 5.0


@dataclass(frozen=True)
class Case:
    """One way to spread a run."""

    data_ranks: int
    tensor_ranks: int
    stage: int
    offload: bool = False

    @property
    def ranks(self) -> int:
        return self.data_ranks * self.tensor_ranks

    @property
    def name(self) -> str:
        return f"{self.data_ranks}x{self.tensor_ranks}-zero{self.stage}{'-offload' if self.offload else ''}"

    def elsewhere(self) -> Case:
        """Where the run goes on with another number of ranks, by another ZeRO stage from 1 to 3."""
        stage = self.stage % 3 + 1 if self.tensor_ranks == 1 else self.stage
        return replace(self, data_ranks=self.data_ranks % 3 + 1, stage=stage)

    def flags(self, folder: Path) -> list[str]:
        zero = dict(ZERO.get(self.stage, {}))
        if self.offload:
            zero["offload_optimizer"] = {"device": "cpu"}
        file = folder / f"zero{self.stage}{'-offload' if self.offload else ''}.json"
        if not file.exists():
            with contextlib.suppress(FileExistsError), file.open("x") as stream:
                json.dump({"zero_optimization": zero}, stream)
        return [
            *("--zero_stage", str(self.stage), "--tensor_parallel_size", str(self.tensor_ranks)),
            *("--per_gpu_train_batch_size", "2"),
            *("--gradient_accumulation_steps", str(STEP_SAMPLES // (2 * self.data_ranks))),
            *(["--deepspeed_config", str(file)] if zero else []),
        ]


ALONE = Case(1, 1, 0)
"""What the others are compared with."""
CASES = tuple(
    Case(data, tensor, stage, offload)
    for tensor in (1, 2)
    for data in (1, 2, 3)
    for offload in (False, True)
    for stage in range(1 if offload else 0, 4)
    if tensor == 1 or stage < 3 or (data == 1 and not offload)  # one that is refused is enough
)
SHORT = tuple(
    case
    for case in CASES
    if case in (ALONE, Case(3, 1, 0), Case(2, 1, 1), Case(3, 1, 2), Case(2, 1, 3), Case(2, 1, 2, True), Case(2, 2, 1))
)
"""A choice in which each stage, each number of ranks, and each kind is there."""


@dataclass
class Row:
    """What became of a case."""

    case: Case
    error: float | None = None
    """The largest of any parameter."""
    resumed: str = ""
    """``SAME_BITS``, or the error."""
    error_elsewhere: float | None = None
    """On other ranks."""
    elsewhere_refused: str = ""
    """By which message."""
    refused: str = ""
    """By which message."""
    failed: list[str] = field(default_factory=list)
    """What is wrong."""


@dataclass
class Certificate:
    """What was found of an optimizer."""

    name: str
    flags: tuple[str, ...]
    limit: float
    rows: list[Row]
    refusals: dict[str, str]
    """What has to be refused, with the message that did."""

    @property
    def problems(self) -> list[str]:
        """What is neither as in one process nor refused; empty for an optimizer that is right."""
        found = [f"{row.case.name}: {problem}" for row in self.rows for problem in row.failed]
        return found + [f"{what}: not refused" for what, message in self.refusals.items() if not message]

    def table(self) -> str:
        """As text."""
        errors = [error for row in self.rows for error in (row.error, row.error_elsewhere) if error is not None]
        lines = [
            f"{' '.join([self.name, *self.flags])}: {STEPS} steps in {len(self.rows) - 1} ways, against one process in"
            " fp32 without ZeRO.",
            "error: of a parameter, over the distance that it has moved, the worst of all parameters."
            f" At most {_short(max(errors, default=0.0))}; allowed: {self.limit:.0e}.",
            "",
            "data    tensor  ZeRO   offload  error    resumed    on other ranks",
        ]
        notes: dict[str, int] = {}

        def noted(message: str) -> str:
            return f"refused [{notes.setdefault(message, len(notes) + 1)}]"

        for row in self.rows:
            case = row.case
            offload = "cpu" if case.offload else ""
            place = f"{case.data_ranks:<7} {case.tensor_ranks:<7} {case.stage:<6} {offload:<8}"
            if row.refused:
                lines.append(f"{place} {noted(row.refused)}")
                continue
            error = "" if case == ALONE else "-" if row.error is None else _short(row.error)
            other = case.elsewhere()
            elsewhere = ""
            if row.elsewhere_refused:
                elsewhere = noted(row.elsewhere_refused)
            elif row.error_elsewhere is not None:
                elsewhere = f"{_short(row.error_elsewhere)} on {other.data_ranks}, ZeRO {other.stage}"
            lines.append(f"{place} {error:<8} {row.resumed:<10} {elsewhere}".rstrip())
            lines += [f"    WRONG: {problem}" for problem in row.failed]
        lines += ["", *(f"[{number}] {message}" for message, number in notes.items())] if notes else []
        if self.refusals:
            lines += ["", "Refused, as it has to be, since the optimizer declares what it needs:"]
            lines += [f"  {what}: {message or 'NOT REFUSED'}" for what, message in self.refusals.items()]
        return "\n".join(lines)


def _short(error: float) -> str:
    return f"{error:.0e}" if error else "0"


def check_optimizer(name: str, *flags: str, short: bool = False, limit: float = LIMIT) -> Certificate:
    """Print what is exact and what is refused, with the optimizer ``name`` and more ``flags`` of `panda-train`.

    Raises AssertionError where a run that is not refused ends elsewhere than one process does, by more than ``limit``
    of the distance moved; where a resumed one has other bits; and where what the optimizer declares that it needs
    cannot be had and is not refused. ``short``: some of the ways; a minute or two on two cores, where all take several
    times as long. How far it is goes to stderr.
    """
    with tempfile.TemporaryDirectory(prefix="panda-certificate-") as folder:
        # In a process of its own, since this one may have threads, which a fork lacks.
        order = Path(folder, "order.json")
        order.write_text(json.dumps({"name": name, "flags": flags, "short": short, "limit": limit}))
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "panda.testing.optimizers", "--order", str(order)]
        said = _obeyed(command, environment, Path(folder), runs=RUNS_OF_A_CASE * len(SHORT if short else CASES) + 1)
        answer = Path(folder, "certificate.json")
        assert answer.exists(), f"the runs could not be made:\n{said}"
        found = json.loads(answer.read_text())
        assert "problem" not in found, found["problem"]
    return _judged(_read(found))


def _obeyed(command: list[str], environment: dict[str, str], folder: Path, *, runs: int) -> str:
    """What ``command`` printed, once it has ended. Meanwhile stderr hears how many of about ``runs`` runs are made."""
    shown = 0
    with Path(folder, "said.txt").open("w+") as said:
        with subprocess.Popen(command, env=environment, stdout=said, stderr=subprocess.STDOUT) as process:
            try:
                while True:
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        process.wait(SECONDS_BETWEEN_WORDS)
                        break
                    if (made := len(list(folder.glob("*.done")))) > shown or not shown:
                        print(f"{made} of {runs} runs are made", file=sys.stderr, flush=True)
                        shown = made
            except BaseException:
                process.kill()
                raise
        said.seek(0)
        return said.read()


def _judged(found: Certificate) -> Certificate:
    print(found.table(), flush=True)
    assert not found.problems, f"optimizer {found.name!r}: {'; '.join(found.problems)}"
    return found


# -- in a process without threads


def certificate(
    name: str,
    flags: Sequence[str],
    folder: Path,
    *,
    cases: Sequence[Case] = CASES,
    limit: float = LIMIT,
    resuming: bool = True,
) -> Certificate:
    """Run all ``cases`` in ``folder``, in forks of this process, which must have no other threads.

    ``resuming``: continue each from its middle, too.
    """
    runs = _Runs(name, tuple(flags), folder, resuming=resuming)
    refusals = runs.refusals()  # an unknown name is said at once
    for module in IMPORTED:
        importlib.import_module(module)
    gc.collect()
    gc.freeze()
    if ALONE not in cases:
        cases = (ALONE, *cases)
    for ranks, tensor_ranks in dict.fromkeys((case.ranks, case.tensor_ranks) for case in cases):
        some = [case for case in cases if (case.ranks, case.tensor_ranks) == (ranks, tensor_ranks)]
        orders = [order for case in some for order in runs.first(case)]
        runs.make(orders, ranks)
    for needed in ("start", ALONE.name):
        assert runs.is_complete(needed), f"the run in one process failed: {runs.why(needed)}"
    again = [case.elsewhere() for case in cases if resuming]
    for ranks, tensor_ranks in dict.fromkeys((place.ranks, place.tensor_ranks) for place in again):
        orders = [
            runs.elsewhere(case)
            for case, place in zip(cases, again, strict=resuming)
            if (place.ranks, place.tensor_ranks) == (ranks, tensor_ranks) and runs.is_complete(case.name)
        ]
        runs.make(orders, ranks)
    return Certificate(name, tuple(flags), limit, [runs.row(case, limit) for case in cases], refusals)


@dataclass(frozen=True)
class _Order:
    """A run to make."""

    name: str
    argv: tuple[str, ...]


class _Runs:
    """The runs of an optimizer, each in a folder of its name."""

    def __init__(self, name: str, flags: tuple[str, ...], folder: Path, *, resuming: bool) -> None:
        self.common = (*RUN, "--optimizer", name, *flags)
        self.folder, self.resuming = folder, resuming

    def first(self, case: Case) -> Iterator[_Order]:
        """The run of ``case`` to its end, and from its middle."""
        yield self._order(case.name, case)
        if self.resuming:
            yield self._order(f"{case.name}-resumed", case, "--resume", self._middle(case))
        if case == ALONE:  # where it begins
            yield self._order("start", case, "--max_steps", "1", "--save_steps", "0", "--learning_rate", "1e-30")

    def elsewhere(self, case: Case) -> _Order:
        return self._order(f"{case.name}-elsewhere", case.elsewhere(), "--resume", self._middle(case))

    def _order(self, name: str, case: Case, *more: str) -> _Order:
        output = ("--output_dir", str(self.folder / name))
        return _Order(name, _last_of_each((*self.common, *case.flags(self.folder), *output, *more)))

    def _middle(self, case: Case) -> str:
        return str(self.folder / case.name / "checkpoints" / f"step-{SAVED:08d}")

    def make(self, orders: list[_Order], ranks: int) -> None:
        """Make the runs. After one that ends the processes, the others begin in new ones."""
        left = list(orders)
        while left:
            output = self.folder / "output.txt"
            output.unlink(missing_ok=True)
            on_ranks(partial(_train_all, left, self.folder), ranks, output)
            undone = [order for order in left if not (self.folder / f"{order.name}.done").exists()]
            if undone:
                text = output.read_text() if output.exists() else ""
                (self.folder / f"{undone[0].name}.failed").write_text(text[-2000:])
                (self.folder / f"{undone[0].name}.done").touch()
            left = undone[1:]

    def is_complete(self, name: str) -> bool:
        return self._export(name).exists()

    def _export(self, name: str) -> Path:
        export = self.folder / name / "export"
        adapters = export / "adapter_model.safetensors"  # with `--use_lora`
        return adapters if adapters.exists() else export / "model.safetensors"

    def _message(self, name: str, kind: str) -> str:
        file = self.folder / f"{name}.{kind}"
        return file.read_text().strip() if file.exists() else ""

    def why(self, name: str) -> str:
        """The reason why a run did not end."""
        return self._message(name, "refused") or _last_lines(self._message(name, "failed"))

    def weights(self, name: str) -> dict[str, Any]:
        from safetensors.torch import load_file

        return {key: tensor.double() for key, tensor in load_file(self._export(name)).items()}

    def error(self, name: str) -> float:
        """Of the run, against the one in one process: of each parameter, over the distance that it moved there."""
        start, expected, found = map(self.weights, ("start", ALONE.name, name))
        errors = []
        for key, value in expected.items():
            distance = (value - start[key]).norm()
            difference = (found[key] - value).norm()
            errors.append(float(difference / distance) if distance > 0 else float(difference > 0))
        return max(error if error == error else float("inf") for error in errors)  # NaN is no small error

    def row(self, case: Case, limit: float) -> Row:
        row = Row(case)
        row.refused = self._message(case.name, "refused")
        if row.refused:
            return row
        if not self.is_complete(case.name):
            row.failed.append(self.why(case.name))
            return row
        row.error = self.error(case.name)
        if not row.error <= limit:
            row.failed.append(f"error {row.error:.1e}")
        if not self.resuming:
            return row
        row.resumed = self._resumed(case, row)
        name = f"{case.name}-elsewhere"
        row.elsewhere_refused = self._message(name, "refused")
        if self.is_complete(name):
            row.error_elsewhere = self.error(name)
            if not row.error_elsewhere <= limit:
                row.failed.append(f"on other ranks: error {row.error_elsewhere:.1e}")
        elif not row.elsewhere_refused:
            row.failed.append(f"on other ranks: {self.why(name)}")
        return row

    def _resumed(self, case: Case, row: Row) -> str:
        name = f"{case.name}-resumed"
        if not self.is_complete(name):
            row.failed.append(f"resumed: {self.why(name)}")
            return "failed"
        if self._is_same(case):
            return SAME_BITS
        row.failed.append("a resumed run ends with other bits")
        return f"{self.error(name):.0e}"

    def _is_same(self, case: Case) -> bool:
        first, second = self.weights(case.name), self.weights(f"{case.name}-resumed")
        return all(bool((tensor == second[key]).all()) for key, tensor in first.items())

    def refusals(self) -> dict[str, str]:
        """The messages that refuse what has to be refused by what the optimizer needs."""
        from panda.configuration.arguments import parse_arguments
        from panda.configuration.configure import configure

        found = {}
        with _quiet():
            needs = (
                configure(parse_arguments([*_last_of_each(self.common)]))
                .resolved.components["optimizer"]
                .component.needs
            )
        for what, zero in NEEDED.items() if needs != "nothing" else ():
            file = self.folder / "refused.json"
            file.write_text(json.dumps({"zero_optimization": zero}))
            argv = _last_of_each((*self.common, "--zero_stage", "3", "--deepspeed_config", str(file)))
            found[what] = ""
            try:
                with _quiet():
                    configure(parse_arguments([*argv]))
            except UserError as problem:
                found[what] = _sentence(problem)
        return found


def _last_of_each(argv: Sequence[str]) -> tuple[str, ...]:
    """``argv`` with each flag once, as it is given last, since `panda-train` refuses one that is given twice."""
    flags: dict[str, list[str]] = {}
    more: list[str] = []
    words = iter(argv)
    values = more
    for word in words:
        if word == "-p":
            more += [word, next(words)]
        elif word.startswith("--"):
            key, given, value = word.partition("=")
            values = flags[key] = [value] if given else []
        else:
            values.append(word)
    return (*(word for key, given in flags.items() for word in (key, *given)), *more)


def _train_all(orders: list[_Order], folder: Path) -> None:
    """On one rank: make the runs one after the other, in one process group."""
    import panda.run.ending
    from panda.configuration.arguments import parse_arguments
    from panda.configuration.configure import configure
    from panda.engine.processes import leave_processes
    from panda.runner import train

    panda.run.ending.ANSWER_TOKENS = 1  # under ZeRO-3 answers take longer than the training
    for order in orders:
        try:
            train(configure(parse_arguments(list(order.argv))))
        except UserError as problem:
            if os.environ["RANK"] == "0":
                (folder / f"{order.name}.refused").write_text(_sentence(problem))
        if os.environ["RANK"] == "0":
            (folder / f"{order.name}.done").touch()
    leave_processes()


def _sentence(problem: UserError) -> str:
    """What refused, without the places of files that are gone after the check."""
    lines = str(problem).splitlines()
    line = next((line for line in lines if "refused" in line), lines[0])
    while Path(line.partition(":")[0]).is_absolute():
        line = re.sub(r"[^:]*:(\d+:)? ", "", line, count=1)
    return line


def _last_lines(text: str) -> str:
    return "failed: " + " / ".join(line.strip() for line in text.strip().splitlines()[-2:] or ["without a word"])


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        yield


def _read(stored: dict[str, Any]) -> Certificate:
    rows = [Row(**{**row, "case": Case(**row["case"])}) for row in stored.pop("rows")]
    return Certificate(**{**stored, "rows": rows, "flags": tuple(stored["flags"])})


def _obey(order: Path) -> None:
    """Make the certificate that ``check_optimizer`` asks for."""
    asked = json.loads(order.read_text())
    cases = SHORT if asked["short"] else CASES
    answer: dict[str, Any]
    try:
        found = certificate(asked["name"], asked["flags"], order.parent, cases=cases, limit=asked["limit"])
        answer = asdict(found)
    except (AssertionError, UserError) as problem:
        answer = {"problem": str(problem)}
    (order.parent / "certificate.json").write_text(json.dumps(answer))


EPILOG = "Each FLAG is one of panda-train, such as `--learning_rate 0.01`: all runs have it."


def main(argv: Sequence[str] | None = None) -> int:
    """``python -m panda.testing.optimizers NAME [FLAG ...]``."""
    program = "python -m panda.testing.optimizers"
    usage = f"{program} NAME [--short] [--limit LIMIT] [FLAG ...]"
    parser = argparse.ArgumentParser(description=__doc__, prog=program, usage=usage, epilog=EPILOG)
    parser.add_argument("name", nargs="?", help="an optimizer, as a configuration names it")
    parser.add_argument("--short", action="store_true", help="some of the ways: a third of the time")
    parser.add_argument("--limit", type=float, default=LIMIT, help="the largest error, of the distance moved")
    parser.add_argument("--order", type=Path, help=argparse.SUPPRESS)
    arguments, flags = parser.parse_known_args(argv)
    if arguments.order is not None:
        _obey(arguments.order)
        return 0
    if arguments.name is None:
        parser.error("name an optimizer")
    try:
        check_optimizer(arguments.name, *flags, short=arguments.short, limit=arguments.limit)
    except AssertionError as problem:
        print(f"error: {problem}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
