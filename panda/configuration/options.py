"""The options that every run has, whatever components it chose; those add their own (``panda show KIND NAME``)."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Annotated
from typing import Any
from typing import Literal

from panda.files.terminal import number_of
from panda.registry import Location
from panda.registry import Meta
from panda.registry import UserError
from panda.registry.contexts import MAX_ROW_BYTES

DEFAULT_PLUGINS = ("progress", "metrics", "tensorboard", "plot", "guard")
"""Lifecycle plugins of panda's own that every run has; ``-p no:NAME`` leaves one out."""

IMPLIED: dict[str, tuple[dict[str, Any], str]] = {
    "use_quant": (
        {"use_lora": True, "precision": "bf16"},
        "quantised weights cannot be trained, but adapters on them can, computed in bf16",
    ),
    "deterministic": (
        {"compile": False},
        "torch's compiler chooses kernels by how fast they are, and two starts may choose others",
    ),
}
"""Defaults that a switch changes, with the reason. Values that the user gave stay."""

LORA_KEYS = ("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "use_dora", "use_rslora")
"""Keys that configure adapters."""


@dataclass(frozen=True)
class RunOptions:
    """Options of every run."""

    # -- what to train, by name
    task: str = "instruct"
    """What is learned; see `panda list tasks`."""
    arch: str | None = None
    """Architecture: one name for a model and its sizes; see `panda list archs`."""
    model: str | None = None
    """Model, with options of your own instead of an arch's. Also accepts the name of an arch, as PandaLLM does."""
    optimizer: str = "AdamW"
    """Optimizer, in upper or lower case; see `panda list optimizers`."""
    lr_scheduler: str = "warmup"
    """Learning-rate schedule; see `panda list lr_schedulers`."""
    reader: str = "auto"
    """How data files become rows; `auto` goes by the ending of each file's name. See `panda list readers`."""
    plugins: tuple[str, ...] = ()
    """Lifecycle plugins to add. panda's own are on; `no:NAME` (or the flag `-p no:NAME`) leaves one out."""
    user_dir: Annotated[str, Location()] | None = None
    """A folder with Python files that declare components, which then have names as those of packages do. A single file
    needs no folder: `FILE.py:NAME` stands where a name does."""

    # -- where things are
    output_dir: Annotated[str, Location()] | None = None
    """The run directory. By default `runs/RUN_NAME`, with a number appended if that exists."""
    run_name: str | None = None
    """Name of the run, a folder in `runs`; by default TASK-ARCH."""
    resume: str | None = None
    """`auto` continues from the newest whole checkpoint, if there is one; a path, from that checkpoint or run. Where
    nothing else names a model, the configuration is that of the run, changed by what is given besides."""
    if_damaged: Literal["begin", "stop"] = "begin"
    """What `resume: auto` does where the run has checkpoints and all are damaged: `begin` sets them aside and trains
    from the first step again, `stop` is an error."""
    tokenizer: Annotated[str, Location(on_hub=True)] = "panda:data/sample/tokenizer"
    """A Hugging Face tokenizer: a folder, or a name on the hub. A path that begins with `panda:`, or with the name of
    another installed package, is inside that package; the default tokenizer reads bytes."""
    ckpt_path: Annotated[str, Location(on_hub=True)] | None = None
    """Weights to start from: a folder, a folder in `./pretrained-models`, or a name on the Hugging Face hub. The model
    is that of the weights. A run directory stands for its export; adapters are trained on, on their base."""
    base_path: Annotated[str, Location(on_hub=True)] | None = None
    """If ckpt_path is a delta or adapters: the weights that they belong to, found in the same way."""
    allow_pickle: bool = False
    """Also load weights from pickles (`.bin`, `.pth`), with torch's `weights_only`; a pickle can hold code."""
    extend_vocab: bool = False
    """If the tokenizer has more entries than the checkpoint, add rows, each the mean of the existing ones. Under
    `use_lora` rows of new entries are trained too."""

    max_row_bytes: Annotated[int, Meta(ge=1, le=2**40)] = MAX_ROW_BYTES
    """Most bytes of a row of data, unpacked; a larger one is reported and left out before it fills the memory. To
    tokenise a text takes about 140 bytes of memory for each of its bytes."""
    token_cache: Annotated[str, Location()] | None = None
    """Folder in which tokenised data is kept for later runs; by default `$PANDA_CACHE`, or `~/.cache/panda`."""

    # -- batches and length of the run
    per_gpu_train_batch_size: Annotated[int, Meta(ge=1, le=10**6)] = 1
    """Micro batch: rows that one GPU (or process) trains on at once."""
    per_gpu_eval_batch_size: Annotated[int, Meta(ge=1, le=10**6)] = 2
    """Rows that one GPU handles at once in evaluation, and for the answers at the end."""
    gradient_accumulation_steps: Annotated[int, Meta(ge=1, le=10**6)] = 64
    """Micro batches per optimizer step on each GPU."""
    batching: Literal["padded", "grouped", "packed"] = "padded"
    """Rows of a step: `padded`, one sample each; `grouped`, and similar lengths together; `packed`, several samples."""
    num_train_epochs: Annotated[float, Meta(gt=0, le=10**6)] = 1.0
    """Passes over the data."""
    max_steps: Annotated[int, Meta(ge=-1, le=10**9)] = -1
    """Exactly this many optimizer steps, whatever num_train_epochs says; -1 for no limit."""
    max_train_hours: Annotated[float, Meta(gt=0, le=10**6)] | None = None
    """Hours after which a start of the run saves and ends, as it does on SIGTERM, for a queue with a time limit.
    `--resume RUN` goes on, for as many hours again."""
    max_seq_length: Annotated[int, Meta(ge=2, le=10**8)] = 2048
    """Most tokens in a sample."""
    num_workers: Annotated[int, Meta(ge=0, le=1024)] = 2
    """Processes that prepare batches; with 0 the training process does."""
    prefetch_factor: Annotated[int, Meta(ge=1, le=1000)] = 2
    """Optimizer steps for which each worker prepares batches ahead of time."""

    max_samples: Annotated[int, Meta(ge=1, le=10**12)] | None = None
    """Most samples of each data set to train on, its first ones, for a trial. Part of them is held out by
    eval_fraction; eval_data_dir is used whole."""

    # -- evaluation
    eval_data_dir: tuple[Annotated[str, Location(holds_data=True)], ...] | None = None
    """Held-out data, a folder, a file, a pattern, a data set on the hub (`OWNER/NAME:CONFIGURATION:SPLIT`) or a list,
    read as the task reads its own; its loss goes to `metrics.jsonl`."""
    eval_names: tuple[str, ...] = ()
    """A name for each path of eval_data_dir, in their order, to evaluate on several sets: `eval_NAME_loss` is the loss
    over the paths of a name, and `eval_loss` that over all."""
    eval_fraction: Annotated[float, Meta(ge=0, lt=1)] = 0.0
    """Share of the samples to hold out and evaluate on, instead of eval_data_dir; the seed decides which ones."""
    eval_steps: Annotated[int, Meta(ge=0, le=10**9)] = 0
    """Optimizer steps between evaluations; 0 evaluates only at the end."""

    # -- optimization
    learning_rate: Annotated[float, Meta(gt=0, le=1000)] = 1e-3
    """Peak learning rate. The default suits small models and adapters; to train all of a large model, lower it."""
    weight_decay: Annotated[float, Meta(ge=0, le=1000)] = 0.0
    """Decoupled weight decay, applied to all parameters unless weight_decay_on says otherwise."""
    weight_decay_on: Literal["all", "matrices"] = "all"
    """What weight_decay applies to: all parameters, or only matrices (no norms, biases or embeddings)."""
    lr_multipliers: tuple[str, ...] = ()
    """`PATTERN=FACTOR` items: scale the learning rate of parameters by name, `*embed*=0.1`. The first match counts."""
    max_grad_norm: Annotated[float, Meta(ge=0)] = 0.3
    """Gradients with a larger global norm are scaled down to it; 0 for no clipping."""
    bit_training: bool = False
    """AdamW with 8-bit state, as `optimizer: adamw8bit`. PandaLLM's documentation calls this quantization-aware
    training, which it is not."""
    seed: Annotated[int, Meta(ge=0, lt=2**32)] = 42
    """Seed of random weights, data order and dropout."""
    deterministic: bool = False
    """Have the GPU compute so that two runs give the same bits, on the same machine with the same versions; some of it
    takes longer. On a CPU they do anyway. What cannot be computed so ends the run, with its name."""

    # -- numbers and memory
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Precision of forward and backward; master weights are always fp32."""
    zero_stage: Annotated[int, Meta(ge=0, le=3)] | None = None
    """DeepSpeed ZeRO stage: what is partitioned over GPUs. 1: optimizer state; 2: also gradients; 3: also weights. By
    default 0 in fp32 and 1 in 16 bits, where only ZeRO sums the gradients of micro batches in fp32."""
    tensor_parallel_size: Annotated[int, Meta(ge=1, le=2**16)] = 1
    """Neighbouring GPUs that hold one copy of the model together, each a part of every large matrix. Must divide the
    number of processes; the rest is data parallelism."""
    activation_checkpointing: Literal["auto", "none", "selective", "full"] = "auto"
    """What the backward pass recomputes instead of storing. full: each layer, from its input. selective: all but
    attention and large matrix products. Saves memory, costs time, and changes nothing else. `auto` takes the first of
    none, selective and full with which the run is estimated to fit the GPU, once: a resumed run keeps it."""
    compile: Literal["auto", True, False] = "auto"
    """Compile each layer with torch: faster after a slower start. Dropout draws other numbers than without it. `auto`
    does so on a GPU where the run is long enough to earn what that costs, once: a resumed run keeps it."""
    flash_attention_4: bool = False
    """Compute attention of packed rows by FlashAttention 4 (the package flash-attn-4), on a Hopper GPU in bf16."""
    timeout: Annotated[float, Meta(gt=0, le=10**6)] = 30.0
    """Minutes for which ranks wait for others, where they meet and in each exchange, before the run ends with an error.
    Which rank keeps the others waiting, and where it stands, is said within one."""
    deepspeed_config: Annotated[str, Location()] | None = None
    """JSON file of DeepSpeed keys that panda does not set itself."""

    # -- adapters on a frozen base
    use_lora: bool = False
    """Train low-rank adapters (LoRA) and keep the weights frozen."""
    lora_r: Annotated[int, Meta(ge=1, le=2**16)] = 64
    """Rank of the adapters."""
    lora_alpha: Annotated[float, Meta(gt=0, le=10**9)] = 16.0
    """Adapters are scaled by lora_alpha over lora_r."""
    lora_dropout: Annotated[float, Meta(ge=0, lt=1)] = 0.05
    """Dropout on the adapters' input."""
    lora_target_modules: tuple[str, ...] = ()
    """Layers to adapt: ends of names, `q_proj, v_proj`, or regular expressions or patterns, `*.layers.1?.*_proj`. By
    default, and with `all-linear`, all linear layers except the output head."""
    use_dora: bool = False
    """Adapt the direction of weights and learn their magnitude separately (DoRA, arXiv 2402.09353)."""
    use_rslora: bool = False
    """Scale by lora_alpha over the square root of lora_r (rsLoRA, arXiv 2312.03732), for high ranks."""

    use_quant: bool = False
    """Quantise the frozen base under adapters (QLoRA): 4-bit NormalFloat, with quantised scales. Implies use_lora."""
    quant_bits: Literal[4, 8] = 4
    """Bits per weight of the quantised base: 4, or 8 (LLM.int8), which is closer to the original and twice as large."""

    # -- what is written
    logging_steps: Annotated[int, Meta(ge=1, le=10**9)] = 1
    """Optimizer steps between log records."""
    save_steps: Annotated[int, Meta(ge=0, le=10**9)] = 0
    """Optimizer steps between checkpoints; 0 for none by steps."""
    save_minutes: Annotated[float, Meta(ge=0, le=10**6)] = 30.0
    """Minutes of training after which a step ends with a checkpoint, beside those of save_steps; 0 for none by time.
    Such a checkpoint is removed once a newer one is complete."""
    save_final: bool = True
    """Write a checkpoint after the last step too. Without it, and without save_minutes, the disk needs room for the
    export only (of a 7B 13 GB, not 94), and the finished run cannot be trained further."""
    save_total_limit: Annotated[int, Meta(ge=1, le=10**9)] | None = None
    """Number of checkpoints to keep; older ones are removed once a newer one is complete. By default all."""
    prompts: tuple[str, ...] = ()
    """Prompts that the trained model answers at the end; by default two from the data."""

    def __post_init__(self) -> None:
        rate_multipliers(self.lr_multipliers)
        check_names(self.eval_names, self.eval_data_dir or ())
        if self.run_name is not None and (self.run_name in ("", ".", "..") or "/" in self.run_name):
            raise UserError(f"run_name: {self.run_name!r} is not the name of a folder. For a path, use `output_dir`.")

    @property
    def zero(self) -> int:
        """The ZeRO stage of the run."""
        if self.zero_stage is None:
            return 0 if self.precision == "fp32" else 1
        return self.zero_stage

    @property
    def compiled(self) -> bool:
        """Whether layers are compiled: not where `auto` is not decided yet."""
        return self.compile is True

    @property
    def dtype_name(self) -> str:
        """The type of weights in the forward pass, as torch names it: `float32`, `bfloat16` or `float16`."""
        return {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}[self.precision]


ALL_SETS = "all"
"""What `panda eval` calls all evaluation sets together."""


def check_names(names: tuple[str, ...], locations: tuple[str, ...]) -> None:
    """Raise UserError unless ``names`` are those of ``locations``, the paths of `eval_data_dir`, or there are none."""
    for name in names:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name):
            raise UserError(
                f"eval_names: {name!r} cannot be part of the name of a metric. Write letters, digits, `_`, `-` and `.`."
            )
        if name == ALL_SETS:
            raise UserError(f"eval_names: {name!r} is the word for all sets together. Name the set otherwise.")
    if names and len(names) != len(locations):
        paths = number_of(len(locations), "path") + ": ".join(["", ", ".join(locations)] if locations else [""])
        given = number_of(len(names), f"name ({names[0]}) is", f"names ({', '.join(names)}) are")
        raise UserError(
            f"eval_names: {given} given for the {paths} of"
            " `eval_data_dir`. Give each path its name, in their order; paths of one name are one set."
        )


def rate_multipliers(written: tuple[str, ...]) -> dict[str, float]:
    """Factors by pattern, from the items of ``lr_multipliers``. Raises UserError for one that is not PATTERN=FACTOR."""
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
                " To leave weights as they are, add the plugin `freeze`."
            )
    return multipliers
