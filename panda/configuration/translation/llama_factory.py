"""LLaMA-Factory's keys: its arguments of data, model and fine-tuning, beside TrainingArguments."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from panda.configuration.translation import trainer
from panda.configuration.translation.rules import ADAPTER
from panda.configuration.translation.rules import DEFAULT_SYSTEM
from panda.configuration.translation.rules import DISPLAY
from panda.configuration.translation.rules import HUB_PART
from panda.configuration.translation.rules import KEPT_DATA
from panda.configuration.translation.rules import KEPT_ORDER
from panda.configuration.translation.rules import LORA_MORE
from panda.configuration.translation.rules import MESSAGES
from panda.configuration.translation.rules import OFF
from panda.configuration.translation.rules import OTHER_LOSS
from panda.configuration.translation.rules import OTHER_PARALLELISM
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
from panda.configuration.translation.rules import one_of
from panda.configuration.translation.rules import places
from panda.configuration.translation.rules import read_adapter
from panda.configuration.translation.rules import read_count
from panda.configuration.translation.rules import read_item
from panda.configuration.translation.rules import read_names
from panda.configuration.translation.rules import read_validation_share
from panda.registry import UserError

_OTHER_MODEL = Absent("panda trains models of text that transformers loads")

_MIX = "panda passes over whole data sets: `data_weights` says how often over each, and no probabilities"

KEYS: dict[str, Rule] = {
    "stage": Part("write `task`: `instruct` for sft, `pretrain` for pt."),
    "finetuning_type": Part("write `use_lora` for adapters; without it all weights are trained."),
    "model_name_or_path": To("ckpt_path"),
    "model_revision": Sets({"main": {}}, "name a folder with that revision as `ckpt_path`"),
    "adapter_name_or_path": ADAPTER,
    **each(
        "dataset dataset_dir",
        Part("write `instruction_tuning_data_dir`, or `pretraining_data_dir`: a name on the hub, a file or a folder."),
    ),
    "eval_dataset": Part("write `eval_data_dir`."),
    "template": Part("write `template: chat` for the tokenizer's own chat template."),
    "cutoff_len": To("max_seq_length"),
    "max_samples": Part("write `max_samples`."),
    "val_size": VALIDATION_SHARE,
    **each("packing neat_packing", Part("write `batching: packed`.", OFF)),
    "train_on_prompt": To("train_on_prompt"),
    "mask_history": Absent("in panda every answer carries loss; `weight: 0` in a turn leaves one out"),
    "default_system": DEFAULT_SYSTEM,
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
    "create_new_adapter": Part("add the adapter to its base with peft, and name the result with `ckpt_path`."),
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
    **each("mixture_of_depths shift_attn use_kt kt_*", _OTHER_MODEL),
    **each(
        "use_galore galore_* use_apollo apollo_* use_badam badam_* use_adam_mini use_muon use_llama_pro freeze_* oft_*"
        " module_dropout",
        OTHER_TRAINING,
    ),
    **each("fp8 fp8_*", Absent("panda computes in fp32, bf16 or fp16")),
    **each("use_dft_loss use_asft_loss asft_alpha use_eaft_loss eaft_*", OTHER_LOSS),
    "moe_aux_loss_coef": To("router_aux_loss_coef"),
    "disable_shuffling": KEPT_ORDER,
    **each(
        "early_stopping_steps",
        Absent("`plugins: [early_stopping]` with `early_stopping_patience` does it, by evaluations"),
    ),
    "streaming": Ignored("memory does not grow with the size of the data"),
    "trust_remote_code": REMOTE_CODE,
    **each("overwrite_cache tokenized_path cache_dir data_shared_file_system", KEPT_DATA),
    **each("preprocessing_* buffer_size use_fast_tokenizer ignore_pad_token_for_loss", PROCESSES),
    "split_special_tokens": Ignored("content that spells a special token is characters in panda"),
    **each("use_unsloth use_v1_kernels upcast_* use_unsloth_gc use_kv_cache", SPEED),
    **each("compute_accuracy print_param_status eval_num_beams", DISPLAY),
    "eval_on_each_dataset": Absent("`eval_names` gives each path of `eval_data_dir` a name, and a loss of its own"),
    **each(
        "pref_* dpo_* kto_* simpo_gamma ppo_* ref_model* reward_model* ld_alpha",
        Absent("it is of preference training: the package panda-preference has its tasks"),
    ),
    "tensor_model_parallel_size": To("tensor_parallel_size"),
    **each(
        "pipeline_model_parallel_size expert_model_parallel_size context_parallel_size sequence_parallel"
        " virtual_pipeline_model_parallel_size",
        Sets({1: {}}, OTHER_PARALLELISM.reason),
    ),
    **each("use_mca use_megatron_bridge use_hyper_parallel hyper_parallel_*", OTHER_PARALLELISM),
    **each(
        "*_fusion moe_grouped_gemm moe_token_dispatcher_type use_distributed_optimizer overlap_*",
        SPEED,
    ),
    **each("recompute_*", Ignored("activations are computed again in any case")),
    **each("profiler_* enable_torch_profiler profile_modules", DISPLAY),
    **each(
        "do_sample temperature top_p top_k num_beams max_new_tokens repetition_penalty length_penalty"
        " skip_special_tokens",
        Ignored("it is not about training"),
    ),
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

_OTHER_STAGES = (
    "panda learns from documents (pt) and from answers (sft); the package panda-preference has tasks for preferences"
)
_PLAIN = ("empty", "default", "alpaca", "vanilla", "fewshot")


def read(theirs: Theirs, found: Translation) -> None:
    """Task, data, template and adapters. Raises UserError for what panda does not train."""
    if not theirs("dataset") and (keys := _elsewhere(theirs)):
        raise UserError(
            f"{', '.join(keys)}, and no dataset: a file of LLaMA-Factory for chat, evaluation or export, which trains"
            " nothing. `panda chat`, `panda generate` and `panda export` do that; they take folders and flags."
        )
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


def _elsewhere(theirs: Theirs) -> list[str]:
    """The keys of the file that are of LLaMA-Factory's other commands."""
    return [key for key in theirs.given if key in ("do_predict", "do_eval") or key.startswith(("infer_", "export_"))]


def _read_adapters(theirs: Theirs, found: Translation) -> None:
    if "lora_alpha" not in theirs.given:
        found.set(
            "lora_alpha", 2 * read_count("lora_rank", theirs), "LLaMA-Factory's default of lora_alpha: twice the rank"
        )
    names = read_names("lora_target", theirs, commas=True)
    if names != ["all"]:  # panda's default is all linear layers but the output head, as theirs
        found.set("lora_target_modules", names, theirs.because("lora_target"))
    if theirs("create_new_adapter"):
        found.lost["create_new_adapter: true"] = "add the adapter to its base with peft, and name that with `ckpt_path`"
    else:
        read_adapter("adapter_name_or_path", theirs, found)


def _read_data(theirs: Theirs, found: Translation, stage: str) -> None:
    data, rules = (
        ("instruction_tuning_data_dir", _OF_DATA) if stage == "sft" else ("pretraining_data_dir", _OF_DOCUMENTS)
    )
    for key, ours in (("dataset", data), ("eval_dataset", "eval_data_dir")):
        names = read_names(key, theirs, commas=True)
        files = [_place_of(name, Path(str(theirs("dataset_dir") or "data")), rules, found) for name in names]
        if files:
            found.set_data(ours, files, f"{key}: {', '.join(names)}")
    read_validation_share("val_size", theirs, found)
    most, several = theirs("max_samples"), isinstance(found.value(data), list)
    if most:
        found.set("max_samples", most, "max_samples")
    if most and several:  # of paths without weights panda takes the first samples of all together
        found.set("data_weights", [1] * len(found.value(data)), "max_samples, which counts in each data set by itself")
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
        if not theirs("neat_packing"):
            found.different.append("packing: packed samples do not see each other in panda, as with neat_packing.")


_FIELDS = "name the field `{}` in the rows"
_INPUT = "name the field `{}` in the rows, or write `input_field` and `target_field`"
_OF_DATA: dict[str, Rule] = {
    **each("file_name hf_hub_url ms_hub_url om_hub_url formatting", Part("read by itself.")),
    "columns.prompt": one_of("instruction prompt question query", _INPUT.format("instruction")),
    "columns.query": one_of("input context", _FIELDS.format("input")),
    "columns.response": one_of("output target completion response answer answers", _INPUT.format("output")),
    "columns.history": one_of("history", _FIELDS.format("history")),
    "columns.system": one_of("system system_prompt", _FIELDS.format("system")),
    "columns.messages": one_of(MESSAGES, _FIELDS.format("messages")),
    "columns.tools": one_of("tools functions", _FIELDS.format("tools")),
    "tags.role_tag": one_of("role from", "name the field `role` in the turns"),
    "tags.content_tag": one_of("content value", "name the field `content` in the turns"),
    "tags.user_tag": one_of("user human", "name the role `user` in the rows"),
    "tags.assistant_tag": one_of("assistant gpt bot chatgpt model", "name the role `assistant` in the rows"),
    "tags.system_tag": one_of("system", "name the role `system` in the rows"),
    "tags.observation_tag": one_of("observation tool function", "name the role `tool` in the rows"),
    "tags.function_tag": one_of("function_call tool_call", "name the role `function_call` in the rows"),
    **each("columns.images columns.videos columns.audios", Absent("panda trains on text, without images and sound")),
    **each("ranking columns.chosen columns.rejected columns.kto_tag", Absent("it is of preference training")),
    "split": one_of("train", HUB_PART.reason),
    **each("subset folder num_samples", HUB_PART),
}
"""Keys of a data set in dataset_info.json."""
_OF_DOCUMENTS = _OF_DATA | {"columns.prompt": one_of("text content", "name it with `content_field`")}
"""The same for `stage: pt`, whose documents are in the column of the prompt."""


def _place_of(name: str, folder: Path, rules: Mapping[str, Rule], found: Translation) -> str:
    """Where the data set ``name`` is by ``folder``/dataset_info.json, if that lists it; else its name.

    As in LLaMA-Factory, a name on the hub takes precedence over a file.

    What panda cannot follow of its entry, by ``rules``, goes to ``found``.
    """
    try:
        listed = json.loads((folder / "dataset_info.json").read_text(encoding="utf-8"))[name]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return name
    if not isinstance(listed, Mapping):
        return name
    on_hub, file = listed.get("hf_hub_url"), listed.get("file_name")
    is_file = file and not on_hub
    named, used = ([str(folder / str(file))], set()) if is_file else places({**listed, "path": on_hub or name})
    left = {key: value for key, value in listed.items() if key not in used}
    read_item(left, f"dataset_info.json: {name}", rules, found)
    return named[0]


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
