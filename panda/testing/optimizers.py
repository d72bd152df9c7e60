"""A certificate for an optimizer: where it gives what it gives in one process, and what it refuses.

``check_optimizer("muon")``, or from a shell ``python -m panda.testing.optimizers muon``. Small models are trained for
ten steps, as `panda-train` does, on CPUs: one process in fp32 without ZeRO, and the same samples under every ZeRO
stage, on several ranks, with tensor parallelism and with the optimizer offloaded. Each run is continued from its
middle, and again on another number of ranks.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import field
from dataclasses import replace
from pathlib import Path
from typing import Any

from panda.registry import UserError
from panda.testing.runs import Outcome
from panda.testing.runs import train_each

LIMIT = 1e-4
"""How far a parameter may end from where one process takes it, relative to the distance that it has moved."""
STEPS, SAVED, STEP_SAMPLES = 10, 5, 12
RUN: tuple[str, ...] = (
    *("--arch", "llama-tiny", "--num_layers", "2", "--hidden_size", "32", "--intermediate_size", "48"),
    *("--num_heads", "4", "--num_key_value_heads", "2", "--vocab_size", "264"),
    *("--instruction_tuning_data_dir", "panda:data/sample/instruct", "--max_seq_length", "48", "--num_workers", "0"),
    *("--lr_scheduler", "constant", "--warmup_steps", "3", "--weight_decay", "0.1", "--max_grad_norm", "1.5"),
    *("--max_steps", str(STEPS), "--save_steps", str(SAVED), "--prompts", "a"),
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
SAME_BITS = "same bits"


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
            f" At most {max(errors, default=0.0):.0e}; allowed: {self.limit:.0e}.",
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
            error = "" if case == ALONE else "-" if row.error is None else f"{row.error:.0e}"
            other = case.elsewhere()
            elsewhere = ""
            if row.elsewhere_refused:
                elsewhere = noted(row.elsewhere_refused)
            elif row.error_elsewhere is not None:
                elsewhere = f"{row.error_elsewhere:.0e} on {other.data_ranks}, ZeRO {other.stage}"
            lines.append(f"{place} {error:<8} {row.resumed:<10} {elsewhere}".rstrip())
            lines += [f"    WRONG: {problem}" for problem in row.failed]
        lines += ["", *(f"[{number}] {message}" for message, number in notes.items())] if notes else []
        if self.refusals:
            lines += ["", "Refused, as it has to be, since the optimizer declares what it needs:"]
            lines += [f"  {what}: {message or 'NOT REFUSED'}" for what, message in self.refusals.items()]
        return "\n".join(lines)


def check_optimizer(name: str, *flags: str, short: bool = False, limit: float = LIMIT) -> Certificate:
    """Print what is exact and what is refused, with the optimizer ``name`` and more ``flags`` of `panda-train`.

    Raises AssertionError where a run that is not refused ends elsewhere than one process does, by more than ``limit``
    of the distance moved; where a resumed one has other bits; and where what the optimizer declares that it needs
    cannot be had and is not refused. ``short``: some of the ways, in half a minute; all take a few minutes.
    """
    cases = SHORT if short else CASES
    with tempfile.TemporaryDirectory(prefix="panda-certificate-") as folder:
        try:
            [found] = certificates([Asked(name, flags, cases)], Path(folder), limit=limit)
        except UserError as problem:  # of the flags
            raise AssertionError(str(problem)) from None
    return _judged(found)


def _judged(found: Certificate) -> Certificate:
    print(found.table(), flush=True)
    assert not found.problems, f"optimizer {found.name!r}: {'; '.join(found.problems)}"
    return found


@dataclass(frozen=True)
class Asked:
    """A certificate to make."""

    name: str
    flags: tuple[str, ...] = ()
    cases: tuple[Case, ...] = CASES
    resuming: bool = True
    """Whether each run is also continued from its middle."""


def certificates(asked: Sequence[Asked], folder: Path, *, limit: float = LIMIT) -> list[Certificate]:
    """Make the runs of all that is ``asked`` in ``folder``, and say what came of each.

    Raises UserError for an unknown name and for flags that are refused.
    """
    every = [_Runs(each, folder / str(number)) for number, each in enumerate(asked)]
    refusals = [runs.refusals() for runs in every]  # an unknown name is said at once
    _make([(runs, order) for runs in every for case in runs.cases for order in runs.first(case)], folder)
    for runs in every:
        for needed in ("start", ALONE.name):
            assert runs.is_complete(needed), f"the run in one process failed: {runs.why(needed)}"
    again = [
        (runs, case) for runs in every if runs.asked.resuming for case in runs.cases if runs.is_complete(case.name)
    ]
    _make([(runs, runs.elsewhere(case)) for runs, case in again], folder)
    return [
        Certificate(runs.asked.name, runs.asked.flags, limit, [runs.row(case, limit) for case in runs.cases], refused)
        for runs, refused in zip(every, refusals, strict=True)
    ]


@dataclass(frozen=True)
class _Order:
    """A run to make."""

    name: str
    case: Case
    argv: tuple[str, ...]


def _make(orders: list[tuple[_Runs, _Order]], folder: Path) -> None:
    """Make the runs, those on equally many ranks in one process group, since starting one takes seconds."""
    for place in dict.fromkeys((order.case.ranks, order.case.tensor_ranks) for _, order in orders):
        some = [(runs, order) for runs, order in orders if (order.case.ranks, order.case.tensor_ranks) == place]
        made = train_each([order.argv for _, order in some], ranks=place[0], cwd=folder)
        for (runs, order), outcome in zip(some, made, strict=True):
            runs.outcomes[order.name] = outcome


class _Runs:
    """The runs of an optimizer, each in a folder of its name."""

    def __init__(self, asked: Asked, folder: Path) -> None:
        self.asked, self.folder = asked, folder
        self.common = (*RUN, "--optimizer", asked.name, *asked.flags)
        self.cases = tuple(dict.fromkeys((ALONE, *asked.cases)))
        self.outcomes: dict[str, Outcome] = {}
        folder.mkdir()

    def first(self, case: Case) -> Iterator[_Order]:
        """The run of ``case`` to its end, and from its middle."""
        yield self._order(case.name, case)
        if self.asked.resuming:
            yield self._order(f"{case.name}-resumed", case, "--resume", self._middle(case))
        if case == ALONE:  # where it begins
            yield self._order("start", case, "--max_steps", "1", "--save_steps", "0", "--learning_rate", "1e-30")

    def elsewhere(self, case: Case) -> _Order:
        return self._order(f"{case.name}-elsewhere", case.elsewhere(), "--resume", self._middle(case))

    def _order(self, name: str, case: Case, *more: str) -> _Order:
        output = ("--output_dir", str(self.folder / name))
        return _Order(name, case, _last_of_each((*self.common, *case.flags(self.folder), *output, *more)))

    def _middle(self, case: Case) -> str:
        return str(self.folder / case.name / "checkpoints" / f"step-{SAVED:08d}")

    def is_complete(self, name: str) -> bool:
        return self.outcomes.get(name) == Outcome() and self._export(name).exists()

    def _export(self, name: str) -> Path:
        export = self.folder / name / "export"
        adapters = export / "adapter_model.safetensors"  # with `--use_lora`
        return adapters if adapters.exists() else export / "model.safetensors"

    def refused(self, name: str) -> str:
        """The message that refused a run; empty where none did."""
        outcome = self.outcomes.get(name)
        return _sentence(outcome.refused) if outcome and outcome.refused else ""

    def why(self, name: str) -> str:
        """The reason why a run did not end."""
        return self.refused(name) or _last_lines(self.outcomes[name].failed if name in self.outcomes else "")

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
        row.refused = self.refused(case.name)
        if row.refused:
            return row
        if not self.is_complete(case.name):
            row.failed.append(self.why(case.name))
            return row
        row.error = self.error(case.name)
        if not row.error <= limit:
            row.failed.append(f"error {row.error:.1e}")
        if not self.asked.resuming:
            return row
        row.resumed = self._resumed(case, row)
        name = f"{case.name}-elsewhere"
        row.elsewhere_refused = self.refused(name)
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
            resolved = configure(parse_arguments([*_last_of_each(self.common)])).resolved
        needs = resolved.components["optimizer"].component.needs
        for what, zero in NEEDED.items() if needs != "nothing" else ():
            file = self.folder / "refused.json"
            file.write_text(json.dumps({"zero_optimization": zero}))
            argv = _last_of_each((*self.common, "--zero_stage", "3", "--deepspeed_config", str(file)))
            found[what] = ""
            try:
                with _quiet():
                    configure(parse_arguments([*argv]))
            except UserError as problem:
                found[what] = _sentence(str(problem))
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


def _sentence(problem: str) -> str:
    """What refused, without the places of files that are gone after the check."""
    lines = problem.splitlines()
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


def main(argv: Sequence[str] | None = None) -> int:
    """``python -m panda.testing.optimizers NAME [FLAG ...]``."""
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m panda.testing.optimizers")
    parser.add_argument("name", help="an optimizer, as a configuration names it")
    parser.add_argument("--short", action="store_true", help="some of the ways, in half a minute")
    parser.add_argument("--limit", type=float, default=LIMIT, help="the largest error, of the distance moved")
    arguments, flags = parser.parse_known_args(argv)
    try:
        check_optimizer(arguments.name, *flags, short=arguments.short, limit=arguments.limit)
    except AssertionError as problem:
        print(f"error: {problem}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
