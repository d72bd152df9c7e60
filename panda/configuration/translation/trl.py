"""TRL's keys, of `trl sft` and its scripts and of the alignment handbook's recipes, beside TrainingArguments."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from panda.configuration.translation import trainer
from panda.configuration.translation.rules import HUB_CHOICE
from panda.configuration.translation.rules import HUB_PART
from panda.configuration.translation.rules import KEPT_DATA
from panda.configuration.translation.rules import LORA_MORE
from panda.configuration.translation.rules import OTHER_LOSS
from panda.configuration.translation.rules import PADDING
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

_DATA = Part("write `instruction_tuning_data_dir`, or `pretraining_data_dir`: a file or folder.")

KEYS: dict[str, Rule] = {
    "model_name_or_path": To("ckpt_path"),
    "model_revision": Sets({"main": {}}, "name a folder with that revision as `ckpt_path`"),
    "tokenizer_name_or_path": To("tokenizer"),
    **each("dataset_name datasets dataset_mixture dataset_mixture.* dataset_mixer dataset_mixer.*", _DATA),
    **each("dataset_config dataset_train_split", HUB_CHOICE),
    **each("dataset_splits dataset_configs", HUB_PART),
    "dataset_test_split": Part("write `eval_data_dir: OWNER/NAME:CONFIGURATION:SPLIT`."),
    **each("test_split_size dataset_mixture.test_split_size", VALIDATION_SHARE),
    "dataset_text_field": Part("write `content_field`, with `task: pretrain`."),
    **each("max_seq_length max_length", To("max_seq_length")),
    "packing": Sets({True: {"batching": "packed"}}, "`batching` takes padded, grouped and packed"),
    "packing_strategy": Sets(
        {"bfd": {}, "ffd": {}}, "packed samples are whole in panda, never continued in the next row"
    ),
    "padding_free": Ignored("`batching: packed` has rows without padding"),
    "assistant_only_loss": Part("leave it out: in panda only answers carry loss."),
    "completion_only_loss": Part("leave it out: in panda only answers carry loss."),
    "use_peft": To("use_lora"),
    "lora_r": To("lora_r"),
    "lora_alpha": To("lora_alpha"),
    "lora_dropout": To("lora_dropout"),
    "lora_target_modules": Part(
        "write `lora_target_modules: q_proj, v_proj`; left out, all linear layers are adapted."
    ),
    **each("lora_target_parameters lora_modules_to_save", LORA_MORE),
    "lora_task_type": Sets({"CAUSAL_LM": {}}, "panda trains causal language models"),
    "use_rslora": To("use_rslora"),
    "use_dora": To("use_dora"),
    "load_in_4bit": Sets({True: {"use_quant": True, "quant_bits": 4}}, "`use_quant` is true or false"),
    "load_in_8bit": Sets({True: {"use_quant": True, "quant_bits": 8}}, "`use_quant` is true or false"),
    "bnb_4bit_quant_type": Sets({"nf4": {}}, "panda's 4 bits are NF4"),
    **each("use_bnb_nested_quant bnb_4bit_quant_storage", Ignored("panda's 4 bits quantise the scales too")),
    **each("torch_dtype dtype", Ignored("master weights are fp32 in panda; `precision` says how it computes")),
    "chat_template": Absent("panda uses the chat template of the tokenizer: put this one into the tokenizer's folder"),
    "chat_template_path": Absent("panda uses the chat template of the tokenizer: put that one into `tokenizer`"),
    **each("eos_token pad_token", TOKENS),
    "pad_to_multiple_of": PADDING,
    "loss_type": Sets({"nll": {}, "chunked_nll": {}}, OTHER_LOSS.reason),
    "router_aux_loss_coef": To("router_aux_loss_coef"),
    "dataset_kwargs.skip_prepare_dataset": Absent("panda tokenises the data itself"),
    **each("dataset_kwargs dataset_kwargs.*", Ignored("panda's templates write what training and inference share")),
    **each("model_init_kwargs model_init_kwargs.*", Absent("panda takes a model as its config.json says")),
    "truncation_mode": Ignored("panda cuts a conversation at its last turns"),
    "shuffle_dataset": Ignored("panda shuffles each epoch"),
    "dataset_streaming": Ignored("memory does not grow with the size of the data"),
    "streaming": Ignored("memory does not grow with the size of the data"),
    "env.*": Ignored("set variables of the environment in the shell"),
    "trust_remote_code": REMOTE_CODE,
    "overwrite_cache": KEPT_DATA,
    **each("activation_offloading", SPEED),
    **each("ignore_bias_buffers eval_packing preprocessing_num_workers", PROCESSES),
    **each(
        "beta max_prompt_length ref_model_* loss_weights num_generations max_completion_length reward_model_*",
        Absent("it is of preference training, which panda lacks"),
    ),
}

DEFAULTS: dict[str, Any] = {
    "learning_rate": 2e-5,
    "gradient_checkpointing": True,
    "bf16": True,
    "max_length": 1024,
    "lora_r": 16,
    "lora_alpha": 32,
    "lora_dropout": 0.05,
}

_PREFERENCE = {"beta", "max_prompt_length", "num_generations", "max_completion_length", "reward_model_name_or_path"}


def read(theirs: Theirs, found: Translation) -> None:
    """Task, data and adapters. Raises UserError for a file of a trainer other than TRL's SFTTrainer."""
    if other := sorted(_PREFERENCE & theirs.given.keys()):
        raise UserError(
            f"{', '.join(other)}: a file of TRL's preference or reinforcement learning, which panda lacks."
            " `panda translate` follows files of `trl sft`."
        )
    text_field = theirs.given.get("dataset_text_field")
    found.set("model", "hf", "any model that transformers loads")
    if text_field:
        found.set("task", "pretrain", "dataset_text_field: every token carries loss")
        found.set("content_field", text_field, "dataset_text_field")
    else:
        found.set("task", "instruct", "trl sft")
        found.set("template", "chat", "trl sft: the tokenizer's own chat template")
        found.different.append(
            "the task: what TRL does follows from the columns. For rows of `text` use `task: pretrain` with"
            " `pretraining_data_dir`; for `prompt` and `completion` as text, `template: plain`."
        )
        if not theirs("assistant_only_loss") and not theirs("completion_only_loss"):
            found.different.append(
                "loss: TRL gives prompts of `messages` loss too, unless assistant_only_loss is set; in panda only"
                " answers carry loss."
            )
    if "max_length" in theirs.nulls and "max_seq_length" not in theirs.given:
        found.drop("max_seq_length")
        found.lost["max_length: null"] = "panda cuts samples at `max_seq_length`: set it to your longest"
    _read_data(theirs, found, "pretraining_data_dir" if text_field else "instruction_tuning_data_dir")
    targets = theirs("lora_target_modules")
    if targets is None and (theirs("use_peft") or found.value("use_quant")):
        found.set("lora_target_modules", ["q_proj", "v_proj"], "peft's default for most models")
    elif targets not in (None, "all-linear", ["all-linear"]):  # panda's default
        found.set("lora_target_modules", [targets] if isinstance(targets, str) else targets, "lora_target_modules")


_PART_KEYS = ("config", "name", "split", "revision", "weight", "fraction")
_WHOLE = (None, "", 1, "default", "train")
"""Values of these with which nothing of a data set is left out."""


def _read_data(theirs: Theirs, found: Translation, key: str) -> None:
    """The data sets of a file: one, or a mixture by name (`id`, or `path`)."""
    mixture = theirs("dataset_mixture.datasets") or theirs("datasets") or []
    sets: list[Mapping[str, Any]] = [item for item in mixture if isinstance(item, Mapping)]
    where = "dataset_mixture"
    if not sets:
        where = "dataset_mixer"
        names = [name for name in theirs.given if name.startswith("dataset_mixer.")]
        sets = [{"id": name.removeprefix("dataset_mixer."), "weight": theirs(name)} for name in names]
    if not sets and theirs("dataset_name"):
        chosen = {"config": theirs("dataset_config"), "split": theirs("dataset_train_split")}
        where, sets = "dataset_name", [{"id": theirs("dataset_name"), **chosen}]
        _read_test_split(theirs, found)
    for share in ("test_split_size", "dataset_mixture.test_split_size"):
        read_validation_share(share, theirs, found)
    paths = []
    for item in sets:
        name = str(item.get("id") or item.get("path"))
        path, used = on_hub(name, item, "config" if item.get("config") else "name")
        paths.append(path)
        left = (part for part in _PART_KEYS if part not in used and item.get(part) not in _WHOLE)
        if parts := [f"{part} {item[part]}" for part in left]:
            found.lost[f"{name}: {', '.join(parts)}"] = HUB_PART.reason
    if paths:
        found.set_data(key, paths, where)


def _read_test_split(theirs: Theirs, found: Translation) -> None:
    """The split that a run with an `eval_strategy` evaluates on."""
    split = theirs("dataset_test_split")
    if split is None and (theirs("eval_strategy") or "no") == "no":
        return
    chosen = {"config": theirs("dataset_config"), "split": split or "test"}
    path, used = on_hub(str(theirs("dataset_name")), chosen, "config")
    if used:
        found.set_data("eval_data_dir", [path], theirs.because("dataset_test_split"))
    else:
        found.lost[f"dataset_test_split: {chosen['split']}"] = (
            "name held-out rows in a file of their own with `eval_data_dir`"
        )


TOOL = Tool(
    "TRL",
    trainer.KEYS | KEYS,
    trainer.DEFAULTS | DEFAULTS,
    frozenset(
        {
            "model_name_or_path",
            "beta",
            "dataset_name",
            "dataset_config",
            "dataset_mixture",
            "dataset_mixer",
            "max_length",
            "use_peft",
            "packing",
            "dataset_text_field",
            "load_in_4bit",
            "assistant_only_loss",
            "torch_dtype",
            "chat_template",
            "eos_token",
            "dataset_train_split",
            "dataset_test_split",
            "dataset_num_proc",
            "attn_implementation",
        }
    ),
    read,
)
TRANSFORMERS = Tool("transformers", trainer.KEYS, trainer.DEFAULTS, trainer.OWN, trainer.read_training_arguments)
