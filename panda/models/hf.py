"""Any causal language model that transformers knows, in the shape of a checkpoint."""

from __future__ import annotations

from typing import TYPE_CHECKING

from panda.registry import UserError
from panda.registry import register_model
from panda.registry.contexts import ModelContext
from panda.registry.errors import in_brief

if TYPE_CHECKING:
    import torch


@register_model("hf")
def build_hf(options: object, context: ModelContext) -> torch.nn.Module:
    """The causal language model of the checkpoint at `ckpt_path`, of whatever kind transformers knows."""
    from transformers import AutoConfig
    from transformers import AutoModelForCausalLM
    from transformers.conversion_mapping import get_model_conversion_mapping

    from panda.models.forward.cross_entropy import offer_loss_sum
    from panda.models.forward.packing import tell_packing
    from panda.models.forward.plain_head import has_plain_head
    from panda.models.initialisation.creation import keep_computed_float32

    assert context.config is not None, "refused without ckpt_path"
    import torch

    values = dict(context.config)
    kind = values.pop("model_type")
    try:
        config = AutoConfig.for_model(kind, **values)
        config.use_cache = False  # a cache of keys and values is of no use in training
        model: torch.nn.Module = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
            config, dtype=torch.float32
        )
    except Exception as problem:  # transformers raises what its parsers raise
        own = " Its code comes with it (auto_map), and panda runs none that does." if "auto_map" in values else ""
        raise UserError(
            f"model hf: transformers makes no causal language model of the checkpoint's config.json, of model_type"
            f" {kind!r}: {in_brief(problem)}.{own}"
        ) from problem
    if get_model_conversion_mapping(model, add_legacy=False):  # type: ignore[arg-type]
        raise UserError(
            f"model hf: transformers joins or renames tensors of {kind!r} checkpoints when it loads them (mixtures of"
            " experts, mostly), and panda, which loads them one by one as they are named, does not yet."
        )
    if has_plain_head(model):
        offer_loss_sum(model)
    keep_computed_float32(model)
    tell_packing(model)
    return model
