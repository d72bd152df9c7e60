"""DeepSpeed's configuration, derived from panda's keys."""

from __future__ import annotations

import json
import operator
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING
from typing import Any

from panda.configuration.deepspeed_file import place_of
from panda.configuration.deepspeed_file import read_deepspeed_file
from panda.registry import UserError
from panda.registry.errors import did_you_mean

if TYPE_CHECKING:
    from panda.configuration.options import RunOptions

# DeepSpeed 0.19.8 allocates buckets up front for ZeRO-3, and its default is 500 million elements. Can go when it
# allocates no more than the model needs.
CPU_BUCKET_ELEMENTS = 1_000_000

LARGEST_LAYER = 1_000_000_000
"""Weights of the largest layer that ZeRO-3 gathers whole. A larger one, as of many experts, is gathered by modules."""
NEAR = 3
"""Layers that ZeRO-3 has gathered at a time: one computes, the next is fetched, and one counts until it is released."""
SMALLEST_BUCKET = 1 << 24
"""Elements of gradients that are reduced in one message, where there are so many."""


def deepspeed_config(options: RunOptions, *, world_size: int, on_gpu: bool) -> dict[str, Any]:
    """The dictionary that ``deepspeed.initialize`` is given and that the run directory records.

    ``options.deepspeed_config`` names a JSON file of keys to add. Raises UserError for a key in it that
    panda owns or that DeepSpeed would refuse or not read, and where ``world_size`` processes cannot hold
    whole copies of the model. Imports neither torch nor DeepSpeed.
    """
    copies, left = divmod(world_size, options.tensor_parallel_size)
    if left:
        raise UserError(
            f"tensor_parallel_size: {options.tensor_parallel_size} processes hold a copy of the model together, and"
            f" there are {world_size}. Start a multiple (`torchrun --nproc_per_node`),"
            f" or give a size that divides {world_size}."
        )
    zero: dict[str, Any] = {"stage": options.zero}
    if options.zero and not on_gpu:
        zero |= {"reduce_bucket_size": CPU_BUCKET_ELEMENTS, "allgather_bucket_size": CPU_BUCKET_ELEMENTS}
    if options.zero == 3 and not on_gpu:
        zero |= {"stage3_prefetch_bucket_size": CPU_BUCKET_ELEMENTS}
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": options.per_gpu_train_batch_size,
        "gradient_accumulation_steps": options.gradient_accumulation_steps,
        "train_batch_size": options.per_gpu_train_batch_size * options.gradient_accumulation_steps * copies,
        # Always written: DeepSpeed's default was 0 before 0.19.3, and is 1.0 since.
        "gradient_clipping": options.max_grad_norm,
        # Adds each gradient to the fp32 sum, and frees it, in the backward pass. By default DeepSpeed (0.19.8) keeps
        # those of the whole model in bf16 as well: 13 GB at 7B.
        "bf16": {"enabled": options.precision == "bf16", "immediate_grad_update": options.precision == "bf16"},
        "fp16": {"enabled": options.precision == "fp16"},
        "zero_optimization": zero,
        # DeepSpeed 0.19.8 knows optimizers under ZeRO by their class. panda's own tests and refusals decide instead.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": None,
    }
    if options.precision != "fp32" and sums_in_fp32(options):
        # Sums of many micro batches in 16 bits lose the small ones.
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    extra = read_deepspeed_file(options)
    _check(extra, options)
    _merge(config, extra)
    return config


def sums_in_fp32(options: RunOptions) -> bool:
    """Whether DeepSpeed sums gradients in fp32. Those of a single micro batch need no sum, and stay in 16 bits.

    Not with stage 1, which DeepSpeed (0.19.8) would give to another optimizer, nor without ZeRO, which sums in 16 bits.
    """
    return options.zero == 1 or (options.zero > 1 and options.gradient_accumulation_steps > 1)


def zero_3_sizes(elements: int, trained: int, layer: int, outside: int) -> dict[str, int]:
    """DeepSpeed's sizes for a model, in elements: all, those that are trained, of the largest layer, outside of layers.

    The next layer is fetched while one computes, and the last one stays for the backward pass. DeepSpeed's own defaults
    are the same for each model: 50 million fetched ahead, which is a quarter of a layer at 7B, and up to a thousand
    million kept. They apply where there are no layers, or one is too large to be gathered whole.
    """
    if not 0 < layer <= LARGEST_LAYER:
        return {}
    return {
        "stage3_prefetch_bucket_size": layer,
        "stage3_max_live_parameters": live_parameters(layer, outside),
        "stage3_max_reuse_distance": outside + layer,
        # The trained weights of a layer: adapters are few.
        "reduce_bucket_size": min(trained, max(layer * trained // elements, SMALLEST_BUCKET)),
    }


def live_parameters(layer: int, outside: int, staying: int = 0) -> int:
    """The `stage3_max_live_parameters` with which ``staying`` layers stay gathered through a step.

    The head stays for the whole forward pass, hence ``outside``, the weights outside of layers, and ``NEAR`` layers are
    there in any case. To DeepSpeed the size only says when to fetch no further ahead.
    """
    return outside + (NEAR + staying) * layer


def layers_staying(live: int, layer: int, outside: int) -> int:
    """How many layers stay gathered through a step where the weights of ``live`` elements may be gathered at a time.

    A twentieth of a layer may be missing: an estimate does not know all of a model, such as parts that a task adds.
    """
    return max(0, int((live - live_parameters(layer, outside)) / layer + 0.05)) if layer else 0


OWNERS = {
    "train_micro_batch_size_per_gpu": "per_gpu_train_batch_size",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "managed_gradient_accumulation": "gradient_accumulation_steps",
    "train_batch_size": "per_gpu_train_batch_size` and `gradient_accumulation_steps",
    "gradient_clipping": "max_grad_norm",
    "bf16": "precision",
    "bfloat16": "precision",
    "torch_autocast": "precision",
    "fp16": "precision",
    "data_types": "precision",
    "zero_optimization.stage": "zero_stage",
    "optimizer": "optimizer",
    "scheduler": "lr_scheduler",
    "zero_allow_untested_optimizer": "optimizer",
    "zero_force_ds_cpu_optimizer": "optimizer",
}
"""Keys of DeepSpeed that follow from one of panda's."""

_LOSS = "it would change the loss, which panda divides by the supervised tokens of all ranks"
_RANKS = "panda's ranks are data-parallel, and tensor-parallel by `tensor_parallel_size`"
_BATCHES = "panda makes the batches, so it would do nothing"
_WRITER = "panda declares a checkpoint complete when DeepSpeed returns, and this writer may still be writing then"
REFUSED = {
    "gradient_allreduce_op": _LOSS,
    "prescale_gradients": _LOSS,
    "gradient_predivide_factor": _LOSS,
    "sequence_parallel_size": _RANKS,
    "tensor_parallel": _RANKS,
    "pipeline": _RANKS,
    "expert_parallel": _RANKS,
    "use_data_before_expert_parallelism": _RANKS,
    "data_efficiency": _BATCHES,
    "dataloader_drop_last": _BATCHES,
    "activation_checkpointing": (
        "models call torch's checkpointing, not DeepSpeed's, so it would do nothing;"
        " `activation_checkpointing` of panda's own configuration is what recomputes"
    ),
    "autotuning": "DeepSpeed would end the process in the middle of the run to report a measurement",
    "compile": "DeepSpeed compiles only on request, and nothing requests it; `compile` of panda's own does",
    "hybrid_engine": "it alternates training and generation, and panda only trains with DeepSpeed",
    "weight_quantization": "it is for inference; `use_quant` trains adapters on a quantised base",
    "datastates_ckpt": _WRITER,
    "checkpoint.writer": _WRITER,
    "checkpoint.load_universal": (
        "panda resumes from its own checkpoints, on any number of ranks, and writes none in DeepSpeed's universal"
        " format: DeepSpeed would find no weights in them"
    ),
    "checkpoint.use_node_local_storage": "panda reads a checkpoint from one folder that every rank sees",
    "zero_optimization.elastic_checkpoint": (
        "panda's checkpoints continue on any number of ranks without it, and could not be read with it"
    ),
    "zero_optimization.compute_grad_norm": "panda needs the norm of the gradients: it clips by it and logs it",
}
"""Keys that DeepSpeed has and a run of panda cannot use, with the reason."""


@cache
def _known() -> dict[str, Any]:
    """What DeepSpeed's configuration may hold, as deepspeed_keys.py wrote it down: DeepSpeed itself imports torch."""
    keys: dict[str, Any] = json.loads(Path(__file__).with_name("deepspeed_keys.json").read_text(encoding="utf-8"))
    return keys


def _check(extra: dict[str, Any], options: RunOptions) -> None:
    """Raise UserError, with its place, for the first key of ``extra`` that DeepSpeed or panda refuses."""
    try:
        _check_object(extra, _known()["properties"])
        _check_together(extra, options)
    except _RefusedError as problem:
        path, text = problem.args
        place = place_of(options.deepspeed_config or "", path)
        raise UserError(f"deepspeed_config: {place}: {path!r}{text}") from None


class _RefusedError(Exception):
    """The dotted path of a key, and the rest of a sentence that begins with it."""


def _check_object(held: dict[str, Any], properties: dict[str, Any], prefix: str = "") -> None:
    for key, value in held.items():
        path = prefix + key
        if path in OWNERS:
            owner = OWNERS[path]
            raise _RefusedError(path, f" is derived from panda's `{owner}`. Take it out of the file and set `{owner}`.")
        if path in REFUSED:
            raise _RefusedError(path, f": refused, since {REFUSED[path]}. Take it out.")
        if path in _known()["removed"]:
            raise _RefusedError(
                path, f" is no longer in DeepSpeed. Take it out. Its own words: {_known()['removed'][path].strip()}"
            )
        if key not in properties:
            names = [name for name in properties if prefix + name not in REFUSED]
            known = f"DeepSpeed {_known()['version']}"
            where = f"{known} has no such key" + (f" in {prefix[:-1]!r}" if prefix else "")
            raise _RefusedError(path, f": {where}.{did_you_mean(key, names) or ' Take it out.'}")
        schema = properties[key]
        if "renamed" in schema:
            raise _RefusedError(path, f" is an old name, which DeepSpeed will drop. Write `{schema['renamed']}`.")
        _check_value(value, schema, path)


def _check_value(value: Any, schema: dict[str, Any], path: str) -> None:
    types = schema.get("type", [])
    types = [types] if isinstance(types, str) else types
    fits = value in schema["enum"] if "enum" in schema else any(_IS[kind](value) for kind in types) or not types
    if fits and isinstance(value, int | float) and not isinstance(value, bool):
        fits = all(compare(value, schema[bound]) for bound, compare in _BOUNDS.items() if bound in schema)
    if not fits:
        auto = " Only Hugging Face's Trainer fills in 'auto': leave the key out." * (value == "auto")
        raise _RefusedError(path, f" is {json.dumps(value)}; expected {_expected(schema, types)}.{auto}")
    if isinstance(value, dict) and "properties" in schema:
        _check_object(value, schema["properties"], f"{path}.")
    if isinstance(value, list) and "items" in schema:
        for item in value:
            _check_value(item, schema["items"], path)


_IS: dict[str, Callable[[Any], bool]] = {
    "boolean": lambda value: isinstance(value, bool),
    # 5e8 is how DeepSpeed's documentation writes sizes, and a float to JSON.
    "integer": lambda value: isinstance(value, int | float) and not isinstance(value, bool) and value % 1 == 0,
    "number": lambda value: isinstance(value, int | float) and not isinstance(value, bool),
    "string": lambda value: isinstance(value, str),
    "object": lambda value: isinstance(value, dict),
    "array": lambda value: isinstance(value, list),
    "null": lambda value: value is None,
}
_WORDS = {
    "boolean": "true or false",
    "integer": "an integer",
    "number": "a number",
    "string": "a text",
    "object": "an object, {...}",
    "array": "a list, [...]",
    "null": "null",
}
_BOUNDS: dict[str, Callable[[Any, Any], bool]] = {
    "minimum": operator.ge,
    "maximum": operator.le,
    "exclusiveMinimum": operator.gt,
    "exclusiveMaximum": operator.lt,
}
_BOUND_WORDS = {
    "minimum": "at least",
    "maximum": "at most",
    "exclusiveMinimum": "above",
    "exclusiveMaximum": "below",
}


def _expected(schema: dict[str, Any], types: list[str]) -> str:
    if "enum" in schema:
        return " or ".join(json.dumps(value) for value in schema["enum"])
    bounds = [f" {words} {schema[bound]}" for bound, words in _BOUND_WORDS.items() if bound in schema]
    return " or ".join(_WORDS[kind] for kind in types) + " and".join(bounds)


def _check_together(extra: dict[str, Any], options: RunOptions) -> None:
    """What DeepSpeed refuses of keys that are right by themselves."""
    zero = extra.get("zero_optimization", {})
    offload = zero.get("offload_optimizer") or {}
    if options.zero < 3 and offload.get("ratio", 1) < 1:
        raise _RefusedError("zero_optimization.offload_optimizer.ratio", " below 1 needs `zero_stage: 3`.")
    zenflow = zero.get("zenflow") or {}
    strategy = zenflow.get("select_strategy", "auto")
    if strategy not in ("auto", "step", "epoch"):
        path = "zero_optimization.zenflow.select_strategy"
        raise _RefusedError(path, f" is {strategy!r}; expected 'auto', 'step' or 'epoch'.")
    for name in ("select_interval", "update_interval"):
        interval = zenflow.get(name, "auto")
        if interval != "auto" and (isinstance(interval, str) or (name == "update_interval" and interval < 1)):
            path = f"zero_optimization.zenflow.{name}"
            raise _RefusedError(path, f" is {interval!r}; expected 'auto' or a number of steps.")


def _merge(config: dict[str, Any], extra: dict[str, Any]) -> None:
    """Add ``extra`` to ``config``, and sections that both have key by key."""
    for key, value in extra.items():
        if isinstance(value, dict) and isinstance(config.get(key), dict):
            _merge(config[key], value)
        else:
            config[key] = value
