"""TRL's keys, of `trl sft` and its scripts and of the alignment handbook's recipes, beside TrainingArguments."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence
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
from panda.configuration.translation.rules import places
from panda.configuration.translation.rules import read_item
from panda.configuration.translation.rules import read_names
from panda.configuration.translation.rules import read_validation_share
from panda.registry import UserError

_DATA = Part("write `instruction_tuning_data_dir`, or `pretraining_data_dir`: a name on the hub, a file or a folder.")

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
    **each(
        "lora_target_modules lora_target_parameters",
        Part("write `lora_target_modules: q_proj, v_proj`; left out, all linear layers are adapted."),
    ),
    "lora_modules_to_save": LORA_MORE,
    "lora_task_type": Sets({"causal_lm": {}}, "panda trains causal language models"),
    "use_rslora": To("use_rslora"),
    "use_dora": To("use_dora"),
    "load_in_4bit": Sets({True: {"use_quant": True, "quant_bits": 4}}, "`use_quant` is true or false"),
    "load_in_8bit": Sets({True: {"use_quant": True, "quant_bits": 8}}, "`use_quant` is true or false"),
    **each("model_init_kwargs.attn_implementation model_init_kwargs.use_cache", SPEED),
    **each(
        "torch_dtype dtype model_init_kwargs.torch_dtype model_init_kwargs.dtype",
        Ignored("master weights are fp32 in panda; `precision` says how it computes"),
    ),
    "chat_template": Absent("panda uses the chat template of the tokenizer: put this one into the tokenizer's folder"),
    "chat_template_path": Absent("panda uses the chat template of the tokenizer: put that one into `tokenizer`"),
    "pad_token": PADDING,
    "eos_token": TOKENS,
    "pad_to_multiple_of": PADDING,
    "loss_type": Sets({"nll": {}, "chunked_nll": {}}, OTHER_LOSS.reason),
    "router_aux_loss_coef": To("router_aux_loss_coef"),
    "dataset_kwargs.skip_prepare_dataset": Absent("panda tokenises the data itself"),
    **each("dataset_kwargs dataset_kwargs.*", Ignored("panda's templates write what training and inference share")),
    **each("model_init_kwargs model_init_kwargs.*", Absent("panda takes a model as its config.json says")),
    "truncation_mode": Sets({"keep_start": {}}, "panda cuts a conversation at its last turns"),
    "shuffle_dataset": SHUFFLED,
    "dataset_streaming": Ignored("memory does not grow with the size of the data"),
    "streaming": Ignored("memory does not grow with the size of the data"),
    "env.*": Ignored("set variables of the environment in the shell"),
    "trust_remote_code": REMOTE_CODE,
    "overwrite_cache": KEPT_DATA,
    **each("activation_offloading", SPEED),
    **each("ignore_bias_buffers eval_packing preprocessing_num_workers", PROCESSES),
    **each(
        "beta max_prompt_length ref_model_* loss_weights num_generations max_completion_length reward_model_*",
        Absent("it is of preference training: the package panda-preference has its tasks"),
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
            f"{', '.join(other)}: a file of TRL's preference or reinforcement learning."
            " `panda translate` follows files of `trl sft`; the tasks of the package panda-preference (dpo, kto, orpo,"
            " simpo, reward, distill) have keys of the same names."
        )
    text_field = theirs.given.get("dataset_text_field")
    found.set("model", "hf", "any model that transformers loads")
    if text_field:
        found.set("task", "pretrain", "dataset_text_field: every token carries loss")
        found.set("content_field", text_field, "dataset_text_field")
        found.different.append(
            "dataset_text_field: TRL reads it only where rows have no `messages` or `prompt`; if yours do, write"
            " `task: instruct` with `instruction_tuning_data_dir`. A text above max_length, which TRL cuts, goes on in"
            " the next sample in panda."
        )
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
    if "router_aux_loss_coef" not in theirs.given:
        found.different.append(
            "router_aux_loss_coef: TRL's default is 0.001 for mixtures of experts; in panda the checkpoint decides."
        )
    if "max_length" in theirs.nulls and "max_seq_length" not in theirs.given:
        found.drop("max_seq_length")
        found.lost["max_length: null"] = "panda cuts samples at `max_seq_length`: set it to your longest"
    _read_data(theirs, found, "pretraining_data_dir" if text_field else "instruction_tuning_data_dir")
    modules, parameters = (read_names(f"lora_target_{what}", theirs) for what in ("modules", "parameters"))
    if not modules and not parameters and (theirs("use_peft") or found.value("use_quant")):
        found.set("lora_target_modules", ["q_proj", "v_proj"], "peft's default for most models")
    elif (modules or parameters) and modules != ["all-linear"]:  # panda's default
        found.set("lora_target_modules", modules + parameters, "lora_target_modules")


_PART_KEYS = ("config", "name", "split", "data_files", "data_dir", "revision")
_WHOLE = (None, "", 1, "default", "train")
"""Values of these, and of weights, with which nothing of a data set is left out."""
_OF_DATA: dict[str, Rule] = {
    **each(f"id path weight fraction data_files.* {' '.join(_PART_KEYS)}", Part("read by itself.")),
    "columns": Ignored("panda takes the columns that its task reads"),
}
"""Keys of a data set of a mixture."""


def _read_data(theirs: Theirs, found: Translation, key: str) -> None:
    """The data sets of a file: one, or a mixture by name (`id`, or `path`)."""
    mixture = theirs("dataset_mixture.datasets") or theirs("datasets") or []
    items = mixture if isinstance(mixture, list) else [mixture]
    sets: list[Mapping[str, Any]] = [item for item in items if isinstance(item, Mapping)]
    where = "dataset_mixture"
    if not sets:
        where = "dataset_mixer"
        names = [name for name in theirs.given if name.startswith("dataset_mixer.")]
        sets = [{"id": name.removeprefix("dataset_mixer."), "weight": theirs(name)} for name in names]
    if not sets and theirs("dataset_name"):
        chosen = {"config": theirs("dataset_config"), "split": theirs("dataset_train_split")}
        where, sets = "dataset_name", [{"id": theirs("dataset_name"), **chosen}]
        _read_test_split(theirs, found)
    else:
        for name in ("dataset_config", "dataset_train_split", "dataset_test_split"):
            if theirs(name) not in _WHOLE:
                found.lost[f"{name}: {theirs(name)}"] = "it is of `dataset_name`; write OWNER/NAME:CONFIGURATION:SPLIT"
    for share in ("test_split_size", "dataset_mixture.test_split_size"):
        read_validation_share(share, theirs, found)
    paths = []
    for item in sets:
        named, used = places(item)
        paths += named
        read_item(item, "dataset_mixture.datasets[]", _OF_DATA, found)
        left = [part for part in _PART_KEYS if part not in used and item.get(part) not in _WHOLE]
        if parts := [f"{part} {item[part]}" for part in left]:
            found.lost[f"{named[0]}: {', '.join(parts)}"] = HUB_PART.reason
    if paths:
        found.set_data(key, paths, where)
    _read_weights(sets, where, key, found)


def _read_test_split(theirs: Theirs, found: Translation) -> None:
    """The split that a run with an `eval_strategy` evaluates on."""
    split = theirs("dataset_test_split")
    if split is None and (theirs("eval_strategy") or "no") == "no":
        return
    chosen = {"path": theirs("dataset_name"), "config": theirs("dataset_config"), "split": split or "test"}
    paths, used = places(chosen)
    if "split" in used:
        found.set_data("eval_data_dir", paths, theirs.because("dataset_test_split"))
    else:
        found.lost[f"dataset_test_split: {chosen['split']}"] = (
            "name held-out rows in a file of their own with `eval_data_dir`"
        )


def _read_weights(sets: Sequence[Mapping[str, Any]], where: str, key: str, found: Translation) -> None:
    """The part of each of ``sets``, whose paths panda's ``key`` has, that is trained on."""
    weights = [item.get("weight") for item in sets]
    if all(weight in _WHOLE for weight in weights):
        pass
    elif len(sets) == (len(found.value(key)) if isinstance(found.value(key), list) else 1):
        found.set("data_weights", [1 if weight in _WHOLE else weight for weight in weights], f"{where}: weights")
        found.different.append(
            "data_weights: of a weight below 1, the other tool takes the same part of the data in each epoch; panda"
            " takes another part in the next."
        )
    else:
        found.lost[f"{where}: weights {', '.join(map(str, weights))}"] = (
            "panda weighs paths: put each part into a file of its own, and write `data_weights`"
        )
    if any(item.get("fraction") is not None for item in sets):
        found.lost[f"{where}: fractions {', '.join(str(item.get('fraction')) for item in sets)}"] = (
            "they are shares of the mixture, and panda's `data_weights` are passes over each data set: compute them"
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
