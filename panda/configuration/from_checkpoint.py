"""What a checkpoint determines in the configuration of a run: model options, tokenizer and vocabulary."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from panda.registry import UserError
from panda.registry.options import options_of
from panda.registry.resolve import Resolved
from panda.weights.formats import CONFIG
from panda.weights.formats import META
from panda.weights.pretrained import Pretrained
from panda.weights.tokenizers import TOKENIZER


def follow_checkpoint(resolved: Resolved, pretrained: Pretrained) -> Resolved:
    """``resolved`` with what its checkpoint determines: options of the model that were not set, and the tokenizer.

    Raises UserError if an option that was set contradicts the checkpoint.
    """
    settings = resolved.settings
    origin = f"checkpoint {pretrained.folder}"
    if hasattr(resolved.components["model"].component.options, "of_checkpoint"):
        stated = _Stated(pretrained.config)
        stated.file = pretrained.config_file
        resolved = _follow_options(resolved, stated, origin)
    core = resolved.core
    positions = pretrained.config.get("max_position_embeddings")
    if positions is not None and core.max_seq_length > positions:
        raise UserError(
            f"max_seq_length: {core.max_seq_length} ({settings['max_seq_length'].origin}), but {pretrained.folder} is"
            f" made for {positions} positions (max_position_embeddings in its {CONFIG}). Lower max_seq_length."
        )
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


def config_for(pretrained: Pretrained, entries: int, *, extend: bool) -> Mapping[str, Any]:
    """``pretrained.config``, with enough rows in its vocabulary for a tokenizer of ``entries`` entries.

    Raises UserError if the checkpoint has fewer rows, unless ``extend`` says that rows may be added.
    """
    rows = pretrained.config.get("vocab_size")
    if rows is None or entries <= rows:
        return pretrained.config
    if not extend:
        raise UserError(
            f"tokenizer: it has {entries:,} entries, and the checkpoint in {pretrained.folder} has {rows:,} rows for"
            " them (vocab_size). Is it the tokenizer of these weights? If entries were added to it, `--extend_vocab`"
            " adds rows, each the mean of the existing ones."
        )
    return {**pretrained.config, "vocab_size": entries}


class _Stated(dict[str, Any]):
    """The configuration of a checkpoint, for a model to read: a missing key raises UserError."""

    file: Path

    def __missing__(self, key: str) -> Any:
        raise UserError(f"{self.file}: it does not state {key!r}. Is it the complete configuration of these weights?")


def _follow_options(resolved: Resolved, config: _Stated, origin: str) -> Resolved:
    """``resolved`` with the options of the model that ``config`` determines.

    Raises UserError for an option that was set to another value.
    """
    model = resolved.components["model"]
    options_class: Any = model.component.options
    known = options_of(options_class)
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
