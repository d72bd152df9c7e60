"""Combinations that cannot work, as data: each with its reason and what to use instead.

``panda-train`` and ``panda check`` apply the table before anything is imported or built, and
docs/refusals.md prints it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from dataclasses import fields
from dataclasses import replace
from fnmatch import fnmatch
from importlib.util import find_spec
from typing import Any

from panda.configuration.deepspeed_file import read_deepspeed_file
from panda.configuration.options import LORA_KEYS
from panda.configuration.options import RunOptions
from panda.registry import UserError
from panda.registry.components import NEEDS
from panda.registry.resolve import Resolved


def _any_task(factory: Any) -> bool:
    return True


@dataclass(frozen=True)
class Refusal:
    """One combination that panda refuses."""

    what: str
    """The combination, as users write it."""
    applies: Callable[[RunOptions], bool]
    reason: str
    instead: str
    of_task: Callable[[Any], bool] = _any_task
    """Of which tasks, by their factories."""
    of_needs: frozenset[str] = frozenset(NEEDS)
    """Of optimizers that need one of these."""
    of_plugins: frozenset[str] = frozenset()
    """Only where the run has one of these plugins of panda's."""
    of_own_optimizers: bool = False
    """Only of panda's own optimizers."""

    def refuses(self, resolved: Resolved) -> bool:
        """Whether ``resolved`` is such a combination."""
        components, plugins = resolved.components, resolved.plugins
        return (
            components["optimizer"].component.needs in self.of_needs
            and (components["optimizer"].offer.is_own or not self.of_own_optimizers)
            and self.applies(resolved.core)
            and self.of_task(components["task"].component.factory)
            and (not self.of_plugins or any(each.offer.is_own and each.name in self.of_plugins for each in plugins))
        )


LAYOUTS = ("padded", "grouped")
"""Those that any loss is right with."""


def layouts_of(factory: Any) -> tuple[str, ...] | None:
    """The values of ``batching`` that the task of ``factory`` supports; None where it is a function, and not known yet.

    A class with a ``loss`` or a ``collate`` of its own has to state ``layouts`` itself: what it inherits is of another.
    """
    if not isinstance(factory, type):
        return None
    for cls in factory.__mro__:
        own = vars(cls)
        if "layouts" in own:
            stated: tuple[str, ...] = own["layouts"]
            return stated
        if "loss" in own or "collate" in own:
            return LAYOUTS
    return LAYOUTS


def _lacks(layout: str) -> Callable[[Any], bool]:
    return lambda factory: layout not in (layouts_of(factory) or (layout,))


def _in_file(run: RunOptions, *path: str) -> Any:
    """The value at ``path`` in the file of ``deepspeed_config``, or None.

    Raises UserError if the file cannot be read. It is validated later, so its values may be of any type here.
    """
    value: Any = read_deepspeed_file(run)
    for key in path:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def _optimizer(run: RunOptions) -> str:
    return run.optimizer.rpartition(":")[2].lower()


_OFFLOAD = ("zero_optimization", "offload_optimizer")
_WEIGHTS = ("zero_optimization", "offload_param")
WHOLE = "an optimizer that needs whole parameters or their norms"
"""The optimizers of some combinations. Messages name the one of the run, and what it needs, in place of these words."""
_WHOLE = frozenset({"norms", "parameters"})
_DEFAULTS = {field.name: field.default for field in fields(RunOptions)}

REFUSALS: tuple[Refusal, ...] = (
    Refusal(
        "batching: packed with a task that does not say that it is right packed",
        lambda run: run.batching == "packed",
        "samples that share a row are one row to its loss",
        "`batching: grouped`; or, of a task that is right so, `layouts` in its class",
        of_task=_lacks("packed"),
    ),
    Refusal(
        "flash_attention_4 without batching: packed",
        lambda run: run.flash_attention_4 and run.batching != "packed",
        "it is for rows of several samples",
        "`batching: packed`, or leave it out",
    ),
    Refusal(
        "max_steps: 0",
        lambda run: run.max_steps == 0,
        "a run without steps trains nothing",
        "`max_steps: -1` for no limit, or a number of steps",
    ),
    Refusal(
        "eval_steps without eval_data_dir or eval_fraction",
        lambda run: run.eval_steps > 0 and run.eval_data_dir is None and not run.eval_fraction,
        "there is nothing to evaluate on",
        "name held-out data with `eval_data_dir`, hold a part out with `eval_fraction`, or leave `eval_steps` out",
    ),
    Refusal(
        "early_stopping, best_checkpoint or rate_on_plateau without evaluations",
        lambda run: not run.eval_steps or (run.eval_data_dir is None and not run.eval_fraction),
        "they go by the evaluations of a run, and this one has none before its end",
        "`eval_steps` with `eval_data_dir` or `eval_fraction`",
        of_plugins=frozenset({"early_stopping", "best_checkpoint", "rate_on_plateau"}),
    ),
    Refusal(
        "eval_generate without eval_data_dir or eval_fraction",
        lambda run: run.eval_data_dir is None and not run.eval_fraction,
        "it answers samples of evaluation data",
        "name held-out data with `eval_data_dir`, or hold a part out with `eval_fraction`",
        of_plugins=frozenset({"eval_generate"}),
    ),
    Refusal(
        "eval_fraction with eval_data_dir",
        lambda run: run.eval_data_dir is not None and run.eval_fraction > 0,
        "both say what is evaluated on",
        "one of them",
    ),
    Refusal(
        "base_path, allow_pickle or extend_vocab without ckpt_path",
        lambda run: run.ckpt_path is None and bool(run.base_path or run.allow_pickle or run.extend_vocab),
        "they say how the weights at ckpt_path are loaded",
        "name those weights with `ckpt_path`, or leave them out",
    ),
    Refusal(
        "lora_*, use_dora or use_rslora without use_lora",
        lambda run: not run.use_lora and any(getattr(run, key) != _DEFAULTS[key] for key in LORA_KEYS),
        "they configure adapters, and there are none without `use_lora`",
        "`use_lora`, or leave them out",
    ),
    Refusal(
        "use_quant with use_lora: false",
        lambda run: run.use_quant and not run.use_lora,
        "quantised weights cannot be trained, so without adapters nothing would be",
        "leave `use_lora` out, which `use_quant` implies, or leave `use_quant` out",
    ),
    Refusal(
        "use_quant without bitsandbytes",
        lambda run: run.use_quant and find_spec("bitsandbytes") is None,
        "bitsandbytes, which quantises, is not installed",
        "`pip install bitsandbytes`, or `pip install panda-train[gpu]`; it works on CPUs too",
    ),
    Refusal(
        "quant_bits without use_quant",
        lambda run: run.quant_bits != _DEFAULTS["quant_bits"] and not run.use_quant,
        "nothing is quantised",
        "`use_quant`, or leave it out",
    ),
    Refusal(
        "quant_bits: 8 with zero_stage: 3",
        lambda run: run.use_quant and run.quant_bits == 8 and run.zero_stage == 3,
        "bitsandbytes keeps each 8-bit weight whole, so ZeRO-3 would partition nothing",
        "4 bits, or `zero_stage: 2`",
    ),
    Refusal(
        "8-bit optimizer state without bitsandbytes",
        lambda run: (
            (run.bit_training or _optimizer(run) in ("adamw8bit", "paged_adamw8bit"))
            and find_spec("bitsandbytes") is None
        ),
        "bitsandbytes, which provides it, is not installed",
        "`pip install bitsandbytes`, or `pip install panda-train[gpu]`; or `optimizer: adamw`",
    ),
    Refusal(
        "bit_training with an optimizer that is not AdamW",
        lambda run: run.bit_training and _optimizer(run) not in ("adamw", "adamw8bit", "paged_adamw8bit"),
        "it means AdamW with 8-bit state, and no other optimizer has such state",
        "`optimizer: adamw`, or leave it out; `zero_stage: 1` partitions the optimizer state over GPUs",
    ),
    Refusal(
        "precision: fp16 with zero_stage: 0",
        lambda run: run.precision == "fp16" and run.zero_stage == 0,
        "DeepSpeed without ZeRO sums the gradients of micro batches in fp16, where they over- and underflow",
        "leave `zero_stage` out: it is then 1, which sums in fp32 and on one GPU is otherwise the same",
    ),
    Refusal(
        f"{WHOLE} with offload_optimizer on NVMe",
        lambda run: _in_file(run, *_OFFLOAD, "device") == "nvme",
        "DeepSpeed keeps most of a parameter on the disk, and gives the optimizer a piece of it at a time",
        '`offload_optimizer: {"device": "cpu"}`, or `optimizer: adamw`',
        of_needs=_WHOLE,
    ),
    Refusal(
        f"{WHOLE} with offload_optimizer.ratio below 1",
        lambda run: _in_file(run, *_OFFLOAD, "ratio") not in (None, 1),
        "DeepSpeed updates the part that stays on the GPU with its own AdamW",
        "leave `ratio` out",
        of_needs=_WHOLE,
    ),
    Refusal(
        f"{WHOLE} with ZenFlow or SuperOffload",
        lambda run: bool(_in_file(run, "zero_optimization", "zenflow") or _in_file(run, *_OFFLOAD, "super_offload")),
        "they update with DeepSpeed's own CPU Adam, a part of the weights at a time",
        'plain `offload_optimizer: {"device": "cpu"}`, or `optimizer: adamw`',
        of_needs=_WHOLE,
    ),
    Refusal(
        "offload_optimizer.ratio below 1 with adamw or another optimizer of panda's",
        lambda run: _in_file(run, *_OFFLOAD, "ratio") not in (None, 1),
        "DeepSpeed then takes only an optimizer of its own, DeepSpeedCPUAdam",
        "leave `ratio` out",
        of_needs=frozenset(NEEDS) - _WHOLE,
        of_own_optimizers=True,
    ),
    Refusal(
        "the plugins ema or freeze with offload_optimizer on NVMe",
        lambda run: _in_file(run, *_OFFLOAD, "device") == "nvme",
        "they read and set the master weights, most of which DeepSpeed keeps on the disk",
        '`offload_optimizer: {"device": "cpu"}`, or leave the plugin out',
        of_plugins=frozenset({"ema", "freeze"}),
    ),
    Refusal(
        "compile with zero_stage: 3 and offload_param on NVMe",
        lambda run: run.compiled and run.zero_stage == 3 and _in_file(run, *_WEIGHTS, "device") == "nvme",
        "compiled layers are gathered whole, and DeepSpeed reads a few weights at a time from the disk",
        '`offload_param: {"device": "cpu"}`, or leave `compile` out, which is then false',
    ),
    Refusal(
        "deterministic with compile",
        lambda run: run.deterministic and run.compiled,
        "torch's compiler chooses kernels by how fast they are, and two starts may choose others",
        "leave `compile` out, which is then false",
    ),
    Refusal(
        "tensor_parallel_size with zero_stage: 3",
        lambda run: run.tensor_parallel_size > 1 and run.zero_stage == 3,
        "both partition the weights, and a checkpoint of the two together cannot be read back whole",
        "`zero_stage: 2`, or `zero_stage: 3` without `tensor_parallel_size`",
    ),
    Refusal(
        "tensor_parallel_size with use_lora or use_quant",
        lambda run: run.tensor_parallel_size > 1 and (run.use_lora or run.use_quant),
        "adapters and quantisation work on whole layers",
        "leave `tensor_parallel_size` out: `zero_stage: 3` partitions the base",
    ),
    Refusal(
        "tensor_parallel_size with zero_stage: 0 in 16 bits",
        lambda run: run.tensor_parallel_size > 1 and run.zero_stage == 0 and run.precision != "fp32",
        "without ZeRO DeepSpeed clips by the gradient norm of one rank's part only",
        "leave `zero_stage` out: it is then 1",
    ),
)


def refuse(resolved: Resolved) -> None:
    """Raise UserError for the combinations in ``resolved`` that cannot work."""
    found = [_said(resolved, refusal) for refusal in REFUSALS if refusal.refuses(resolved)]
    if found:
        raise UserError("\n".join(found))


def refuse_layout(resolved: Resolved, task: type) -> None:
    """Raise UserError if ``task``, the class of the task that a factory made, does not support the ``batching``."""
    for refusal in REFUSALS:
        if refusal.of_task is not _any_task and refusal.applies(resolved.core) and refusal.of_task(task):
            raise UserError(_said(resolved, refusal))


def refuse_undeclared(resolved: Resolved) -> None:
    """Raise UserError if the optimizer, which has ``bind`` and declares no ``needs``, is in such a combination."""
    chosen = resolved.components["optimizer"]
    if chosen.component.needs == "nothing":
        declared = replace(chosen, component=replace(chosen.component, needs="norms"))
        refuse(replace(resolved, components={**resolved.components, "optimizer": declared}))


def _said(resolved: Resolved, refusal: Refusal) -> str:
    component = resolved.components["optimizer"].component
    what = refusal.what.replace(WHOLE, f"optimizer: {component.name}, which needs {NEEDS[component.needs]},")
    return f"{_origins(resolved, what)}{what}: refused, since {refusal.reason}. Instead: {refusal.instead}."


def _origins(resolved: Resolved, what: str) -> str:
    """The places in files of the keys that ``what`` names, before a message; keys given as flags need none."""
    patterns = re.findall(r"[\w*]+", what)  # `lora_*` names several
    settings = (setting for key, setting in resolved.settings.items() if any(fnmatch(key, p) for p in patterns))
    places = dict.fromkeys(setting.origin for setting in settings if ":" in setting.origin)
    return f"{', '.join(places)}: " if places else ""
