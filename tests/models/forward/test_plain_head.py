"""`--model hf` trains without logits if they are its head's output, and computes them if anything follows the head."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - the customary name
from transformers import CohereConfig
from transformers import FalconConfig
from transformers import Gemma2Config
from transformers import GemmaConfig
from transformers import GPT2Config
from transformers import GraniteConfig
from transformers import MistralConfig
from transformers import OPTConfig
from transformers import PhiConfig
from transformers import Qwen2Config
from transformers import Qwen3Config

from panda.models.hf import HfOptions
from panda.models.hf import build_hf
from panda.models.initialisation.creation import without_weights
from panda.registry.contexts import ModelContext

VOCABULARY = 101
SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}
WITH_IDS = SHAPE | {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
BEFORE = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
CONFIGS: dict[str, tuple[Any, bool]] = {
    "mistral": (MistralConfig(**SHAPE), True),
    "qwen2": (Qwen2Config(**SHAPE), True),
    "qwen3": (Qwen3Config(head_dim=16, **SHAPE), True),
    "gpt2": (GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=2, resid_pdrop=0, embd_pdrop=0), True),
    "falcon": (FalconConfig(**BEFORE), True),
    "gemma": (GemmaConfig(head_dim=16, **WITH_IDS), True),
    "gemma2, which caps logits": (Gemma2Config(head_dim=16, final_logit_softcapping=2.0, **WITH_IDS), False),
    "granite, which divides them": (GraniteConfig(logits_scaling=3.0, **WITH_IDS), False),
    "cohere, which multiplies them": (CohereConfig(logit_scale=0.5, **WITH_IDS), False),
    "phi, which has a bias": (PhiConfig(**SHAPE), False),
    "opt, whose base model is passed over": (
        OPTConfig(**BEFORE, ffn_dim=48, word_embed_proj_dim=16, max_position_embeddings=32),
        False,
    ),
}
"""Configurations, and whether their loss can go without logits."""


def built(config: Any) -> Any:
    context = ModelContext(VOCABULARY, 16, 0, 1, 2, config.to_dict())
    with without_weights():
        model: Any = build_hf(HfOptions(), context)
    model.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


def with_buffers(model: Any, config: Any) -> Any:
    """``model`` with the buffers that ``to_empty`` has emptied."""
    from transformers import AutoModelForCausalLM

    fresh = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for mine, theirs in zip(model.buffers(), fresh.buffers(), strict=True):
        mine.copy_(theirs)
    return model.eval()


@pytest.mark.parametrize("name", CONFIGS)
def test_loss_and_gradients_are_those_of_the_logits(name: str) -> None:
    config, is_plain = CONFIGS[name]
    model = with_buffers(built(config), config)
    assert getattr(model, "sums_loss", False) == is_plain
    if not is_plain:
        return
    generator = torch.Generator().manual_seed(2)
    input_ids = torch.randint(3, VOCABULARY, (3, 11), generator=generator)
    labels = input_ids.clone()
    labels[0, :9] = labels[1, ::2] = -100
    reference = with_buffers(built(config), config).double()
    logits = reference(input_ids).logits[:, :-1]
    expected = F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
    expected.backward()
    loss = model(input_ids, labels=labels)
    loss.backward()
    assert abs(loss - expected) <= 1e-6 * expected
    largest = max(float(p.grad.abs().max()) for p in reference.parameters() if p.grad is not None)
    for (key, mine), theirs in zip(model.named_parameters(), reference.parameters(), strict=True):
        assert (mine.grad - theirs.grad).abs().max() <= 1e-6 * largest, key


@pytest.mark.parametrize("name", ["gemma2, which caps logits", "granite, which divides them"])
def test_what_is_behind_the_head_would_be_lost(name: str) -> None:
    """Taken without asking, the loss of these would be another one."""
    from panda.models.forward.cross_entropy import offer_loss_sum

    config, _ = CONFIGS[name]
    model = with_buffers(built(config), config)
    ids = torch.arange(3, 14)[None]
    expected = F.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:], reduction="sum")
    offer_loss_sum(model)
    assert abs(model(ids, labels=ids) - expected) > 1e-3 * expected
