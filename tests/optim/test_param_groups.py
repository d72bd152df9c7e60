"""Which parameters are stepped together."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from panda.configuration.options import RunOptions
from panda.configuration.options import rate_multipliers
from panda.optim.param_groups import param_groups
from panda.registry import UserError


def build(**modules: nn.Module) -> nn.Module:
    return nn.ModuleDict(modules)


def grouped(module: nn.Module) -> list[list[str]]:
    names = {parameter: name for name, parameter in module.named_parameters()}
    return [[names[p] for p in group["params"]] for group in param_groups(module, learning_rate=1, weight_decay=0)]


def test_each_layer_is_a_group_and_what_is_outside_the_layers_one_together() -> None:
    layers = nn.ModuleList(nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2, bias=False)}) for _ in range(11))
    module = build(embed=nn.Embedding(3, 2), layers=layers, norm=nn.LayerNorm(2))
    first, *others = grouped(module)
    assert first == ["embed.weight", "norm.weight", "norm.bias"]
    assert others == [[f"layers.{n}.a.weight", f"layers.{n}.a.bias", f"layers.{n}.b.weight"] for n in range(11)]


def test_a_layer_is_told_by_its_first_number() -> None:
    experts = nn.ModuleList(nn.ModuleDict({"experts": nn.ModuleList([nn.Linear(1, 1, bias=False)] * 1)}) for _ in "ab")
    assert grouped(build(layers=experts)) == [["layers.0.experts.0.weight"], ["layers.1.experts.0.weight"]]
    linears = [nn.Linear(1, 1, bias=False) for _ in range(4)]
    nested = nn.Sequential(nn.Sequential(*linears[:2]), nn.Sequential(*linears[2:]))
    assert grouped(nested) == [["0.0.weight", "0.1.weight"], ["1.0.weight", "1.1.weight"]]


def test_a_number_inside_a_word_is_no_layer() -> None:
    module = build(fc1=nn.Linear(1, 1, bias=False), fc2=nn.Linear(1, 1, bias=False))
    assert grouped(module) == [["fc1.weight", "fc2.weight"]]


def described(module: nn.Module, **options: Any) -> dict[str, tuple[float, float]]:
    """Rate and decay of each parameter, for a rate of 1 and a decay of 0.5."""
    names = {parameter: name for name, parameter in module.named_parameters()}
    groups = param_groups(module, learning_rate=1, weight_decay=0.5, **options)
    return {names[p]: (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}


def test_matrices_alone_can_be_decayed() -> None:
    head, embed = nn.Linear(2, 3, bias=False), nn.Embedding(3, 2)
    tied = nn.Linear(2, 3)
    tied.weight = embed.weight
    module = build(embed=embed, layers=nn.ModuleList([nn.Linear(2, 2)]), norm=nn.LayerNorm(2), head=head, tied=tied)
    decays = {name: decay for name, (_, decay) in described(module, decay_on="matrices").items()}
    assert decays == {
        "embed.weight": 0,
        "layers.0.weight": 0.5,
        "layers.0.bias": 0,
        "norm.weight": 0,
        "norm.bias": 0,
        "head.weight": 0.5,
        "tied.bias": 0,
    }


def test_new_rows_of_an_embedding_and_biases_of_experts_are_no_matrices_either() -> None:
    from peft import LoraConfig
    from peft import get_peft_model

    model: Any = build(embed=nn.Embedding(3, 2), layer=nn.Linear(2, 2), head=nn.Linear(2, 3, bias=False))
    rows = {"embed": [1, 2], "head": [1, 2]}
    adapted: Any = get_peft_model(model, LoraConfig(r=2, target_modules=["layer"], trainable_token_indices=rows))
    adapted.experts = nn.ParameterDict({"up_proj_bias": torch.zeros(4, 2), "up_proj": torch.zeros(4, 2, 2)})
    assert {decay for _, decay in described(adapted).values()} == {0.5}, "all are decayed by default"
    found = {name: decay for name, (_, decay) in described(adapted, decay_on="matrices").items()}
    assert {name.removeprefix("base_model.model."): decay for name, decay in found.items()} == {
        "embed.token_adapter.trainable_tokens_delta.default": 0,
        "layer.lora_A.default.weight": 0.5,
        "layer.lora_B.default.weight": 0.5,
        "head.token_adapter.trainable_tokens_delta.default": 0.5,
        "experts.up_proj_bias": 0,
        "experts.up_proj": 0.5,
    }


def test_an_embedding_of_which_tensor_parallel_ranks_have_parts_is_no_matrix_either(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It is a class of FairScale's, and not one of torch's."""
    from fairscale.nn.model_parallel import layers

    monkeypatch.setattr(layers, "get_model_parallel_world_size", lambda: 2)
    monkeypatch.setattr(layers, "get_model_parallel_rank", lambda: 1)
    module = build(embed=layers.VocabParallelEmbedding(4, 2), head=nn.Linear(2, 4, bias=False))
    decays = {name: decay for name, (_, decay) in described(module, decay_on="matrices").items()}
    assert decays == {"embed.weight": 0, "head.weight": 0.5}


def test_the_first_multiplier_whose_pattern_matches_scales_the_rate() -> None:
    module = build(embed=nn.Embedding(3, 2), layers=nn.ModuleList(nn.Linear(2, 2) for _ in range(2)))
    rates = described(module, multipliers={"layers.0.*": 0.1, "*.bias": 3.0, "embed.weight": 0.5})
    assert {name: rate for name, (rate, _) in rates.items()} == {
        "embed.weight": 0.5,
        "layers.0.weight": 0.1,
        "layers.0.bias": 0.1,
        "layers.1.weight": 1,
        "layers.1.bias": 3,
    }


def test_a_pattern_that_matches_nothing_is_an_error_with_the_names() -> None:
    with pytest.raises(UserError, match=r"\*wte\* matches no parameter. The parameters are: embed.weight, head.weight"):
        described(build(embed=nn.Embedding(3, 2), head=nn.Linear(2, 3)), multipliers={"*wte*": 0.1})


@pytest.mark.parametrize(
    "text", ["embed", "=0.1", "embed=", "embed=x", "embed=0", "embed=-1", "embed=inf", "embed=nan"]
)
def test_what_is_no_multiplier_is_told_at_once(text: str) -> None:
    with pytest.raises(UserError, match="is not PATTERN=FACTOR"):
        RunOptions(lr_multipliers=(text,))


def test_a_pattern_may_hold_an_equals_sign() -> None:
    assert rate_multipliers(("a=b*=0.5", "c=2")) == {"a=b*": 0.5, "c": 2.0}


def test_every_group_has_the_rate_and_the_decay() -> None:
    module = build(norm=nn.LayerNorm(2), layers=nn.ModuleList([nn.Linear(2, 2)]))
    groups = param_groups(module, learning_rate=0.3, weight_decay=0.1)
    assert [(group["lr"], group["weight_decay"]) for group in groups] == [(0.3, 0.1)] * 2


def test_frozen_parameters_are_left_out_and_leave_no_empty_group() -> None:
    module = build(layers=nn.ModuleList(nn.Linear(2, 2) for _ in range(3)), head=nn.Linear(2, 2))
    module.get_parameter("layers.1.weight").requires_grad_(False)
    for parameter in module.get_submodule("layers.2").parameters():
        parameter.requires_grad_(False)
    assert grouped(module) == [["layers.0.weight", "layers.0.bias"], ["layers.1.bias"], ["head.weight", "head.bias"]]


def test_a_shared_parameter_is_in_one_group_once() -> None:
    head, embed = nn.Linear(2, 3, bias=False), nn.Embedding(3, 2)
    head.weight = embed.weight
    assert grouped(build(embed=embed, layers=nn.ModuleList([head]))) == [["embed.weight"]]


def test_a_matrix_whose_weights_are_spread_is_a_matrix() -> None:
    """Under ZeRO-3 a parameter that has been spread is an empty vector, and says what shape it has."""
    module: Any = nn.Linear(2, 3)
    module.weight.ds_shape, module.weight.data = module.weight.shape, torch.empty(0)
    decays = [
        each["weight_decay"] for each in param_groups(module, learning_rate=0.3, weight_decay=0.1, decay_on="matrices")
    ]
    assert decays == [0.1, 0.0]


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_the_groups_suit_torch_optimizers(optimizer: Any) -> None:
    module = build(layers=nn.ModuleList(nn.Linear(2, 2) for _ in range(3)))
    built = optimizer(param_groups(module, learning_rate=0.3, weight_decay=0.1))
    assert sum(len(group["params"]) for group in built.param_groups) == len(list(module.parameters()))
