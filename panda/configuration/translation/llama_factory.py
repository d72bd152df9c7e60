"""LLaMA-Factory's keys: its arguments of data, model and fine-tuning, beside TrainingArguments."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from panda.configuration.translation import trainer
from panda.configuration.translation.rules import ALL_LOSS
from panda.configuration.translation.rules import DISPLAY
from panda.configuration.translation.rules import FROM_ADAPTER
from panda.configuration.translation.rules import KEPT_DATA
from panda.configuration.translation.rules import LORA_MORE
from panda.configuration.translation.rules import OTHER_LOSS
from panda.configuration.translation.rules import OTHER_TRAINING
from panda.configuration.translation.rules import PROCESSES
from panda.configuration.translation.rules import REMOTE_CODE
from panda.configuration.translation.rules import SPEED
from panda.configuration.translation.rules import TOKENS
from panda.configuration.translation.rules import VALIDATION_SHARE
from panda.configuration.translation.rules import Absent
from panda.configuration.translation.rules import Ignored
from panda.configuration.translation.rules import Part
from panda.configuration.translation.rules import Rule
from panda.configuration.translation.rules import Sets
from panda.configuration.translation.rules import Theirs
from panda.configuration.translation.rules import To
from panda.configuration.translation.rules import Tool
from panda.configuration.translation.rules import Translation
from panda.configuration.translation.rules import each
from panda.configuration.translation.rules import on_hub
from panda.configuration.translation.rules import read_validation_share
from panda.registry import UserError

_OTHER_MODEL = Absent("panda trains models of text that transformers loads")

_MIX = "`task: mix` weighs one instruct and one pretrain data set"

KEYS: dict[str, Rule] = {
    "stage": Part("write `task`: `instruct` for sft, `pretrain` for pt."),
    "finetuning_type": Part("write `use_lora` for adapters; without it all weights are trained."),
    "model_name_or_path": To("ckpt_path"),
    "model_revision": Sets({"main": {}}, "name a folder with that revision as `ckpt_path`"),
    "adapter_name_or_path": FROM_ADAPTER,
    **each(
        "dataset dataset_dir", Part("write `instruction_tuning_data_dir`, or `pretraining_data_dir`: a file or folder.")
    ),
    "eval_dataset": Part("write `eval_data_dir`."),
    "template": Part("write `template: chat` for the tokenizer's own chat template."),
    "cutoff_len": To("max_seq_length"),
    "max_samples": Part("write `max_samples`."),
    "val_size": VALIDATION_SHARE,
    **each("packing neat_packing", Part("write `batching: packed`.")),
    "train_on_prompt": ALL_LOSS,
    "mask_history": Absent("in panda every answer carries loss; `weight: 0` in a turn leaves one out"),
    "default_system": Absent("write the system prompt into the rows: `system`, or a turn"),
    "tool_format": Ignored("the tokenizer's chat template writes tools"),
    **each("enable_thinking preserve_thinking", Ignored("the tokenizer's chat template writes reasoning")),
    "mix_strategy": Sets({"concat": {}}, _MIX),
    "interleave_probs": Absent(_MIX),
    "lora_rank": To("lora_r"),
    "lora_alpha": To("lora_alpha"),
    "lora_dropout": To("lora_dropout"),
    "lora_target": Part("write `lora_target_modules: q_proj, v_proj`; left out, all linear layers are adapted."),
    "additional_target": LORA_MORE,
    "use_rslora": To("use_rslora"),
    "use_dora": To("use_dora"),
    **each(
        "pissa_* loraplus_*", Absent("panda begins adapters as LoRA does, with one learning rate (`lr_multipliers`)")
    ),
    "create_new_adapter": FROM_ADAPTER,
    "quantization_bit": Sets(
        {4: {"use_quant": True, "quant_bits": 4}, 8: {"use_quant": True, "quant_bits": 8}}, "`quant_bits` is 4 or 8"
    ),
    "quantization_method": Sets({"bnb": {}, "bitsandbytes": {}}, "panda quantises with bitsandbytes"),
    "quantization_type": Sets({"nf4": {}}, "panda's 4 bits are NF4"),
    "double_quantization": Sets({True: {}}, "panda quantises the scales too"),
    "quantization_device_map": PROCESSES,
    "disable_gradient_checkpointing": Part("leave it out, or write `activation_checkpointing: full` for the opposite."),
    "pure_bf16": Sets(
        {True: {"precision": "bf16"}}, "write `precision`", {True: "master weights are fp32 in panda, not bf16."}
    ),
    "resize_vocab": Sets({True: {"extend_vocab": True}}, "`extend_vocab` is true or false"),
    **each("add_tokens add_special_tokens new_special_tokens_config init_special_tokens", TOKENS),
    "rope_scaling": Absent("panda takes positions from the checkpoint's config.json: change `rope_scaling` there"),
    "train_from_scratch": Absent("`arch` in place of `model` and `ckpt_path` begins with random weights"),
    **each("freeze_vision_tower freeze_multi_modal_projector freeze_language_model", Ignored("it is about images")),
    **each(
        "image_* video_* audio_* media_dir use_audio_in_video crop_to_patches", Ignored("it is about images and sound")
    ),
    **each("mixture_of_depths shift_attn use_unsloth use_kt kt_*", _OTHER_MODEL),
    **each(
        "use_galore galore_* use_apollo apollo_* use_badam badam_* use_adam_mini use_muon use_llama_pro freeze_* oft_*"
        " module_dropout",
        OTHER_TRAINING,
    ),
    **each("fp8 fp8_*", Absent("panda computes in fp32, bf16 or fp16")),
    **each("use_dft_loss use_asft_loss asft_alpha use_eaft_loss eaft_* moe_aux_loss_coef", OTHER_LOSS),
    **each("early_stopping_steps", Absent("panda trains to the end; a lifecycle plugin can stop a run")),
    "streaming": Ignored("memory does not grow with the size of the data"),
    "trust_remote_code": REMOTE_CODE,
    **each("overwrite_cache tokenized_path cache_dir data_shared_file_system", KEPT_DATA),
    **each("preprocessing_* buffer_size use_fast_tokenizer split_special_tokens ignore_pad_token_for_loss", PROCESSES),
    **each("use_v1_kernels upcast_* use_unsloth_gc use_kv_cache", SPEED),
    **each("compute_accuracy print_param_status eval_on_each_dataset eval_num_beams disable_shuffling", DISPLAY),
    **each("infer_* vllm_* sglang_* export_* offload_folder *_hub_token", Ignored("it is not about training")),
}

DEFAULTS: dict[str, Any] = {
    "stage": "sft",
    "finetuning_type": "lora",
    "cutoff_len": 2048,
    "lora_rank": 8,
    "lora_dropout": 0.0,
    "lora_target": "all",
}

_OTHER_STAGES = "panda learns from documents (pt) and from answers (sft), not from preferences or rewards"
_PLAIN = ("empty", "default", "alpaca", "vanilla", "fewshot")


def read(theirs: Theirs, found: Translation) -> None:
    """Task, data, template and adapters. Raises UserError for what panda does not train."""
    stage, kind = theirs("stage"), theirs("finetuning_type")
    if stage not in ("sft", "pt"):
        raise UserError(f"stage: {stage}: {_OTHER_STAGES}. `panda list tasks` names the tasks.")
    if kind not in ("lora", "full"):
        raise UserError(f"finetuning_type: {kind}: panda trains all weights (full) or LoRA adapters (lora).")
    found.set("task", "instruct" if stage == "sft" else "pretrain", f"{theirs.because('stage')}: {stage}")
    found.set("model", "hf", "any model that transformers loads")
    if kind == "lora":
        found.set("use_lora", True, theirs.because("finetuning_type"))
        _read_adapters(theirs, found)
    if not theirs("disable_gradient_checkpointing"):
        found.set("activation_checkpointing", "full", theirs.because("disable_gradient_checkpointing"))
    _read_data(theirs, found, stage)


def _read_adapters(theirs: Theirs, found: Translation) -> None:
    if "lora_alpha" not in theirs.given:
        found.set("lora_alpha", 2 * int(theirs("lora_rank")), "LLaMA-Factory's default of lora_alpha: twice the rank")
    target = theirs("lora_target")
    names = target.split(",") if isinstance(target, str) else target
    if names != ["all"]:  # panda's default is all linear layers but the output head, as theirs
        found.set("lora_target_modules", [str(name).strip() for name in names], theirs.because("lora_target"))


def _read_data(theirs: Theirs, found: Translation, stage: str) -> None:
    data = "instruction_tuning_data_dir" if stage == "sft" else "pretraining_data_dir"
    for key, ours in (("dataset", data), ("eval_dataset", "eval_data_dir")):
        written = theirs(key)
        names = [name.strip() for name in written.split(",")] if isinstance(written, str) else written or []
        files = [_file_of(name, Path(theirs("dataset_dir") or "data")) for name in names]
        if files:
            found.set_data(ours, files, f"{key}: {', '.join(names)}")
    read_validation_share("val_size", theirs, found)
    most, several = theirs("max_samples"), isinstance(found.value(data), list)
    if most and several:
        found.lost[f"max_samples: {most}"] = "panda takes the first samples of all files together: write how many"
    elif most:
        found.set("max_samples", most, "max_samples")
    template = theirs("template")
    if stage == "sft" and template in _PLAIN:
        found.lost[f"template: {template}"] = (
            "panda's `template: plain` writes turns one after another, with `separator`"
        )
    elif stage == "sft":
        found.set("template", "chat", f"{theirs.because('template')}: the tokenizer's own chat template")
        if template:
            found.different.append(
                f"template: {template} is text of LLaMA-Factory's; panda uses the chat template of the tokenizer, as"
                " inference does. A base model without one needs a tokenizer that has it."
            )
    packing = theirs("neat_packing") or theirs("packing") or (stage == "pt" and theirs("packing") is None)
    if packing:
        found.set("batching", "packed", theirs.because("neat_packing" if theirs("neat_packing") else "packing"))
        if stage == "sft" and not theirs("neat_packing"):
            found.different.append("packing: packed samples do not see each other in panda, as with neat_packing.")


def _file_of(name: str, folder: Path) -> str:
    """Where the data set ``name`` is by ``folder``/dataset_info.json, a file or a name on the hub; else its name."""
    try:
        listed = json.loads((folder / "dataset_info.json").read_text(encoding="utf-8"))[name]
        if "hf_hub_url" in listed:
            return on_hub(str(listed["hf_hub_url"]), listed, "subset")[0]
        return str(folder / str(listed["file_name"]))
    except (OSError, ValueError, KeyError, TypeError):
        return name


TOOL = Tool(
    "LLaMA-Factory",
    trainer.KEYS | KEYS,
    trainer.DEFAULTS | DEFAULTS,
    frozenset(
        {
            "stage",
            "finetuning_type",
            "cutoff_len",
            "lora_rank",
            "lora_target",
            "dataset",
            "dataset_dir",
            "val_size",
            "template",
            "quantization_bit",
            "neat_packing",
            "max_samples",
            "preprocessing_num_workers",
        }
    ),
    read,
)
