"""Any causal language model that transformers knows: in the shape of a checkpoint, or in one that options describe."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING
from typing import Annotated
from typing import Any

from panda.files.terminal import number_of
from panda.registry import Meta
from panda.registry import UserError
from panda.registry import register_model
from panda.registry.contexts import ModelContext

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class HfOptions:
    """Options of the models of transformers. A checkpoint decides all but the last."""

    hf_model_type: str | None = None
    """For random weights: the type of the model, as `model_type` in a config.json; an arch states it."""
    hf_shape: tuple[str, ...] = ()
    """For random weights: values of its config.json, as `NAME=VALUE` items; an arch states them."""
    hf_config: tuple[str, ...] = ()
    """The same, to change some values of an arch: `num_hidden_layers=2`. Values are JSON: `true`, `null`, `[1, 2]`; any
    other is text."""
    router_aux_loss_coef: Annotated[float, Meta(ge=0)] | None = None
    """For mixtures of experts: weight of the loss that balances the load of the experts, 0 for none. By default the
    checkpoint decides, as in transformers: its `router_aux_loss_coef` if its `output_router_logits` is true, else 0."""

    def __post_init__(self) -> None:
        if self.hf_model_type is None and (self.hf_shape or self.hf_config):
            raise UserError("hf_shape and hf_config are values for a model of type `hf_model_type`: give that too.")
        written_values("hf_shape", self.hf_shape), written_values("hf_config", self.hf_config)

    @property
    def written(self) -> dict[str, Any]:
        """The values of ``hf_shape`` and ``hf_config``, by name."""
        return written_values("hf_shape", self.hf_shape) | written_values("hf_config", self.hf_config)


def written_values(key: str, items: tuple[str, ...]) -> dict[str, Any]:
    """Values by name, from ``NAME=VALUE`` items of option ``key``: JSON where it is, else text.

    Raises UserError for other items.
    """
    values = {}
    for item in items:
        name, separator, text = item.partition("=")
        if not separator or not name.strip():
            raise UserError(f"{key}: {item!r} is not NAME=VALUE. Example: `num_hidden_layers=2`.")
        try:
            values[name.strip()] = json.loads(text)
        except (ValueError, RecursionError):
            values[name.strip()] = text
    return values


@register_model("hf", options=HfOptions)
def build_hf(options: HfOptions, context: ModelContext) -> torch.nn.Module:
    """A causal language model of any type that transformers knows: that of the checkpoint, or of `hf_model_type`."""
    import torch

    from panda.models.causal_lm import build_causal_lm
    from panda.models.forward.cross_entropy import offer_loss_sum
    from panda.models.forward.packed_rows import tell_packing
    from panda.models.forward.plain_head import has_plain_head
    from panda.models.forward.router_loss import offer_router_loss
    from panda.models.forward.stretched_positions import stretch_by_sample
    from panda.models.initialisation.creation import keep_computed_float32

    if context.config is not None:
        _refuse_another_shape(options, context.config)
        config, source = context.config, "model hf: the checkpoint"
    else:
        config, source = _config_of(options, context), "model hf: hf_model_type, hf_shape and hf_config"
    # A cache of keys and values is of no use in training.
    model: torch.nn.Module = build_causal_lm(config, source, dtype=torch.float32, use_cache=False)
    _refuse_small_vocabulary(model, context)
    if has_plain_head(model):
        offer_loss_sum(model)
    keep_computed_float32(model)
    tell_packing(model)
    stretch_by_sample(model, context.max_seq_length)
    if weight := router_loss_weight(options, model):
        offer_router_loss(model, weight)
    return model


def router_loss_weight(options: HfOptions, model: Any) -> float:
    """The weight of the router loss of ``model``; 0 for none.

    Raises UserError where one is asked for that ``model`` does not have.
    """
    from panda.models.forward.router_loss import has_router_loss
    from panda.models.forward.router_loss import own_weight

    asked, origin = options.router_aux_loss_coef, "router_aux_loss_coef"
    if asked is None:
        states = getattr(model.config, "output_router_logits", False)
        asked, origin = own_weight(model) if states else 0.0, "output_router_logits in the checkpoint's config.json"
    if asked and not has_router_loss(model):
        raise UserError(
            f"{origin}: {type(model).__name__} has no router loss that panda knows. Write `router_aux_loss_coef: 0`."
        )
    return asked


def _config_of(options: HfOptions, context: ModelContext) -> dict[str, Any]:
    """The content of a config.json for the model that ``options`` describe."""
    if options.hf_model_type is None:
        raise UserError(
            "model: hf: which model? Name a checkpoint with `ckpt_path`, an `arch`, or with `hf_model_type` a type that"
            " transformers knows."
        )
    tokens = {
        "pad_token_id": context.pad_token_id,
        "bos_token_id": context.bos_token_id,
        "eos_token_id": context.eos_token_id,
    }
    config = {"vocab_size": context.vocab_size} | tokens | options.written | {"model_type": options.hf_model_type}
    positions = config.get("max_position_embeddings")
    if positions is not None and positions < context.max_seq_length:
        raise UserError(
            f"max_seq_length: {context.max_seq_length} exceeds the model's {positions} positions. Lower it, or raise"
            f" them: `hf_config: max_position_embeddings={context.max_seq_length}`."
        )
    return config


def _refuse_another_shape(options: HfOptions, config: Mapping[str, Any]) -> None:
    """Raise UserError where ``options`` describe another model than ``config`` of the checkpoint."""
    said = options.written | ({"model_type": options.hf_model_type} if options.hf_model_type else {})
    said.pop("vocab_size", None)  # a fine-tuned model may have more entries
    different = [
        f"{name} is {value}, but {config[name]} in the checkpoint"
        for name, value in said.items()
        if name in config and config[name] != value
    ]
    if different:
        raise UserError(
            "model hf: the checkpoint has another shape:\n"
            + "\n".join(different)
            + "\nLeave arch, hf_model_type, hf_shape and hf_config out: a checkpoint has its own."
        )


def _refuse_small_vocabulary(model: Any, context: ModelContext) -> None:
    """Raise UserError where ``model`` has fewer entries than the tokenizer."""
    embedding = model.get_input_embeddings()
    rows = getattr(embedding, "num_embeddings", None)
    if rows is not None and rows < context.vocab_size:
        raise UserError(
            f"tokenizer: it has {context.vocab_size:,} entries, and {type(model).__name__} has"
            f" {number_of(rows, 'row')} for them. Is it the tokenizer of this model?"
        )
