"""Weights that are drawn when they are read are those that the module would have had from the beginning."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers import Gemma2Config
from transformers import GPT2Config
from transformers import LlamaConfig
from transformers import LlamaForCausalLM
from transformers import OPTConfig

from panda.models.initialisation.drawing import drawn_later
from panda.run.assembly import seed_random

SHAPE: dict[str, Any] = {
    "vocab_size": 259,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
OPT = {"ffn_dim": 48, "word_embed_proj_dim": 16}


def by_hand() -> torch.nn.Module:
    """Draws in several steps, on parts, and beside parameters."""
    layer = torch.nn.Linear(50, 51)
    torch.nn.init.xavier_normal_(layer.weight)
    with torch.no_grad():
        layer.weight[3:7].fill_(2)
        layer.weight[:, 1].uniform_()
        layer.weight.mul_(3).add_(1)
        layer.bias.copy_(torch.randn(51))
    layer.drawn_before = torch.nn.Parameter(torch.randn(3))
    layer.register_buffer("buffer", torch.rand(2))
    return layer


def orthogonal() -> torch.nn.Module:
    """Looks at what it drew, which cannot be done later."""
    layer = torch.nn.Linear(5, 5)
    torch.nn.init.orthogonal_(layer.weight)
    return layer


def truncated() -> torch.nn.Module:
    """Draws again what is too large."""
    layer = torch.nn.Linear(50, 51)
    torch.nn.init.trunc_normal_(layer.weight, std=2.0)
    return layer


def by_chance() -> torch.nn.Module:
    """Draws from numpy and Python, too, and then does what cannot be done later."""
    layer = torch.nn.Linear(5, 5)
    with torch.no_grad():
        layer.weight.fill_(random.random())
        layer.bias.fill_(np.random.rand())
        layer.weight.add_(float(layer.weight.sum()))
    return layer


def given_data() -> torch.nn.Module:
    layer = torch.nn.Linear(5, 5)
    layer.weight.data = torch.randn(5, 5)
    return layer


def through_numpy() -> torch.nn.Module:
    layer = torch.nn.Linear(5, 5)
    layer.weight.detach().numpy()[:] = np.eye(5)
    return layer


def goes_on_from_notes() -> torch.nn.Module:
    """Catches what says that something cannot be noted."""
    layer = torch.nn.Linear(5, 5)
    try:
        torch.nn.init.orthogonal_(layer.weight)
    except Exception:
        torch.nn.init.zeros_(layer.weight)
    return layer


def goes_on_from_torch() -> torch.nn.Module:
    """Catches what torch says of the meta device."""
    layer = torch.nn.Linear(5, 5)
    try:
        layer.weight.data = torch.randn(5, 5)
    except Exception:
        torch.nn.init.zeros_(layer.weight)
    return layer


def written_by_another_name() -> torch.nn.Module:
    layer, weight = torch.nn.Module(), torch.empty(4, 4)
    layer.weight = torch.nn.Parameter(weight)
    weight.fill_(2)
    return layer


def written_by_another_name_in_numpy() -> torch.nn.Module:
    layer, weight = torch.nn.Module(), torch.empty(4, 4)
    array = weight.numpy()
    layer.weight = torch.nn.Parameter(weight)
    del weight
    array[:] = 2
    return layer


def written_before_in_numpy() -> torch.nn.Module:
    layer, weight = torch.nn.Module(), torch.empty(4, 4)
    np.asarray(weight)[:] = 2
    weights = [weight]
    del weight
    layer.weight = torch.nn.Parameter(weights.pop())
    return layer


def part_of_another() -> torch.nn.Module:
    layer = torch.nn.Linear(5, 5)
    layer.part = torch.nn.Parameter(layer.weight.detach()[2:])
    return layer


def written_as_another_type() -> torch.nn.Module:
    layer = torch.nn.Linear(4, 4)
    layer.weight.detach().view(torch.int32).fill_(7)
    return layer


def turned() -> torch.nn.Module:
    """Written to through a view that is transposed in place."""
    layer = torch.nn.Linear(4, 4)
    view = layer.weight.detach()
    view.t_()
    view[0].fill_(3)
    return layer


def copied() -> torch.nn.Module:
    return torch.nn.TransformerEncoder(torch.nn.TransformerEncoderLayer(8, 2), 2)


BUILDERS: dict[str, tuple[Callable[[], torch.nn.Module], bool]] = {
    "llama": (lambda: LlamaForCausalLM(LlamaConfig(pad_token_id=0, **SHAPE)), True),
    "tied": (lambda: LlamaForCausalLM._from_config(LlamaConfig(tie_word_embeddings=True, **SHAPE)), True),
    "gpt2": (
        lambda: AutoModelForCausalLM.from_config(GPT2Config(vocab_size=259, n_embd=32, n_layer=2, n_head=2)),
        True,
    ),
    "opt": (lambda: AutoModelForCausalLM.from_config(OPTConfig(**SHAPE | OPT)), True),
    "gemma2": (lambda: AutoModelForCausalLM.from_config(Gemma2Config(head_dim=16, pad_token_id=0, **SHAPE)), True),
    "gru": (lambda: torch.nn.Sequential(torch.nn.Embedding(7, 8, padding_idx=1), torch.nn.GRU(8, 8, 2)), True),
    "convolution": (lambda: torch.nn.Sequential(torch.nn.Conv2d(3, 5, 3), torch.nn.BatchNorm2d(5)), True),
    "by hand": (by_hand, True),
    "truncated": (truncated, False),
    "orthogonal": (orthogonal, False),
    "copied": (copied, False),
    "by chance": (by_chance, False),
    "given data": (given_data, False),
    "through numpy": (through_numpy, False),
    "goes on from notes": (goes_on_from_notes, False),
    "goes on from torch": (goes_on_from_torch, False),
    "written by another name": (written_by_another_name, False),
    "written by another name in numpy": (written_by_another_name_in_numpy, False),
    "written before in numpy": (written_before_in_numpy, False),
    "part of another": (part_of_another, False),
    "written as another type": (written_as_another_type, False),
    "turned": (turned, False),
    "empty": (lambda: torch.nn.Linear(0, 4), True),
}
"""What builds a module, and whether its weights can be left for later."""


@pytest.mark.parametrize("name", BUILDERS)
def test_in_any_order_each_tensor_is_the_same_bits(name: str) -> None:
    build, is_later = BUILDERS[name]
    seed_random(3)
    expected = build()
    generator_after, others_after = torch.get_rng_state(), (random.random(), np.random.rand())
    seed_random(3)
    module, weights = drawn_later(build)
    assert torch.equal(torch.get_rng_state(), generator_after)
    assert (random.random(), np.random.rand()) == others_after
    state = expected.state_dict()
    assert len(weights) == len({id(tensor) for tensor in expected.state_dict(keep_vars=True).values()})
    for key in reversed(weights):
        for _ in range(2):
            assert torch.equal(weights[key].read(), state[key]), key
            torch.rand(1)  # whatever is drawn in between
    matrices = [parameter for parameter in module.parameters() if parameter.dim() > 1]
    assert all(parameter.is_meta == is_later for parameter in matrices)


def test_reading_leaves_the_generator_alone() -> None:
    _, weights = drawn_later(BUILDERS["llama"][0])
    before = torch.get_rng_state()
    for stored in weights.values():
        stored.read()
    assert torch.equal(torch.get_rng_state(), before)


def test_an_error_of_the_model_is_the_one_that_building_it_raises() -> None:
    def build() -> torch.nn.Module:
        torch.nn.Linear(2, 2)
        raise ValueError("hidden_size")

    with pytest.raises(ValueError, match=r"^hidden_size$") as caught:
        drawn_later(build)
    assert caught.value.__context__ is None


def test_modules_and_tensors_built_afterwards_are_as_ever() -> None:
    drawn_later(BUILDERS["gru"][0])
    with torch.device("meta"):
        assert torch.nn.Linear(2, 2).weight.is_meta
    assert not torch.nn.Linear(2, 2).weight.is_meta
