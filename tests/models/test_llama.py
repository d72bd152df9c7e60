"""The LLaMA family: published sizes, and what each option means, in plain transformers."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers import LlamaForCausalLM

from panda.models.llama import LlamaOptions
from panda.models.llama import build_llama
from panda.registry import Catalog
from panda.registry import UserError
from panda.registry.contexts import ModelContext
from panda.registry.options import build

CONTEXT = ModelContext(vocab_size=259, max_seq_length=64, pad_token_id=0, bos_token_id=1, eos_token_id=2)
SHAPE = {"hidden_size": 32, "intermediate_size": 48, "num_layers": 2, "num_heads": 4}
PLAIN_SHAPE = {
    "vocab_size": 259,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}

PUBLISHED = {
    "llama-1.3b": 1_345_423_360,  # princeton-nlp/Sheared-LLaMA-1.3B
    "llama-7b": 6_738_415_616,
    "llama-13b": 13_015_864_320,
    "llama-33b": 32_528_943_616,
    "llama-65b": 65_285_660_672,
    "llama2-7b": 6_738_415_616,
    "llama2-13b": 13_015_864_320,
    "llama2-70b": 68_976_648_192,
    "llama3-8b": 8_030_261_248,
    "llama3-70b": 70_553_706_496,
    "llama3.2-1b": 1_235_814_400,
    "llama3.2-3b": 3_212_749_824,
    "smollm2-135m": 134_515_008,
    "smollm2-360m": 361_821_120,
    "smollm2-1.7b": 1_711_376_384,
}
"""Parameters of the checkpoints on the hub, as their safetensors headers add up."""


def built(values: dict[str, Any], context: ModelContext = CONTEXT) -> Any:
    return build_llama(build(LlamaOptions, values), context)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_full_size_arch_has_the_published_parameters(name: str) -> None:
    catalog = Catalog()
    component = catalog.load(catalog.find("arch", name))
    assert component is not None
    with torch.device("meta"):
        model = built(component.factory())
    assert sum(parameter.numel() for parameter in model.parameters()) == PUBLISHED[name]


def test_every_arch_of_the_document_of_llama_is_here() -> None:
    names = {offer.name for offer in Catalog().offers("arch")}
    assert names >= {*PUBLISHED, "llama-tiny", "llama-125m", "llama-30b"}


LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "original_max_position_embeddings": 16,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "grouped queries": ({"num_key_value_heads": 2}, {"num_key_value_heads": 2}),
    "tied": ({"tie_word_embeddings": True}, {"tie_word_embeddings": True}),
    "bias": ({"attention_bias": True}, {"attention_bias": True}),
    "linear": (
        {"rope_scaling": "linear", "rope_scaling_factor": 4},
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}},
    ),
    "dynamic": (
        {"rope_scaling": "dynamic", "rope_scaling_factor": 2, "max_position_embeddings": 16},
        {
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0},
            "max_position_embeddings": 16,
        },
    ),
    "llama3": (
        {
            "rope_scaling": "llama3",
            "rope_scaling_factor": 8,
            "rope_theta": 500,
            "rope_original_max_position_embeddings": 16,
        },
        {"rope_parameters": LLAMA3},
    ),
}
"""Options of panda's, and what they are in a LlamaConfig."""


def logits(model: Any) -> torch.Tensor:
    ids = torch.arange(96).reshape(2, 48) * 7 % 259
    result: torch.Tensor = model.eval()(ids).logits
    return result


def of_seed(make: Any) -> Any:
    torch.manual_seed(3)
    model = make()
    with torch.no_grad():  # far from zero, so that a change of any part is seen
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.3)
    return model


@pytest.mark.parametrize("name", VARIANTS)
def test_an_option_means_what_it_means_in_transformers(name: str) -> None:
    ours, theirs = VARIANTS[name]
    context = ModelContext(259, min(64, ours.get("max_position_embeddings", 64)), 0, 1, 2)
    expected = logits(of_seed(lambda: LlamaForCausalLM(LlamaConfig(**PLAIN_SHAPE | theirs))))
    got = logits(of_seed(lambda: built(SHAPE | {"max_position_embeddings": 64} | ours, context)))
    assert torch.equal(got, expected)
    plain = of_seed(lambda: LlamaForCausalLM(LlamaConfig(**PLAIN_SHAPE)))
    if [p.shape for p in plain.parameters()] == [p.shape for p in built(SHAPE | ours).parameters()]:
        assert not torch.allclose(logits(plain), expected, atol=1e-2), "the option makes a difference"


@pytest.mark.parametrize("name", VARIANTS)
def test_options_are_read_back_from_the_config_that_they_make(name: str) -> None:
    values = SHAPE | {"max_position_embeddings": 64, "vocab_size": 300} | VARIANTS[name][0]
    model = built(values, ModelContext(259, 16, 0, 1, 2))
    found = LlamaOptions.of_checkpoint(model.config.to_dict())
    assert {key: found[key] for key in values} == values
    again = build_llama(build(LlamaOptions, found), ModelContext(259, 16, 0, 1, 2))
    assert again.config.to_dict() == model.config.to_dict()


def test_the_older_of_two_keys_of_rope_counts_as_in_transformers() -> None:
    file = {
        **{"model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1},
        **{"num_attention_heads": 2, "max_position_embeddings": 16, "original_max_position_embeddings": 4},
        "rope_scaling": {**LLAMA3, "factor": 2.0, "original_max_position_embeddings": 8, "rope_theta": 100.0},
        "rope_parameters": LLAMA3,
    }
    theirs = LlamaConfig(**copy.deepcopy(file)).rope_parameters
    found = LlamaOptions.of_checkpoint(file)
    assert (theirs["factor"], theirs["rope_theta"], theirs["original_max_position_embeddings"]) == (
        *(found["rope_scaling_factor"], found["rope_theta"], found["rope_original_max_position_embeddings"]),
    )
    assert (found["rope_scaling_factor"], found["rope_theta"]) == (2.0, 100.0)


def test_a_config_of_older_transformers_is_read() -> None:
    old = {
        "model_type": "llama",
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "rope_theta": 500000.0,
        "rope_scaling": {"type": "linear", "factor": 2.0},
    }
    found = LlamaOptions.of_checkpoint(old)
    assert (found["rope_theta"], found["rope_scaling"], found["rope_scaling_factor"]) == (500000.0, "linear", 2.0)
    assert (found["num_key_value_heads"], found["vocab_size"], found["rms_norm_eps"]) == (4, 32000, 1e-6)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"hidden_size": 30}, "hidden_size 30 is not divisible by num_heads 4"),
        ({"num_key_value_heads": 3}, "num_heads 4 is not divisible by num_key_value_heads 3"),
        ({"rope_scaling": "linear"}, "they need each other"),
        ({"rope_scaling_factor": 2.0}, "they need each other"),
        ({"rope_original_max_position_embeddings": 8}, "only used with `rope_scaling: llama3`"),
    ],
)
def test_values_that_do_not_go_together_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build(LlamaOptions, SHAPE | values)


@pytest.mark.parametrize(("key", "value"), [("hidden_act", "sylu"), ("head_dim", 0), ("head_dim", -8)])
def test_a_config_of_which_transformers_makes_no_model_is_an_error_in_words(key: str, value: Any) -> None:
    config = LlamaConfig(**PLAIN_SHAPE).to_dict() | {key: value}
    context = replace(ModelContext(259, 64, 0, 1, 2), config=config)
    with pytest.raises(UserError, match=r"transformers makes no LLaMA of the config.json of the model: [A-Z].*Error"):
        built(SHAPE, context)


def test_a_checkpoint_of_another_kind_is_refused() -> None:
    with pytest.raises(UserError, match="model_type is 'gpt2'"):
        LlamaOptions.of_checkpoint({"model_type": "gpt2"})
    with pytest.raises(UserError, match="scales RoPE by 'yarn'"):
        LlamaOptions.of_checkpoint({"model_type": "llama", "rope_parameters": {"rope_type": "yarn"}})
