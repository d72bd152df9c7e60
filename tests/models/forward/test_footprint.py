"""The activations that a step keeps, read off a trace without data: against arithmetic by hand, and against a model
that runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig
from transformers import AutoModelForCausalLM
from transformers import LlamaConfig
from transformers import LlamaForCausalLM

from panda.configuration.options import RunOptions
from panda.models.adapters.lora import add_adapters
from panda.models.forward.cross_entropy import LOGITS_AT_ONCE
from panda.models.forward.cross_entropy import offer_loss_sum
from panda.models.forward.footprint import Footprint
from panda.models.forward.footprint import footprint
from panda.models.forward.packed_rows import tell_packing

WIDTH, INNER, LAYERS, HEADS, VOCABULARY, LENGTH = 256, 688, 3, 4, 512, 128


def traced(
    *, adapters: RunOptions | None = None, masked: bool = False, kv_heads: int = HEADS, dtype: Any = torch.bfloat16
) -> Footprint:
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=INNER,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=kv_heads,
        use_cache=False,
    )
    with torch.device("meta"):
        model: Any = LlamaForCausalLM(config)
        tell_packing(model)
        offer_loss_sum(model)
        if adapters:
            from panda.models.adapters.one_rounding import round_once

            model = add_adapters(model, adapters)
            round_once(model)
    return footprint(model.to(dtype), length=LENGTH, masked=masked)


LSE = 4 * HEADS
NORM = 4  # fp32, the root of a mean square


def test_a_llama_keeps_what_arithmetic_says() -> None:
    """Bytes a token of a layer in bf16; h is the width, f the inner width."""
    h, f = WIDTH, INNER
    found = traced()
    ((layer, count),) = found.layers
    assert count == LAYERS
    # Two norms (input in fp32, root, result before and after the weight), queries, keys, values, the result of
    # attention, and gate, its SiLU, up, and their product.
    norms = 2 * (4 * h + NORM + 2 * h + 2 * h)
    assert layer.stored == LENGTH * (norms + 3 * 2 * h + 2 * h + LSE + 4 * 2 * f)
    # Compiled: input, residual, both norms' results, queries, keys, values, result; gate, up and product.
    assert layer.compiled == LENGTH * (4 * 2 * h + 3 * 2 * h + 2 * h + LSE + 3 * 2 * f)
    # Selective: input, seven products, attention.
    assert layer.selective == LENGTH * (2 * h + 5 * 2 * h + 2 * 2 * f + 2 * h + LSE)
    assert layer.input == LENGTH * 2 * h
    assert layer.largest == LENGTH * 2 * f
    assert found.attention_width == LAYERS * h
    assert found.kept("full", compiled=False) == LAYERS * layer.input + found.outside
    assert found.kept("none", compiled=True) == LAYERS * layer.compiled + found.outside
    assert found.working("none", compiled=False) == 3 * layer.largest
    assert found.working("full", compiled=False) == layer.stored - layer.input + 3 * layer.largest


def test_adapters_keep_their_inner_results_and_what_dropout_made() -> None:
    h, f, rank = WIDTH, INNER, 16
    plain = traced(adapters=RunOptions(use_lora=True, lora_r=rank, lora_dropout=0.0)).layers[0][0]
    norms = 2 * (4 * h + NORM + 2 * h)  # the weights of norms are frozen
    assert plain.stored == LENGTH * (norms + 3 * 2 * h + 2 * h + LSE + 4 * 2 * f + 7 * 2 * rank)
    dropped = traced(adapters=RunOptions(use_lora=True, lora_r=rank, lora_dropout=0.1)).layers[0][0]
    # Each adapter has an input of its own and its mask; then neither norms' results, nor that product, are kept.
    inputs = 6 * h + f
    assert dropped.stored == plain.stored + LENGTH * (3 * inputs - 2 * 2 * h - 2 * f)
    # Compiled code computes norms and the product again, but not what is drawn.
    assert plain.compiled == LENGTH * (4 * 2 * h + 4 * 2 * h + LSE + 3 * 2 * f + 7 * 2 * rank)
    assert dropped.compiled == LENGTH * (2 * 2 * h + 4 * 2 * h + LSE + 2 * 2 * f + 3 * inputs + 7 * 2 * rank)


def test_a_mask_and_fewer_heads_count() -> None:
    whole, fewer = (traced(kv_heads=heads).layers[0][0].stored for heads in (HEADS, HEADS // 2))
    assert whole - fewer == LENGTH * 2 * 2 * WIDTH // 2
    masked = traced(masked=True).layers[0][0]
    assert masked.stored - whole == 2 * LENGTH**2, "the mask as numbers, in each layer"
    repeated = traced(kv_heads=HEADS // 2, masked=True).layers[0][0]
    assert repeated.stored == masked.stored, "with a mask, keys and values are repeated for each head"


def test_fp32_has_twice_as_much_and_no_copies() -> None:
    h, f = WIDTH, INNER
    layer = traced(dtype=torch.float32).layers[0][0]
    assert layer.input == LENGTH * 4 * h
    assert layer.stored == LENGTH * (2 * (4 * h + NORM + 4 * h + 4 * h) + 4 * 4 * h + LSE + 4 * 4 * f)


def test_the_loss_needs_logits_of_few_tokens_and_the_gradient_of_a_trained_head() -> None:
    found = traced()
    assert found.loss(1) == LENGTH * VOCABULARY * 8 + VOCABULARY * WIDTH * 6
    assert found.loss(10_000) == LOGITS_AT_ONCE * 8 + VOCABULARY * WIDTH * 6
    assert traced(adapters=RunOptions(use_lora=True)).loss(1) == LENGTH * VOCABULARY * 8


FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": 2},
    "qwen3": {"head_dim": 32, "num_key_value_heads": 2},
    "gemma2": {"head_dim": 32, "num_key_value_heads": 2},
    "gpt2": {"n_embd": 64, "n_layer": 3, "n_head": 4, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "olmo2": {"num_key_value_heads": 2},
}


def family(name: str) -> Any:
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4}
    given = FAMILIES[name] if name == "gpt2" else shape | FAMILIES[name]
    config = AutoConfig.for_model(name, vocab_size=128, **given)
    config.use_cache = False
    model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    tell_packing(model)
    return model.train()


@pytest.mark.parametrize("name", FAMILIES)
def test_models_that_run_save_as_much(name: str) -> None:
    torch.manual_seed(0)
    running = family(name)
    parameters = {p.untyped_storage().data_ptr() for p in (*running.parameters(), *running.buffers())}
    saved: dict[int, int] = {}
    alive = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        alive.append(tensor)
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        running.base_model(torch.zeros(1, LENGTH, dtype=torch.int64))
    expected = sum(size for key, size in saved.items() if key not in parameters)
    with torch.device("meta"):
        outline = family(name)
    found = footprint(outline, length=LENGTH, masked=False)
    assert not found.approximate
    assert sum(count for _, count in found.layers) == 3
    assert found.kept("none", compiled=False) == pytest.approx(expected, rel=0.03)
    if name == "llama":  # products over so few terms are computed again
        assert found.layers[0][0].selective == LENGTH * (4 * 64 + 4 * 64 + LSE)


def test_experts_count_as_many_as_a_token_uses() -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 96, "num_hidden_layers": 2}
    kept = {}
    for chosen in (1, 2):
        config = AutoConfig.for_model(
            "qwen3_moe",
            vocab_size=128,
            num_attention_heads=4,
            num_key_value_heads=4,
            head_dim=16,
            num_experts=8,
            num_experts_per_tok=chosen,
            **sizes,
        )
        with torch.device("meta"):
            model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
            tell_packing(model)
        found = footprint(model, length=LENGTH, masked=False)
        assert found.approximate == "experts do the work of those that a token uses"
        kept[chosen] = found.layers[0][0].stored
    # Of one expert more: its input, gate and up in one tensor, the SiLU, their product, its result, and a weight.
    assert kept[2] - kept[1] == pytest.approx(LENGTH * 2 * (64 + 2 * 96 + 96 + 96 + 64), rel=0.1)


def test_a_model_that_needs_values_is_estimated_by_its_linear_layers() -> None:
    class Block(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = torch.nn.Linear(8, 32)

        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            return self.inner(hidden) if bool(hidden.sum() > 0) else hidden

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = torch.nn.Embedding(16, 8)
            self.layers = torch.nn.ModuleList([Block(), Block()])

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.layers[0](self.embed(ids))

    with torch.device("meta"):
        found = footprint(Model(), length=LENGTH, masked=False)
    assert "its forward does not run without data" in found.approximate
    assert [(layer.stored, count) for layer, count in found.layers] == [(LENGTH * 40 * 4, 2)]
