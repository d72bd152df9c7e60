"""Keys of transformers' TrainingArguments (5.x and 4.x), which LLaMA-Factory and TRL share and axolotl resembles."""

from __future__ import annotations

from typing import Any

from panda.configuration.translation.rules import DISPLAY
from panda.configuration.translation.rules import HUB_UPLOAD
from panda.configuration.translation.rules import NOTHING_HELD_OUT
from panda.configuration.translation.rules import PROCESSES
from panda.configuration.translation.rules import SERVICES
from panda.configuration.translation.rules import SPEED
from panda.configuration.translation.rules import Absent
from panda.configuration.translation.rules import Ignored
from panda.configuration.translation.rules import Part
from panda.configuration.translation.rules import Rule
from panda.configuration.translation.rules import Sets
from panda.configuration.translation.rules import Theirs
from panda.configuration.translation.rules import To
from panda.configuration.translation.rules import Translation
from panda.configuration.translation.rules import each
from panda.configuration.translation.rules import number
from panda.configuration.translation.rules import read_names
from panda.configuration.translation.rules import whole
from panda.configuration.translation.sharding import read_sharding

_OPTIMIZERS = {
    "adamw": "adamw_torch adamw_torch_fused adamw_hf adamw_apex_fused adamw_torch_npu_fused adamw_torch_xla adamw"
    " adamw_anyprecision paged_adamw paged_adamw_32bit",
    "adamw8bit": "adamw_8bit adamw_bnb_8bit adamw_torch_8bit",
    "paged_adamw8bit": "paged_adamw_8bit",
}
OPTIMIZERS = Sets(
    {theirs: {"optimizer": ours} for ours, names in _OPTIMIZERS.items() for theirs in names.split()},
    "panda has AdamW, NVLAMB and 8-bit AdamW (`panda list optimizers`), and packages add others; left as it is, the run"
    " uses AdamW, for which another learning rate may be right",
    {
        "paged_adamw": "the state of `optimizer: adamw` is not paged; `paged_adamw8bit` is, in 8 bits.",
        "paged_adamw_32bit": "the state of `optimizer: adamw` is not paged; `paged_adamw8bit` is, in 8 bits.",
        "adamw_torch_8bit": "the 8-bit state is bitsandbytes', not torchao's.",
    },
)
_SCHEDULES = {
    "linear": "linear",
    "cosine": "cosine",
    "cosine_with_min_lr": "cosine",
    "constant": "constant",
    "constant_with_warmup": "constant",
    "polynomial": "poly",
    "warmup_stable_decay": "wsd",
}
SCHEDULES = Sets(
    {theirs: {"lr_scheduler": ours} for theirs, ours in _SCHEDULES.items()},
    "`panda list lr_schedulers` names panda's schedules, and packages add others; left as it is, the rate stays at its"
    " peak after the warm-up",
)
BF16 = Sets({True: {"precision": "bf16"}, "auto": {"precision": "bf16"}}, "write `precision`")
FP16 = Sets({True: {"precision": "fp16"}}, "write `precision`")
RECOMPUTE = Sets(
    {True: {"activation_checkpointing": "full"}} | {"offload": {"activation_checkpointing": "full"}},
    "`activation_checkpointing` takes none, selective and full",
    {"offload": "activations are computed again in backward, and not moved to host memory."},
)
MICRO_BATCH = To("per_gpu_train_batch_size")

KEYS: dict[str, Rule] = {
    "output_dir": To("output_dir"),
    "per_device_train_batch_size": MICRO_BATCH,
    "per_device_eval_batch_size": To("per_gpu_eval_batch_size"),
    "gradient_accumulation_steps": To("gradient_accumulation_steps"),
    "num_train_epochs": To("num_train_epochs"),
    "max_steps": To("max_steps"),
    "learning_rate": To("learning_rate"),
    "lr_scheduler_type": SCHEDULES,
    "lr_scheduler_kwargs": Part("write the keys of the schedule, such as `min_lr_ratio` and `power`."),
    "lr_scheduler_kwargs.*": Part("write the keys of the schedule, such as `min_lr_ratio` and `power`."),
    "warmup_steps": Part("write `warmup_steps`, or `warmup_proportion` for a share of all steps."),
    "warmup_ratio": Part("write `warmup_proportion`."),
    "optim": OPTIMIZERS,
    **each("adam_beta1 adam_beta2", Part("write `adam_betas: 0.9, 0.99`.")),
    "adam_epsilon": To("adam_epsilon"),
    "weight_decay": Part("write `weight_decay`."),
    "max_grad_norm": To("max_grad_norm"),
    "seed": To("seed"),
    "bf16": BF16,
    "fp16": FP16,
    **each(
        "gradient_checkpointing activation_checkpointing fsdp_config.activation_checkpointing"
        " fsdp_config.fsdp_activation_checkpointing",
        RECOMPUTE,
    ),
    "group_by_length": Sets({True: {"batching": "grouped"}}, "`batching` takes padded, grouped and packed"),
    "train_sampling_strategy": Sets(
        {"random": {}, "group_by_length": {"batching": "grouped"}}, "panda's order of samples is random"
    ),
    "torch_compile": Sets({True: {"compile": True}, "auto": {}}, "`compile` is true, false or auto"),
    "dataloader_num_workers": To("num_workers"),
    "dataloader_prefetch_factor": Ignored("panda's workers prepare whole steps; `prefetch_factor` says how many"),
    "logging_steps": Part("write `logging_steps`, a number of optimizer steps."),
    **each("save_steps save_strategy", Part("write `save_steps`, a number of optimizer steps.")),
    "save_total_limit": To("save_total_limit"),
    **each(
        "eval_steps eval_strategy evaluation_strategy do_eval",
        Part("write `eval_steps`, with `eval_fraction` or `eval_data_dir`."),
    ),
    "resume_from_checkpoint": Part("write `resume: auto`, or `resume: PATH` for a checkpoint of panda's."),
    **each(
        "deepspeed deepspeed.*", Part("write `zero_stage`, or `deepspeed_config: FILE` for keys panda does not own.")
    ),
    **each("fsdp fsdp_config fsdp_config.* fsdp_version", Part("write `zero_stage: 3`, which shards as FSDP does.")),
    "report_to": Part(
        "leave it out: panda writes metrics.jsonl and tensorboard/; a lifecycle plugin can send them on."
    ),
    **each(
        "run_name project trackio_* wandb_* wandb_project wandb_name wandb_entity swanlab_* mlflow_* comet_* log_with"
        " use_swanlab use_otel_metrics otel_*",
        SERVICES,
    ),
    **each("push_to_hub hub_model_id hub_strategy hub_* push_to_*", HUB_UPLOAD),
    **each("neftune_noise_alpha", Absent("panda adds no noise to embeddings")),
    "label_smoothing_factor": Absent("write `label_smoothing`"),
    **each("optim_args optim_target_modules", Absent("write the optimizer's own keys (`panda show optimizer NAME`)")),
    **each(
        "load_best_model_at_end",
        Absent("panda exports the weights of the last step; `plugins: [best_checkpoint]` keeps the best ones, too"),
    ),
    **each("auto_find_batch_size", Absent("panda refuses a model that does not fit, and changes no batch size")),
    **each("full_determinism", Ignored("runs of panda repeat to the bit on the same machine")),
    "do_predict": Absent("`panda generate RUN` answers prompts after training"),
    "predict_with_generate": Absent("`plugins: [eval_generate]` has evaluation data answered, and scores the answers"),
    **each(
        "tf32 use_liger_kernel enable_liger_kernel liger_* torch_compile_* attn_implementation flash_attn"
        " use_flash_attention_2 use_flash_attn"
        " *_attention use_kernels dataloader_pin_memory dataloader_persistent_workers torch_empty_cache_steps"
        " dataloader_in_order dataloader_multiprocessing_context liger_kernel_config",
        SPEED,
    ),
    **each(
        "gradient_checkpointing_kwargs gradient_checkpointing_kwargs.* activation_checkpointing_kwargs use_reentrant_gc"
        " use_reentrant",
        Ignored("it is about how activations are computed again; the result is the same"),
    ),
    "quantization_config.load_in_4bit": Sets(
        {True: {"use_quant": True, "quant_bits": 4}}, "`use_quant` is true or false"
    ),
    "quantization_config.load_in_8bit": Sets(
        {True: {"use_quant": True, "quant_bits": 8}}, "`use_quant` is true or false"
    ),
    "quantization_config.quant_method": Sets({"bitsandbytes": {}}, "panda quantises with bitsandbytes"),
    **each("bnb_4bit_quant_type quantization_config.bnb_4bit_quant_type", Sets({"nf4": {}}, "panda's 4 bits are NF4")),
    **each(
        "bnb_4bit_use_double_quant use_bnb_nested_quant bnb_4bit_quant_storage bnb_4bit_compute_dtype"
        " quantization_config.bnb_4bit_*",
        Ignored("panda's 4 bits have quantised scales, and compute in `precision`"),
    ),
    "data_seed": Ignored("`seed` decides the order of samples, too"),
    **each("average_tokens_across_devices", Ignored("panda divides by the tokens of all ranks, always")),
    **each("overwrite_output_dir", Ignored("panda overwrites no run")),
    **each(
        "save_only_model save_safetensors save_on_each_node save_first_step", Ignored("a checkpoint of panda is whole")
    ),
    **each("do_train", Ignored("`panda-train` trains")),
    **each(
        "logging_* log_* disable_tqdm plot_loss include_* skip_memory_metrics prediction_loss_only"
        " metric_for_best_model greater_is_better label_names batch_eval_metrics length_column_name debug eval_delay"
        " eval_on_start eval_do_concat_batches eval_use_gather_object eval_accumulation_steps *_full_eval"
        " restore_callback_states_from_checkpoint enable_jit_checkpoint jit_mode_eval",
        DISPLAY,
    ),
    **each(
        "ddp_* ddp local_rank no_cuda use_cpu use_ipex fp16_backend fp16_opt_level half_precision_backend"
        " accelerator_config accelerator_config.* dataset_num_proc *num_proc remove_unused_columns"
        " dataloader_drop_last ignore_data_skip past_index parallelism_config ray_* use_cache low_cpu_mem_usage"
        " mp_parameters tpu_* use_mps_device use_legacy_prediction_loop",
        PROCESSES,
    ),
}
"""TrainingArguments. What tools add to them is in their own tables."""

DEFAULTS: dict[str, Any] = {
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "num_train_epochs": 3,
    "learning_rate": 5e-5,
    "lr_scheduler_type": "linear",
    "warmup_steps": 0,
    "adam_beta1": 0.9,
    "adam_beta2": 0.999,
    "adam_epsilon": 1e-8,
    "max_grad_norm": 1.0,
    "save_steps": 500,
}
"""TrainingArguments' defaults, where panda's are others."""

OWN = frozenset({"per_device_train_batch_size", "lr_scheduler_type", "optim", "logging_strategy", "save_strategy"})


def combine(theirs: Theirs, found: Translation) -> None:
    """Translate what depends on several keys and is the same for every tool. The last step."""
    _warm_up(theirs, found)
    _optimizer(theirs, found)
    _steps_between(theirs, found)
    read_sharding(theirs, found)
    _resume(theirs, found)
    services = [name for name in read_names("report_to", theirs) if name != "tensorboard"]
    if services and services != ["none"]:
        found.lost[f"report_to: {', '.join(services)}"] = SERVICES.reason
    if not found.value("use_lora") and not found.value("use_quant"):
        unused = [key for key in found.lines if key.startswith("lora_") or key in ("use_dora", "use_rslora")]
        found.drop_all(unused, "adapters are off")
    elif found.value("use_quant") and not found.value("use_lora"):
        found.set("use_lora", True, found.lines["use_quant"].because)
    if found.value("batching") == "packed":
        found.different.append(
            f"{theirs.tool} counts packed rows, panda samples: a step of per_gpu_train_batch_size x"
            " gradient_accumulation_steps x ranks samples is shorter than as many full rows. `panda data` says how many"
            " samples a row holds: multiply `gradient_accumulation_steps` by that for steps of as many tokens."
        )


def _warm_up(theirs: Theirs, found: Translation) -> None:
    steps, ratio = number(theirs.given.get("warmup_steps")), number(theirs("warmup_ratio"))
    if steps is not None and "warmup_ratio" not in theirs.given:
        ratio = None  # a ratio by default gives way
    key = next((key for key in ("lr_scheduler_type", "lr_scheduler") if theirs(key)), "")
    if theirs(key) == "constant":  # theirs has no warm-up
        found.set("warmup_steps", 0, f"{key}: constant, without warm-up")
    elif steps and steps < 1:
        found.set("warmup_proportion", steps, "warmup_steps")
    elif steps or not ratio:
        found.set("warmup_steps", whole(steps or 0), theirs.because("warmup_steps"))
    else:
        found.set("warmup_proportion", ratio, theirs.because("warmup_ratio"))
    rate = number(theirs("learning_rate"))
    for key in [key for key in theirs.given if key.startswith("lr_scheduler_kwargs.")]:
        value, name = number(theirs(key)), key.partition(".")[2]
        if name == "min_lr_rate" and value is not None:
            found.set("min_lr_ratio", value, key)
        elif name == "min_lr" and value is not None and rate:
            found.set("min_lr_ratio", value / rate, f"{key} / learning_rate")
        elif name == "power" and value is not None:
            found.set("power", value, key)
        elif name == "lr_end" and value is not None:
            found.set("lr_end", value, key)
        else:
            found.lost[f"{key}: {theirs(key)}"] = "`panda show lr_scheduler NAME` lists what a schedule takes"


def _optimizer(theirs: Theirs, found: Translation) -> None:
    betas = [theirs("adam_beta1"), theirs("adam_beta2")]
    if None not in betas:
        given = [key for key in ("adam_beta1", "adam_beta2") if key in theirs.given]
        found.set("adam_betas", betas, " and ".join(given) or theirs.because("adam_beta1 and adam_beta2"))
    decay = number(theirs("weight_decay"))
    if decay:
        found.set("weight_decay", decay, theirs.because("weight_decay"))
        found.set("weight_decay_on", "matrices", "weight_decay: norms and biases are left out")
        if not found.value("use_lora"):
            found.different.append(
                f"weight_decay: {theirs.tool} decays embeddings too, panda's `weight_decay_on: matrices` does not."
            )


def _steps_between(theirs: Theirs, found: Translation) -> None:
    """How often a run logs, saves and evaluates."""
    of_epoch = (
        "panda counts optimizer steps, and saves and evaluates at the end in any case; `panda check` says the steps"
    )
    if (every := number(theirs("logging_steps"))) and every >= 1:
        found.set("logging_steps", whole(every), theirs.because("logging_steps"))
    elif every:
        found.lost[f"logging_steps: {every}"] = "panda counts optimizer steps"
    for what, data in (("save", True), ("eval", found.evaluates)):
        strategy = theirs(f"{what}_strategy") or (theirs("evaluation_strategy") if what == "eval" else None)
        every = number(theirs(f"{what}_steps")) if strategy not in ("no", "epoch", "best", False) else None
        if strategy in ("epoch", "best") and not data:
            found.lost[f"{what}_strategy: {strategy}"] = NOTHING_HELD_OUT
        elif strategy in ("epoch", "best"):
            found.lost[f"{what}_strategy: {strategy}"] = f"{of_epoch}: set `{what}_steps`"
        elif every and every < 1:
            found.lost[f"{what}_steps: {every}"] = f"{of_epoch}: set `{what}_steps`"
        elif every and data:
            found.set(f"{what}_steps", whole(every), theirs.because(f"{what}_steps"))
        elif every and f"{what}_steps" in theirs.given:
            found.lost[f"{what}_steps: {whole(every)}"] = NOTHING_HELD_OUT


def _resume(theirs: Theirs, found: Translation) -> None:
    resume = theirs("resume_from_checkpoint")
    if resume is True or str(resume).lower() in ("true", "auto"):
        found.set("resume", "auto", "resume_from_checkpoint")
    elif resume:
        found.lost[f"resume_from_checkpoint: {resume}"] = (
            "a checkpoint of another tool cannot be continued; start from its weights with `ckpt_path`"
        )


def read_training_arguments(theirs: Theirs, found: Translation) -> None:
    """A file of TrainingArguments names neither model nor data: its script does."""
    found.lost["model and data"] = "TrainingArguments name neither: set `ckpt_path` and `instruction_tuning_data_dir`"
    found.set("task", "instruct", "panda's default")
    found.set("model", "hf", "any model that transformers loads")
