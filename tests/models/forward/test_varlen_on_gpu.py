"""torch's varlen kernel on a GPU, against float32 with a mask. These tests use nothing that forks a process."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from model_types import tiny
from token_batches import collate

from panda.data.batches import TokenBatch
from panda.engine.determinism import deterministic
from panda.models.forward import varlen_attention
from panda.models.forward.flash_attention_4 import HEAD_SIZES
from panda.models.forward.flash_attention_4 import why_not
from panda.models.forward.isolation import refuse_leaking
from panda.models.forward.layers import compile_layers
from panda.models.forward.layers import recompute_activations
from panda.models.forward.varlen_attention import FLASH_4
from panda.models.forward.varlen_attention import KERNELS
from panda.models.forward.varlen_attention import attend_by_kernel
from panda.models.forward.varlen_attention import why_masked
from panda.models.hf import HfOptions
from panda.models.hf import build_hf
from panda.models.llama import LlamaOptions
from panda.models.llama import build_llama
from panda.registry.contexts import ModelContext
from panda.tasks.scores import next_token_loss

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")

GPU = torch.device("cuda")
ENTRIES, LENGTH = 160, 512
LENGTHS = ((200, 30, 150), (1, 300, 7, 100), (512,), (90, 90))
"""Of the samples of each row: from one token to a whole row, over the kernel's blocks of 64 and 128 tokens."""
ROUNDED = 3e-2
"""Of a gradient, how far off it may be, relative to its norm: some units of bfloat16 (2 ** -8) over two layers."""
loss_of = next_token_loss
CONTEXT = ModelContext(ENTRIES, max_seq_length=LENGTH, pad_token_id=0, bos_token_id=1, eos_token_id=2)
SHAPE: dict[str, Any] = {"hidden_size": 512, "intermediate_size": 384, "num_layers": 2, "num_heads": 4}


@pytest.fixture(autouse=True, params=KERNELS)
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """That which `attend_by_kernel` has a model use in the test."""
    if request.param == FLASH_4 and (why := why_not(GPU)):
        pytest.skip(why)

    def attend(model: Any) -> None:
        sizes = varlen_attention._asked(model, torch.bfloat16).sizes
        if request.param == FLASH_4 and not sizes <= set(HEAD_SIZES):
            pytest.skip(f"heads of {sizes} numbers")
        varlen_attention.attend_by_kernel(model, request.param)

    monkeypatch.setattr(sys.modules[__name__], "attend_by_kernel", attend)


@pytest.fixture(autouse=True)
def float32_products() -> Iterator[None]:
    """The reference is in float32, not in TensorFloat-32."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


def packed_batch(rows: tuple[tuple[int, ...], ...] = LENGTHS, *, bounded: bool, length: int = LENGTH) -> TokenBatch:
    generator = np.random.default_rng(len(rows))
    made = [[(generator.integers(3, ENTRIES, n).astype(np.int32), np.arange(n) > n // 4) for n in row] for row in rows]
    return collate(made, 0, packed=True, bounded=bounded, row_length=lambda tokens: length).to(GPU)


def llama(kv_heads: int = 4, heads: int = 4) -> Any:
    torch.manual_seed(0)
    options = LlamaOptions(**SHAPE | {"num_heads": heads}, num_key_value_heads=kv_heads, initializer_range=0.06)
    return build_llama(options, CONTEXT)


def hf(model_type: str, **changes: Any) -> Any:
    torch.manual_seed(0)
    config = tiny(model_type).config.to_dict() | {"use_cache": False, "max_position_embeddings": LENGTH} | changes
    return build_hf(HfOptions(), ModelContext(ENTRIES, LENGTH, 0, 1, 2, config=config))


def gradients(model: Any, batch: TokenBatch) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss = loss_of(model, batch)
    loss.backward()
    return float(loss.detach()), {n: p.grad.float() for n, p in model.named_parameters() if p.grad is not None}


def furthest(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """The largest distance of a gradient from what is expected, relative to the norm of that."""
    assert found.keys() == expected.keys()
    whole = float(torch.stack([g.norm() for g in expected.values()]).norm())
    return max(float((found[n] - g).norm() / (g.norm() + 1e-3 * whole)) for n, g in expected.items())


MODELS = {
    "heads of 128": llama,
    "queries share keys": partial(llama, kv_heads=1),
    "heads of 256": partial(llama, heads=2, kv_heads=1),
    "heads of 64": partial(llama, heads=8, kv_heads=2),
    "a window": partial(hf, "mistral", sliding_window=100, head_dim=64),
    "a window in one of two layers": partial(
        hf, "gemma3_text", sliding_window=64, head_dim=64, layer_types=["sliding_attention", "full_attention"]
    ),
    "smaller values": partial(hf, "minicpm3", qk_nope_head_dim=48, qk_rope_head_dim=16),
    "experts": partial(hf, "qwen3_moe"),
}


@pytest.mark.parametrize("name", [name for name in MODELS if name != "experts"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_loss_and_gradients_are_as_close_to_float32_as_with_a_mask(name: str, dtype: torch.dtype) -> None:
    model = MODELS[name]().to(GPU)
    assert why_masked(model, GPU, dtype) == ""
    exact_loss, exact = gradients(model, packed_batch(bounded=False))
    model.to(dtype)
    masked_loss, masked = gradients(model, packed_batch(bounded=False))
    attend_by_kernel(model)
    loss, found = gradients(model, packed_batch(bounded=True))
    with_mask, by_kernel = furthest(masked, exact), furthest(found, exact)
    print(f"{name}, {dtype}: off by {by_kernel:.2e} by the kernel, {with_mask:.2e} with a mask")
    assert by_kernel < max(2 * with_mask, ROUNDED)
    assert abs(loss - exact_loss) <= max(2 * abs(masked_loss - exact_loss), 2e-3 * exact_loss)


@pytest.mark.parametrize("name", MODELS)
def test_a_real_model_is_found_to_keep_samples_apart(name: str) -> None:
    model = MODELS[name]().to(GPU, torch.bfloat16).eval()
    attend_by_kernel(model)
    refuse_leaking(model, name, ENTRIES, GPU, bounded=True)


@pytest.mark.parametrize("window", [None, 100])
def test_a_sample_has_the_logits_that_it_has_alone(window: int | None) -> None:
    model = (hf("mistral", sliding_window=window, head_dim=64) if window else llama()).to(GPU, torch.bfloat16).eval()
    attend_by_kernel(model)
    batch = packed_batch(bounded=True)
    with torch.no_grad():
        together = model(batch.input_ids, **batch.positions).logits.float()
        for row, lengths in enumerate(LENGTHS):
            start = 0
            for length in lengths:
                alone = model(batch.input_ids[row : row + 1, start : start + length]).logits[0].float()
                found = together[row, start : start + length]
                assert (found - alone).norm() <= ROUNDED * alone.norm()
                start += length


def test_the_host_waits_for_nothing_and_no_mask_takes_memory() -> None:
    model = llama().to(GPU, torch.bfloat16)
    attend_by_kernel(model)
    length = 16384
    batch = packed_batch(((5000, 7000, 4000),), bounded=True, length=length)
    gradients(model, batch)  # what is set up once
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with torch.no_grad():
        torch.cuda.set_sync_debug_mode("error")
        try:
            loss_of(model, batch)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    mask = length * length
    assert torch.cuda.max_memory_allocated() - before < mask, "a mask alone would take as much"


@pytest.mark.parametrize("how", ["compiled", "recomputed", "recomputed in part"])
def test_compiled_and_recomputed_layers_give_the_same(how: str) -> None:
    model = llama(kv_heads=2).to(GPU)
    others = ((300, 200), (512,), (100, 100), (7, 400, 9))
    exact = [gradients(model, packed_batch(rows, bounded=False))[1] for rows in (LENGTHS, others)]
    attend_by_kernel(model.to(torch.bfloat16))
    batches = [packed_batch(rows, bounded=True) for rows in (LENGTHS, others)]
    plain = [gradients(model, batch) for batch in batches]
    if how == "compiled":
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        compile_layers(model, GPU)
    else:
        recompute_activations(model, selective=how == "recomputed in part")
    for batch, (loss, as_is), expected in zip(batches, plain, exact, strict=True):
        found_loss, found = gradients(model, batch)
        assert found_loss == pytest.approx(loss, rel=5e-3)
        # Compiled layers round at other places: their gradients are as close to float32, and not to the bit the same.
        assert furthest(found, expected) < max(1.5 * furthest(as_is, expected), ROUNDED)
    if how == "compiled":
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
        assert not torch._dynamo.utils.counters["graph_break"]


def test_deterministic_gradients_have_the_same_bits() -> None:
    model = llama(kv_heads=1).to(GPU, torch.bfloat16)
    attend_by_kernel(model)
    batch = packed_batch(((1500, 500, 2000, 96),), bounded=True, length=4096)
    with deterministic(True):  # torch's `warn_only` leaves FlashAttention's backward pass as it is
        (_, first), (_, again) = gradients(model, batch), gradients(model, batch)
    layer = "model.layers.0.self_attn."
    assert all(torch.equal(first[layer + name], again[layer + name]) for name in ("q_proj.weight", "k_proj.weight"))


def test_a_window_moves_the_loss() -> None:
    """The tests above would see a window that is left out."""
    narrow, wide = (hf("mistral", sliding_window=window).to(GPU, torch.bfloat16) for window in (8, 4096))
    for model in (narrow, wide):
        attend_by_kernel(model)
    wide.load_state_dict(narrow.state_dict())
    found, expected = (gradients(model, packed_batch(bounded=True))[1] for model in (narrow, wide))
    assert furthest(found, expected) > 3 * ROUNDED
