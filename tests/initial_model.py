"""A plain transformers model with the weights with which a run of panda starts."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM

from panda.models.initialisation.creation import without_weights
from panda.models.initialisation.drawing import initial_weights


def without(config: Any) -> Any:
    """The causal language model of ``config``, its parameters on the meta device."""
    with without_weights():
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def initial_model(config: Any, seed: int) -> Any:
    """The causal language model of ``config``, its weights drawn by ``seed``."""
    weights = initial_weights(without(config), seed)
    assert weights is not None
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict({name: stored.read() for name, stored in weights.items()}, strict=False)
    return model.train()
