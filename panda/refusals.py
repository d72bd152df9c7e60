"""Combinations that cannot work, as data: each with its reason and what to use instead.

Asked before anything is imported or built, by ``panda-train`` and ``panda check`` alike, and
printed in docs/refusals.md.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from dataclasses import fields
from importlib.util import find_spec

from panda.registry import UserError
from panda.registry.resolve import Resolved
from panda.run_options import LORA_KEYS
from panda.run_options import RunOptions


@dataclass(frozen=True)
class Refusal:
    """One combination that panda refuses."""

    what: str
    """The combination, as it is written."""
    applies: Callable[[RunOptions], bool]
    reason: str
    instead: str


_DEFAULTS = {field.name: field.default for field in fields(RunOptions)}

REFUSALS: tuple[Refusal, ...] = (
    Refusal(
        "max_steps: 0",
        lambda run: run.max_steps == 0,
        "a run without steps trains nothing",
        "`max_steps: -1` for no limit, or a number of steps",
    ),
    Refusal(
        "ckpt_path",
        lambda run: run.ckpt_path is not None,
        "loading pretrained weights is not in this version of panda",
        "leave it out: the model starts from random weights",
    ),
    Refusal(
        "lora_*, use_dora or use_rslora without use_lora",
        lambda run: not run.use_lora and any(getattr(run, key) != _DEFAULTS[key] for key in LORA_KEYS),
        "they say how adapters are, and without `use_lora` there are none",
        "`use_lora`, or leave them out",
    ),
    Refusal(
        "use_quant with use_lora: false",
        lambda run: run.use_quant and not run.use_lora,
        "quantised weights cannot be trained, and there would be nothing else",
        "leave `use_lora` out, which `use_quant` implies, or `use_quant`",
    ),
    Refusal(
        "use_quant without bitsandbytes",
        lambda run: run.use_quant and find_spec("bitsandbytes") is None,
        "it is bitsandbytes that quantises, and that is not installed",
        "`pip install bitsandbytes`, or install panda with it, `panda-train[gpu]`; it has CPU kernels too",
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
        "bitsandbytes holds on to each whole 8-bit weight, so that ZeRO-3 would spread nothing",
        "4 bits, or `zero_stage: 2`",
    ),
    Refusal(
        "bit_training",
        lambda run: run.bit_training,
        "8-bit optimizer state is not in this version of panda",
        "leave it out; `zero_stage: 1` spreads the optimizer state over GPUs",
    ),
    Refusal(
        "precision: fp16 with zero_stage: 0",
        lambda run: run.precision == "fp16" and run.zero_stage == 0,
        "DeepSpeed without ZeRO sums the gradients of micro batches in fp16, where they over- and underflow",
        "leave `zero_stage` out: it is 1 then, which is the same on one GPU and sums in fp32",
    ),
    Refusal(
        "compile with zero_stage: 3",
        lambda run: run.compile and run.zero_stage == 3,
        "ZeRO-3 gathers weights in hooks around every module, and a compiled layer is one piece without them",
        "`zero_stage: 2`, or leave `compile` out",
    ),
)


def refuse(resolved: Resolved) -> None:
    """Raise UserError for what of ``resolved`` cannot work."""
    found = [
        f"{_origins(resolved, refusal)}{refusal.what}: refused, since {refusal.reason}. Instead: {refusal.instead}."
        for refusal in REFUSALS
        if refusal.applies(resolved.core)
    ]
    if found:
        raise UserError("\n".join(found))


def _origins(resolved: Resolved, refusal: Refusal) -> str:
    """Where in a file the keys that ``refusal`` names were written; of flags it says enough itself."""
    settings = (resolved.settings[word] for word in re.findall(r"\w+", refusal.what) if word in resolved.settings)
    places = dict.fromkeys(setting.origin for setting in settings if ":" in setting.origin)
    return f"{', '.join(places)}: " if places else ""
