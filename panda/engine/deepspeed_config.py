"""DeepSpeed's configuration, derived from panda's keys."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING
from typing import Any

from panda.registry import UserError
from panda.registry.errors import did_you_mean
from panda.registry.location import resolve_path

if TYPE_CHECKING:
    from panda.run_options import RunOptions

# DeepSpeed allocates this many elements up front for ZeRO-3, and its default is 500 million.
CPU_BUCKET_ELEMENTS = 1_000_000


def deepspeed_config(options: RunOptions, *, world_size: int, on_gpu: bool) -> dict[str, Any]:
    """The dictionary that ``deepspeed.initialize`` is given and that the run directory records.

    ``options.deepspeed_config`` names a JSON file of keys to add. Raises UserError for a key in it
    that panda owns, and where ``world_size`` processes cannot hold whole copies of the model.
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
        # Always written: DeepSpeed's default was 0 until 0.19.3 and is 1.0 since.
        "gradient_clipping": options.max_grad_norm,
        "bf16": {"enabled": options.precision == "bf16"},
        "fp16": {"enabled": options.precision == "fp16"},
        "zero_optimization": zero,
        # Whether an optimizer is right under ZeRO is settled by panda's own tests and refusals.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": None,
    }
    if options.precision != "fp32" and options.zero > 0:
        # Sums of many micro batches in 16 bits lose the small ones.
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    if options.deepspeed_config is not None:
        _add(config, _load(options.deepspeed_config), options.deepspeed_config)
    return config


_OWNERS = {
    "train_micro_batch_size_per_gpu": "per_gpu_train_batch_size",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "managed_gradient_accumulation": "gradient_accumulation_steps",
    "train_batch_size": "per_gpu_train_batch_size and gradient_accumulation_steps",
    "gradient_clipping": "max_grad_norm",
    "bf16": "precision",
    "bfloat16": "precision",
    "amp": "precision",
    "torch_autocast": "precision",
    "fp16": "precision",
    "data_types": "precision",
    "zero_optimization.stage": "zero_stage",
    "optimizer": "optimizer",
    "scheduler": "lr_scheduler",
    "zero_allow_untested_optimizer": "optimizer",
    "zero_force_ds_cpu_optimizer": "optimizer",
}
"""Keys of DeepSpeed's that follow from one of panda's."""

_LOSS = "it would change the loss, which panda divides by the supervised tokens of all ranks"
_RANKS = "panda's ranks are data-parallel, and tensor-parallel by `tensor_parallel_size`"
_BATCHES = "panda makes the batches, so it would do nothing"
_REFUSED = {
    "gradient_allreduce_op": _LOSS,
    "prescale_gradients": _LOSS,
    "gradient_predivide_factor": _LOSS,
    "sequence_parallel_size": _RANKS,
    "tensor_parallel": _RANKS,
    "pipeline": _RANKS,
    "expert_parallel": _RANKS,
    "use_data_before_expert_parallelism": _RANKS,
    "curriculum_learning": _BATCHES,
    "data_efficiency": _BATCHES,
    "dataloader_drop_last": _BATCHES,
}
"""Keys of DeepSpeed's that cannot be had, and why."""

_TAKEN = [
    "activation_checkpointing",
    "aio",
    "autotuning",
    "checkpoint",
    "comet",
    "comms_logger",
    "communication_data_type",
    "compile",
    "compression_training",
    "csv_monitor",
    "datastates_ckpt",
    "disable_allgather",
    "disable_python_gc",
    "dump_state",
    "eigenvalue",
    "elasticity",
    "flops_profiler",
    "graph_harvesting",
    "hybrid_engine",
    "log_level",
    "memory_breakdown",
    "nebula",
    "progressive_layer_drop",
    "quantize_training",
    "seq_parallel_communication_data_type",
    "sparse_attention",
    "sparse_gradients",
    "steps_per_print",
    "tensorboard",
    "timers",
    "vocabulary_size",
    "wall_clock_breakdown",
    "wandb",
    "weight_quantization",
    "zero_optimization",
]
"""The other keys at the top that DeepSpeed 0.19 reads. It does not look at what it does not know."""


def _load(file: str) -> dict[str, Any]:
    try:
        loaded = json.loads(resolve_path(file).read_text(encoding="utf-8"))
    except OSError as problem:
        raise UserError(f"deepspeed_config: {file}: {problem.strerror}.") from None
    except ValueError as problem:
        raise UserError(f"deepspeed_config: {file}: not valid JSON: {problem}.") from None
    if not isinstance(loaded, dict):
        raise UserError(f"deepspeed_config: {file}: expected a JSON object.")
    return loaded


def _add(config: dict[str, Any], extra: dict[str, Any], file: str, prefix: str = "") -> None:
    for key, value in extra.items():
        path = prefix + key
        if path in _OWNERS:
            raise UserError(
                f"deepspeed_config: {file} sets {path!r}, which panda derives from `{_OWNERS[path]}`."
                f" Take it out of {file} and set `{_OWNERS[path]}`."
            )
        if path in _REFUSED:
            raise UserError(f"deepspeed_config: {file} sets {path!r}: refused, since {_REFUSED[path]}. Take it out.")
        if not prefix and key not in _TAKEN:
            raise UserError(
                f"deepspeed_config: {file}: DeepSpeed has no key {key!r}.{did_you_mean(key, [*_TAKEN, *_OWNERS])}"
            )
        if isinstance(config.get(key), dict):
            if not isinstance(value, dict):
                raise UserError(f"deepspeed_config: {file}: {path!r} is {value!r}; expected an object, {{...}}.")
            _add(config[key], value, file, f"{path}.")
        else:
            config[key] = value
