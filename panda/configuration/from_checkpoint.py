"""What a checkpoint determines in the configuration of a run: model options, tokenizer and vocabulary."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from panda.configuration.implied import Stated
from panda.configuration.options import RunOptions
from panda.configuration.positions import positions_of_checkpoint
from panda.files.terminal import number_of
from panda.registry import UserError
from panda.registry.options import options_of
from panda.registry.resolve import Resolved
from panda.weights.adapters import adapter_options
from panda.weights.formats import ADAPTERS
from panda.weights.formats import META
from panda.weights.pretrained import Pretrained
from panda.weights.tokenizers import TOKENIZER


def follow_checkpoint(resolved: Resolved, pretrained: Pretrained) -> Resolved:
    """``resolved`` with what its checkpoint determines: options of the model that were not set, and the tokenizer.

    Raises UserError if an option that was set contradicts the checkpoint.
    """
    settings = resolved.settings
    origin = f"checkpoint {pretrained.folder}"
    if "panda_model" in pretrained.config or hasattr(resolved.components["model"].component.options, "of_checkpoint"):
        resolved = _follow_options(resolved, Stated(pretrained.config, pretrained.config_file), origin)
    if pretrained.adapters:
        resolved = _follow_adapters(resolved, pretrained.adapters)
    resolved = _within_positions(resolved, pretrained, origin)
    if settings["tokenizer"].origin == "default":
        holder = pretrained.with_tokenizer()
        if holder is None:
            raise UserError(
                f"ckpt_path: {pretrained.folder} has no tokenizer that transformers loads (none of"
                f" {', '.join(TOKENIZER)}), and panda's own belongs to other weights. Name the folder of one"
                " with `tokenizer`."
            )
        if pretrained.format is META and not (holder.folder / "tokenizer.json").exists():
            raise UserError(
                f"ckpt_path: the tokenizer in {holder.folder} is only a SentencePiece model, as Meta publishes it. Name"
                " the folder of a Hugging Face tokenizer of this model with `tokenizer`."
            )
        location = holder.name or str(holder.folder)
        resolved = resolved.with_values({"tokenizer": location}, origin)
    return resolved


def config_for(pretrained: Pretrained, needed: int, *, extend: bool) -> Mapping[str, Any]:
    """``pretrained.config``, with enough rows in its vocabulary for a tokenizer whose ids are below ``needed``.

    Raises UserError if the checkpoint has fewer rows, unless ``extend`` says that rows may be added.
    """
    rows = pretrained.vocabulary
    if rows is None or needed <= rows:
        return pretrained.config
    if not extend:
        raise UserError(
            f"tokenizer: it needs {number_of(needed, 'row')} (its highest id is {needed - 1:,}), and the checkpoint in"
            f" {pretrained.folder} has {rows:,} (vocab_size). Is it the tokenizer of these weights? If entries were"
            " added to it, `--extend_vocab` adds rows, each the mean of the existing ones."
        )
    if "vocab_size" in pretrained.config:
        return {**pretrained.config, "vocab_size": needed}
    return {**pretrained.config, "text_config": {**pretrained.config["text_config"], "vocab_size": needed}}


def _follow_adapters(resolved: Resolved, folder: Path) -> Resolved:
    """``resolved`` with the options that the adapters in ``folder`` were trained with.

    Raises UserError for one that was set to another value. Only their dropout may change.
    """
    known = options_of(RunOptions)
    values, contradictions = {}, []
    for key, stated in adapter_options(folder).items():
        try:
            value = known[key].check(stated)
        except ValueError:
            raise UserError(f"{folder / ADAPTERS}: {key}: {stated!r} is not {known[key].expects}.") from None
        setting = resolved.settings[key]
        if setting.origin == "default" or key == "extend_vocab":
            values[key] = value
        elif setting.value != value and key != "lora_dropout":
            contradictions.append(f"{key} is {setting.value} ({setting.origin}), but {value} in the adapters")
    if contradictions:
        raise UserError(
            f"ckpt_path: the adapters in {folder} have another shape:\n"
            + "\n".join(contradictions)
            + "\nLeave these options out: they are taken from the adapters."
        )
    return resolved.with_values(values, f"adapters {folder}")


def _within_positions(resolved: Resolved, pretrained: Pretrained, origin: str) -> Resolved:
    """``resolved`` with a ``max_seq_length`` that the checkpoint has positions for.

    Only the default is lowered, and a line says so. Raises UserError for a value that was set and is too large.
    """
    positions = positions_of_checkpoint(pretrained)
    setting = resolved.settings["max_seq_length"]
    if positions is None or setting.value <= positions.count:
        return resolved
    if setting.origin != "default":
        raise UserError(
            f"max_seq_length: {setting.value} ({setting.origin}), but {pretrained.folder} is made for"
            f" {positions.count} positions ({positions.reason}). Lower max_seq_length."
        )
    if os.environ.get("RANK", "0") == "0":
        print(
            f"note: max_seq_length is {positions.count}, and not {setting.value}, its default: the checkpoint has no"
            f" more positions ({positions.reason}).",
            file=sys.stderr,
        )
    return resolved.with_values({"max_seq_length": positions.count}, origin)


def _follow_options(resolved: Resolved, config: Stated, origin: str) -> Resolved:
    """``resolved`` with the options of the model that ``config`` determines.

    Raises UserError for an option that was set to another value.
    """
    model = resolved.components["model"]
    options_class: Any = model.component.options
    known = options_of(options_class)
    if "panda_model" in config:
        if config["panda_model"] != model.offer.qualified:
            raise UserError(
                f"{config.file}: these are weights of the model {config['panda_model']!r}, and not of"
                f" {model.offer.qualified!r}. Leave `model` and `arch` out: the model is then theirs."
            )
        stated = {key: value for key, value in config["options"].items() if key in known}
    else:
        with model.attributed("`of_checkpoint`"):
            stated = options_class.of_checkpoint(config)
    values = {}
    contradictions = []
    for key, value in stated.items():
        written = resolved.key_of(model, key)
        setting = resolved.settings[written]
        try:
            value = known[key].check(value)
        except ValueError:
            raise UserError(f"{config.file}: {key}: {value!r} is not {known[key].expects}.") from None
        # An arch states the vocabulary of the original tokenizer; a fine-tuned model may have more entries.
        is_given = setting.origin != "default" and not (key == "vocab_size" and setting.origin.startswith("arch "))
        if not is_given:
            values[written] = value
        elif setting.value != value:
            contradictions.append(f"{key} is {setting.value} ({setting.origin}), but {value} in the checkpoint")
    if contradictions:
        raise UserError(
            f"{origin} has another shape:\n"
            + "\n".join(contradictions)
            + f"\nLeave arch and these options out: `model: {model.component.name}` takes them from the checkpoint."
        )
    try:
        return resolved.with_values(values, origin)
    except UserError as problem:
        raise UserError(f"{origin}: {problem}") from None
