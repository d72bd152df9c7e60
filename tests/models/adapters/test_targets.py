"""What `lora_target_modules` says: ends of names, several in a text, patterns, all linear layers."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from checkpoint_files import llama
from checkpoint_files import qwen3_moe
from transformers import AutoConfig
from transformers import AutoModelForCausalLM
from transformers import GPT2Config
from transformers import GPT2LMHeadModel

from panda.configuration.arguments import parse_arguments
from panda.configuration.configure import configure
from panda.configuration.options import RunOptions
from panda.models.adapters.experts import written_names
from panda.models.adapters.lora import add_adapters
from panda.models.adapters.lora import left_bare
from panda.registry import UserError

ALL = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def adapted(model: Any, *written: str) -> set[str]:
    """The layers that have adapters, without the prefixes of peft and the model."""
    found = add_adapters(model, RunOptions(use_lora=True, lora_r=2, lora_target_modules=written))
    layers = {name.partition(".lora_A")[0] for name, _ in found.named_parameters() if ".lora_A." in name}
    return {name.removeprefix("base_model.model.").removeprefix("model.layers.") for name in layers}


QV = {f"{layer}.self_attn.{name}" for layer in (0, 1) for name in ("q_proj", "v_proj")}
SECOND = {f"1.mlp.{name}" for name in ("gate_proj", "up_proj", "down_proj")}


@pytest.mark.parametrize(
    ("written", "layers"),
    [
        (("q_proj", "v_proj"), QV),
        (("q_proj, v_proj",), QV),
        (("q_proj,", "v_proj"), QV),
        ((r".*\.(q|v)_proj",), QV),
        (("(q|v)_proj",), QV),
        (("*.[qv]_proj",), QV),
        (("*.self_attn.q_proj", "v_proj"), QV),
        ((r"model\.layers\.[0-9]{1,2}\.self_attn\.(q|v)_proj",), QV),
        ((r"layers\.1\.mlp\..*",), SECOND),
        (("model.layers.1.mlp.*",), SECOND),
        (("0.self_attn.q_proj",), {"0.self_attn.q_proj"}),
        (("lm_head",), {"lm_head"}),
    ],
)
def test_names_and_patterns_mean_what_they_say(written: tuple[str, ...], layers: set[str]) -> None:
    assert adapted(llama(), *written) == layers


@pytest.mark.parametrize("written", [(), ("all-linear",)])
def test_all_linear_layers_but_the_head(written: tuple[str, ...]) -> None:
    assert {name.rpartition(".")[2] for name in adapted(llama(), *written)} == ALL


def test_the_layers_of_gpt2_can_be_named() -> None:
    def gpt2() -> Any:
        return GPT2LMHeadModel(GPT2Config(vocab_size=10, n_embd=8, n_layer=1, n_head=2, n_positions=8))

    assert adapted(gpt2(), "h.*.attn.c_*") == {"transformer.h.0.attn.c_attn", "transformer.h.0.attn.c_proj"}
    with pytest.raises(UserError, match=r"has no 'q_proj'; it has c_attn, c_fc, c_proj, lm_head"):
        adapted(gpt2(), "q_proj")


@pytest.mark.parametrize("written", ["q_prj", "*.q_prj", r"layers\.7\..*", "q_proj, v_prj", "self_attn", "layers.0"])
def test_what_matches_nothing_is_an_error_with_the_names_that_there_are(written: str) -> None:
    with pytest.raises(UserError, match=r"has no '.*'; it has down_proj, gate_proj, k_proj, lm_head, o_proj"):
        adapted(llama(), written)


def mixture() -> Any:
    """One layer without experts, and one with four and a shared one."""
    sizes = {"vocab_size": 20, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "q_lora_rank": 8, "kv_lora_rank": 8}
    width = {"qk_nope_head_dim": 4, "qk_rope_head_dim": 4, "v_head_dim": 4, "moe_intermediate_size": 8}
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}
    return AutoModelForCausalLM.from_config(
        AutoConfig.for_model("deepseek_v3", **sizes, **heads, **width, **experts, first_k_dense_replace=1)
    )


BESIDE_EXPERTS = {
    f"model.layers.{layer}.{name}_proj"
    for layer in ("0.mlp", "1.mlp.shared_experts")
    for name in ("gate", "up", "down")
}


EXPERTS = ["experts.down_proj", "experts.gate_up_proj"]


@pytest.mark.parametrize(
    ("written", "layers", "parameters"),
    [
        (("q_proj,v_proj,experts.gate_up_proj",), {"q_proj", "v_proj"}, EXPERTS[1:]),
        (("q_proj, experts.down_proj",), {"q_proj"}, EXPERTS[:1]),
        (("model.layers.1.mlp.experts.down_proj", "o_proj"), {"o_proj"}, EXPERTS[:1]),
        (("experts.*",), set(), EXPERTS),
        (("*.experts.*", "q_proj"), {"q_proj"}, EXPERTS),
        ((r"layers\.0\..*\.(q|down)_proj",), {"q_proj"}, EXPERTS[:1]),
        (("*.layers.0.*",), {"q_proj", "k_proj", "v_proj", "o_proj"}, EXPERTS),
        (("q_proj,gate",), {"q_proj"}, ["gate"]),
        ((), {"q_proj", "k_proj", "v_proj", "o_proj"}, [*EXPERTS, "gate"]),
    ],
)
def test_experts_are_named_among_layers_and_by_patterns(
    written: tuple[str, ...], layers: set[str], parameters: list[str]
) -> None:
    model = qwen3_moe()
    found = add_adapters(copy.deepcopy(model), RunOptions(use_lora=True, lora_r=2, lora_target_modules=written))
    config: Any = found.peft_config["default"]
    assert {name.rpartition(".")[2] for name in config.target_modules} == layers
    assert written_names(model, config.target_parameters) == parameters
    adapters = [name for name, _ in found.named_parameters() if ".lora_A." in name]
    in_first, in_second = (any(f".{layer}.mlp." in name for name in adapters) for layer in (0, 1))
    assert (in_first, in_second) == ("layers.1" not in str(written), ".0." not in str(written).replace("\\", ""))


def test_layers_that_peft_takes_for_experts_are_named_or_refused() -> None:
    options = RunOptions(use_lora=True, lora_r=2)
    found = add_adapters(mixture(), options)
    without = {
        name for name in BESIDE_EXPERTS if f"base_model.model.{name}.base_layer.weight" not in found.state_dict()
    }
    assert set(left_bare(found, "all-linear")) == without == BESIDE_EXPERTS, "else peft can adapt these by now"
    for written in (("gate_proj", "up_proj", "down_proj"), ("q_a_proj", "layers.0.mlp.down_proj")):
        for dropout in (0.0, 0.05):
            with pytest.raises(UserError, match=r"takes gate_proj, .* for names of experts.*: experts\.down_proj, "):
                add_adapters(mixture(), replace(options, lora_target_modules=written, lora_dropout=dropout))
    named = replace(options, lora_target_modules=("q_a_proj", "experts.down_proj"))
    assert not left_bare(add_adapters(mixture(), named), ["q_a_proj"])


def test_a_router_that_is_a_linear_layer_by_its_class_alone_has_no_adapters() -> None:
    sizes = {"vocab_size": 20, "hidden_size": 16, "intermediate_size": 24, "intermediate_size_mlp": 24}
    heads = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8}
    config = AutoConfig.for_model("llama4_text", **sizes, **heads, num_local_experts=4, interleave_moe_layer_step=2)
    found = add_adapters(AutoModelForCausalLM.from_config(config), RunOptions(use_lora=True, lora_r=2))
    layers = {name.partition(".lora_A")[0].rpartition(".")[2] for name in found.state_dict() if ".lora_A." in name}
    assert layers == ALL
    assert found(input_ids=torch.tensor([[1, 2]])).logits.shape == (1, 2, 20)
    named = RunOptions(use_lora=True, lora_target_modules=("router",))
    with pytest.raises(UserError, match="has no 'router'; it has "):
        add_adapters(AutoModelForCausalLM.from_config(config), named)


def test_a_text_of_yaml_and_words_of_a_command_line_are_the_same() -> None:
    words = configure(
        parse_arguments(["--arch", "llama-tiny", "--use_lora", "--lora_target_modules", "q_proj,", "v_proj"])
    )
    text = configure(parse_arguments(["--arch", "llama-tiny", "--use_lora", "--lora_target_modules", "q_proj, v_proj"]))
    assert adapted(llama(), *words.options.lora_target_modules) == adapted(llama(), *text.options.lora_target_modules)
