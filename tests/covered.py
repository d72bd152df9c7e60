"""What the tests train together with what: read out of their own tables, for docs/support.md.

Each entry of ``TRIALS`` names a test, and how a case of its parametrisation is a run: on how many ranks, with which
options. The cases are those of the test itself, so what it tries no more is on the page no more.
"""

from __future__ import annotations

import importlib.util
import itertools
import sys
from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import launching
import yaml

ROOT = Path(__file__).parent.parent
Run = tuple[int, dict[str, Any]]
"""Ranks, and options that matter here, by key."""
OFFLOAD = "offload"
"""Stands among the options for `offload_optimizer` in `deepspeed_config`."""


@dataclass(frozen=True)
class Trial:
    """A test, and the run that a case of it is."""

    file: str
    """From the repository's root."""
    test: str
    against: str
    """What its runs are compared with."""
    run_of: Callable[..., Iterable[Run]]
    """The runs of a case: of its module, and the values of its parametrisation by name."""
    in_long_form: bool = False
    """Whether these runs are made only with PANDA_EVERY_WAY=1, or by a command."""

    def runs(self) -> Iterator[Run]:
        """The runs of all cases. Raises AttributeError where the test is gone, or has lost a table."""
        module = _module(ROOT / self.file)
        for case in _cases(getattr(module, self.test)):
            yield from self.run_of(module, **case)


def options_of(flags: Iterable[object]) -> dict[str, Any]:
    """The options that ``flags`` give, without those that only tests know."""
    words = [str(word) for word in flags]
    found: dict[str, Any] = {}
    for number, word in enumerate(words):
        if word.startswith("--"):
            value = words[number + 1] if number + 1 < len(words) else "--"
            found[word.removeprefix("--")] = True if value.startswith("--") else value
    return found


def _module(file: Path) -> ModuleType:
    """The module in ``file``, as it is outside pytest: under a name of its own, with its neighbours in reach."""
    name = "covered_" + "_".join(file.relative_to(ROOT).with_suffix("").parts).replace("-", "_")
    if name not in sys.modules:
        package = file.parents[1]
        neighbours = [str(file.parent), str(ROOT / "tests"), *([str(package)] if "plugins" in file.parts else [])]
        # Two packages have helpers of the same names, which must not stay.
        before, path, every_way = set(sys.modules), list(sys.path), launching.EVERY_WAY
        hidden = {each: sys.modules.pop(each) for each in ("runs", "tiny", "making") if each in sys.modules}
        sys.path[:0] = neighbours
        launching.EVERY_WAY = False  # the page has what each change is tested with
        try:
            spec = importlib.util.spec_from_file_location(name, file)
            assert spec and spec.loader, file
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        finally:
            sys.path[:], launching.EVERY_WAY = path, every_way
            for each in [each for each in set(sys.modules) - before if each in ("runs", "tiny", "making")]:
                del sys.modules[each]
            sys.modules.update(hidden)
        sys.modules[name] = module
    return sys.modules[name]


def _cases(test: Any) -> list[dict[str, Any]]:
    """The values of each case of ``test``, by name: the product of its parametrisations."""
    axes = []
    for mark in getattr(test, "pytestmark", []):
        if mark.name == "parametrize":
            names = (
                [name.strip() for name in mark.args[0].split(",")] if isinstance(mark.args[0], str) else mark.args[0]
            )
            values = [getattr(each, "values", each) for each in mark.args[1]]
            axes.append([dict(zip(names, each if len(names) > 1 else [each], strict=True)) for each in values])
    return [{key: value for part in parts for key, value in part.items()} for parts in itertools.product(*axes)]


# -- a case as a run ------------------------------------------------------------------------------


def _split(module: Any, name: str) -> Iterator[Run]:
    if name in module.SPLITS:
        yield module.SPLITS[name][2], {}
    elif name in module.LAID_OUT:
        batching, split = module.LAID_OUT[name]
        yield module.SPLITS[split][2], {"batching": batching}
    else:
        yield 1 if "alone" in name else 2, {"zero_stage": name[4]}


def _tensor_parallel(module: Any, name: str) -> Iterator[Run]:
    ranks, _, optimizer, flags = module.RUNS.get(name, (2, "drawn", "nvlamb", module.BF16))
    yield ranks, {"optimizer": optimizer, "tensor_parallel_size": min(ranks, 2), **options_of(flags)}


def _gathered(module: Any, way: str) -> Iterator[Run]:
    yield 2, {"zero_stage": 3, "precision": "fp32", **(module.WAYS | module.UNUSUAL)[way]}


def _partitioned(module: Any, task: str) -> Iterator[Run]:
    yield 2, {"task": "one of a package", "use_lora": True, "zero_stage": 3}


def _packed_distillation(module: Any) -> Iterator[Run]:
    yield 1, {"task": "distill", "batching": "packed"}


def _resumed(module: Any, name: str) -> Iterator[Run]:
    ranks, _, way = name.partition("-")
    yield int(ranks), options_of(module.WAYS[int(ranks)][way])


def _continued(module: Any, way: tuple[str, str, str]) -> Iterator[Run]:
    layout, optimizer, kind = way
    spread = {"zero_stage": 2, OFFLOAD: True} if layout == "offload" else {"zero_stage": layout}
    yield module.RANKS, {"optimizer": optimizer, **spread, **options_of(module.KINDS[kind])}


def _every_continued(module: Any, way: object) -> Iterator[Run]:
    for each in itertools.product(module.LAYOUTS, module.OPTIMIZERS, module.KINDS):
        yield from _continued(module, each)


def _moved(module: Any, optimizer: str, before: tuple[int, int], after: tuple[int, int]) -> Iterator[Run]:
    for ranks, stage in (before, after):
        yield ranks, {"optimizer": optimizer, "zero_stage": stage}


def _of_engine(optimizer: str) -> Callable[..., Iterator[Run]]:
    def run_of(module: Any, ranks: int, name: str) -> Iterator[Run]:
        configuration = module.CONFIGURATIONS[name]
        offload = {OFFLOAD: True} if "offload_optimizer" in configuration["deepspeed"]["zero_optimization"] else {}
        yield ranks, {"optimizer": optimizer, **configuration["options"], **offload}

    return run_of


def _eight_bit(module: Any, stage: int) -> Iterator[Run]:
    yield 2, {"optimizer": "adamw8bit", "zero_stage": stage}


def _adapted(module: Any, name: str) -> Iterator[Run]:
    kind, flags = (module.ALONE | module.TOGETHER)[name]
    more = {"zero_stage": 3} if name.startswith("zero3") else {}
    yield (
        1 if name in module.ALONE else 2,
        {"use_lora": True, **options_of((*module.KINDS[kind][1], *flags)), **more},
    )


def _quantised(module: Any, name: str) -> Iterator[Run]:
    more = {"zero_stage": 3} if "zero3" in name else {}
    yield (
        1 if name in module.ALONE else 2,
        {"use_quant": True, **options_of((module.ALONE | module.TOGETHER)[name]), **more},
    )


def _new_rows(module: Any, run: str) -> Iterator[Run]:
    yield 1 if run in module.ALONE else 2, {"use_lora": True, "zero_stage": (module.ALONE | module.TOGETHER)[run]}


def _layers(module: Any, name: str) -> Iterator[Run]:
    if name in module.VARIANTS:
        yield 1, options_of(module.VARIANTS[name])
    else:
        mode = module.PARTITIONED[name][0] if name in module.PARTITIONED else "full"
        compiled = {"compile": True} if "compiled" in name else {}
        yield 2, {"zero_stage": 3, "activation_checkpointing": mode, **compiled}


def _skipped(module: Any, way: tuple[str, int, str, str]) -> Iterator[Run]:
    precision, stage, offload, _ = way
    yield 2, {"precision": precision, "zero_stage": stage, **({OFFLOAD: True} if offload else {})}


def _averaged(module: Any, name: str) -> Iterator[Run]:
    precision, stage = name.split("-")
    yield module.RANKS[name], {"optimizer": "schedule_free_adamw", "precision": precision, "zero_stage": stage}


def _any_loss(module: Any, task: str, name: str) -> Iterator[Run]:
    stage = {"zero_stage": name[4]} if name.startswith("zero") else {}
    yield 2 if name in module.TOGETHER else 1, {"task": "one of a package", **stage}


def _preference(module: Any, task: str, split: str) -> Iterator[Run]:
    ranks, options = module.SPLITS[split]
    yield ranks, {**options, "task": module.TASKS[task].get("task", task) if task != "ipo" else "dpo"}


def _adapted_preference(module: Any, task: str) -> Iterator[Run]:
    yield 1, {"task": task, "use_lora": True}


def _rewarded(module: Any, loss: str, split: str) -> Iterator[Run]:
    ranks, options = module.SPLITS[split]
    yield ranks, {**options, "task": "grpo"}


def _configured(module: Any, name: str) -> Iterator[Run]:
    values = yaml.safe_load((module.CONFIGS / f"{name}.yaml").read_text())
    smaller = (module.ALONE | module.TOGETHER)[name]
    yield 2 if name in module.TOGETHER else 1, {"task": "instruct", **values, **smaller}


def _certified(module: Any, name: str) -> Iterator[Run]:
    for case in module.CASES:
        refused = case.tensor_ranks > 1 and case.stage == 3
        if not refused:
            offload = {OFFLOAD: True} if case.offload else {}
            spread = {"zero_stage": case.stage, "tensor_parallel_size": case.tensor_ranks, **offload}
            yield case.ranks, {"optimizer": name, **spread}


IN_FLOAT64 = "one process in float64 without DeepSpeed"
TRIALS = (
    Trial("tests/engine/test_invariance.py", "test_every_split_follows_the_plain_loop", IN_FLOAT64, _split),
    Trial("tests/engine/test_tensor_parallel.py", "test_ten_steps_follow_one_process", IN_FLOAT64, _tensor_parallel),
    Trial(
        "tests/engine/test_gathering.py",
        "test_losses_are_those_without_zero",
        "the same ranks without ZeRO",
        _gathered,
    ),
    Trial(
        "tests/engine/test_tensor_parallel.py",
        "test_a_resumed_run_ends_with_the_same_bits",
        "a run without a break, to the bit",
        _tensor_parallel,
    ),
    Trial(
        "tests/engine/test_resume.py",
        "test_a_resumed_run_ends_with_the_same_bits",
        "a run without a break, to the bit",
        _resumed,
    ),
    Trial(
        "tests/engine/test_resume_matrix.py",
        "test_a_continued_run_ends_with_the_same_bits",
        "a run without a break, to the bit",
        _continued,
    ),
    Trial(
        "tests/engine/test_resume_matrix.py",
        "test_a_continued_run_ends_with_the_same_bits",
        "a run without a break, to the bit; all ways",
        _every_continued,
        in_long_form=True,
    ),
    Trial(
        "tests/engine/checkpoints/test_redistribution.py",
        "test_other_ranks_and_stages_go_on_as_one_process_without_a_break",
        "one process without a break, after going on with other ranks",
        _moved,
    ),
    Trial(
        "tests/engine/test_sharded_lamb.py",
        "test_every_sharding_follows_one_process_in_float64",
        IN_FLOAT64,
        _of_engine("nvlamb"),
    ),
    Trial(
        "tests/engine/test_sharded_muon.py",
        "test_every_sharding_follows_one_process_in_float64",
        IN_FLOAT64,
        _of_engine("muon"),
    ),
    Trial(
        "tests/testing/test_optimizers.py",
        "test_the_docs_have_a_certificate_of_all_ways",
        "one process in fp32, by `python docs/certificates.py`",
        _certified,
        in_long_form=True,
    ),
    Trial(
        "tests/engine/test_eight_bit.py",
        "test_a_resumed_run_ends_with_the_same_bits",
        "a run without a break, to the bit",
        _eight_bit,
    ),
    Trial(
        "tests/run/test_averaged_weights.py",
        "test_the_last_evaluation_is_of_what_is_exported",
        "an evaluation of the export",
        _averaged,
    ),
    Trial(
        "tests/engine/test_skipped_steps.py",
        "test_a_step_is_skipped_alike_and_the_rest_is_as_without_it",
        "a run without the skipped batch, to the bit",
        _skipped,
    ),
    Trial(
        "tests/models/adapters/test_adapters.py",
        "test_ten_steps_follow_a_plain_peft_loop",
        "plain peft in one process, in float64",
        _adapted,
    ),
    Trial(
        "tests/models/adapters/test_new_rows.py",
        "test_new_rows_and_adapters_follow_a_plain_peft_loop",
        "plain peft in one process, in float64",
        _new_rows,
    ),
    Trial(
        "tests/models/adapters/test_quantisation.py",
        "test_ten_steps_follow_plain_peft_and_bitsandbytes",
        "plain peft and bitsandbytes in one process",
        _quantised,
    ),
    Trial(
        "tests/models/forward/test_model_layers.py",
        "test_a_run_follows_the_same_trajectory",
        "a run that neither recomputes nor compiles",
        _layers,
    ),
    Trial(
        "tests/run/test_any_loss.py",
        "test_every_split_takes_the_same_steps",
        "one micro batch in one process",
        _any_loss,
    ),
    Trial(
        "tests/run/test_any_loss.py",
        "test_adapters_take_the_same_steps_on_a_partitioned_base",
        "one process without ZeRO",
        _partitioned,
    ),
    Trial(
        "plugins/panda-preference/tests/test_splits.py",
        "test_a_split_step_is_the_same",
        "one micro batch in one process",
        _preference,
    ),
    Trial(
        "plugins/panda-preference/tests/test_runs.py",
        "test_adapters_are_compared_with_the_model_without_them",
        "margins that begin at 0 and grow",
        _adapted_preference,
    ),
    Trial(
        "plugins/panda-preference/tests/test_runs.py",
        "test_distillation_is_the_same_packed",
        "the same step in padded rows",
        _packed_distillation,
    ),
    Trial(
        "plugins/panda-rl/tests/test_runs.py",
        "test_a_split_step_is_the_same",
        "one micro batch in one process",
        _rewarded,
    ),
    Trial("tests/test_configs.py", "test_a_configuration_trains", "it trains; nothing is compared", _configured),
)
