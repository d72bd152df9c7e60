"""Code of compiled layers: rows of the usual length keep their own, all others share one, and both exist early."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from dataclasses import field
from typing import Any

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd
from transformers import LlamaConfig
from transformers import LlamaForCausalLM

from panda.models.forward.layers import compile_layers
from panda.models.forward.layers import recompute_activations

FULL = 64
"""Also the width of the model: code for any length must not take the one for the other."""
LAYERS = 3
CPU = torch.device("cpu")


@dataclass
class Code:
    """What torch compiled, and ran: ``full`` for code of one shape, ``any`` for code of any."""

    compiled: Counter[str] = field(default_factory=Counter)
    backwards: int = 0
    ran: list[str] = field(default_factory=list)

    def backend(self, graph: torch.fx.GraphModule, inputs: Any, **_: Any) -> Callable[..., Any]:
        sizes = {str(size) for each in inputs for size in (each.shape if isinstance(each, torch.Tensor) else (each,))}
        kind = "full" if all(size.isdigit() for size in sizes) else "any"
        self.compiled[kind] += 1
        code = aot_autograd(fw_compiler=lambda graph, _: graph.forward, bw_compiler=self._backward)(graph, inputs)

        def run(*given: Any) -> Any:
            self.ran.append(kind)
            return code(*given)

        return run

    def _backward(self, graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        self.backwards += 1
        return graph.forward


@pytest.fixture
def code(monkeypatch: pytest.MonkeyPatch) -> Code:
    torch._dynamo.reset()
    found = Code()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=found.backend))
    monkeypatch.setattr(torch.nn.functional, "linear", torch._C._nn.linear)  # ZeRO-3 leaves another one
    return found


def model(*, adapters: bool = False) -> Any:
    torch.manual_seed(0)
    shape = {"hidden_size": FULL, "intermediate_size": 48, "num_hidden_layers": LAYERS, "num_attention_heads": 2}
    made = LlamaForCausalLM(LlamaConfig(vocab_size=53, attention_dropout=0.1, use_cache=False, **shape)).train()
    made.set_attn_implementation("sdpa")
    if adapters:
        from peft import LoraConfig
        from peft import inject_adapter_in_model

        made = inject_adapter_in_model(LoraConfig(target_modules=["q_proj", "v_proj"]), made)
        for name, parameter in made.named_parameters():
            parameter.requires_grad_("lora_" in name)
            if "lora_B" in name:
                torch.nn.init.ones_(parameter)
    return made


def train(model: Any, length: int, rows: int = 1) -> tuple[torch.Tensor, ...]:
    """Loss and gradients, and what is drawn afterwards."""
    torch.manual_seed(1)
    model.zero_grad()
    loss = model(torch.arange(rows * length).view(rows, length) % 53).logits.logsumexp(-1).square().mean()
    loss.backward()
    gradients = (parameter.grad for parameter in model.parameters() if parameter.grad is not None)
    return loss.detach(), torch.rand(1), *gradients


@pytest.mark.parametrize(
    ("how", "adapters"), [("none", False), ("none", True), ("selective", False), ("full", True), ("full", False)]
)
def test_full_rows_keep_their_code_and_others_share_one(code: Code, how: str, adapters: bool) -> None:
    """The first layer's input has no gradient with adapters: two pieces of code of each kind."""
    plain, compiled = model(adapters=adapters), model(adapters=adapters)
    if how == "selective":
        recompute_activations(compiled, selective=True)
    compile_layers(compiled, CPU, {(1, FULL): 4, (1, 40): 1, (1, 24): 1})
    if how == "full":
        recompute_activations(compiled, selective=False)
    kinds = 2 if adapters else 1
    for number, length in enumerate((FULL, FULL, 40, FULL, 24, FULL)):
        code.ran.clear()
        for found, expected in zip(train(compiled, length), train(plain, length), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)
        assert code.compiled == {"full": kinds, "any": kinds} and code.backwards == 2 * kinds
        if number:
            assert code.ran == ["full" if length == FULL else "any"] * LAYERS * (2 if how == "full" else 1)


def test_code_that_no_row_of_the_run_needs_is_not_compiled(code: Code) -> None:
    compiled = model()
    compile_layers(compiled, CPU, {(1, FULL): 4})
    train(compiled, FULL)
    assert code.compiled == {"full": 1}


@pytest.mark.parametrize("shapes", [None, {(2, FULL): 1, (2, 40): 1, (3, FULL): 1}])
def test_without_a_usual_shape_one_code_is_for_all(code: Code, shapes: dict[tuple[int, int], int] | None) -> None:
    plain, compiled = model(), model()
    compile_layers(compiled, CPU, shapes)
    for rows, length in ((2, FULL), (2, 40), (3, FULL), (5, 32)):
        for found, expected in zip(train(compiled, length, rows), train(plain, length, rows), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)
    assert code.compiled == {"any": 1}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("width", [256, 2048])
def test_on_a_gpu_too_short_rows_share_one_code(width: int) -> None:
    """There torch's compiler chooses by the number of tokens, and would compile again for few."""
    gpu, long = torch.device("cuda"), 2**23 // width
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    shape = {"hidden_size": width, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 8}
    compiled = LlamaForCausalLM(LlamaConfig(vocab_size=53, use_cache=False, **shape)).train().to(gpu, torch.bfloat16)
    compile_layers(compiled, gpu, {(1, long): 4, (1, 40): 1})
    for length in (long, 40, long // 2, 1032):
        compiled(torch.arange(length, device=gpu)[None] % 53).logits.logsumexp(-1).sum().backward()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2


def test_evaluations_share_one_code(code: Code) -> None:
    compiled = model(adapters=True).eval()
    compile_layers(compiled, CPU, {(2, FULL): 4})
    with torch.no_grad():
        for length in (FULL, 40, 24):
            compiled(torch.arange(2 * length).view(2, length) % 53)
    assert code.compiled == {"any": 1}
