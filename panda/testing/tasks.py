"""Whether a task keeps what panda relies on: ``check_task("pairs", pairs_dir="rows")``."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from panda.configuration.arguments import parse_arguments
from panda.configuration.configure import configure
from panda.data.batches import RowShape
from panda.files.terminal import number_of
from panda.run.preparation import Preparation
from panda.run.records import TAKEN
from panda.tasks.task import Task
from panda.tasks.task import stated_metrics
from panda.testing.report import Report
from panda.testing.runs import AS_COMMANDS
from panda.testing.runs import Trained
from panda.testing.runs import as_flags
from panda.testing.runs import train
from panda.testing.runs import train_several
from panda.testing.runs import zero3_at_once

STEP = 4
"""Samples of an optimizer step."""
TIMED = ("seconds", "per_second", "wait", "learning_rate", "memory", "mfu")
"""What the names of entries of a record have that depend on the time, or not on the task."""
RESUMING = "resuming"
FAILED = "The message says which part failed."
ADVICE = (
    "`loss` has to return a sum over units, and `units` of the batch how many there are; metrics are pairs of a"
    " numerator and a denominator. None may depend on how many samples a batch has, or on padding: divide by nothing"
    " that is counted in the batch."
)


def check_task(name: str, **options: object) -> None:
    """Check the task ``name``. ``options``: its own, with data of at least five samples, or any key of a run.

    Batches are made twice, and units and metrics looked at. A run that was interrupted is compared with one that was
    not, to the bit, and a run in one process with one micro batch a step with every other split of the same steps:
    micro batches, layouts of rows that the task states, two ranks under ZeRO 0 to 3. Prints a line for each, and raises
    AssertionError that says what is broken and what to do.

    The model is a tiny LLaMA unless the options name another. Give ``eval_data_dir`` to try evaluations, too.
    """
    common = _common(options) | {"task": name} | options
    configuration = configure(parse_arguments(as_flags(common)))
    chosen = configuration.resolved.components["task"]
    report = Report(f"check_task {name}: {chosen.label} of {chosen.offer.describe()}")
    prepared = Preparation(configuration)
    samples = report.tried("samples", "Mend `dataset`.", lambda: _check_samples(report, prepared))
    report.finish()
    assert samples is not None
    with tempfile.TemporaryDirectory(prefix="panda-check-task-") as folder:
        _check_splits(report, Path(folder), common | {"max_samples": samples}, prepared.task)
    report.finish()


def _common(options: dict[str, object]) -> dict[str, Any]:
    """Options of each run."""
    names_model = {"arch", "model", "ckpt_path"} & options.keys()
    tiny = {} if names_model else {"arch": "llama-tiny", "num_layers": 2, "hidden_size": 32}
    # So that rounding of gradients near zero does not become a step of its own.
    epsilon = {} if "optimizer" in options else {"adam_epsilon": 1e-3}
    return {
        **tiny,
        **epsilon,
        "max_seq_length": 64,
        "num_train_epochs": 1,
        "learning_rate": 1e-2,
        "lr_scheduler": "constant",
        "warmup_steps": 0,
        "max_grad_norm": 0,
        "num_workers": 0,
        "per_gpu_eval_batch_size": STEP,
    }


def _check_samples(report: Report, prepared: Preparation) -> int:
    """How many samples to train on: so many that the last step has one, and one of two ranks none."""
    task, dataset = prepared.task, prepared.dataset
    found = len(dataset)
    used = min(2, (found - 1) // STEP) * STEP + 1
    report.judge(
        "samples",
        found > STEP,
        f"{number_of(found, 'sample')}"
        + f", of which the first {used} are trained on, in steps of {STEP}" * (found > STEP),
        f"Give data with at least {STEP + 1} rows that can be used.",
    )
    rows: Any = [[{**dataset[number], "index": number}] for number in range(min(STEP, found))]
    first, second = (task.collate(rows, RowShape()) for _ in range(2))
    same = first.arrays.keys() == second.arrays.keys() and all(
        torch.equal(first.arrays[key], second.arrays[key]) for key in first.arrays
    )
    report.judge(
        "batches",
        same and first.units > 0,
        f"a batch of {len(rows)} samples, made twice, is {'the same' if same else 'another'}; it has"
        f" {first.units:g} {task.unit}",
        "`collate` is called in other processes, and again after an interruption: it must draw no random numbers and"
        " keep no state, and `units` must be positive.",
    )
    return used


def _check_records(report: Report, whole: Trained, unit: str) -> None:
    """Units and metrics of the records of a run."""
    records = whole.records
    names = [set(record) - TAKEN - {unit} for record in records]
    of_task = sorted(names[0])
    counts = [record[unit] for record in records]
    growing = all(b > a for a, b in zip([0, *counts], counts, strict=False))
    report.judge(
        "units",
        growing,
        f"{unit}, {counts[-1]} after {number_of(len(counts), 'step')}",
        "Every batch has at least one unit, of which `units` says how many.",
    )
    for record in whole.evaluations:
        missing = [name for name in of_task if f"eval_{name}" not in record]
        if missing:
            report.broken("metrics", f"an evaluation lacks {', '.join(missing)}", "All batches have the same metrics.")
    odd = [name for name in ("loss", *of_task) for record in records if not _is_finite(record.get(name))]
    report.judge(
        "metrics",
        all(each == names[0] for each in names) and not odd,
        f"not finite: {', '.join(dict.fromkeys(odd))}" if odd else ", ".join(of_task) or "none but the loss",
        "Every batch has the same metrics, each a pair of a numerator and a denominator that is not 0 over a step.",
    )


def _is_finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


@dataclass(frozen=True)
class _Split:
    """A way to take the same steps."""

    promise: str
    ranks: int
    micro_batch: int
    options: Mapping[str, Any]

    @property
    def folder(self) -> str:
        return self.promise.replace(" ", "-").replace(",", "")

    def flags(self, common: Mapping[str, Any]) -> dict[str, Any]:
        """The options of its run."""
        accumulation = STEP // (self.ranks * self.micro_batch)
        split = {"per_gpu_train_batch_size": self.micro_batch, "gradient_accumulation_steps": accumulation}
        return {**common, "save_final": False, **split, **self.options}


WHOLE = _Split("training", 1, STEP, {"save_steps": 2})


def _splits(folder: Path, layouts: tuple[str, ...]) -> list[_Split]:
    """Those in one process, and then those on two ranks."""
    checkpoint = folder / WHOLE.folder / "checkpoints" / "step-00000002"
    others = (layout for layout in layouts if layout != "padded")
    return [
        WHOLE,
        _Split(RESUMING, 1, STEP, {"save_steps": 2, "resume": checkpoint}),
        _Split("micro batches of 1", 1, 1, {}),
        *(_Split(f"{layout} rows, micro batches of 2", 1, 2, {"batching": layout}) for layout in others),
        *(_Split(f"ZeRO-{stage}, two ranks", 2, 2 - stage % 2, {"zero_stage": stage}) for stage in range(3)),
        _Split("ZeRO-3, two ranks", 2, 1, zero3_at_once(folder)),
    ]


def _check_splits(report: Report, folder: Path, common: Mapping[str, Any], task: Task) -> None:
    """Take the same steps in each way, and compare."""
    splits = _splits(folder, task.layouts)
    whole = None
    for ranks in (1, 2):
        alike = [split for split in splits if split.ranks == ranks]
        argv = [[*as_flags({**split.flags(common), "output_dir": folder / split.folder})] for split in alike]
        with suppress(AssertionError):  # of one that fails; the others are run by themselves, and say which
            train_several(argv, ranks=ranks, cwd=Path.cwd(), **AS_COMMANDS)
        for split in alike:
            run = report.tried(split.promise, FAILED, partial(_run_of, split, folder, common))
            if run is None:
                report.finish()
            elif whole is None:
                whole = run
                _check_records(report, whole, task.unit)
            elif split.promise == RESUMING:
                _check_resumed(report, run, whole)
            else:
                report.judge(split.promise, *same_records(run, whole), ADVICE)
        report.finish()
    if stated_metrics(task) is None:
        report.note("names", "the task does not state its `metrics`: a misspelt `best_metric` is found late")
    if "packed" not in task.layouts:
        report.note("packed rows", "not among the task's `layouts`: `batching: packed` is refused for it")


def _run_of(split: _Split, folder: Path, common: Mapping[str, Any]) -> Trained:
    """The run of ``split``, which may be there."""
    if (folder / split.folder / "export" / "config.json").exists():
        return Trained(folder / split.folder, "")
    return train(folder / "alone" / split.folder, ranks=split.ranks, **split.flags(common))


def _check_resumed(report: Report, run: Trained, whole: Trained) -> None:
    """Compare a run that went on from a checkpoint of ``whole``."""
    same = _values(run.records) == _values(whole.records)[2:]
    weights, expected = map(_exported, (run, whole))
    other = [name for name, tensor in expected.items() if not torch.equal(weights[name], tensor)]
    report.judge(
        RESUMING,
        same and not other,
        f"from step 2, records are {'the same' if same else 'others'}, and {len(other)} of {len(expected)} tensors"
        " of the export differ in some bit",
        "What the task does in a step may depend on the weights, the samples, the step and the seed, and on nothing"
        " that it remembers from earlier steps: that is not in a checkpoint.",
    )


def _exported(run: Trained) -> dict[str, torch.Tensor]:
    """The tensors of the export of ``run``, by name."""
    files = sorted(run.export.glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def _values(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The entries of records that do not depend on the time."""
    return [
        {name: value for name, value in record.items() if not any(word in name for word in TIMED)} for record in records
    ]


def same_records(run: Trained, whole: Trained, tolerance: float = 1e-5) -> tuple[bool, str]:
    """Whether two runs have the same records and evaluations, and in words how far they are apart."""
    found = _values([*run.records, *run.evaluations])
    expected = _values([*whole.records, *whole.evaluations])
    if [each.keys() for each in found] != [each.keys() for each in expected]:
        return (
            False,
            f"other entries in its {number_of(len(found), 'record')} than in the {len(expected)} of one process",
        )
    worst, entry = 0.0, "loss"
    for mine, theirs in zip(found, expected, strict=True):
        for name, value in theirs.items():
            if not (_is_finite(value) and _is_finite(mine[name])):
                return False, f"{name} is not finite: {mine[name]}, and {value}"
            apart = abs(mine[name] - value) / max(abs(value), 1.0)
            if apart > worst:
                worst, entry = apart, f"{name} at step {theirs['step']}: {mine[name]:.7g} instead of {value:.7g}"
    return worst <= tolerance, f"{number_of(len(found), 'record')}, apart by at most {worst:.1g}" + f" ({entry})" * (
        worst > 0
    )
