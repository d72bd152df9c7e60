"""The options of every run, whatever it chose. Components add their own (``panda show KIND NAME``)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated
from typing import Any
from typing import Literal

from panda.registry import Location
from panda.registry import Meta
from panda.registry import UserError

DEFAULT_PLUGINS = ("progress", "metrics", "tensorboard", "plot")
"""Lifecycle plugins of panda's own that every run has; ``-p no:NAME`` leaves one out."""

ACCEPTED_SPELLINGS = {"conf_path": "config", "learing_rate": "learning_rate"}
"""Keys from PandaLLM's documentation that mean another; they are taken with a warning."""

RENAMED = {
    "lr": "write `learning_rate`.",
    "batch_size": "write `per_gpu_train_batch_size`.",
    "micro_batch_size": "write `per_gpu_train_batch_size`.",
    "per_device_train_batch_size": "write `per_gpu_train_batch_size`.",
    "per_device_eval_batch_size": "write `per_gpu_eval_batch_size`.",
    "train_micro_batch_size_per_gpu": "write `per_gpu_train_batch_size`; panda derives DeepSpeed's configuration.",
    "lr_scheduler_type": "write `lr_scheduler`.",
    "warmup_ratio": "write `warmup_proportion`.",
    "adam_beta1": "write `adam_betas: 0.9, 0.99`.",
    "adam_beta2": "write `adam_betas: 0.9, 0.99`.",
    "num_epochs": "write `num_train_epochs`.",
    "epochs": "write `num_train_epochs`.",
    "max_length": "write `max_seq_length`.",
    "cutoff_len": "write `max_seq_length`.",
    "gradient_clipping": "write `max_grad_norm`.",
    "packing": "write `batching: packed`.",
    "sample_packing": "write `batching: packed`.",
    "group_by_length": "write `batching: grouped`.",
    "bf16": "write `precision: bf16`.",
    "fp16": "write `precision: fp16`.",
    "deepspeed": "write `zero_stage`, or `deepspeed_config: FILE` for keys that panda does not own.",
    "resume_from_checkpoint": "write `resume`.",
    "model_name_or_path": "write `ckpt_path` for weights and `arch` for the shape.",
    "dataloader_num_workers": "write `num_workers`.",
    "use_nvlamb": "write `optimizer: nvlamb`.",
    "dev_file": "write `eval_data_dir`.",
    "eval_dataset": "write `eval_data_dir`.",
    "do_eval": "write `eval_data_dir`: where there is data to evaluate on, it is evaluated on.",
    "evaluate_during_training": "write `eval_steps`, with `eval_data_dir`.",
    "eval_strategy": "write `eval_steps`, with `eval_data_dir`.",
    "evaluation_strategy": "write `eval_steps`, with `eval_data_dir`.",
}
"""Keys of other programs and older documents, and what panda calls them. Refused: a value may not mean the same."""

IMPLIED: dict[str, tuple[dict[str, Any], str]] = {
    "use_quant": (
        {"use_lora": True, "precision": "bf16"},
        "quantised weights cannot be trained, adapters on them can, and are computed with in bf16",
    ),
}
"""Defaults that a switch changes, with the reason. What was given stays as it was given."""

LORA_KEYS = ("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "use_dora", "use_rslora")
"""What adapters are like, where `use_lora` asks for them."""


@dataclass(frozen=True)
class RunOptions:
    """Options of every run."""

    # -- what to train, by name
    task: str = "instruct"
    """What is learned; `panda list tasks`."""
    arch: str | None = None
    """Architecture: a model and its sizes by one name; `panda list archs`."""
    model: str | None = None
    """Model with options of your own instead of an arch's; also takes an arch's name, as PandaLLM's does."""
    optimizer: str = "AdamW"
    """How weights follow gradients, in any case; `panda list optimizers`."""
    lr_scheduler: str = "warmup"
    """Course of the learning rate; `panda list lr_schedulers`."""
    reader: str = "json"
    """How data files become rows; `panda list readers`."""
    plugins: tuple[str, ...] = ()
    """Lifecycle plugins to add; panda's own are on, and `no:NAME` (or the flag `-p no:NAME`) leaves one out."""

    # -- where things are
    output_dir: Annotated[str, Location()] | None = None
    """The run directory. By default `runs/RUN_NAME`, with a number behind it where that exists."""
    run_name: str | None = None
    """Name of the run; by default TASK-ARCH."""
    resume: str | None = None
    """`auto` continues from the newest complete checkpoint, if there is one; a path, from that checkpoint or run."""
    tokenizer: Annotated[str, Location(on_hub=True)] = "panda:data/sample/tokenizer"
    """A Hugging Face tokenizer: a folder, or a name on the hub. `panda:` begins a path inside the panda package; the
    default reads bytes."""
    ckpt_path: Annotated[str, Location(on_hub=True)] | None = None
    """Weights to start from: a folder, one in `./pretrained-models`, or a name on the Hugging Face hub."""
    base_path: Annotated[str, Location(on_hub=True)] | None = None
    """Where ckpt_path is a delta: the weights that it is added to, found in the same way."""
    allow_pickle: bool = False
    """Load weights from pickles (`.bin`, `.pth`) too, with torch's `weights_only`; a pickle can hold code."""
    extend_vocab: bool = False
    """Where the tokenizer has more entries than the checkpoint, add rows, each the mean of those that are there."""

    token_cache: Annotated[str, Location()] | None = None
    """Folder in which tokenised data is kept for the next run; by default `$PANDA_CACHE`, or `~/.cache/panda`."""

    # -- batches and length of the run
    per_gpu_train_batch_size: Annotated[int, Meta(ge=1)] = 1
    """Micro batch: rows that one GPU (or process) handles at once."""
    per_gpu_eval_batch_size: Annotated[int, Meta(ge=1)] = 2
    """Rows that one GPU handles at once where nothing is trained: in evaluation, and for the answers at the end."""
    gradient_accumulation_steps: Annotated[int, Meta(ge=1)] = 64
    """Micro batches of one optimizer step on each GPU."""
    batching: Literal["padded", "grouped", "packed"] = "padded"
    """Rows of a step: `padded`, a sample each; `grouped`, like lengths together; `packed`, several samples a row."""
    num_train_epochs: Annotated[float, Meta(gt=0)] = 1.0
    """Passes over the data."""
    max_steps: Annotated[int, Meta(ge=-1)] = -1
    """Exactly this many optimizer steps, whatever num_train_epochs says; -1 for no such limit."""
    max_seq_length: Annotated[int, Meta(ge=2)] = 2048
    """Tokens of a sample at most."""
    num_workers: Annotated[int, Meta(ge=0)] = 2
    """Processes that prepare batches; 0 prepares them in the training process."""
    prefetch_factor: Annotated[int, Meta(ge=1)] = 2
    """Optimizer steps whose batches each worker prepares ahead."""

    # -- evaluation
    eval_data_dir: Annotated[str, Location()] | None = None
    """Folder or file of data that is not trained on, read as the task's own is: its loss is in `metrics.jsonl`."""
    eval_steps: Annotated[int, Meta(ge=0)] = 0
    """Optimizer steps between evaluations; 0 for one at the end alone."""

    # -- optimization
    learning_rate: Annotated[float, Meta(gt=0)] = 1e-3
    """Peak learning rate. The default suits small models and adapters; full training of a large one wants less."""
    weight_decay: Annotated[float, Meta(ge=0)] = 0.0
    """Decoupled weight decay, applied to all parameters unless weight_decay_on says otherwise."""
    weight_decay_on: Literal["all", "matrices"] = "all"
    """What weight_decay is applied to: all parameters, or matrices alone: not norms, biases and embeddings."""
    lr_multipliers: tuple[str, ...] = ()
    """`PATTERN=FACTOR`, each: scales the learning rate of parameters by name, `*embed*=0.1`. The first match counts."""
    max_grad_norm: Annotated[float, Meta(ge=0)] = 0.3
    """Global gradient norm above which gradients are scaled down to it; 0 for no clipping."""
    bit_training: bool = False
    """AdamW with 8-bit state, as `optimizer: adamw8bit`: what PandaLLM's documentation calls quantization-aware
    training, which it is not."""
    seed: Annotated[int, Meta(ge=0, lt=2**32)] = 42
    """Seed of weights, data order and dropout."""

    # -- numbers and memory
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Arithmetic of forward and backward; master weights are fp32 in each."""
    zero_stage: Annotated[int, Meta(ge=0, le=3)] | None = None
    """DeepSpeed ZeRO: what is spread over GPUs. 1 optimizer state, 2 and gradients, 3 and weights. By default 0 in
    fp32, and 1 in 16 bits, where only ZeRO sums the gradients of micro batches in fp32."""
    tensor_parallel_size: Annotated[int, Meta(ge=1)] = 1
    """Neighbouring GPUs that hold one copy of the model together, each a part of every large matrix. It divides the
    number of processes; data parallelism is what is left of it."""
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    """What backward computes again instead of keeping. full: each layer, from its input. selective: what is cheap in
    it; attention and large matrix products are kept. Slower and smaller, and nothing else changes."""
    compile: bool = False
    """Compile each layer with torch: faster after some minutes at the start. Draws other dropout than without."""
    deepspeed_config: Annotated[str, Location()] | None = None
    """JSON file of DeepSpeed keys that panda does not own, for what has no key here."""

    # -- adapters on a frozen base
    use_lora: bool = False
    """Train low-rank adapters (LoRA) and leave the weights as they are."""
    lora_r: Annotated[int, Meta(ge=1)] = 64
    """Rank of the adapters."""
    lora_alpha: Annotated[float, Meta(gt=0)] = 16.0
    """Scale of the adapters, over their rank."""
    lora_dropout: Annotated[float, Meta(ge=0, lt=1)] = 0.05
    """Dropout on the adapters' input."""
    lora_target_modules: tuple[str, ...] = ()
    """Names of the layers to adapt, `q_proj, v_proj`; by default all linear layers but the output head."""
    use_dora: bool = False
    """Adapt the direction of weights and learn their magnitude beside it (DoRA, arXiv 2402.09353)."""
    use_rslora: bool = False
    """Scale by lora_alpha over the root of the rank (rsLoRA, arXiv 2312.03732), for high ranks."""

    use_quant: bool = False
    """Keep the base in few bits under adapters (QLoRA): 4-bit NormalFloat with quantised scales. Implies use_lora."""
    quant_bits: Literal[4, 8] = 4
    """Bits of a weight of the base: 4, or 8 (LLM.int8), which is nearer to the base and twice as large."""

    # -- what is written
    logging_steps: Annotated[int, Meta(ge=1)] = 1
    """Optimizer steps between log records."""
    save_steps: Annotated[int, Meta(ge=0)] = 0
    """Optimizer steps between checkpoints; 0 for one at the end alone."""
    save_total_limit: Annotated[int, Meta(ge=1)] | None = None
    """Checkpoints to keep; older ones are removed once a newer one is complete. By default all."""
    prompts: tuple[str, ...] = ()
    """Prompts that the trained model answers at the end; by default two from the data."""

    def __post_init__(self) -> None:
        rate_multipliers(self.lr_multipliers)
        if self.run_name is not None and (self.run_name in ("", ".", "..") or "/" in self.run_name):
            raise UserError(f"run_name: {self.run_name!r} is not a name of one folder. A path goes into `output_dir`.")

    @property
    def zero(self) -> int:
        """The ZeRO stage of the run."""
        if self.zero_stage is None:
            return 0 if self.precision == "fp32" else 1
        return self.zero_stage

    @property
    def dtype_name(self) -> str:
        """The type of weights in the forward pass, as torch names it: `float32`, `bfloat16` or `float16`."""
        return {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}[self.precision]


def rate_multipliers(written: tuple[str, ...]) -> dict[str, float]:
    """Factors by pattern, as ``lr_multipliers`` has them. Raises UserError for what is none."""
    multipliers = {}
    for text in written:
        pattern, _, factor = text.rpartition("=")
        try:
            multipliers[pattern] = float(factor)
        except ValueError:
            multipliers[pattern] = math.nan
        if not pattern or not 0 < multipliers[pattern] < math.inf:
            raise UserError(
                f"lr_multipliers: {text!r} is not PATTERN=FACTOR with a factor above 0: `*embed*=0.1`."
                " To leave weights as they are, freeze them in the model."
            )
    return multipliers


def resolve_path(text: str) -> Path:
    """The path that an option means: ``panda:`` begins one inside the installed panda package."""
    if text.startswith("panda:"):
        import panda

        return Path(panda.__file__).parent / text.removeprefix("panda:")
    return Path(text).expanduser()
