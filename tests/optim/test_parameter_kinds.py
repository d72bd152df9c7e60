"""Each parameter of a model is known for what it is."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers import GPT2Config
from transformers import LlamaConfig
from transformers import MixtralConfig

from panda.optim.parameter_kinds import describe_parameters

LLAMA: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
MODELS: dict[str, tuple[Any, dict[str, str]]] = {
    "llama": (
        LlamaConfig(**LLAMA, attention_bias=True),
        {
            "*.embed_tokens.weight": "embedding",
            "lm_head.weight": "head",
            "*norm.weight": "norm",
            "*.bias": "bias",
            "*_proj.weight": "matrix",
        },
    ),
    "tied": (
        LlamaConfig(**LLAMA, tie_word_embeddings=True),
        {"*.embed_tokens.weight": "embedding", "*norm.weight": "norm", "*_proj.weight": "matrix"},
    ),
    "gpt2": (  # queries, keys and values are one matrix; positions are a table
        GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2, n_positions=32),
        {"*.wte.weight": "embedding", "*.wpe.weight": "embedding", "*.ln_*": "norm", "*.bias": "bias", "*": "matrix"},
    ),
    "mixtral": (
        MixtralConfig(**LLAMA, num_local_experts=4),
        {
            "*.embed_tokens.weight": "embedding",
            "lm_head.weight": "head",
            "*norm.weight": "norm",
            "*.experts.*": "expert",
            "*": "matrix",
        },
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_kinds_of_transformers_models(name: str) -> None:
    config, expected = MODELS[name]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    described = describe_parameters(model)
    assert [each.name for each in described.values()] == [name for name, _ in model.named_parameters()]
    for parameter, each in described.items():
        assert each.kind == next(kind for pattern, kind in expected.items() if fnmatchcase(each.name, pattern)), each
        assert each.shape == tuple(parameter.shape) and each.split is None
    assert {each.kind for each in described.values()} == set(expected.values())


def test_adapters_and_what_is_frozen() -> None:
    from peft import LoraConfig
    from peft import get_peft_model

    model: Any = AutoModelForCausalLM.from_config(LlamaConfig(**LLAMA))
    targets = ["q_proj", "v_proj"]
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=targets, use_dora=True, modules_to_save=["lm_head"]))
    described = list(describe_parameters(adapted).values())  # type: ignore[arg-type]
    assert {each.kind for each in described if "lora_A" in each.name or "lora_B" in each.name} == {"adapter"}
    assert {each.kind for each in described if "magnitude" in each.name} == {"vector"}
    assert {each.kind for each in described if "lm_head" in each.name} == {"head"}
    assert len(described) == 4 * 3 + 1


ROWS = {"embed_tokens": [48, 49], "lm_head": [48, 49]}
ENDS: dict[str, tuple[bool, dict[str, Any], dict[str, str]]] = {
    "new rows": (
        False,
        {"trainable_token_indices": ROWS},
        {"*.embed_tokens.token_adapter.*": "embedding", "*.lm_head.token_adapter.*": "head"},
    ),
    "one new row": (
        False,
        {"trainable_token_indices": {name: rows[:1] for name, rows in ROWS.items()}},
        {"*.embed_tokens.token_adapter.*": "embedding", "*.lm_head.token_adapter.*": "head"},
    ),
    "new rows of tied ends": (
        True,
        {"trainable_token_indices": {"embed_tokens": [48, 49]}},
        {"*.embed_tokens.token_adapter.*": "embedding"},
    ),
    "whole": (
        False,
        {"modules_to_save": ["embed_tokens", "lm_head"]},
        {"*.embed_tokens.modules_to_save.*": "embedding", "*.lm_head.modules_to_save.*": "head"},
    ),
    "adapted": (  # of the embedding, A is a table itself, with a column for each token
        False,
        {"target_modules": ["q_proj", "embed_tokens", "lm_head"], "use_dora": True},
        {
            "*.lora_embedding_A.*": "embedding",
            "*.lora_embedding_B.*": "adapter",
            "*.lm_head.lora_[AB].*": "adapter",
            "*.lora_magnitude_vector.*": "vector",
        },
    ),
}


@pytest.mark.parametrize("name", ENDS)
def test_what_adapters_train_of_embedding_and_head(name: str) -> None:
    from peft import LoraConfig
    from peft import get_peft_model

    tied, options, expected = ENDS[name]
    model: Any = AutoModelForCausalLM.from_config(LlamaConfig(**LLAMA, tie_word_embeddings=tied))
    adapted = get_peft_model(model, LoraConfig(**{"r": 2, "target_modules": ["q_proj"], **options}))
    of_layers = {"*.q_proj.lora_[AB].*": "adapter"}
    kinds = {each.name: each.kind for each in describe_parameters(adapted).values()}  # type: ignore[arg-type]
    for pattern, kind in (expected | of_layers).items():
        found = {kinds[each] for each in kinds if fnmatchcase(each, pattern)}
        assert found == {kind}, (pattern, kinds)
    assert all(any(fnmatchcase(each, pattern) for pattern in expected | of_layers) for each in kinds)


def test_a_model_that_names_no_output_and_other_shapes() -> None:
    class Mixed(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = torch.nn.Embedding(30, 8)
            self.layers = torch.nn.ModuleList([torch.nn.Linear(8, 30), torch.nn.Conv1d(8, 8, 3), torch.nn.GRU(8, 8)])
            self.inside = torch.nn.Linear(8, 8)
            self.reward = torch.nn.Linear(8, 1)
            self.out = torch.nn.Linear(8, 30)
            self.gain = torch.nn.Parameter(torch.ones(()))
            self.out.weight.split_dimension, self.out.weight.whole_shape = 0, (30, 8)

    described = {each.name: each for each in describe_parameters(Mixed()).values()}
    kinds = {name: each.kind for name, each in described.items()}
    assert kinds == {
        "table.weight": "embedding",
        "layers.0.weight": "matrix",  # as many rows as the table, and in a layer
        "layers.0.bias": "bias",
        "layers.1.weight": "tensor",
        "layers.1.bias": "bias",
        "layers.2.weight_ih_l0": "matrix",
        "layers.2.weight_hh_l0": "matrix",
        "layers.2.bias_ih_l0": "bias",
        "layers.2.bias_hh_l0": "bias",
        "inside.weight": "matrix",
        "inside.bias": "bias",
        "reward.weight": "vector",
        "reward.bias": "bias",
        "out.weight": "head",
        "out.bias": "bias",
        "gain": "vector",
    }
    assert described["out.weight"].split == 0
