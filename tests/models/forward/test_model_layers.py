"""Recomputing activations and compiling layers change memory and time, and no result."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from counted_operations import Operations
from launching import EVERY_WAY
from launching import exported_weights
from launching import losses
from launching import run_script
from launching import train_many
from launching import zero3_ahead
from launching import zero3_at_once
from transformers import LlamaConfig
from transformers import LlamaForCausalLM

from panda.models.forward import layers
from panda.models.forward.layers import compile_layers
from panda.models.forward.layers import numbered_layers
from panda.models.forward.layers import recompute_activations
from panda.registry import UserError

LAYERS = 2


@pytest.fixture(autouse=True)
def torchs_own_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """ZeRO-3, where another test has had it in this process, leaves a linear function of its own in torch's place, of
    which other operations are counted."""
    monkeypatch.setattr(torch.nn.functional, "linear", torch._C._nn.linear)


def model_with_dropout() -> Any:
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": LAYERS, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=53, attention_dropout=0.2, use_cache=False, **shape))
    model.set_attn_implementation("sdpa")
    return model.train()


def step(model: Any) -> tuple[dict[str, torch.Tensor], Counter[str], int]:
    """Gradients, what backward ran, and the bytes that forward kept for it (parameters apart)."""
    torch.manual_seed(1)
    ids = torch.arange(24).reshape(2, 12)
    kept: dict[int, int] = {}
    parameters = {parameter.data_ptr() for parameter in model.parameters()}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.data_ptr() not in parameters:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(ids).logits.logsumexp(-1).square().sum()
    with Operations() as operations:
        loss.backward()
    return {n: p.grad for n, p in model.named_parameters()}, operations.counts, sum(kept.values())


@pytest.mark.parametrize("selective", [False, True])
def test_gradients_are_the_same_bits_dropout_included(monkeypatch: pytest.MonkeyPatch, selective: bool) -> None:
    monkeypatch.setattr(layers, "CHEAP_TERMS", 32)
    expected, plain, most = step(model_with_dropout())
    model = model_with_dropout()
    recompute_activations(model, selective=selective)
    found, operations, kept = step(model)
    assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())
    assert kept < most / 2  # what selective keeps is in a cache of its own, which this does not see
    # Seven products a layer; that of two, queries' and keys', and of the weights with values is attention's.
    repeated = operations["aten::mm"] - plain["aten::mm"]
    assert repeated == (0 if selective else 7 * LAYERS - LAYERS)  # nothing needs the last one's result
    assert operations["aten::silu"] == LAYERS and plain["aten::silu"] == 0


def test_selective_repeats_the_cheap_products_of_adapters(monkeypatch: pytest.MonkeyPatch) -> None:
    from peft import LoraConfig
    from peft import inject_adapter_in_model

    monkeypatch.setattr(layers, "CHEAP_TERMS", 32)
    adapted = [inject_adapter_in_model(LoraConfig(target_modules="all-linear"), model_with_dropout()) for _ in "ab"]
    for name, parameter in [*adapted[0].named_parameters(), *adapted[1].named_parameters()]:
        if "lora_B" in name:
            torch.nn.init.ones_(parameter)
    expected, plain, _ = step(adapted[0])
    recompute_activations(adapted[1], selective=True)
    found, operations, _ = step(adapted[1])
    for name, gradient in expected.items():
        assert gradient is found[name] is None or torch.equal(found[name], gradient)
    assert operations["aten::mm"] - plain["aten::mm"] == 6 * LAYERS


def test_a_layer_is_what_the_first_number_names() -> None:
    inner = torch.nn.ModuleDict({"experts": torch.nn.ModuleList([torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)])})
    model = torch.nn.ModuleDict({"blocks": torch.nn.ModuleList([inner, torch.nn.Linear(1, 1)])})
    assert numbered_layers(model, "compile") == list(model["blocks"])


def test_a_model_without_layers_is_an_error_that_names_the_key() -> None:
    with pytest.raises(UserError, match=r"activation_checkpointing: Linear has no numbered layers"):
        recompute_activations(torch.nn.Linear(1, 1), selective=False)


def test_compiling_without_a_compiler_is_an_error_that_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UserError, match=r"'no-such-compiler'.*apt-get install g\+\+"):
        compile_layers(model_with_dropout(), torch.device("cpu"))


COMMON = (
    *("--arch", "llama-tiny", "--num_layers", 2, "--hidden_size", 256, "--intermediate_size", 48, "--num_heads", 2),
    *("--instruction_tuning_data_dir", "panda:data/sample/instruct", "--num_workers", 0),
    *("--max_steps", 3, "--gradient_accumulation_steps", 2, "--adam_epsilon", 1e-4, "-p", "no:tensorboard"),
)
LONG, SHORT = ("--max_seq_length", 48), ("--max_seq_length", 16)
"""All samples have so many tokens as rows of the second have: compiled code is made for one length instead of two."""
VARIANTS: dict[str, tuple[object, ...]] = {
    "plain": LONG,
    "full": (*LONG, "--activation_checkpointing", "full"),
    "selective": (*LONG, "--activation_checkpointing", "selective"),
    "eager": (*LONG, "--attention", "eager"),
    "short": SHORT,
    "compiled": ("--compile", "--activation_checkpointing", "selective", *SHORT),
}
PARTITIONED = {"zero3-full": ("full", zero3_ahead), "zero3-selective": ("selective", zero3_at_once)}
TRACED = ("lengths-compiled", "zero3-compiled")
"""Layers that are compiled for rows of several lengths: by train_traced.py, or with PANDA_EVERY_WAY in full."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("layers")
    alone = [
        [*COMMON, *more, "--per_gpu_train_batch_size", 4, "--output_dir", folder / name]
        for name, more in VARIANTS.items()
    ]
    split = [*COMMON, *LONG, "--per_gpu_train_batch_size", 2]
    together = [
        [*split, *zero3(folder), "--output_dir", folder / name, "--activation_checkpointing", mode]
        for name, (mode, zero3) in PARTITIONED.items()
    ]
    train_many(alone, cwd=folder)
    train_many(together, ranks=2, cwd=folder)
    selective = ("--compile", "--activation_checkpointing", "selective", "--per_gpu_train_batch_size", 4)
    full = ("--compile", "--activation_checkpointing", "full", *zero3_ahead(folder))
    train_traced([*COMMON, *LONG, *selective, "--output_dir", folder / "lengths-compiled"], 1, folder)
    train_traced([*split, *full, "--output_dir", folder / "zero3-compiled"], 2, folder)
    return folder


def train_traced(flags: list[object], ranks: int, folder: Path) -> None:
    script = "panda.testing.train_many" if EVERY_WAY else Path(__file__).with_name("train_traced.py")
    run_script(script, json.dumps([[*map(str, flags)]]), cwd=folder, ranks=ranks)


@pytest.mark.parametrize("name", [*list(VARIANTS)[1:4], "compiled", *PARTITIONED, *TRACED])
def test_a_run_follows_the_same_trajectory(runs: Path, name: str) -> None:
    plain = runs / ("short" if name == "compiled" else "plain")
    assert losses(runs / name) == pytest.approx(losses(plain), rel=1e-6)
    expected = exported_weights(plain)
    for key, weight in exported_weights(runs / name).items():
        assert (weight - expected[key]).abs().max() < 1e-6, key


def test_the_attention_that_was_chosen_is_recorded(runs: Path) -> None:
    chosen = [json.loads((runs / name / "provenance.json").read_text())["attention"] for name in ("plain", "eager")]
    assert chosen == ["sdpa", "eager"]
