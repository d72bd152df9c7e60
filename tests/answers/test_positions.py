"""Which models cannot take more tokens than they have positions: as transformers' forward shows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig
from transformers import AutoModelForCausalLM

from panda.answers.positions import held_positions

SMALL = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
MODELS: dict[str, tuple[dict[str, Any], int | None]] = {
    "gpt2": ({"vocab_size": 50, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 24}, 24),
    "gptj": ({"vocab_size": 50, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 24, "rotary_dim": 4}, 24),
    "gpt_neo": (
        {**SMALL, "num_heads": 2, "num_layers": 1, "attention_types": [[["global"], 1]], "max_position_embeddings": 24},
        24,
    ),
    "opt": ({**SMALL, "ffn_dim": 16, "word_embed_proj_dim": 16, "max_position_embeddings": 24}, 24),
    "biogpt": ({**SMALL, "intermediate_size": 16, "max_position_embeddings": 24}, 24),
    "roberta": ({**SMALL, "intermediate_size": 16, "max_position_embeddings": 26, "is_decoder": True}, 24),
    "llama": ({**SMALL, "intermediate_size": 16, "max_position_embeddings": 24}, None),
    "gpt_neox": ({**SMALL, "intermediate_size": 16, "max_position_embeddings": 24}, None),
    "bloom": ({"vocab_size": 50, "hidden_size": 16, "n_layer": 1, "n_head": 2}, None),
    "mamba": ({"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 1, "state_size": 4}, None),
}


@pytest.mark.parametrize("kind", MODELS)
def test_the_positions_of_models_of_transformers(kind: str) -> None:
    config, positions = MODELS[kind]
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **config)).eval()
    assert held_positions(model) == positions
    ids = torch.arange(positions or 40)[None] % 40 + 3
    model(ids)
    if positions is not None:
        with pytest.raises((IndexError, RuntimeError)):
            model(torch.arange(positions + 1)[None] % 40 + 3)


def test_the_positions_of_a_model_of_another_package() -> None:
    class Other(torch.nn.Module):
        def __init__(self, **tables: Any) -> None:
            super().__init__()
            for name, table in tables.items():
                setattr(self, name, table)

    assert held_positions(Other(position=torch.nn.Parameter(torch.zeros(1, 24, 8)))) == 24
    assert held_positions(Other(pos_emb=torch.nn.Embedding(24, 8), wte=torch.nn.Embedding(9, 8))) == 24
    assert held_positions(Other(decomposition=torch.nn.Parameter(torch.zeros(24, 8)))) is None
