"""Names and options become objects, and every option reaches the object that it is for."""

from __future__ import annotations

import weakref
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from panda.configuration.arguments import parse_arguments
from panda.configuration.configure import configure
from panda.engine.deepspeed_config import deepspeed_config
from panda.engine.processes import Processes
from panda.models.adapters import quantisation
from panda.run.assembly import build_optimizer
from panda.run.assembly import load_tokenizer
from panda.run.continuation import agreement_of
from panda.run.model import build_outline
from panda.run.model import build_weights
from panda.run.model import build_with_weights
from panda.run.model import make_trainable
from panda.run.model import model_context
from panda.run.preparation import Preparation


def test_decay_and_rates_of_the_options_are_those_of_the_optimizer() -> None:
    flags = ["--arch", "llama-tiny", "--num_layers", "1", "--learning_rate", "0.01", "--weight_decay", "0.2"]
    flags += [
        "--weight_decay_on",
        "matrices",
        "--lr_multipliers",
        "*embed*=0.5",
        "lm_head.weight=3",
        "--optimizer",
        "lamb",
    ]
    resolved = configure(parse_arguments(flags)).resolved
    model, _ = build_with_weights(resolved, model_context(resolved, load_tokenizer(resolved.core.tokenizer)))
    optimizer = build_optimizer(resolved, model, torch.device("cpu"))
    names = {parameter: name for name, parameter in model.named_parameters()}
    found = {
        names[parameter]: (round(group["lr"], 9), group["weight_decay"])
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    assert found.keys() == set(names.values())
    assert found["model.embed_tokens.weight"] == (0.005, 0.0)
    assert found["lm_head.weight"] == (0.03, 0.2)
    assert found["model.layers.0.self_attn.q_proj.weight"] == (0.01, 0.2)
    assert found["model.layers.0.input_layernorm.weight"] == found["model.norm.weight"] == (0.01, 0.0)


@pytest.mark.parametrize(("kind", "forwards"), [("none", 1), ("selective", 1), ("full", 2)])
def test_what_is_asked_of_the_layers_is_done_to_them(monkeypatch: pytest.MonkeyPatch, kind: str, forwards: int) -> None:
    """`full` runs compiled layers again; `selective` is within compiled code, which chooses what to compute again."""
    ran: list[Any] = []

    def compiled(forward: Any, **_: Any) -> Any:
        return lambda *inputs, **keywords: (ran.append(forward), forward(*inputs, **keywords))[1]

    monkeypatch.setattr(torch, "compile", compiled)
    flags = ["--arch", "llama-tiny", "--num_layers", "2", "--compile", "--activation_checkpointing", kind]
    resolved = configure(parse_arguments(flags)).resolved
    context = model_context(resolved, load_tokenizer(resolved.core.tokenizer))
    model: Any = build_with_weights(resolved, context)[0]
    processes = Processes(0, 1, torch.device("cpu"))
    assert make_trainable(model, resolved.core, None, {}, processes) is model
    model(torch.tensor([[1, 2, 3]])).logits.sum().backward()
    assert len(ran) == forwards * 2


@pytest.mark.parametrize(
    "flags",
    [["--bit_training"], ["--weight_decay_on", "matrices"], ["--use_lora"], ["--seed", "7"], ["--precision", "bf16"]],
)
def test_a_run_that_differs_so_does_not_continue_another(flags: list[str]) -> None:
    dataset: Any = type("Samples", (), {"__len__": lambda self: 1, "sources": (), "tokens": 1, "fingerprint": ""})()
    shapes = [
        agreement_of(configure(parse_arguments(["--arch", "llama-tiny", *more])).resolved, None, dataset)
        for more in ([], flags)
    ]
    assert shapes[0] != shapes[1]


@pytest.mark.parametrize(("of_transformers", "is_whole"), [(True, False), (False, True)])
def test_only_models_that_are_not_of_transformers_are_drawn_whole(
    of_transformers: bool, is_whole: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}
    monkeypatch.setattr("panda.run.fitting.refuse_without_room", lambda *_, **keywords: asked.update(keywords))
    if not of_transformers:
        monkeypatch.setattr("panda.run.preparation.build_outline", lambda *_: torch.nn.Linear(2, 2))
    configuration = configure(parse_arguments(["--arch", "llama-tiny", "--num_layers", "1"]))
    assert Preparation(configuration).outline is not None
    assert asked["drawn"] == is_whole


def test_of_a_quantised_model_no_layer_is_kept_in_full_precision(
    processes: Processes, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ["--arch", "llama-tiny", "--use_quant", "--lora_dropout", "0"]
    prepared = Preparation(configure(parse_arguments(flags)))
    alive: list[int] = []
    layers: list[weakref.ref[torch.nn.Module]] = []
    quantised: Any = quantisation._quantised

    def counted(layer: torch.nn.Linear, *arguments: Any) -> torch.nn.Linear:
        alive.append(sum(reference() is not None for reference in layers))
        layers.append(weakref.ref(layer))
        result: torch.nn.Linear = quantised(layer, *arguments)
        return result

    monkeypatch.setattr(quantisation, "_quantised", counted)
    config = deepspeed_config(prepared.options, world_size=1, on_gpu=False)
    base, weights = prepared.take_base()
    make_trainable(base, prepared.options, weights, config, processes)
    assert len(alive) > 20 and max(alive) <= 1


def test_a_model_that_is_not_of_transformers_is_built_with_its_weights_by_the_seed() -> None:
    def build(context: Any, kind: type) -> torch.nn.Module:
        return torch.nn.Linear(4, 4)

    context: Any = SimpleNamespace(config=None, new_rows_from=None)
    resolved: Any = SimpleNamespace(components={"model": SimpleNamespace(build=build)}, core=SimpleNamespace(seed=3))
    torch.manual_seed(3)
    expected = torch.nn.Linear(4, 4).state_dict()
    module, weights = build_weights(resolved, context, None)
    assert list(weights) == ["weight", "bias"]
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, expected[name])
        assert torch.equal(weights[name].read(), expected[name])


def test_a_model_that_wants_weights_while_it_is_made_has_no_outline_unless_a_checkpoint_has_them() -> None:
    def build(context: Any, kind: type) -> torch.nn.Module:
        layer = torch.nn.Linear(2, 2)
        layer.scale = float(layer.weight.detach().abs().max())
        return layer

    resolved: Any = SimpleNamespace(components={"model": SimpleNamespace(build=build)})
    drawn: Any = SimpleNamespace(config=None)
    loaded: Any = SimpleNamespace(config={})
    assert build_outline(resolved, drawn) is None
    with pytest.raises(RuntimeError, match="meta"):
        build_outline(resolved, loaded)
