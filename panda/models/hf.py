"""Any causal language model that transformers knows, in the shape of a checkpoint."""

from __future__ import annotations

from typing import TYPE_CHECKING

from panda.registry import UserError
from panda.registry import register_model
from panda.registry.contexts import ModelContext

if TYPE_CHECKING:
    import torch


@register_model("hf")
def build_hf(options: object, context: ModelContext) -> torch.nn.Module:
    """The causal language model of the checkpoint at `ckpt_path`, of any type that transformers knows."""
    import torch

    from panda.models.causal_lm import build_causal_lm
    from panda.models.causal_lm import is_converted_when_loaded
    from panda.models.forward.cross_entropy import offer_loss_sum
    from panda.models.forward.packed_rows import tell_packing
    from panda.models.forward.plain_head import has_plain_head
    from panda.models.forward.stretched_positions import stretch_by_sample
    from panda.models.initialisation.creation import keep_computed_float32

    assert context.config is not None, "refused without ckpt_path"
    # A cache of keys and values is of no use in training.
    model: torch.nn.Module = build_causal_lm(
        context.config, "model hf: the checkpoint", dtype=torch.float32, use_cache=False
    )
    if is_converted_when_loaded(model):
        raise UserError(
            f"model hf: transformers joins or renames tensors of {context.config['model_type']!r} checkpoints when it"
            " loads them (mostly mixtures of experts). panda loads each tensor by its stored name, and cannot train"
            " such a model yet."
        )
    if has_plain_head(model):
        offer_loss_sum(model)
    keep_computed_float32(model)
    tell_packing(model)
    stretch_by_sample(model, context.max_seq_length)
    return model
