"""Random weights follow from seed and name, are distributed as transformers has them, and come a unit at a time."""

from __future__ import annotations

import gc
import hashlib
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from initial_model import without
from launching import train_many
from launching import zero3_at_once
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from transformers import AutoModelForSeq2SeqLM
from transformers import Gemma2Config
from transformers import GPT2Config
from transformers import LlamaConfig
from transformers import LlamaForCausalLM
from transformers import OPTConfig
from transformers import PreTrainedModel
from transformers import T5Config

from panda.models.initialisation.creation import without_weights
from panda.models.initialisation.drawing import _unit_of as unit_of
from panda.models.initialisation.drawing import initial_weights

SHAPE: dict[str, Any] = {
    "vocab_size": 259,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "pad_token_id": 0,
}
T5 = {"vocab_size": 259, "d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 2, "num_heads": 2}
CONFIGS: dict[str, Any] = {
    "llama": LlamaConfig(**SHAPE),
    "tied": LlamaConfig(tie_word_embeddings=True, **SHAPE),
    "biases": LlamaConfig(attention_bias=True, mlp_bias=True, **SHAPE),
    "gpt2": GPT2Config(vocab_size=259, n_embd=32, n_layer=3, n_head=2, bos_token_id=1, eos_token_id=2),
    "opt": OPTConfig(**SHAPE, ffn_dim=48, word_embed_proj_dim=16),
    "gemma2": Gemma2Config(head_dim=16, **SHAPE),
    "t5": T5Config(**T5, tie_word_embeddings=False),
}


def build(name: str) -> Any:
    config = CONFIGS[name]
    kind: Any = AutoModelForSeq2SeqLM if name == "t5" else AutoModelForCausalLM
    return kind.from_config(config, dtype=torch.float32)


def weights_of(name: str, seed: int = 3) -> Any:
    with without_weights():
        outline = build(name)
    return initial_weights(outline, seed)


def read_all(name: str, seed: int = 3) -> dict[str, torch.Tensor]:
    return {key: stored.read() for key, stored in weights_of(name, seed).items()}


def test_a_layer_is_drawn_from_a_generator_of_its_own_that_seed_and_name_give() -> None:
    found = read_all("llama", seed=3)
    for unit, first in {
        "model.layers.2": "model.layers.2.self_attn.q_proj.weight",
        "model.embed_tokens": "model.embed_tokens.weight",
        "lm_head": "lm_head.weight",
    }.items():
        number = int.from_bytes(hashlib.sha256(f"3/{unit}".encode()).digest()[:8], "big")
        expected = torch.empty_like(found[first]).normal_(std=0.02, generator=torch.Generator().manual_seed(number))
        if unit == "model.embed_tokens":
            expected[0] = 0.0  # of the padding token
        assert torch.equal(found[first], expected), unit


@pytest.mark.parametrize("name", ["llama", "tied", "gpt2"])
def test_what_is_small_is_not_drawn_again_when_another_layer_is_read_first(name: str) -> None:
    """Quantisation reads the matrices of all layers before the norms of the first."""
    weights = weights_of(name)
    drawn: list[str] = []
    initialise = PreTrainedModel.initialize_weights
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(PreTrainedModel, "initialize_weights", lambda model: (drawn.append(name), initialise(model)))
        by_dimensions = sorted(weights, key=lambda key: -len(weights[key].shape))
        found = {key: weights[key].read() for key in by_dimensions}
    assert len(drawn) == len({unit_of(key) for key in weights})
    assert all(torch.equal(found[key], tensor) for key, tensor in read_all(name).items())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("name", CONFIGS)
def test_a_gpu_draws_where_it_trains_and_leaves_the_generators_as_they_are(name: str) -> None:
    gpu = torch.device("cuda", 0)
    states = torch.get_rng_state(), torch.cuda.get_rng_state()
    with without_weights():
        first, second = build(name), build(name)
    expected = {key: stored.read() for key, stored in (initial_weights(first, 3, gpu) or {}).items()}
    weights = initial_weights(second, 3, gpu) or {}
    for key in reversed(list(weights)):
        assert torch.equal(weights[key].read(), expected[key]), key
    parameters = dict(second.named_parameters())
    assert all(tensor.device == gpu for key, tensor in expected.items() if key in parameters)
    for key, tensor in read_all(name).items():  # distributed as on the CPU
        if tensor.numel() > 1000:
            assert expected[key].float().std().item() == pytest.approx(tensor.float().std().item(), rel=0.1), key
    assert torch.equal(states[0], torch.get_rng_state()) and torch.equal(states[1], torch.cuda.get_rng_state())


@pytest.mark.parametrize("name", CONFIGS)
def test_the_order_of_reading_changes_nothing(name: str) -> None:
    expected, weights = read_all(name), weights_of(name)
    for key in reversed(weights):
        for _ in range(2):
            assert torch.equal(weights[key].read(), expected[key]), key
            torch.rand(1)  # whatever is drawn in between
    mixed = weights_of(name)
    for key in sorted(mixed, key=lambda key: hashlib.sha256(key.encode()).digest()):
        assert torch.equal(mixed[key].read(), expected[key]), key


def test_every_tensor_is_there_once_in_the_order_of_the_module() -> None:
    for name in CONFIGS:
        plain = build(name).state_dict(keep_vars=True)
        seen: dict[int, str] = {}
        for key, tensor in plain.items():
            seen.setdefault(id(tensor), key)
        weights = weights_of(name)
        assert list(weights) == list(seen.values())
        for key, stored in weights.items():
            assert (stored.shape, stored.dtype) == (tuple(plain[key].shape), plain[key].dtype)
            assert stored.read().shape == stored.shape
    assert "lm_head.weight" in weights_of("llama")
    assert "lm_head.weight" not in weights_of("tied")


def test_another_seed_and_another_name_give_other_numbers() -> None:
    found, other = read_all("llama", 3), read_all("llama", 4)
    matrices = {key: tensor for key, tensor in found.items() if tensor.dim() > 1}
    assert len(matrices) == 2 + 3 * 7
    for key, tensor in matrices.items():
        assert (tensor != other[key]).float().mean() > 0.9, key
        for sibling, same_shape in matrices.items():
            if sibling != key and same_shape.shape == tensor.shape:
                assert (tensor != same_shape).float().mean() > 0.9, (key, sibling)


def test_a_layer_is_the_same_in_a_model_of_more_layers() -> None:
    found = read_all("llama")
    deeper = initial_weights(without(LlamaConfig(**SHAPE | {"num_hidden_layers": 5})), 3)
    assert deeper is not None
    assert len(deeper) > len(found)
    assert all(torch.equal(deeper[key].read(), tensor) for key, tensor in found.items())


@pytest.mark.parametrize("name", CONFIGS)
def test_numbers_are_distributed_as_transformers_has_them(name: str) -> None:
    torch.manual_seed(11)
    plain = build(name).state_dict()
    found = read_all(name)
    for key, tensor in found.items():
        expected, count = plain[key], tensor.numel()
        if expected.std() == 0:  # norms are one, biases zero
            assert torch.equal(tensor, expected), key
            continue
        # Both are samples: five standard errors of the difference.
        deviation = expected.std()
        assert abs(tensor.std() / deviation - 1) < 5 * math.sqrt(2 / (2 * count)), key
        assert abs(tensor.mean() - expected.mean()) < 5 * deviation * math.sqrt(2 / count), key
        assert torch.equal((tensor == 0).all(-1), (expected == 0).all(-1)), key  # the row of the padding token


def test_residual_projections_of_gpt2_are_scaled_by_the_depth() -> None:
    found = read_all("gpt2")
    for layer in range(3):
        for part in ("attn", "mlp"):
            deviation = float(found[f"transformer.h.{layer}.{part}.c_proj.weight"].std())
            assert deviation == pytest.approx(0.02 / math.sqrt(6), rel=0.1)


@pytest.mark.parametrize("name", CONFIGS)
def test_generators_are_left_as_they_are(name: str) -> None:
    with without_weights():
        outline = build(name)
    before = torch.get_rng_state()
    weights = initial_weights(outline, 3)
    assert weights is not None
    for stored in weights.values():
        stored.read()
    assert torch.equal(torch.get_rng_state(), before)


def test_one_unit_is_in_memory_and_is_drawn_once(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = weights_of("llama")
    drawn = []
    initialise = LlamaForCausalLM.initialize_weights
    monkeypatch.setattr(LlamaForCausalLM, "initialize_weights", lambda model: (drawn.append(1), initialise(model)))
    sizes: dict[str, int] = {}
    for key, stored in weights.items():
        unit = ".".join(key.split(".")[:3]) if ".layers." in key else key
        sizes[unit] = sizes.get(unit, 0) + math.prod(stored.shape)
    gc.collect()
    gc.freeze()  # what is there already is not looked through again
    most = 0
    for stored in weights.values():
        tensor = stored.read()
        most = max(most, newly_in_memory())
        del tensor
    left = newly_in_memory()
    gc.unfreeze()
    assert len(drawn) == len(sizes) == 3 + 3
    assert max(sizes.values()) // 2 < most <= max(sizes.values())
    assert left == 0  # nothing is kept of what has been read


def test_a_model_of_many_layers_is_not_walked_through_for_each(monkeypatch: pytest.MonkeyPatch) -> None:
    visited = []
    initialise = PreTrainedModel._initialize_weights

    def counting(model: Any, module: Any, *rest: Any) -> None:
        visited.append(module)
        initialise(model, module, *rest)

    outline = without(LlamaConfig(**SHAPE | {"num_hidden_layers": 20}))
    monkeypatch.setattr(PreTrainedModel, "_initialize_weights", counting)
    for stored in (initial_weights(outline, 3) or {}).values():
        stored.read()
    assert 0 < len(visited) < 2 * 2 * len([*outline.modules()])  # tried and drawn, with the modules around each layer


def newly_in_memory() -> int:
    """Numbers in tensors that were made since ``gc.freeze()`` and are reachable, each memory counted once."""
    gc.collect()
    found = {}
    for tensor in gc.get_objects():
        if issubclass(type(tensor), torch.Tensor) and not tensor.is_meta:
            found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes() // tensor.element_size()
    return sum(found.values())


def test_the_module_may_be_changed_before_weights_are_read() -> None:
    outline = without(CONFIGS["llama"])
    weights = initial_weights(outline, 3)
    assert weights is not None
    for layer in outline.model.layers:
        layer.mlp.up_proj = torch.nn.Identity()
    outline.model.embed_tokens.weight = torch.nn.Parameter(torch.zeros(259, 32))
    for key, tensor in read_all("llama").items():
        assert torch.equal(weights[key].read(), tensor)


class Stated(PreTrainedModel):
    """A matrix and a buffer that ``_init_weights`` does to what its configuration says."""

    config_class = LlamaConfig

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.inner = torch.nn.Linear(4, 4)
        self.scale = torch.nn.Parameter(torch.ones(8))
        self.register_buffer("table", torch.rand(5))
        self.post_init()

    def _init_weights(self, module: Any) -> None:
        if isinstance(module, torch.nn.Linear):
            torch.nn.init.normal_(module.weight)
            torch.nn.init.zeros_(module.bias)
        elif module is self:
            if self.config.initializer_range == 0.5:
                torch.nn.init.normal_(self.scale)
            elif self.config.initializer_range == 0.25:
                torch.nn.init.normal_(self.scale[:3])
            torch.nn.init.uniform_(self.table)
            torch.nn.init.normal_(self.inner.weight, mean=9.0)


def stated(initializer_range: float) -> tuple[Any, Any]:
    with without_weights():
        outline = Stated(LlamaConfig(initializer_range=initializer_range))
    return outline, initial_weights(outline, 3)


def test_what_an_outer_module_draws_again_is_drawn_by_it() -> None:
    assert (stated(0.5)[1]["inner.weight"].read() - 9).abs().max() < 6


def test_a_buffer_is_the_modules_own() -> None:
    outline, weights = stated(0.5)
    table = outline.table.clone()
    assert {key: stored.shape for key, stored in weights.items()} == {
        "scale": (8,),
        "table": (5,),
        "inner.weight": (4, 4),
        "inner.bias": (4,),
    }
    first = {key: stored.read().clone() for key, stored in weights.items()}
    assert torch.equal(first["table"], table)
    assert all(torch.equal(stored.read(), first[key]) for key, stored in weights.items())


def test_what_is_not_initialised_by_part_is_not_drawn_by_part() -> None:
    assert initial_weights(torch.nn.Linear(2, 2), 3) is None
    with without_weights():
        assert initial_weights(torch.nn.TransformerEncoderLayer(8, 2), 3) is None
    assert stated(0.0)[1] is None  # `scale` would be what the constructor made of it


def test_a_parameter_that_is_set_in_part_is_an_error_where_it_is_read() -> None:
    _, weights = stated(0.25)
    assert torch.isfinite(weights["inner.weight"].read()).all()
    with pytest.raises(AssertionError, match=r"Stated\._init_weights sets only a part of scale"):
        weights["scale"].read()


RUNS: dict[str, tuple[int, tuple[object, ...]]] = {
    "zero0": (1, ("--zero_stage", 0)),
    "zero1": (2, ("--zero_stage", 1)),
    "zero3": (2, ()),
    "tensor-parallel": (2, ("--tensor_parallel_size", 2, "--vocab_size", 260)),
    "bf16": (2, ("--zero_stage", 1, "--precision", "bf16")),
}
"""Ranks and flags of runs that end where they began: a step at a learning rate of next to nothing."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("drawing")
    (folder / "rows.json").write_text(json.dumps([{"input": "a", "target": "b"}] * 8))
    for ranks in (1, 2):
        commands = [
            [
                *("--arch", "llama-tiny", "--num_layers", 2, "--hidden_size", 32, "--intermediate_size", 48),
                *("--num_heads", 2, "--instruction_tuning_data_dir", folder / "rows.json", "--seed", 3),
                *("--output_dir", folder / name, "--max_steps", 1, "--learning_rate", 1e-30, "--num_workers", 0),
                *("--per_gpu_train_batch_size", 1, "-p", "no:tensorboard", "-p", "no:plot"),
                *(*more, *(zero3_at_once(folder) if name == "zero3" else ())),
            ]
            for name, (count, more) in RUNS.items()
            if count == ranks
        ]
        train_many(commands, ranks=ranks, cwd=folder)
    return folder


@pytest.mark.parametrize("name", RUNS)
def test_a_run_begins_with_them_whatever_its_stage_its_ranks_and_its_precision(runs: Path, name: str) -> None:
    config = LlamaConfig(**SHAPE | {"num_hidden_layers": 2, "vocab_size": 260 if "tensor" in name else 259})
    expected = initial_weights(without(config), 3)
    assert expected is not None
    found = load_file(runs / name / "export" / "model.safetensors")
    assert found.keys() == expected.keys()
    for key, stored in expected.items():
        tensor = stored.read().to(torch.bfloat16 if name == "bf16" else torch.float32)
        assert found[key].dtype == tensor.dtype
        assert (found[key] - tensor).abs().max() < 1e-25, key
