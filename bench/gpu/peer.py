"""The peer: Hugging Face's Trainer on the same checkpoint, samples, batch and precision, in a process of its own.

    python -m bench.gpu.peer '{"model": FOLDER, "samples": FILE, "rows": 4, ...}'

Precision is bf16 as its users have it: all weights trained, fp32 weights under autocast, or bf16 weights with fp32
master weights under DeepSpeed, which then accumulates gradients in its default type; with adapters, a frozen base in
bf16. Its AdamW is torch's fused one. The bench starts it; the keys are the fields of Spec.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass
from dataclasses import field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset
from transformers import AutoModelForCausalLM
from transformers import BitsAndBytesConfig
from transformers import LlamaConfig
from transformers import Trainer
from transformers import TrainerCallback
from transformers import TrainingArguments

from bench.gpu.cases import SHAPES
from bench.gpu.marks import Marks

IGNORED = -100


@dataclass(frozen=True)
class Spec:
    """What the peer trains."""

    samples: str
    output: str
    rows: int
    accumulation: int
    steps: int
    learning_rate: float
    max_grad_norm: float
    model: str | None = None
    """The folder of a checkpoint; else random weights of ``shape``."""
    shape: str | None = None
    grouped: bool = False
    """Samples of similar length together, as its `group_by_length`."""
    lora_r: int | None = None
    lora_alpha: float = 16.0
    quantised: bool = False
    """NF4 with quantised scales."""
    checkpointing: bool = False
    zero_stage: int | None = None
    """Of DeepSpeed; None: without it."""
    ends: bool = True
    """Save the model at the end, as panda does."""
    more: dict[str, Any] = field(default_factory=dict)
    """More of TrainingArguments."""


class Samples(Dataset[dict[str, Any]]):
    """The samples of the bench, in the order of panda's steps."""

    def __init__(self, file: str) -> None:
        arrays = np.load(file)
        self.ids, self.supervised, self.ends = arrays["ids"], arrays["supervised"], arrays["ends"]

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> dict[str, Any]:
        where = slice(self.ends[index - 1] if index else 0, self.ends[index])
        ids = torch.from_numpy(self.ids[where].astype(np.int64))
        return {"input_ids": ids, "labels": ids.masked_fill(~torch.from_numpy(self.supervised[where]), IGNORED)}


def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """A batch padded to its longest sample, and its counts as plain numbers."""
    pad = torch.nn.utils.rnn.pad_sequence
    ids = pad([sample["input_ids"] for sample in samples], batch_first=True)
    labels = pad([sample["labels"] for sample in samples], batch_first=True, padding_value=IGNORED)
    lengths = torch.tensor([len(sample["input_ids"]) for sample in samples])
    mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
    supervised = int((labels != IGNORED).sum())
    counts = {"slots": ids.numel(), "tokens": int(lengths.sum()), "supervised": supervised}
    return {"input_ids": ids, "labels": labels, "attention_mask": mask, "counts": counts}


class Marking(TrainerCallback):
    """Marks steps, and the parts that can be marked only once training has begun."""

    def __init__(self, marks: Marks) -> None:
        self.marks = marks

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        trainer = given["model"].bench_trainer
        self.marks.begin_forward_with(given["model"])
        if trainer.is_deepspeed_enabled:
            self.marks.wrap(trainer.deepspeed, "backward", "backward")
            self.marks.wrap(trainer.deepspeed, "step", "optimizer")
        else:
            self.marks.wrap(trainer.accelerator, "backward", "backward")
            self.marks.wrap(trainer.accelerator, "clip_grad_norm_", "optimizer")
            self.marks.wrap(given["optimizer"], "step", "optimizer")

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.marks.step_end(state.global_step, last=state.global_step == state.max_steps)


class Counting(Trainer):
    """The Trainer, which gives the counts of its batches to the marks."""

    marks: Marks

    def training_step(self, model: Any, inputs: dict[str, Any], *more: Any, **named: Any) -> torch.Tensor:
        self.marks.count(**inputs.pop("counts"))
        loss: torch.Tensor = super().training_step(model, inputs, *more, **named)
        return loss


def build(spec: Spec, device: torch.device) -> Any:
    """The model, with adapters if it has any."""
    plain = spec.zero_stage is None
    dtype = torch.float32 if spec.lora_r is None and plain else torch.bfloat16
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    if spec.model is None:
        model = _drawn(spec, nf4, device)
    else:
        more: dict[str, Any] = {"quantization_config": nf4} if spec.quantised else {}
        more |= {"device_map": {"": device}} if spec.zero_stage != 3 else {}  # ZeRO-3 loads parts by itself
        model = AutoModelForCausalLM.from_pretrained(spec.model, dtype=dtype, **more)
    model.config.use_cache = False
    if spec.lora_r is not None:
        from peft import LoraConfig
        from peft import get_peft_model

        chosen = LoraConfig(r=spec.lora_r, lora_alpha=spec.lora_alpha, lora_dropout=0.0, target_modules="all-linear")
        if spec.checkpointing:
            model.enable_input_require_grads()
        model = get_peft_model(model, chosen)
    return model


def _drawn(spec: Spec, nf4: BitsAndBytesConfig, device: torch.device) -> Any:
    """A model of random weights, each linear layer drawn on the device and quantised there before the next one."""
    import bitsandbytes

    config = LlamaConfig(**SHAPES[str(spec.shape)].config())
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    # By name: a list of the layers would keep the large ones alive after they are replaced.
    for name in [name for name, _ in model.named_modules()]:
        layer = model.get_submodule(name)
        for key, weight in list(layer.named_parameters(recurse=False)):
            drawn = torch.empty(weight.shape, dtype=torch.bfloat16, device=device)
            drawn = drawn.fill_(1.0) if "norm" in name else drawn.normal_(std=0.02)
            setattr(layer, key, torch.nn.Parameter(drawn, requires_grad=not spec.quantised))
        if spec.quantised and isinstance(layer, torch.nn.Linear) and name != "lm_head":
            small = bitsandbytes.nn.Linear4bit(
                layer.in_features, layer.out_features, False, torch.bfloat16, True, "nf4", device="meta"
            )
            small.weight = bitsandbytes.nn.Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4")
            model.set_submodule(name, small.to(device))
    rotary = model.model.rotary_emb
    for name, buffer in type(rotary)(config).named_buffers():
        setattr(rotary, name, buffer.to(device))
    model.is_loaded_in_4bit = spec.quantised  # peft chooses its layers by it
    return model


def training_arguments(spec: Spec, on_gpu: bool) -> TrainingArguments:
    deepspeed = {
        "bf16": {"enabled": True},
        # Without it, save_model writes the states of the optimizer, too.
        "zero_optimization": {"stage": spec.zero_stage, "stage3_gather_16bit_weights_on_model_save": True},
        "gradient_clipping": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "zero_allow_untested_optimizer": True,
    }
    given: dict[str, Any] = {
        "output_dir": spec.output,
        "per_device_train_batch_size": spec.rows,
        "gradient_accumulation_steps": spec.accumulation,
        "max_steps": spec.steps,
        "learning_rate": spec.learning_rate,
        "max_grad_norm": spec.max_grad_norm,
        "bf16": True,
        "use_cpu": not on_gpu,
        "optim": "adamw_torch_fused" if on_gpu else "adamw_torch",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "train_sampling_strategy": "group_by_length" if spec.grouped else "sequential",
        "dataloader_num_workers": 2,
        "remove_unused_columns": False,
        "gradient_checkpointing": spec.checkpointing,
        "deepspeed": None if spec.zero_stage is None else deepspeed,
        "seed": 42,
    }
    return TrainingArguments(**given | spec.more)


def main() -> None:
    spec = Spec(**json.loads(sys.argv[1]))
    on_gpu = torch.cuda.is_available()
    arguments = training_arguments(spec, on_gpu)  # first: it joins the processes, and ZeRO-3 loads weights in parts
    model = build(spec, arguments.device)
    folder = Path(spec.output)
    marks = Marks(folder, arguments.process_index, on_gpu=on_gpu)
    trainer = Counting(
        model=model,
        args=arguments,
        train_dataset=Samples(spec.samples),
        data_collator=collate,
        callbacks=[Marking(marks)],
    )
    trainer.marks = marks
    object.__setattr__(model, "bench_trainer", trainer)  # not as a submodule
    marks.wrap(trainer, "get_batch_samples", "data", on_host=True)
    trainer.train()
    if trainer.is_world_process_zero():
        losses = [record["loss"] for record in trainer.state.log_history if "loss" in record]
        (folder / "losses.json").write_text(json.dumps(losses))
    if spec.ends:
        trainer.save_model(str(folder / "model"))
    marks.end()
    print(f"ended at {time.time():.1f}")


if __name__ == "__main__":
    main()
