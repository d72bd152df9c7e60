"""docs/support.md: what works together, tried by which test, on what, and what is not.

Cells come from the tests' own tables (tests/covered.py) and from what panda refuses.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import tempfile
from collections.abc import Callable
from configparser import ConfigParser
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from covered import OFFLOAD
from covered import TRIALS

from panda.configuration.arguments import parse_arguments
from panda.configuration.configure import configure
from panda.registry import UserError

ROOT = Path(__file__).parent.parent

Options = dict[str, Any]


@dataclass(frozen=True)
class Feature:
    """A row or a column: flags that ask for it, and whether a run of the tests has it."""

    name: str
    flags: tuple[str, ...]
    is_in: Callable[[int, Options], bool]


def stage_of(options: Options) -> int:
    """The ZeRO stage: in 16 bits the default is 1."""
    sixteen = options.get("precision", "bf16" if options.get("use_quant") else "fp32") != "fp32"
    return int(options.get("zero_stage", int(sixteen)))


def parts_of(options: Options) -> int:
    return int(options.get("tensor_parallel_size", 1))


def is_on(options: Options, key: str) -> bool:
    return str(options.get(key, False)).lower() == "true"


def trained(options: Options) -> str:
    if is_on(options, "use_quant"):
        return "8 bits" if str(options.get("quant_bits", 4)) == "8" else "NF4"
    if is_on(options, "use_lora"):
        return "DoRA" if is_on(options, "use_dora") else "LoRA"
    return "all weights"


OFFLOADED = {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}
SPREAD = [
    Feature("one rank", (), lambda ranks, run: ranks == 1),
    *(
        Feature(
            f"ZeRO {stage}",
            ("--zero_stage", str(stage)),
            lambda ranks, run, stage=stage: ranks > 1 and stage_of(run) == stage and parts_of(run) == 1,
        )
        for stage in range(4)
    ),
    Feature(
        "`offload_optimizer` to the CPU",
        ("--zero_stage", "2", "--deepspeed_config", OFFLOAD),
        lambda ranks, run: OFFLOAD in run,
    ),
    *(
        Feature(
            f"tensor parallel, ZeRO {stage}",
            ("--tensor_parallel_size", "2", "--zero_stage", str(stage)),
            lambda ranks, run, stage=stage: parts_of(run) > 1 and stage_of(run) == stage,
        )
        for stage in range(4)
    ),
]
TRAINED = [
    Feature(name, flags, lambda ranks, run, name=name: trained(run) == name)
    for name, flags in {
        "all weights": (),
        "LoRA": ("--use_lora",),
        "DoRA": ("--use_lora", "--use_dora"),
        "NF4": ("--use_quant",),
        "8 bits": ("--use_quant", "--quant_bits", "8"),
    }.items()
]
FORWARD = [
    Feature("packed rows", ("--batching", "packed"), lambda ranks, run: run.get("batching") == "packed"),
    *(
        Feature(
            f"recomputed: `{name}`",
            ("--activation_checkpointing", name),
            lambda ranks, run, name=name: run.get("activation_checkpointing") == name,
        )
        for name in ("full", "selective")
    ),
    Feature("`compile`", ("--compile",), lambda ranks, run: is_on(run, "compile")),
]
PRECISIONS = [
    Feature(
        name,
        ("--precision", name),
        lambda ranks, run, name=name: run.get("precision", "bf16" if run.get("use_quant") else "fp32") == name,
    )
    for name in ("fp32", "bf16", "fp16")
]
OPTIMIZERS = [
    Feature(
        f"`{name}`", ("--optimizer", name), lambda ranks, run, name=name: run.get("optimizer", "adamw").lower() == name
    )
    for name in ("adamw", "nvlamb", "muon", "schedule_free_adamw", "adamw8bit")
]
TASKS = ["instruct", "pretrain", "mix", "one of a package", "dpo", "simpo", "orpo", "kto", "reward", "distill", "grpo"]
"""Those of packages may not be installed here, so what they say of packed rows is in ``PACKED``."""
PACKED = {"instruct", "pretrain", "mix", "one of a package", "distill"}
"""Tasks that are right packed; "one of a package", if it says so."""

SHOWN = 3
"""Tests in a cell; of others it has their number."""

EXPERIMENTAL = (
    ("`tensor_parallel_size`", "compiled on two H100s; on four H200s not compiled", "machines.md"),
    ("`offload_param`, and offloading to NVMe", "on CPUs only, and NVMe not at all", "refusals.md"),
    ("several machines", "no test starts more than one", "machines.md"),
    ("flight recorder of NCCL", "its files were not seen yet", "machines.md"),
)
"""What may be used, and how little is known of it; the page that says more."""
PLATFORMS = (
    ("Linux, x86-64, CPU (gloo)", "every test, at each change", "two cores, Python 3.11, constraints.txt"),
    ("Linux, x86-64, NVIDIA H100 and H200", "by hand, as above", "torch 2.11 for CUDA 13, Python 3.12"),
    ("Linux, other NVIDIA cards", "not run", "one kernel needs a Hopper, and is left out elsewhere"),
    ("Linux, AMD (ROCm)", "not run", ""),
    ("Linux, ARM", "not run", ""),
    ("macOS", "not run", "panda knows no MPS"),
    ("Windows", "does not start", "panda locks files by `fcntl`; WSL 2 was not run"),
)


@cache
def found() -> dict[int, list[tuple[int, Options]]]:
    """The runs of each of ``TRIALS``, by its place."""
    return {number: [*trial.runs()] for number, trial in enumerate(TRIALS)}


def numbers() -> dict[tuple[str, str, str], int]:
    """The number of each test on the page: of its file, name and what it is compared with."""
    tests = dict.fromkeys((trial.file, trial.test, trial.against) for trial in TRIALS)
    return {test: number for number, test in enumerate(tests, 1)}


@cache
def refused(flags: tuple[str, ...]) -> bool:
    """Whether panda refuses a run with ``flags``."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):
        file = Path(folder) / "offload.json"
        file.write_text(json.dumps(OFFLOADED))
        words = [str(file) if word == OFFLOAD else word for word in flags]
        try:
            configure(parse_arguments(["--arch", "llama-7b", *words]))
        except UserError as error:
            # Whether bitsandbytes is installed here is not a property of panda.
            return "refused, since" in str(error) and "bitsandbytes, which" not in str(error)
    return False


def cell(*features: Feature) -> str:
    """What is known of a run that has all ``features``."""
    if refused(tuple(word for feature in features for word in feature.flags)):
        return "[refused](refusals.md)"
    tried = {}
    for place, runs in found().items():
        if any(all(feature.is_in(*run) for feature in features) for run in runs):
            trial = TRIALS[place]
            number = numbers()[trial.file, trial.test, trial.against]
            tried[number] = f"{number}{'*' * trial.in_long_form}"
    shown = ", ".join([*tried.values()][:SHOWN])
    return f"{shown} +{len(tried) - SHOWN}" if len(tried) > SHOWN else shown or "not tried"


def matrix(rows: list[Feature], columns: list[Feature]) -> str:
    lines = [f"| {row.name} | " + " | ".join(cell(row, column) for column in columns) + " |" for row in rows]
    return _table(["", *(column.name for column in columns)], lines)


def tests() -> str:
    """The numbered list of tests."""
    lines = [f"| {number} | `{file}`: `{test}` | {against} |" for (file, test, against), number in numbers().items()]
    return _table(["", "test", "compared with"], lines)


def tasks() -> str:
    """Tasks, and where they were trained."""
    places = [*SPREAD[:5], TRAINED[1], FORWARD[0]]
    lines = []
    for name in TASKS:
        task = Feature(name, (), lambda ranks, run, name=name: run.get("task", "instruct") == name)
        lines.append(f"| {name} | " + " | ".join(_of_task(task, place) for place in places) + " |")
    return _table(["task", *(place.name for place in places)], lines)


def _of_task(task: Feature, place: Feature) -> str:
    if place is FORWARD[0] and task.name not in PACKED:
        return "[refused](refusals.md)"
    return cell(task, place)


def need_a_gpu() -> str:
    """Files of tests of which some need a GPU."""
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    names = [str(file.relative_to(ROOT)) for file in files if re.search(r'reason="no GPU"\)', file.read_text("utf-8"))]
    return ", ".join(f"`{name}`" for name in names)


def versions() -> str:
    setup = ConfigParser()
    setup.read(ROOT / "setup.cfg")
    wanted = ("torch", "transformers", "deepspeed", "peft", "fairscale")
    pinned = dict(re.findall(r"^([\w-]+)==(\S+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    lines = []
    for line in setup["options"]["install_requires"].split():
        name, range_ = re.fullmatch(r"(\w+)(.*)", line).groups()  # type: ignore[union-attr]
        if name in wanted:
            lines.append(f"| {name} | `{range_}` | {pinned[name]} |")
    return _table(["", "allowed", "in the tests"], lines)


def support() -> str:
    """The page."""
    return f"""# What works together

{{generated}}A number is a test of [the list below](#the-tests) that trains such a run and compares it; with `*`, one in
a long form, which `PANDA_EVERY_WAY=1` or a command makes, and not each change. `1, 2, 3 +4` is seven tests. *Refused*
is refused in words before anything is read: [refusals.md](refusals.md) has the reasons, and what to use instead. *Not
tried* is accepted, and none of these tests trains it. Tests compare small models on CPUs (gloo); [GPUs](#on-gpus) have
a part of their own.

## Where a run is spread, and what is trained
{matrix(SPREAD, [*TRAINED, *FORWARD])}
*NF4* and *8 bits* are a base that is quantised under LoRA.

## Where a run is spread, and how it is trained
{matrix(SPREAD, [*PRECISIONS, *OPTIMIZERS])}
## What is trained, and how
{matrix(TRAINED, [*PRECISIONS, *OPTIMIZERS])}
{matrix(TRAINED, FORWARD)}
## Precision and optimizer
{matrix(OPTIMIZERS, PRECISIONS)}
## Tasks
`dpo` to `distill` are of [panda-preference](../plugins/panda-preference), `grpo` is of [panda-rl](../plugins/panda-rl);
*one of a package* stands for the tests' own tasks with pairs, statistics of a step, a head and drawn answers.

{tasks()}
Which models: [models.md](models.md#what-was-compared) has a table of {model_types()} types, each compared with plain
transformers.

## The tests
{tests()}
## On GPUs
Not by each change, but by hand: the runs of [speed.md](speed.md), and, of which bench/LOG.md has the figures,
preferences and reinforcement learning on one H100.

Some tests need a GPU, and are skipped without one: {need_a_gpu()}.

## Experimental
These may be used, and little is known of them yet.

| | what is known | |
|---|---|---|
{chr(10).join(f"| {what} | {known} | [{page}]({page}) |" for what, known, page in EXPERIMENTAL)}

## Platforms
| | run | |
|---|---|---|
{chr(10).join(f"| {platform} | {run} | {note} |" for platform, run, note in PLATFORMS)}

## Versions
{versions()}
Both ends of each range were tried by `.ci/ends low` and `.ci/ends high`, with the tests that depend most on them.
Python: 3.11 in the tests of each change, 3.12 on GPUs.
"""


def model_types() -> int:
    page = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
    return len(re.findall(r"^\| [\w.-]+ \| (?:yes|) ", page, re.MULTILINE))


def _table(head: list[str], lines: list[str]) -> str:
    return "\n".join(["| " + " | ".join(head) + " |", "|---" * len(head) + "|", *lines]) + "\n"
