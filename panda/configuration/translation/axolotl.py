"""axolotl's keys."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from panda.configuration.translation import trainer
from panda.configuration.translation.rules import ADAPTER
from panda.configuration.translation.rules import ALL_LOSS
from panda.configuration.translation.rules import DEFAULT_SYSTEM
from panda.configuration.translation.rules import DISPLAY
from panda.configuration.translation.rules import HUB_PART
from panda.configuration.translation.rules import KEPT_DATA
from panda.configuration.translation.rules import KEPT_ORDER
from panda.configuration.translation.rules import LORA_MORE
from panda.configuration.translation.rules import MESSAGES
from panda.configuration.translation.rules import NOTHING_HELD_OUT
from panda.configuration.translation.rules import OFF
from panda.configuration.translation.rules import OTHER_LOSS
from panda.configuration.translation.rules import OTHER_PARALLELISM
from panda.configuration.translation.rules import OTHER_TRAINING
from panda.configuration.translation.rules import PADDING
from panda.configuration.translation.rules import PROCESSES
from panda.configuration.translation.rules import REMOTE_CODE
from panda.configuration.translation.rules import ROUTER_LOSS
from panda.configuration.translation.rules import SHUFFLED
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
from panda.configuration.translation.rules import number
from panda.configuration.translation.rules import one_of
from panda.configuration.translation.rules import places
from panda.configuration.translation.rules import read_adapter
from panda.configuration.translation.rules import read_count
from panda.configuration.translation.rules import read_item
from panda.configuration.translation.rules import read_names
from panda.configuration.translation.rules import read_validation_share
from panda.registry import UserError

_DATA = Part("write `instruction_tuning_data_dir`, or `pretraining_data_dir`: a name on the hub, a file or a folder.")
_OF_EPOCH = "panda counts optimizer steps, and saves and evaluates at the end in any case; `panda check` says the steps"
_PREFERENCE = "panda itself learns from documents and answers; from preferences by the package panda-preference"

KEYS: dict[str, Rule] = {
    "base_model": To("ckpt_path"),
    **each(
        "base_model_config cls_model_config base_model_ignore_patterns", Ignored("the checkpoint's own config is used")
    ),
    **each("model_type tokenizer_type tokenizer_use_fast tokenizer_legacy", Ignored("the folder says it")),
    "processor_type": Absent("panda trains on text, without images and sound"),
    "tokenizer_config": To("tokenizer"),
    "revision_of_model": Absent("name a folder with that revision as `ckpt_path`"),
    **each("datasets pretraining_dataset", _DATA),
    "test_datasets": Part("write `eval_data_dir`."),
    "val_set_size": VALIDATION_SHARE,
    **each("chat_template chat_template_jinja", Part("write `template: chat` for the tokenizer's own chat template.")),
    "sequence_len": To("max_seq_length"),
    "sample_packing": Sets({True: {"batching": "packed"}}, "`batching` takes padded, grouped and packed"),
    "train_on_inputs": Part("it has no counterpart: in panda only answers carry loss.", OFF),
    "adapter": Part("write `use_lora`; for qlora `use_quant`."),
    "lora_model_dir": ADAPTER,
    "lora_r": To("lora_r"),
    "lora_alpha": To("lora_alpha"),
    "lora_dropout": To("lora_dropout"),
    **each(
        "lora_target_modules lora_target_linear lora_target_parameters",
        Part("write `lora_target_modules: q_proj, v_proj`; left out, all linear layers are adapted."),
    ),
    **each("lora_modules_to_save peft_trainable_token_indices peft_layers_*", LORA_MORE),
    "peft_use_dora": To("use_dora"),
    "peft_use_rslora": To("use_rslora"),
    **each("loraplus_* relora* loftq* peft* lora_rank_pattern lora_alpha_pattern", OTHER_TRAINING),
    "lora_fan_in_fan_out": Ignored("it follows from the layers"),
    "load_in_4bit": Sets({True: {"use_quant": True, "quant_bits": 4}}, "`use_quant` is true or false"),
    "load_in_8bit": Sets({True: {"use_quant": True, "quant_bits": 8}}, "`use_quant` is true or false"),
    **each("bnb_config_kwargs bnb_config_kwargs.*", Ignored("panda's 4 bits are NF4, with quantised scales")),
    **each(
        "gptq* quantize_moe_experts model_quantization_config* qat qat.*", Absent("panda quantises with bitsandbytes")
    ),
    "micro_batch_size": trainer.MICRO_BATCH,
    "batch_size": Part("write `per_gpu_train_batch_size` and `gradient_accumulation_steps`."),
    "eval_batch_size": To("per_gpu_eval_batch_size"),
    "num_epochs": To("num_train_epochs"),
    "optimizer": trainer.OPTIMIZERS,
    "lr_scheduler": trainer.SCHEDULES,
    **each("cosine_min_lr_ratio", Part("write `min_lr_ratio`.")),
    **each(
        "cosine_constant_lr_ratio eta_min lr_quadratic_warmup lr_div_factor lr_groups embedding_lr*",
        Absent("`panda show lr_scheduler NAME` lists what a schedule takes; `lr_multipliers` scales rates by name"),
    ),
    **each("adam_epsilon adam_eps", To("adam_epsilon")),
    **each("adam_epsilon2 adam_beta3 torchdistx_path", Ignored("it is of other optimizers")),
    **each("bf16 bfloat16", trainer.BF16),
    **each("fp16 float16", trainer.FP16),
    "float32": Ignored("fp32 is panda's default"),
    **each("fp8 fp8_*", Absent("panda computes in fp32, bf16 or fp16")),
    "activation_offloading": Absent("panda recomputes activations (`activation_checkpointing`), and offloads none"),
    "tensor_parallel_size": To("tensor_parallel_size"),
    **each(
        "context_parallel_size sequence_parallel_degree expert_parallel_size dp_shard_size dp_replicate_size",
        Sets({1: {}}, OTHER_PARALLELISM.reason),
    ),
    **each("saves_per_epoch", Part("write `save_steps`, a number of optimizer steps.")),
    **each("evals_per_epoch", Part("write `eval_steps`, with `eval_fraction` or `eval_data_dir`.")),
    "auto_resume_from_checkpoints": Sets({True: {"resume": "auto"}}, "`resume: auto`"),
    **each("special_tokens.pad_token", PADDING),
    **each("special_tokens special_tokens.* tokens tokens.* added_tokens_overrides", TOKENS),
    "eot_tokens": Ignored("panda finds the ends of answers in the chat template, and names them in the export"),
    "resize_token_embeddings_to_32x": Ignored("panda adds rows only for tokens (`extend_vocab`)"),
    **each("unfrozen_parameters", OTHER_TRAINING),
    "excess_length_strategy": Part("leave it out: panda cuts samples at `max_seq_length`; `panda data` counts them."),
    **each("shuffle_merged_datasets shuffle_before_merging_datasets", SHUFFLED),
    **each("curriculum_sampling sample_packing_sequentially", KEPT_ORDER),
    **each("dataset_shard_num dataset_shard_idx", Absent("panda trains on all rows: put a part of them into a file")),
    "min_sample_len": Absent("panda uses samples of any length"),
    "dataset_exact_deduplication": Absent("panda trains on each row that the data has"),
    **each("use_eaft eaft_* num_labels orpo_alpha rl_beta", OTHER_LOSS),
    **each("plugins", Absent("plugins of axolotl do not run in panda; kernels that change no result need none")),
    **each("cut_cross_entropy chunked_cross_entropy*", Ignored("panda keeps no logits where the model allows it")),
    "reinit_weights": Absent("`arch` in place of `model` and `ckpt_path` begins with random weights"),
    **each("model_config.* overrides_of_model_config.*", Absent("panda takes a model as its config.json says")),
    **each("model_config.output_router_logits overrides_of_model_config.output_router_logits", ROUTER_LOSS),
    **each(
        "model_config.router_aux_loss_coef overrides_of_model_config.router_aux_loss_coef", To("router_aux_loss_coef")
    ),
    "early_stopping_patience": To("early_stopping_patience"),
    **each("loss_watchdog_*", Absent("panda trains on whatever the loss is; a lifecycle plugin can stop a run")),
    **each("device_map max_memory gpu_memory_limit", Ignored("`zero_stage` says what is partitioned over GPUs")),
    "tokenizer_use_mistral_common": Absent("panda reads a tokenizer as transformers does"),
    "freeze_mm_modules": Ignored("panda trains on text, without images"),
    **each("lisa_*", OTHER_TRAINING),
    **each("jagged_restart_*", Absent("a schedule of panda runs once, over the whole run")),
    "chat_template_kwargs.*": Absent("the chat template of the tokenizer decides: put its defaults there"),
    "default_system_message": DEFAULT_SYSTEM,
    "trust_remote_code": REMOTE_CODE,
    **each("dataset_prepared_path dataset_keep_in_memory skip_prepare_dataset push_dataset_to_hub", KEPT_DATA),
    **each("pad_to_sequence_len pad_to_multiple_of", PADDING),
    **each(
        "dataset_processes streaming* pretrain_multipack_* pretraining_sample_concatenation sample_packing_*"
        " eval_sample_packing group_by_length_* multipack_* max_packed_sequence_len strict hf_use_auth_token"
        " total_num_tokens qlora_sharded_model_loading lora_on_cpu gc_steps total_supervised_tokens use_ray"
        " experimental_skip_move_to_device num_dataset_shards_to_save",
        PROCESSES,
    ),
    **each(
        "flash_* xformers* sdp_attention lora_*_kernel use_scattermoe use_sonicmoe experts_implementation"
        " llama4_linearized_experts fused_attn_kernel gemma4_hybrid_attn_impl flex_attn_* unsloth_* tiled_mlp*"
        " deepcompile scaling_softmax* use_kernels sdpa_varlen flash_attn_*",
        SPEED,
    ),
    **each(
        "eval_table_size eval_max_new_tokens eval_causal_lm_metrics do_causal_lm_eval profiler_* use_tensorboard",
        DISPLAY,
    ),
}

DEFAULTS: dict[str, Any] = {
    "sequence_len": 512,
    "micro_batch_size": 1,
    "num_epochs": 1,
    "lr_scheduler": "cosine",
    "warmup_ratio": 0.03,
    "lora_dropout": 0.0,
    "bf16": "auto",
}

_SHARED_DEFAULTS = ("gradient_accumulation_steps", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm")

_PARTS = ("name", "revision", "data_files", "shards", "shards_idx", "skip")

_OF_DATA: dict[str, Rule] = {
    **each(
        f"path type type.* split field text_column chat_template data_files.* {' '.join(_PARTS)}",
        Part("read by itself."),
    ),
    **each("ds_type trust_remote_code preprocess_shards template_thinking_key", Ignored("panda finds it in the file")),
    "conversation": Absent("panda uses the chat template of the tokenizer"),
    "chat_template_jinja": Absent("panda uses the chat template of the tokenizer: put this one into its folder"),
    "field_messages": one_of(MESSAGES, "name the field `messages` in the rows"),
    "field_tools": one_of("tools functions", "name the field `tools` in the rows"),
    "field_thinking": one_of(
        "reasoning_content reasoning thinking", "name the field `reasoning_content` in the turns of the rows"
    ),
    **each(
        "message_field_role message_property_mappings.role", one_of("role from", "name the field `role` in the turns")
    ),
    **each(
        "message_field_content message_property_mappings.content",
        one_of("content value", "name the field `content` in the turns"),
    ),
    "message_field_training": one_of("weight train training loss", "name the field `train` in the turns"),
    "message_field_training_detail": Absent("in panda an answer carries loss as a whole, or not (`weight: 0`)"),
    "roles.user": one_of(("user", "human", "human, user", "user, human"), "name the role `user` in the rows"),
    "roles.assistant": one_of(
        ("assistant", "gpt", "model", "gpt, assistant", "assistant, gpt", "gpt, model, assistant"),
        "name the role `assistant` in the rows",
    ),
    "roles.system": one_of("system", "name the role `system` in the rows"),
    "roles.tool": one_of("tool", "name the role `tool` in the rows"),
    "roles_to_train": one_of(("assistant", "gpt", "gpt, assistant", "assistant, gpt"), ALL_LOSS.reason),
    **each("train_on_eos train_on_eot", one_of("turn", "in panda the end of each answer carries loss")),
    "drop_system_message": Absent("leave the system turns out of the rows"),
    "split_thinking": Absent("write the reasoning into `reasoning_content` of the turns"),
}
"""Keys of a data set."""

_ALPACA = (
    "datasets[].type: {}: axolotl puts prompts into a text of its own (of alpaca, 'Below is an instruction ...'); panda"
    " writes the prompt as the row has it. For a trained text of that kind, put it into the rows."
)


def read(theirs: Theirs, found: Translation) -> None:
    """Task, data, batch sizes and adapters. Raises UserError for what panda does not train."""
    for key in ("rl", "reward_model", "process_reward_model", "ebft", "diffusion", "diffusion.noise_schedule"):
        if theirs(key):
            raise UserError(f"{key}: {theirs(key)}: {_PREFERENCE}. `panda list tasks` names the tasks.")
    found.set("model", "hf", "any model that transformers loads")
    _read_data(theirs, found)
    _read_adapters(theirs, found)
    if theirs.given.get("early_stopping_patience"):
        found.set("plugins", ["early_stopping"], "early_stopping_patience")
    if not {"warmup_steps", "warmup_ratio"} & theirs.given.keys():
        found.different.append(
            "warm-up: axolotl's default is 3% of the steps and at most 100; for a run of more than 3,333 steps write"
            " `warmup_steps: 100` in place of `warmup_proportion`."
        )
    micro = theirs("micro_batch_size")
    if theirs("batch_size") and "gradient_accumulation_steps" not in theirs.given:
        steps = max(1, read_count("batch_size", theirs) // read_count("micro_batch_size", theirs))
        found.set("gradient_accumulation_steps", steps, "batch_size / micro_batch_size")
    if theirs("eval_batch_size") is None and found.evaluates:
        found.set("per_gpu_eval_batch_size", micro, "micro_batch_size")
    least = number(theirs("cosine_min_lr_ratio"))
    if least is not None and least < 1 and found.value("lr_scheduler") == "cosine":
        found.set("min_lr_ratio", least, "cosine_min_lr_ratio")
    elif least:
        found.lost[f"cosine_min_lr_ratio: {least}"] = "`min_lr_ratio` is below 1 and of `lr_scheduler: cosine`"
    for key in ("saves_per_epoch", "evals_per_epoch"):
        once = theirs(key) == 1 and theirs("num_epochs") == 1  # at the end, as panda does
        if theirs(key) and not once:
            unused = key == "evals_per_epoch" and not found.evaluates
            found.lost[f"{key}: {theirs(key)}"] = NOTHING_HELD_OUT if unused else f"{_OF_EPOCH}: set `{key[:4]}_steps`"


def _read_adapters(theirs: Theirs, found: Translation) -> None:
    adapter = theirs("adapter")
    if adapter not in (None, "", "lora", "qlora"):
        raise UserError(f"adapter: {adapter}: panda trains all weights, or LoRA adapters (lora, qlora).")
    if not adapter:
        return
    found.set("use_lora", True, f"adapter: {adapter}")
    if adapter == "qlora" and not found.value("use_quant"):
        found.set("use_quant", True, "adapter: qlora")
        found.set("quant_bits", 4, "adapter: qlora")
    names = read_names("lora_target_modules", theirs) + read_names("lora_target_parameters", theirs)
    if theirs("lora_target_linear"):  # panda's default: all linear layers but the output head
        if names:
            found.different.append("lora_target_linear: all linear layers but the output head are adapted.")
    elif names:
        given = [key for key in ("lora_target_modules", "lora_target_parameters") if theirs(key)]
        found.set("lora_target_modules", names, " and ".join(given))
    read_adapter("lora_model_dir", theirs, found)


def _read_data(theirs: Theirs, found: Translation) -> None:
    """The data sets: those of documents are pretrain data, all others instruct data, and both at once a mix."""
    sets, pretraining = _items(theirs("datasets")), _items(theirs("pretraining_dataset"))
    in_sets = [item for item in sets if str(item.get("type")).startswith(("completion", "pretrain"))]
    documents, answers = pretraining + in_sets, [item for item in sets if item not in in_sets]
    task = "mix" if documents and answers else "pretrain" if documents else "instruct"
    found.set("task", task, "pretraining_dataset" if pretraining else "datasets[].type")
    if answers:
        _write_paths(answers, "instruction_tuning_data_dir", "datasets", found)
        _read_answers(answers, theirs, found)
    if theirs("train_on_inputs") and task != "pretrain":
        found.set("train_on_prompt", True, "train_on_inputs")
    if documents:
        said = "datasets" if in_sets else "pretraining_dataset"
        _write_paths(documents, "pretraining_data_dir", said, found)
        fields = {item.get("field") or item.get("text_column") or "text" for item in documents}
        if len(fields) == 1 and not fields & {"text", "content"}:
            found.set(
                "content_field", fields.pop(), "datasets[].field" if in_sets else "pretraining_dataset[].text_column"
            )
        elif len(fields) > 1:
            found.lost[f"datasets[].field: {', '.join(sorted(fields))}"] = "panda reads one `content_field`"
    if tests := _items(theirs("test_datasets")):
        _write_paths(tests, "eval_data_dir", "test_datasets", found)
    read_validation_share("val_set_size", theirs, found)


def _items(written: Any) -> list[Mapping[str, Any]]:
    """The data sets of a key: a path, one data set, or a list of them."""
    items = written if isinstance(written, list) else [written] if written else []
    return [item if isinstance(item, Mapping) else {"path": item} for item in items]


def _write_paths(items: list[Mapping[str, Any]], key: str, said: str, found: Translation) -> None:
    """Write the paths of ``items``, which are below the key ``said``, as panda's ``key``."""
    paths: list[str] = []
    for item in items:
        named, used = places(item)
        paths += named
        parts = {part: item[part] for part in (*_PARTS, "split") if item.get(part) and part not in used}
        if parts.get("split") == "train":
            del parts["split"]
        if parts:
            shown_parts = ", ".join(f"{part} {value}" for part, value in parts.items())
            found.lost[f"{said}[]: {named[0]}: {shown_parts}"] = HUB_PART.reason
        read_item(item, f"{said}[]", _OF_DATA, found)
    found.set_data(key, paths, f"{said}[].path")


def _read_answers(items: list[Mapping[str, Any]], theirs: Theirs, found: Translation) -> None:
    """Template and fields of conversations and exchanges."""
    kinds = [item.get("type") for item in items]
    chat = [kind for kind in kinds if str(kind).startswith(("chat_template", "sharegpt"))]
    template = next((item["chat_template"] for item in items if item.get("chat_template")), theirs("chat_template"))
    is_chat = bool(chat) or (template is not None and not any(kinds))
    found.set(
        "template", "chat" if is_chat else "plain", "chat_template" if is_chat and template else "datasets[].type"
    )
    if is_chat and template not in (None, "tokenizer_default"):
        found.different.append(
            f"chat_template: {template} is text of axolotl's; panda uses the chat template of the tokenizer, as"
            " inference does. A base model without one needs a tokenizer that has it."
        )
    for kind in kinds:
        if isinstance(kind, Mapping):
            _read_fields(kind, found)
        elif kind == "input_output":
            found.lost["datasets[].type: input_output"] = (
                "panda has no segments with a loss of their own: tokenise them into rows of `input_ids` and `labels`"
            )
        elif kind not in chat and kind:
            found.different.append(_ALPACA.format(kind))
    longer = theirs("excess_length_strategy")
    if longer == "raise":
        found.lost["excess_length_strategy: raise"] = (
            "panda cuts samples at `max_seq_length`; `panda check` counts them"
        )
    elif longer != "truncate":
        found.different.append(
            "excess_length_strategy: axolotl drops samples that are longer than sequence_len; panda cuts them at"
            " `max_seq_length`, and `panda check` counts them."
        )


def _read_fields(kind: Mapping[str, Any], found: Translation) -> None:
    """A prompter of the user's own: names of fields, and perhaps a text around them."""
    asks, answers = kind.get("field_instruction"), kind.get("field_output")
    if asks and answers:
        found.set("input_field", asks, "datasets[].type.field_instruction")
        found.set("target_field", answers, "datasets[].type.field_output")
    for name in ("field_input", "field_system", "system_prompt", "system_format", "format", "no_input_format"):
        if value := kind.get(name):
            if value in ("[INST] {instruction} [/INST]", "{instruction}") and name != "format":
                continue
            found.lost[f"datasets[].type.{name}: {value}"] = "panda writes fields as they are: put it into the rows"


TOOL = Tool(
    "axolotl",
    {key: rule for key, rule in trainer.KEYS.items() if key not in ("optim", "lr_scheduler_type")} | KEYS,
    {key: trainer.DEFAULTS[key] for key in _SHARED_DEFAULTS} | DEFAULTS,
    frozenset(
        {
            "base_model",
            "sequence_len",
            "micro_batch_size",
            "num_epochs",
            "adapter",
            "datasets",
            "sample_packing",
            "val_set_size",
            "pad_to_sequence_len",
            "dataset_prepared_path",
            "lora_target_linear",
            "saves_per_epoch",
            "evals_per_epoch",
            "special_tokens",
            "train_on_inputs",
            "chat_template_jinja",
            "pretraining_dataset",
        }
    ),
    read,
)
