"""Packed rows without a mask: the same loss and gradients as with one, and only where the kernel can do that."""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Iterator
from functools import partial
from importlib import metadata
from typing import Any

import numpy as np
import pytest
import torch
from model_types import ENTRIES
from model_types import tiny
from token_batches import collate
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode
from varlen_on_cpu import varlen_on_cpu

from panda.data.batches import TokenBatch
from panda.models.causal_lm import build_causal_lm
from panda.models.forward import flash_attention_4
from panda.models.forward import varlen_attention
from panda.models.forward.isolation import refuse_leaking
from panda.models.forward.layers import compile_layers
from panda.models.forward.layers import recompute_activations
from panda.models.forward.packed_rows import tell_packing
from panda.models.forward.varlen_attention import KERNELS
from panda.models.forward.varlen_attention import attend_by_kernel
from panda.models.forward.varlen_attention import takes_bounds
from panda.models.forward.varlen_attention import what_forbids_kernel
from panda.models.forward.varlen_attention import why_masked
from panda.models.hf import HfOptions
from panda.models.hf import build_hf
from panda.models.initialisation.creation import without_weights
from panda.models.llama import LlamaOptions
from panda.models.llama import build_llama
from panda.registry import UserError
from panda.registry.contexts import ModelContext
from panda.tasks.scores import next_token_loss

if not varlen_attention._HAS_WINDOW:
    pytest.skip("this torch has no varlen_attn with windows", allow_module_level=True)

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
CONTEXT = ModelContext(ENTRIES, max_seq_length=64, pad_token_id=0, bos_token_id=1, eos_token_id=2)
WINDOW = 4
ROWS = ((9, 3, 14), (7, 11), (25, 4))
"""Lengths of the samples of each row; the second is padded by more than a sample, the first by less."""
loss_of = next_token_loss


@pytest.fixture(params=KERNELS)
def calls(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Of the kernel that `attend_by_kernel` has a model use in the test."""
    monkeypatch.setattr(sys.modules[__name__], "attend_by_kernel", partial(attend_by_kernel, kernel=request.param))
    with varlen_on_cpu() as calls:
        yield calls


def packed_batch(rows: tuple[tuple[int, ...], ...] = ROWS, *, bounded: bool, length: int = 32) -> TokenBatch:
    generator = np.random.default_rng(len(rows))
    made = [[(generator.integers(3, ENTRIES, n).astype(np.int32), np.arange(n) > n // 3) for n in row] for row in rows]
    return collate(made, 0, packed=True, bounded=bounded, row_length=lambda tokens: length)


def hf_model(model_type: str, *, weights: bool = True, **changes: Any) -> Any:
    """A tiny model of that type, in float64."""
    config = tiny(model_type).config.to_dict() | {"use_cache": False} | changes
    if not weights:
        with without_weights():
            return build_hf(HfOptions(), ModelContext(ENTRIES, 64, 0, 1, 2, config=config))
    torch.manual_seed(0)
    return build_hf(HfOptions(), ModelContext(ENTRIES, 64, 0, 1, 2, config=config)).double()


def llama(**options: Any) -> Any:
    """A tiny model of panda's own, in float64, whose queries share keys."""
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_layers": 2, "num_heads": 4, "num_key_value_heads": 2}
    return build_llama(LlamaOptions(**shape, initializer_range=0.3, **options), CONTEXT).double()


def loss_and_gradients(model: Any, batch: TokenBatch) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss = loss_of(model, batch)
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **gradients}


WINDOWED = {"sliding_window": WINDOW}
TYPES: dict[str, dict[str, Any]] = {
    "qwen3": {},
    "gpt_neox": {"attention_dropout": 0.0},
    "mistral": WINDOWED,
    "gemma3_text": WINDOWED | {"layer_types": ["sliding_attention", "full_attention"]},
    "phi3": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1.0}},
    "minicpm3": {},
    "olmo2": {},
    "granite": {"attention_multiplier": 0.3},
}
"""With windows, heads of other sizes for values, a scale of its own, and parts that rotate."""


@pytest.mark.parametrize("model_type", ["llama", *TYPES])
def test_loss_and_gradients_are_those_with_a_mask(model_type: str, calls: list[int]) -> None:
    model = llama() if model_type == "llama" else hf_model(model_type, **TYPES[model_type])
    assert what_forbids_kernel(model, torch.bfloat16) == ""
    masked = loss_and_gradients(model, packed_batch(bounded=False))
    assert not calls
    attend_by_kernel(model)
    kernel = loss_and_gradients(model, packed_batch(bounded=True))
    assert calls == [16, 16]  # of each layer: 7 samples, and the padding of 3 rows, and empty ones
    assert kernel.keys() == masked.keys()
    for name, expected in masked.items():
        torch.testing.assert_close(kernel[name], expected, rtol=1e-6, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize(
    ("model_type", "changes", "why"),
    [
        ("llama", {"head_dim": 64}, ""),
        ("mistral", {"head_dim": 128, "sliding_window": None}, ""),
        ("llama", {}, "it was not tried with heads of 8 numbers"),
        ("minicpm3", {"qk_nope_head_dim": 48, "qk_rope_head_dim": 16}, ""),
        ("minicpm3", {"head_dim": 64}, "it was not tried with heads of 16 numbers"),
        ("mistral", {"head_dim": 64, "sliding_window": 16}, "it was not tried with sliding windows"),
        ("gpt_neox", {"attention_dropout": 0.1}, "the model has dropout in its attention"),
    ],
)
def test_flash_attention_4_serves_what_it_was_tried_for(
    model_type: str, changes: dict[str, Any], why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(varlen_attention, "why_not_4", lambda device: "")
    model = hf_model(model_type, weights=False, **changes)
    assert varlen_attention.why_not_flash_4(model, CUDA, torch.bfloat16) == why
    assert varlen_attention.why_not_flash_4(model, CUDA, torch.float16) == "it was tried in bf16 only"


@pytest.mark.parametrize(
    ("version", "capability", "module", "why"),
    [
        (None, (9, 0), None, "flash-attn-4 is not installed, and it needs version 4.0.0b36: `pip install"),
        ("4.0.0", (9, 0), None, "this machine has flash-attn-4 4.0.0, and it needs version 4.0.0b36"),
        ("4.0.0b36", (10, 0), None, "it was tried on Hopper GPUs only, and this is some card"),
        ("4.0.0b36", (8, 0), None, "it was tried on Hopper GPUs only, and this is some card"),
        ("4.0.0b36", (9, 0), ImportError("No module named 'cutlass'"), "flash-attn-4 cannot be imported (No module"),
        ("4.0.0b36", (9, 0), RuntimeError("CUDA driver"), "flash-attn-4 cannot be imported (CUDA driver)"),
        ("4.0.0b36", (9, 0), None, ""),
    ],
)
def test_flash_attention_4_is_of_one_version_on_one_kind_of_card(
    version: str | None,
    capability: tuple[int, int],
    module: Exception | None,
    why: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def installed(name: str) -> str:
        if version is None:
            raise metadata.PackageNotFoundError
        return version

    def kernels() -> object:
        if module:
            raise module
        return object()

    monkeypatch.setattr(metadata, "version", installed)
    monkeypatch.setattr(flash_attention_4, "_kernels", kernels)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "some card")
    found = flash_attention_4.why_not(CUDA)
    assert found.startswith(why) if why else found == ""


def test_amds_cards_are_not_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """To torch MI200 is of capability 9.0, and MI300 of 9.4."""
    monkeypatch.setattr(metadata, "version", lambda name: flash_attention_4.VERSION)
    monkeypatch.setattr(flash_attention_4, "_kernels", object)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "AMD Instinct MI250X")
    assert flash_attention_4.why_not(CUDA) == ""
    monkeypatch.setattr(torch.version, "hip", "6.2")
    assert flash_attention_4.why_not(CUDA) == "it was tried on Hopper GPUs only, and this is AMD Instinct MI250X"


def test_what_torch_is_told_of_flash_attention_4_is_so() -> None:
    """Layouts, too: queries of one row may be those of another order of dimensions."""
    bounds = torch.tensor([0, 5, 12], dtype=torch.int32)
    query, key, value = (torch.randn(heads, 12, 8).transpose(0, 1).requires_grad_() for heads in (4, 2, 2))
    with varlen_on_cpu():
        torch.library.opcheck(torch.ops.panda.flash_attention_4, (query, key, value, bounds, 7, None, 3))


def test_the_comparison_sees_windows_and_bounds(calls: list[int]) -> None:
    """The test above can fail."""
    model = hf_model("mistral", **WINDOWED)
    wide = hf_model("mistral", sliding_window=None)
    wide.load_state_dict(model.state_dict())
    attend_by_kernel(model), attend_by_kernel(wide)
    batch = packed_batch(bounded=True)
    with torch.no_grad():
        loss = loss_of(model, batch)
        assert (loss - loss_of(wide, batch)).abs() > 1e-2
        assert batch.bounds is not None
        batch.bounds[1] += 2
        assert (loss - loss_of(model, batch)).abs() > 1e-2


class Seen(TorchDispatchMode):
    """What torch runs: whether anything has a number for each pair of tokens of a row, or is read by the host."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.length, self.pairs, self.reads = length, Counter[str](), Counter[str]()

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        if function.name() in ("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select"):
            self.reads[function.name()] += 1
        result = function(*arguments, **(keywords or {}))
        for tensor in result if isinstance(result, tuple) else (result,):
            if isinstance(tensor, torch.Tensor) and tensor.shape[-2:] == (self.length, self.length):
                self.pairs[function.name()] += 1
        return result


@pytest.mark.parametrize("make", [llama, partial(hf_model, "gemma3_text", **TYPES["gemma3_text"])])
def test_no_mask_is_made_and_nothing_waits_for_the_device(make: Any, calls: list[int]) -> None:
    model = make()
    width = 32 + 8  # no other tensor has two dimensions of this size
    samples = [[(np.full(n, 5, np.int32), np.arange(n) > 0) for n in row] for row in ROWS]
    batch = collate(samples, 0, packed=True, bounded=True, row_length=lambda tokens: width)
    attend_by_kernel(model)
    with Seen(width) as seen:
        loss_of(model, batch)
    assert not seen.pairs and not seen.reads
    with Seen(width) as seen:
        model(batch.input_ids, position_ids=batch.positions["position_ids"])
    assert seen.pairs, "with a mask it is seen: else this test sees nothing"


def test_a_padded_row_of_one_sample_needs_no_mask_either() -> None:
    """SDPA is causal by itself, and no token sees the padding on its right."""
    model = llama()
    batch = collate([[(np.full(n, 5, np.int32), np.arange(n) > 0)] for n in (40, 9, 22)], 0)
    with Seen(40) as seen:
        loss_of(model, batch).backward()
    assert not seen.pairs and not seen.reads


def test_without_bounds_the_model_computes_as_before(calls: list[int]) -> None:
    """To the bit: rows of a sample, and packed rows, for which it makes a mask."""
    model = llama().eval()
    packed = packed_batch(bounded=False)
    each = [{}, {"position_ids": packed.positions["position_ids"]}]
    with torch.no_grad():
        before = [model(packed.input_ids, **more).logits for more in each]
        attend_by_kernel(model)
        after = [model(packed.input_ids, **more).logits for more in each]
    assert all(map(torch.equal, before, after)) and not calls


def test_a_model_says_that_it_takes_bounds_and_its_config_does_not_keep_it() -> None:
    model = llama()
    assert not takes_bounds(model)
    attend_by_kernel(model)
    assert takes_bounds(torch.nn.ModuleList([model]))
    assert not [key for key, value in model.config.to_dict().items() if value == varlen_attention.VARLEN]


def test_the_model_is_found_to_keep_samples_apart_or_refused(calls: list[int]) -> None:
    model = llama().eval()
    attend_by_kernel(model)
    refuse_leaking(model, "llama", ENTRIES, CPU, bounded=True)
    assert calls

    class Careless(torch.nn.Module):
        def forward(self, input_ids: torch.Tensor, sample_bounds: torch.Tensor, **positions: Any) -> Any:
            rows = torch.tensor([0, 8, 16], dtype=torch.int32)
            return model(input_ids, **positions | {"sample_bounds": rows, "longest_sample": 8})

    with pytest.raises(UserError, match="sees the one before it in its row"):
        refuse_leaking(Careless(), "llama", ENTRIES, CPU, bounded=True)


def test_compiled_layers_are_compiled_once_and_whole(calls: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of other lengths, with more samples and longer ones, run the same code."""
    model, counter = llama(), CompileCounter()

    def backend(graph: torch.fx.GraphModule, inputs: Any, **_: Any) -> Any:
        return counter(graph, inputs)

    attend_by_kernel(model)
    several = [ROWS, ((9, 9, 9), (11, 12), (24, 6)), ((20,), (12, 8)), ((2,) * 9, (1, 2, 3, 4, 5), (30, 1))]
    batches = [packed_batch(rows, bounded=True, length=32) for rows in several]
    batches += [packed_batch(rows, bounded=True, length=80) for rows in (((80,), (40, 40)), ((8,) * 10, (3,) * 20))]
    plain = [loss_and_gradients(model, batch) for batch in batches]
    assert len({len(batch.positions["sample_bounds"]) for batch in batches}) > 2
    assert len({batch.positions["longest_sample"] for batch in batches}) > 1
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend, fullgraph=True))
    compile_layers(model, CPU)
    for batch, expected in zip(batches, plain, strict=True):
        found = loss_and_gradients(model, batch)
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-12)
    assert counter.frame_count == 1


@pytest.mark.parametrize(("selective", "runs"), [(False, 4), (True, 2)])
def test_recomputed_layers_keep_their_bounds_and_selectively_the_result(
    selective: bool, runs: int, calls: list[int]
) -> None:
    model = llama()
    attend_by_kernel(model)
    batch = packed_batch(bounded=True)
    expected = loss_and_gradients(model, batch)
    calls.clear()
    recompute_activations(model, selective=selective)
    found = loss_and_gradients(model, batch)
    assert len(calls) == runs
    assert all(torch.equal(found[name], value) for name, value in expected.items())


# -- where a mask is needed ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model_type", "changes", "reason"),
    [
        ("llama", {"attention_dropout": 0.1}, "dropout in its attention"),
        ("llama", {"head_dim": 12}, "heads of 12 numbers"),
        ("llama", {"head_dim": 264}, "heads of 264 numbers"),
        ("gpt_oss", {}, "attention is eager"),
        ("gemma2", {}, "attention (is eager|takes softcap)"),  # as transformers 5.23 and 5.17 have it
        ("bloom", {}, "attention is eager"),
        ("falcon", {}, "does not leave its attention to transformers"),
        ("nemotron", {}, "layers do not pass on where samples begin"),
        ("gpt2", {}, "cannot be tried without weights"),
    ],
)
def test_what_the_kernel_cannot_do_is_found_without_weights(
    model_type: str, changes: dict[str, Any], reason: str
) -> None:
    model = hf_model(model_type, weights=False, **changes)
    before = model.config._attn_implementation
    assert re.search(reason, what_forbids_kernel(model, torch.bfloat16))
    assert model.config._attn_implementation == before


@pytest.mark.parametrize("model_type", ["llama", "mixtral", "qwen3_moe", "mistral", "cohere2"])
def test_a_model_without_weights_is_asked_and_left_as_it_was(model_type: str) -> None:
    model = hf_model(model_type, weights=False)
    model.eval()
    devices = {name: tensor.device for name, tensor in [*model.named_parameters(), *model.named_buffers()]}
    assert what_forbids_kernel(model, torch.bfloat16) == ""
    assert model.config._attn_implementation == "sdpa" and not model.training
    assert devices == {name: tensor.device for name, tensor in [*model.named_parameters(), *model.named_buffers()]}


def changed_attention(monkeypatch: pytest.MonkeyPatch, **changes: Any) -> Any:
    """A llama whose attention calls transformers' with ``changes``."""
    from transformers.models.llama import modeling_llama

    model = llama()
    get = modeling_llama.ALL_ATTENTION_FUNCTIONS.get_interface

    def interface(*arguments: Any) -> Any:
        def call(module: Any, query: Any, key: Any, value: Any, mask: Any, **keywords: Any) -> Any:
            mask = changes.get("mask", lambda mask: mask)(mask)
            more = {name: each for name, each in changes.items() if name != "mask"}
            return get(*arguments)(module, query, key, value, mask, **keywords | more)

        return call

    monkeypatch.setattr(modeling_llama.ALL_ATTENTION_FUNCTIONS, "get_interface", interface)
    return model


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, ""),
        ({"mask": lambda mask: mask[..., :4]}, "a mask of its own"),
        ({"mask": lambda mask: None}, "a mask of its own"),
        ({"is_causal": False}, "not causal"),
        ({"sliding_window": 4}, "a mask of its own"),
        ({"softcap": 30.0, "s_aux": torch.ones(4)}, "attention takes s_aux, softcap"),
        ({"position_bias": torch.ones(4)}, "attention takes position_bias"),
    ],
)
def test_what_a_layer_does_to_attention_is_seen(
    changes: dict[str, Any], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = what_forbids_kernel(changed_attention(monkeypatch, **changes), torch.bfloat16)
    assert reason in found and bool(reason) == bool(found)


def test_a_mask_that_is_more_than_causal_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import masking_utils
    from transformers.models.llama import modeling_llama

    sees_one_more = partial(masking_utils.create_causal_mask, or_mask_function=lambda b, h, q, k: k == q + 1)
    monkeypatch.setattr(modeling_llama, "create_causal_mask", sees_one_more)
    assert "not causal" in what_forbids_kernel(llama(), torch.bfloat16)
    chunks = partial(masking_utils.create_sliding_window_causal_mask)
    monkeypatch.setattr(modeling_llama, "create_causal_mask", chunks)
    model = llama()
    model.config.sliding_window = WINDOW  # of which its layers do not know, as of chunks
    assert "a mask of its own" in what_forbids_kernel(model, torch.bfloat16)


def test_a_model_of_another_kind_has_its_own_attention() -> None:
    assert what_forbids_kernel(torch.nn.Linear(2, 2), torch.bfloat16) == "the model is not one that panda builds"
    untold = build_causal_lm(tiny("llama").config.to_dict(), "test")
    assert what_forbids_kernel(untold, torch.bfloat16) == "the model is not one that panda builds"
    tell_packing(untold)
    assert not what_forbids_kernel(untold, torch.bfloat16)


def test_masks_are_for_cpus_float32_and_old_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama()
    capability = [(9, 0)]
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability[0])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla V100")
    assert why_masked(model, CUDA, torch.bfloat16) == why_masked(model, CUDA, torch.float16) == ""
    assert why_masked(model, CPU, torch.bfloat16) == "there is no kernel for a CPU"
    assert why_masked(model, CUDA, torch.float32) == "there is no kernel for float32"
    capability[0] = (7, 0)
    assert why_masked(model, CUDA, torch.bfloat16) == "there is no kernel for Tesla V100"
    monkeypatch.setattr(varlen_attention, "_HAS_WINDOW", False)
    assert why_masked(model, CUDA, torch.bfloat16).startswith("torch ")
