"""Under ZeRO-3 a layer gathers its weights at once, also compiled and recomputed, and none of them stays."""

from __future__ import annotations

import json
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from gathered_weights import LAYERS
from gathered_weights import MICRO_BATCHES
from gathered_weights import READ
from gathered_weights import STAYING
from gathered_weights import UNUSUAL
from gathered_weights import WAYS
from gathered_weights import Batch
from launching import TESTS
from launching import run_script
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig
from transformers import LlamaForCausalLM

from panda.configuration.options import RunOptions
from panda.engine import gathering
from panda.engine.deepspeed_config import deepspeed_config
from panda.engine.engine import Engine
from panda.engine.gathering import with_sizes
from panda.engine.layer_weights import LayerWeights
from panda.engine.processes import Processes
from panda.registry import UserError
from panda.run.model import make_trainable
from panda.weights.stored_tensor import weights_of


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("gathering")
    run_script(TESTS / "engine/gathered_weights.py", folder / "found.json", cwd=folder, ranks=2)
    return json.loads((folder / "found.json").read_text())


@pytest.mark.parametrize("way", WAYS | UNUSUAL)
def test_losses_are_those_without_zero(found: Any, way: str) -> None:
    plain, partitioned = found[way]
    assert partitioned["losses"] == pytest.approx(plain["losses"], rel=1e-6)


@pytest.mark.parametrize("way", WAYS)
def test_a_layer_is_gathered_at_once(found: Any, way: str) -> None:
    """One layer is not gathered again for its backward, and embedding, norm and head add a few."""
    gathers = found[way][1]["gathers"]
    of_layers = [each for each in gathers if each != found[way][1]["kept"]]
    assert LAYERS <= len(of_layers) <= 2 * LAYERS


@pytest.mark.parametrize("way", ["all weights", "adapters", "NF4, compiled"])
def test_a_layer_is_one_collective(found: Any, way: str) -> None:
    """NF4 is stored in the type of the adapters."""
    assert found[way][1]["collectives"] == 2 * LAYERS - 1, "the last layer stays for its backward"


@pytest.mark.parametrize("way", STAYING)
def test_layers_that_stay_are_gathered_once_a_step(found: Any, way: str) -> None:
    """And the others for each forward and backward."""
    stay = min(STAYING[way][0], LAYERS)
    # Before the first backward pass of a step, each forward pass gathers all; and where something else released them.
    passes = 3 if "two passes" in way else MICRO_BATCHES if way == READ else 1
    assert found[way][1]["collectives"] == passes * stay + 2 * (LAYERS - stay) * MICRO_BATCHES
    assert found[way][1]["after a step"] == found[way][1]["after evaluation"] == 0, "none stays longer"


def test_numbers_do_not_depend_on_how_many_layers_stay(found: Any) -> None:
    assert found["two layers stay"][1]["losses"] == found["all layers stay"][1]["losses"]


def test_what_all_ranks_keep_is_gathered_at_once_after_a_step(found: Any) -> None:
    """Adapters change in each step; values that were not gathered would give other losses."""
    kept = found["adapters, kept by all ranks"][1]
    assert kept["kept"] > 0 and kept["gathers"].count(kept["kept"]) == 1


@pytest.mark.parametrize("way", WAYS)
def test_backward_does_not_keep_weights_that_were_released(found: Any, way: str) -> None:
    assert found[way][1]["alive"] == 0


class Layered(torch.nn.Module):
    """Two layers of two parts each, of 76 and 42 weights, between parts of 64 and 8."""

    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Linear(8, 8, bias=False)
        parts = (torch.nn.Sequential(torch.nn.Linear(8, width), torch.nn.Linear(width, 8)) for width in (4, 2))
        self.layers = torch.nn.ModuleList(parts)
        self.last = torch.nn.Linear(8, 1, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        for layer in self.layers:
            x = layer(x)
        result: torch.Tensor = self.last(x)
        return result


def config_of(**zero: Any) -> dict[str, Any]:
    options = RunOptions(precision="fp32", zero_stage=3)
    config = deepspeed_config(options, world_size=1, on_gpu=True)
    config["zero_optimization"] |= zero
    return config


def engine_of(module: torch.nn.Module, processes: Processes) -> Engine:
    small = {"reduce_bucket_size": 1000}
    return Engine(module, torch.optim.SGD(module.parameters(), lr=0.1), config_of(**small), processes)


def hooked(module: torch.nn.Module) -> list[str]:
    return [name for name, part in module.named_modules() if name and part._forward_hooks]


def test_sizes_are_those_of_the_model_where_nothing_else_is_said() -> None:
    layer, outside = 8 * 4 + 4 + 4 * 8 + 8, 64 + 8
    zero = with_sizes(config_of(stage3_max_reuse_distance=5), Layered())["zero_optimization"]
    assert zero == {
        "stage": 3,
        "stage3_prefetch_bucket_size": layer,
        "stage3_max_live_parameters": 3 * layer + outside,
        "stage3_max_reuse_distance": 5,
        "reduce_bucket_size": layer + outside + 8 * 2 + 2 + 2 * 8 + 8,
    }
    assert with_sizes(config_of(), torch.nn.Linear(2, 2)) == config_of(), "a model without layers"
    assert with_sizes({"zero_optimization": {"stage": 2}}, Layered()) == {"zero_optimization": {"stage": 2}}


def test_every_rank_keeps_few_trained_weights() -> None:
    module = torch.nn.Module()
    module.layers = torch.nn.ModuleList([torch.nn.Linear(3000, 2000, bias=False)])
    module.layers[0].weight.requires_grad_(False)
    module.adapter = torch.nn.Linear(3000, 50, bias=False)
    key = "stage3_param_persistence_threshold"
    assert with_sizes(config_of(), module)["zero_optimization"][key] == 3000 * 50
    assert with_sizes(config_of(**{key: 7}), module)["zero_optimization"][key] == 7, "what a file says"
    module.adapter = torch.nn.Linear(3000, 200, bias=False)
    assert key not in with_sizes(config_of(), module)["zero_optimization"], "a tenth of the weights"


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_adapters_have_the_precision_of_the_model(processes: Processes, stage: int) -> None:
    """In float32, under ZeRO-3 only, their products took as long as those of the base (H100, 2026-11-26)."""
    options = RunOptions(precision="bf16", zero_stage=stage, use_lora=True, gradient_accumulation_steps=1)
    config = deepspeed_config(options, world_size=1, on_gpu=False)
    shape = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    plain = LlamaForCausalLM(LlamaConfig(vocab_size=64, **shape))
    model = make_trainable(plain, options, weights_of(plain), config, processes)
    engine = Engine(model, torch.optim.AdamW(p for p in model.parameters() if p.requires_grad), config, processes)
    assert {parameter.dtype for parameter in engine.module.parameters()} == {torch.bfloat16}
    engine.close()


def test_only_a_layer_has_hooks(processes: Processes) -> None:
    module = Layered()
    engine = engine_of(module, processes)
    assert hooked(module) == ["first", "layers", "layers.0", "layers.1", "last"]
    engine.close()


def too_large(module: Layered, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(gathering, "LARGEST_LAYER", 75)


def shared(module: Layered, patch: pytest.MonkeyPatch) -> None:
    module.again = module.layers[0][0]


@pytest.mark.parametrize(
    ("prevent", "why"),
    [(too_large, r"layers\.0 has 76 weights, more than 75"), (shared, r"layers\.0 shares modules with the rest")],
)
def test_a_layer_that_cannot_gather_all_its_weights_does_so_by_its_modules(
    processes: Processes,
    monkeypatch: pytest.MonkeyPatch,
    prevent: Callable[[Layered, pytest.MonkeyPatch], None],
    why: str,
) -> None:
    module = Layered()
    prevent(module, monkeypatch)
    engine = engine_of(module, processes)
    assert {"layers.0.1", "layers.1"} <= set(hooked(module)) and "layers.1.0" not in hooked(module)
    engine.close()
    module = Layered()
    prevent(module, monkeypatch)
    for layer in module.layers:
        layer.is_compiled = True  # type: ignore[assignment]
    with pytest.raises(UserError, match=rf"compile: .*{why}.*`compile: false`"):
        engine_of(module, processes)


def test_compiled_code_has_the_linear_layer_of_torch(processes: Processes) -> None:
    """DeepSpeed's asks each weight for its number, which torch 2.11 compiles again for each layer."""
    engine = engine_of(Layered(), processes)
    called: list[str] = []

    def record(graph: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        called.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    compiled = torch.compile(torch.nn.Linear(8, 8), backend=record)
    torch.testing.assert_close(compiled(torch.ones(2, 8)), compiled._orig_mod(torch.ones(2, 8)))
    assert len(called) == 1 and "linear" in called[0], called
    engine.close()


class Results(dict[str, torch.Tensor]):
    """Not registered with pytree."""


class Direct(torch.nn.Module):
    """A layer that uses its weights itself: no module of torch or DeepSpeed saves them for backward."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.w = torch.nn.Parameter(torch.randn(8, 8) / 3)
        self.v = torch.nn.Parameter(torch.randn(8, 8) / 3)

    def forward(self, x: torch.Tensor, more: torch.Tensor | None = None) -> Any:
        h = torch.tanh((x * 1) @ self.w)  # `x` itself is not saved, and can be changed
        if self.kind == "changes what it is given":
            return x.add_(h @ self.v)
        if self.kind == "returns a dict":
            return Results(x=x + h @ self.v)
        if more is None:
            more = h @ self.v
        else:
            h = h @ self.v
        return x + h + more, more


class Unusual(torch.nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.first = torch.nn.Linear(8, 8)
        self.layers = torch.nn.ModuleList([Direct(kind) for _ in range(6)])
        self.last = torch.nn.Linear(8, 8, bias=False)
        if kind == "shares a weight":
            self.layers[1].v = self.last.weight

    def several(self, begin: int, end: int, x: torch.Tensor) -> torch.Tensor:
        more = None
        for layer in self.layers[begin:end]:
            if self.kind == "is recomputed":
                x, _ = checkpoint(layer, x, use_reentrant=False, early_stop=False)
            elif self.kind == "returns a dict":
                x = layer(x)["x"]
            elif self.kind == "changes what it is given":
                x = layer(x)
            elif self.kind == "returns what it is given":
                x, more = layer(x, more=more)
            else:
                x, _ = layer(x)
        return x

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        if self.kind == "is recomputed with others":
            x = checkpoint(self.several, 0, 6, x, use_reentrant=False)
        else:
            x = self.several(0, 6, x)
        result: torch.Tensor = self.last(x)
        return result


@pytest.mark.parametrize(
    "kind",
    [
        "returns what it is given",
        "changes what it is given",
        "returns a dict",
        "shares a weight",
        "is recomputed",
        "is recomputed with others",
    ],
)
def test_an_unusual_layer_is_right_too(processes: Processes, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    present: list[int] = []
    fetch = LayerWeights.fetch

    def fetching(weights: LayerWeights, layer: Any) -> None:
        fetch(weights, layer)
        present.append(len(weights.present))

    monkeypatch.setattr(LayerWeights, "fetch", fetching)
    losses = {}
    for stage in (0, 3):
        torch.manual_seed(0)
        module = Unusual(kind)
        options = RunOptions(precision="fp32", zero_stage=stage, gradient_accumulation_steps=1)
        config = deepspeed_config(options, world_size=1, on_gpu=True)
        if stage == 3:
            config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        engine = Engine(module, torch.optim.AdamW(module.parameters(), lr=1e-2), config, processes)
        batches = [Batch(torch.randn(4, 8)) for _ in range(3)]
        losses[stage] = [engine.step([batch], lambda model, b: model(b.ids).square().sum()).loss for batch in batches]
        engine.close()
    assert torch.stack(losses[3]).tolist() == pytest.approx(torch.stack(losses[0]).tolist(), rel=1e-5)
    assert 0 < max(present) <= 3, "a layer, and those before and after it"


def test_memory_of_a_released_layer_is_not_given_back_while_it_is_computed_with() -> None:
    """Which torch does once the stream has come to its end that the memory is of: the one that gathers."""
    calls: list[Any] = []

    class Released:
        coming = ()

        def release(self) -> None:
            calls.append("release")

    layer, weights = Released(), LayerWeights.__new__(LayerWeights)
    weights.present = {layer}  # type: ignore[arg-type]
    weights.stream = "side"
    weights.computed = SimpleNamespace(record=lambda: calls.append("record"), wait=calls.append)
    weights.release(layer)  # type: ignore[arg-type]
    assert calls == ["release", "record", "side"] and not weights.present
