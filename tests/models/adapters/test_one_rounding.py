"""Adapted layers give what peft's give, and in 16 bits what peft's round away."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from counted_operations import Operations
from launching import ZERO3_AT_ONCE
from peft import LoraConfig
from peft import get_peft_model
from peft import inject_adapter_in_model
from peft.tuners import lora
from transformers import LlamaConfig
from transformers import LlamaForCausalLM

from panda.configuration.options import RunOptions
from panda.engine.deepspeed_config import deepspeed_config
from panda.engine.engine import Engine
from panda.engine.processes import Processes
from panda.files.compilers import can_compile
from panda.models.adapters import one_rounding
from panda.models.adapters.one_rounding import OneRounding
from panda.models.adapters.one_rounding import round_once
from panda.models.adapters.quantisation import quantise
from panda.models.forward import layers
from panda.models.forward.layers import compile_layers
from panda.models.forward.layers import recompute_activations

CPU = torch.device("cpu")


class Pair(torch.nn.Module):
    """Two linear layers, the first with a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = torch.nn.Linear(24, 40), torch.nn.Linear(40, 24, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.second(torch.tanh(self.first(x)))
        return result


def adapted(module: Any, **config: Any) -> Any:
    """``module`` with adapters that change its output, at a scale that is no power of two."""
    given = {"r": 4, "lora_alpha": 6, "target_modules": "all-linear"} | config
    model = inject_adapter_in_model(LoraConfig(**given), module)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return model.train()


def pair(**config: Any) -> Any:
    torch.manual_seed(0)
    return adapted(Pair(), target_modules=["first", "second"], **config).double()


def rounded_once(model: Any, **keywords: Any) -> Any:
    model = copy.deepcopy(model)
    round_once(model, **keywords)
    assert any(isinstance(module, OneRounding) for module in model.modules())
    return model


def results(model: Callable[..., Any], x: torch.Tensor, parameters: Any, *, of_x: bool = True) -> list[torch.Tensor]:
    """Output, and gradients of ``x`` and of the trained ``parameters``."""
    torch.manual_seed(3)  # dropout
    x = x.detach().requires_grad_(of_x)
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    y = model(x)
    return [y.detach(), *torch.autograd.grad(y.square().sum(), [*([x] if of_x else []), *trained])]


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("config", [{}, {"lora_dropout": 0.3}, {"use_rslora": True}], ids=["plain", "dropout", "rs"])
def test_outputs_and_gradients_are_pefts(config: dict[str, Any], compiled: bool) -> None:
    model, x = pair(**config), torch.randn(2, 5, 24, dtype=torch.float64)
    mine = rounded_once(model)
    for of_x in (True, False):
        expected = results(model, x, model.parameters(), of_x=of_x)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(lora.Linear, "forward", None)  # peft's own is not called
            torch.compiler.reset()
            function = torch.compile(mine, fullgraph=True, backend="aot_eager") if compiled else mine
            found = results(function, x, mine.parameters(), of_x=of_x)
        assert len(found) == len(expected) == 5 + of_x
        for one, other in zip(found, expected, strict=True):
            assert torch.allclose(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("config", [{}, {"lora_dropout": 0.3}, {"use_rslora": True}], ids=["plain", "dropout", "rs"])
def test_without_gradients_outputs_are_pefts(
    monkeypatch: pytest.MonkeyPatch, config: dict[str, Any], compiled: bool
) -> None:
    model, x = pair(**config), torch.randn(2, 5, 24, dtype=torch.float64)
    mine = rounded_once(model)
    torch.manual_seed(3)  # dropout
    expected = model(x).detach()
    monkeypatch.setattr(lora.Linear, "forward", None)  # peft's own is not called
    torch.compiler.reset()
    function = torch.compile(mine, fullgraph=True, backend="aot_eager") if compiled else mine
    torch.manual_seed(3)
    with torch.no_grad():
        assert torch.allclose(function(x), expected, rtol=1e-12, atol=1e-12)


def test_inductor_compiles_it_without_a_break() -> None:
    model, x = pair(), torch.randn(2, 5, 24, dtype=torch.float64)
    mine = rounded_once(model)
    torch.compiler.reset()
    found = results(torch.compile(mine, fullgraph=True), x, mine.parameters())
    for one, other in zip(found, results(model, x, model.parameters()), strict=True):
        assert torch.allclose(one, other, rtol=1e-12, atol=1e-12)


def large_layer(dtype: torch.dtype, device: torch.device = CPU) -> Any:
    """A layer with values of about 1, and an adapter that adds 1/1000 or less to each."""
    torch.manual_seed(0)
    module = torch.nn.ModuleDict({"layer": torch.nn.Linear(256, 256, bias=False)})
    with torch.no_grad():
        module.layer.weight.normal_(std=256**-0.5)
    model = inject_adapter_in_model(LoraConfig(r=8, lora_alpha=8, target_modules=["layer"]), module)
    for name, parameter in model.named_parameters():
        if "lora" in name:
            torch.nn.init.uniform_(parameter, 0.0, 2e-2 if "lora_A" in name else 1e-4)
    return model.to(device, dtype)["layer"]


@pytest.mark.parametrize("once", [False, True], ids=["peft", "once"])
def test_in_16_bits_a_small_update_has_its_size_on_average(once: bool) -> None:
    shares = _moved(large_layer(torch.bfloat16), once)
    if once:
        assert shares == pytest.approx([1.0, 1.0], abs=0.05)
    else:
        assert max(shares) < 0.6  # what this is about


@pytest.mark.parametrize("once", [False, True], ids=["peft", "once"])
def test_in_16_bits_a_small_update_changes_the_loss_as_in_32(once: bool) -> None:
    exact = with_adapters(llama(hidden=128)).bfloat16().float()
    rounded = copy.deepcopy(exact).bfloat16()
    if once:
        round_once(rounded)
    ids = torch.randint(0, 53, (48, 96), generator=torch.Generator().manual_seed(0))

    def loss(model: Any) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(model(ids).logits.double().flatten(0, 1), ids.roll(1).flatten())

    def b_of(model: Any) -> list[torch.nn.Parameter]:
        return [parameter for name, parameter in model.named_parameters() if "lora_B" in name]

    def change(model: Any) -> float:
        """Of the loss, by a step from adapters without effect along the gradient in float32."""
        losses = []
        with torch.no_grad():
            for length in (0.0, 0.01):
                for parameter, gradient in zip(b_of(model), gradients, strict=True):
                    parameter.copy_(-length * gradient)
                losses.append(loss(model).item())
        return losses[1] - losses[0]

    for parameter in b_of(exact):
        torch.nn.init.zeros_(parameter)
    gradients = torch.autograd.grad(loss(exact), b_of(exact))
    norm = torch.stack([gradient.square().sum() for gradient in gradients]).sum().sqrt()
    gradients = tuple(gradient / norm for gradient in gradients)
    share = change(rounded) / change(exact)
    assert (0.75 < share < 1.25) if once else share < 0.5, share


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("tokens", [32, 4096], ids=["in float32", "by the kernel, on a Hopper"])
def test_on_a_gpu_too(tokens: int) -> None:
    layer = large_layer(torch.bfloat16, torch.device("cuda"))
    assert _moved(layer, True, tokens) == pytest.approx([1.0, 1.0], abs=0.05 if tokens > 1000 else 0.3)


ON_HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9


@pytest.mark.skipif(not ON_HOPPER, reason="no Hopper GPU")
@pytest.mark.parametrize("way", ["kept", "selective", "full"])
def test_compiled_code_launches_the_kernel_itself(monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    """With the same results as the operation, and as often; recomputed in full, the operation stays."""
    from panda.models.adapters import low_rank_triton

    monkeypatch.setattr(layers, "CHEAP_TERMS", 16)
    torch.compiler.reset()
    model = adapted(llama(hidden=256), r=8).to("cuda", torch.bfloat16)
    round_once(model, recomputed=way == "full")
    plain = copy.deepcopy(model)
    # As make_trainable does: in full around compiled layers.
    if way == "selective":
        recompute_activations(model, selective=True)
    compile_layers(model, torch.device("cuda"))
    if way == "full":
        recompute_activations(model, selective=False)
    if way != "kept":
        recompute_activations(plain, selective=way == "selective")
    ids = torch.arange(53, device="cuda").repeat(2, 20)[:, :1024]
    launched = []
    run = low_rank_triton.product_with_low_rank
    monkeypatch.setattr(low_rank_triton, "product_with_low_rank", lambda *given: launched.append(1) or run(*given))

    def gradients(model: Any) -> dict[str, torch.Tensor]:
        model(ids).logits.float().logsumexp(-1).square().mean().backward()
        return {name: each.grad.float() for name, each in model.named_parameters() if each.requires_grad}

    expected, called = gradients(plain), len(launched)
    launched.clear()
    found = gradients(model)
    assert called >= 25 and len(launched) == (called if way == "full" else 0)
    for name, gradient in found.items():
        assert (gradient - expected[name]).norm() < 0.02 * expected[name].norm(), name


@pytest.mark.parametrize("odd", ["", "r", "inputs", "head"])
def test_the_kernel_is_launched_by_compiled_code_where_all_weights_lie_well(
    monkeypatch: pytest.MonkeyPatch, odd: str
) -> None:
    """Where each weight fills multiples of 16 bytes; a row of a layer that does not is that layer's alone."""
    pytest.importorskip("triton")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.current_device", lambda: 0)
    monkeypatch.setattr(one_rounding, "can_compile", lambda device: True)
    monkeypatch.setattr("panda.models.adapters.low_rank_triton.is_hopper", lambda device: True)
    module = torch.nn.Module()
    module.first, module.second = torch.nn.Linear(16, 64), torch.nn.Linear(20 if odd == "inputs" else 64, 64)
    model = adapted(module, target_modules=["first", "second"], r=12 if odd == "r" else 8)
    model.head = torch.nn.Linear(8, 1 if odd == "head" else 8)
    round_once(model, recomputed=False)
    expected = {"": (True, True), "r": (False, False), "inputs": (True, False), "head": (False, False)}
    assert (model.first.in_line, model.second.in_line) == expected[odd]
    round_once(model, recomputed=True)
    assert not model.first.in_line and not model.second.in_line


def _moved(layer: Any, once: bool, tokens: int = 2048) -> list[float]:
    """By how much of its size, on average, the adapter of ``layer`` changes its output, and the gradient of its input.

    All elements of what it adds have one sign.
    """
    if once:
        round_once(layer)
    weights = [layer.base_layer.weight, layer.lora_A["default"].weight, layer.lora_B["default"].weight]
    w, a, b = (weight.detach().double() for weight in weights)
    values = torch.randn(tokens, 256).abs().bfloat16().to(w.device)  # so A's and B's products do not cancel
    changes = []
    for added in (True, False):
        with torch.no_grad():
            layer.lora_B["default"].weight.copy_(b if added else 0 * b)
        x = values.clone().requires_grad_()
        y = layer(x)
        y.backward(values)
        changes.append((y.detach().double(), x.grad.double()))  # type: ignore[union-attr]
    expected = values.double() @ a.t() @ b.t(), values.double() @ b @ a
    assert all((part.abs() < 2e-3).all() for part in expected) and w.isfinite().all()
    return [
        ((with_ - without).mean() / part.mean()).item() for with_, without, part in zip(*changes, expected, strict=True)
    ]


def llama(*, hidden: int = 64) -> Any:
    shape = {"hidden_size": hidden, "intermediate_size": 2 * hidden, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=53, use_cache=False, initializer_range=0.06, **shape)
    config.mlp_bias = True
    torch.manual_seed(0)
    return LlamaForCausalLM(config)


NF4 = RunOptions(use_quant=True, precision="fp32")


def in_nf4(options: RunOptions = NF4, device: torch.device = CPU) -> Any:
    model = llama()
    quantise(model, options, device)
    return with_adapters(model).to(device)


def with_adapters(model: Any) -> Any:
    model = get_peft_model(model, LoraConfig(r=4, lora_alpha=6, target_modules="all-linear", task_type="CAUSAL_LM"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return model.train()


IDS = torch.arange(48).reshape(2, 24) % 53


def trained(model: Any) -> dict[str, torch.Tensor]:
    """The gradients of one step."""
    model.zero_grad()
    model(IDS.to(next(model.parameters()).device)).logits.logsumexp(-1).square().sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")),
    ],
)
def test_on_a_base_in_nf4_gradients_are_pefts_and_bitsandbytes(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    model = in_nf4(device=torch.device(device))
    expected = trained(model)
    monkeypatch.setattr(lora.Linear4bit, "forward", None)  # peft's own is not called
    for keep in (False, True):
        round_once(model, recomputed=keep)
        found = trained(model)
        assert len(found) == len(expected) == 2 * 7 * 2
        for name, gradient in expected.items():
            assert torch.allclose(found[name], gradient, rtol=1e-4, atol=1e-4 * gradient.abs().max().item()), name


@pytest.mark.parametrize(
    ("recomputed", "keep", "expected"),
    [("none", False, 2), ("full", False, 3), ("full", True, 2), ("selective", False, 2)],
)
def test_how_often_a_base_in_nf4_is_dequantised(
    monkeypatch: pytest.MonkeyPatch, recomputed: str, keep: bool, expected: int
) -> None:
    monkeypatch.setattr(layers, "CHEAP_TERMS", 16)
    model = in_nf4()
    round_once(model, recomputed=keep)
    gradients = trained(model)
    if recomputed != "none":
        recompute_activations(model, selective=recomputed == "selective")
    calls: list[int] = []
    original = bitsandbytes.functional.dequantize_4bit
    monkeypatch.setattr(bitsandbytes.functional, "dequantize_4bit", lambda *given: calls.append(1) or original(*given))
    again = trained(model)
    assert all(torch.equal(again[name], gradient) for name, gradient in gradients.items())
    # In the first layer, queries, keys and values need no gradient of their input, the embedding's.
    assert len(calls) == 14 * expected - (0 if keep else 3)


@pytest.mark.parametrize("packed", [False, True], ids=["whole", "nf4"])
def test_forward_keeps_the_input_and_what_is_small(packed: bool) -> None:
    model = in_nf4() if packed else with_adapters(llama())
    round_once(model)
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    x = torch.randn(3, 5, 64, requires_grad=True)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        layer(x)
    known = {x.data_ptr(), *(tensor.data_ptr() for tensor in model.state_dict(keep_vars=True).values())}
    others = [tensor for tensor in kept if tensor.data_ptr() not in known]
    assert x.data_ptr() in [tensor.data_ptr() for tensor in kept]
    assert [tensor.shape for tensor in others if tensor.numel() > 1024] == []  # scales, and their code
    assert sum(tensor.shape == (15, 4) for tensor in others) == 1  # x A^T


def test_selective_recomputing_does_not_repeat_the_product(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "CHEAP_TERMS", 16)
    model = with_adapters(llama())
    round_once(model)
    expected, counts = trained(model), []
    for _ in range(2):
        loss = model(IDS).logits.logsumexp(-1).square().sum()
        model.zero_grad()
        with Operations() as operations:
            loss.backward()
        counts.append(operations.counts)
        assert all(torch.equal(p.grad, expected[n]) for n, p in model.named_parameters() if p.requires_grad)
        recompute_activations(model, selective=True)
    assert counts[0]["panda::sum_of_products"] == counts[1]["panda::sum_of_products"] == 14 - 3
    assert counts[0]["aten::mm"] == counts[1]["aten::mm"]


@pytest.mark.parametrize("kind", ["disabled", "merged", "two", "hook", "float32", "autocast", "dora"])
def test_what_is_not_the_plain_case_is_pefts(kind: str) -> None:
    model, x = pair(use_dora=kind == "dora"), torch.randn(2, 5, 24, dtype=torch.float64)
    if kind == "two":
        inject_adapter_in_model(LoraConfig(target_modules=["first"], init_lora_weights=False), model, "other")
        model.double().first.set_adapter(["default", "other"])
    if kind == "merged":
        model.first.merge()
    if kind == "disabled":
        model.first.enable_adapters(False)
    if kind in ("float32", "autocast"):
        model, x = model.float(), x.float()
    if kind == "float32":  # adapters keep more digits than the base
        model.first.base_layer.bfloat16()
        x = x.bfloat16()
    seen = []
    if kind == "hook":
        model.first.lora_A["default"].register_forward_hook(lambda *_: seen.append(1))
    mine = copy.deepcopy(model)
    round_once(mine)
    with torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
        expected, found = model.first(x), mine.first(x)
    assert torch.equal(found, expected) and found.dtype == expected.dtype
    assert len(seen) == (2 if kind == "hook" else 0)


def test_a_result_can_be_added_to_in_place() -> None:
    model = rounded_once(pair())
    y = model.first(torch.randn(3, 24, dtype=torch.float64))
    y += 1  # a view could not be
    y.sum().backward()


class Batch:
    tokens = units = IDS.numel()
    idle = False

    def to(self, device: torch.device) -> Batch:
        return self


def loss_sum(model: Any, batch: Batch) -> torch.Tensor:
    ids = IDS.to(next(model.parameters()).device)
    loss: torch.Tensor = model(ids).logits.logsumexp(-1).square().sum()
    return loss


@pytest.mark.parametrize("recomputed", [False, True], ids=["plain", "recomputed"])
@pytest.mark.parametrize("packed", [False, True], ids=["whole", "nf4"])
def test_under_zero_3_the_layer_gathers_what_it_reads(
    monkeypatch: pytest.MonkeyPatch, processes: Processes, tmp_path: Path, packed: bool, recomputed: bool
) -> None:
    file = tmp_path / "zero3.json"
    file.write_text(json.dumps({"zero_optimization": ZERO3_AT_ONCE}))
    options = RunOptions(
        use_quant=packed, use_lora=True, zero_stage=3, precision="fp32", deepspeed_config=str(file), max_grad_norm=0
    )
    plain = in_nf4(options) if packed else with_adapters(llama())
    model = copy.deepcopy(plain)
    round_once(model, recomputed=recomputed)
    if recomputed:
        recompute_activations(model, selective=False)
    optimizers = [
        torch.optim.SGD([p for p in each.parameters() if p.requires_grad], lr=0.02) for each in (plain, model)
    ]
    expected = []
    for _ in range(3):
        loss = loss_sum(plain, Batch()) / IDS.numel()
        optimizers[0].zero_grad()
        loss.backward()
        optimizers[0].step()
        expected.append(loss.item())
    for kind in (lora.Linear, lora.Linear4bit):
        monkeypatch.setattr(kind, "forward", None)  # peft's own is not called
    engine = Engine(model, optimizers[1], deepspeed_config(options, world_size=1, on_gpu=False), processes)
    found = [engine.step([Batch()], loss_sum).loss.item() for _ in range(3)]
    assert found == pytest.approx(expected, rel=1e-5) and expected[2] < expected[0] * 0.99
    weights = {name: p for name, p in model.named_parameters() if ".mlp." in name and name.endswith("weight")}
    assert len(weights) == 2 * 3 * 3 and all(weight.numel() < 2 for weight in weights.values())  # released again
    gathered = engine.weights(trained_only=True)
    for name, parameter in plain.named_parameters():
        if parameter.requires_grad:
            assert torch.allclose(gathered[name].read(), parameter, atol=1e-5), name
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        loss_sum(engine.deepspeed, Batch())
    bases = [layer.base_layer.weight for layer in plain.modules() if isinstance(layer, lora.LoraLayer)]
    shapes = {weight.shape for weight in bases}
    assert sum(tensor.shape in shapes for tensor in kept) <= len(bases) / 2  # of two layers only the last one stays


def test_a_machine_that_cannot_compile_sums_on_a_gpu_without_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU, here the CPU, whose machine has Triton and no compiler."""
    pytest.importorskip("triton")

    def product(left: torch.Tensor, right: torch.Tensor, out_dtype: torch.dtype) -> torch.Tensor:
        return left.to(out_dtype) @ right.to(out_dtype)  # torch has it for GPUs only

    monkeypatch.setattr("torch.mm", product)
    monkeypatch.setattr("panda.models.adapters.low_rank_triton.can_multiply", lambda *factors: True)
    monkeypatch.setenv("CXX", "no-such-compiler")
    can_compile.cache_clear()
    x, weight, left, right = (torch.randn(8, 8).bfloat16() for _ in range(4))
    monkeypatch.setattr(one_rounding, "LEAST_ROWS", 0)
    result = torch.empty_like(x)
    one_rounding._sum_on_gpu(result, x, weight, left, right)
    can_compile.cache_clear()
    assert torch.equal(result, (x.float() @ weight.float() + left.float() @ right.float()).bfloat16())
