"""Linear layers with adapters, whose sum is rounded once: ``y = x W^T + s (x A^T) B^T``.

peft computes ``x W^T``, rounds it to 16 bits, and adds the adapter's product: an update below half of the last bit of
``x W^T`` is lost, in every element, and training stands still. Here the adapter's product is computed first and rounded
by itself, which costs 2^-9 of it, and ``x W^T`` is summed onto it: a matrix product (of oneDNN) reads the
16-bit matrix that it adds to, adds it to its float32 sum, and rounds that once. An update then changes as many elements
as it is large, and their average by its size. The gradient of ``x`` is computed in the same way. cuBLAS rounds its
product before it adds a matrix (CUDA 13.0, 2026-11-26), so on a GPU a kernel of panda's own continues the float32 sum
of ``x W^T`` by the adapter's product (low_rank_triton.py); where that cannot run, both are summed in float32.

Memory traffic beyond ``x W^T`` itself, at 4 x 2048 tokens and rank 64, in MiB of reads and writes:

    ===================================================  ============  =============
    forward                                              4096 -> 4096  4096 -> 11008
    ===================================================  ============  =============
    peft: product, scaled, added                                  384           1032
    both in float32, summed, rounded                              448           1204
    one product over ``[x, s x A^T]`` and ``[W, B]``              160            214
    the adapter's product first (on a CPU)                        128            344
    one kernel (on a GPU)                                           0              0
    ===================================================  ============  =============

and 64 more in each, for the second reading of ``x``. The third has copies of ``x`` and of ``W``, or needs ``W`` stored
with room for ``B``, which its 4-bit form, ZeRO-3 and names in checkpoints stand against. All of them are small beside
the product: 128 MiB are 0.04 ms at 3.35 TB/s, and the product takes 0.4 ms at 700 TFLOP/s.

Only the layer's input and ``s x A^T`` are saved for backward, and no copy of a weight. With dropout, the adapter's
input is another tensor than the layer's: it is saved instead, and autograd adds the two gradients of ``x``.
A bias is added last, which rounds again; small updates pass through that, since the first sum has a finer last bit.

A base in NF4 is dequantised to the type of ``x``, once in forward and once in backward: to keep forward's result for
all layers would take 2 bytes a parameter. Where activations are recomputed in full, that would be three times. There
the result of the recomputation is kept, which lives from there to the backward of the same layer, so it is twice again.

The sum is an operation of its own: inductor (torch 2.13) would split it again into a rounded product and an addition,
and merge the dequantisations of forward and backward into one result, kept for all layers at once. Where compiled code
may launch the kernel itself (`_summed`), inductor sees it and splits nothing, and the host does a tenth of the work.
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any

import torch
from peft.tuners import lora
from torch import Tensor

from panda.files.compilers import can_compile

Settings = tuple[float, bool, bool, tuple[int, ...]]
"""The adapter's scale, whether to keep a dequantised weight, ``in_line`` of `_summed`, and the layout of the weight."""
ALIGNMENT = 16
"""Bytes of which the copying unit of a GPU wants multiples, for the beginning of a matrix and of each of its rows."""
LEAST_ROWS = 1024
"""With fewer rows the kernel has too few tiles to keep a GPU busy: such products are left to cuBLAS."""

SUM = "panda::sum_of_products"
DEQUANTISED = "panda::dequantised"

torch.library.define(
    SUM, "(Tensor x, Tensor[] weight, int[] layout, bool transposed, Tensor[] low_rank, Tensor? bias) -> Tensor"
)
torch.library.define(DEQUANTISED, "(Tensor x, Tensor[] weight, int[] layout) -> Tensor")


def _sum(
    x: Tensor,
    weight: Sequence[Tensor],
    layout: Sequence[int],
    transposed: bool,
    low_rank: Sequence[Tensor],
    bias: Tensor | None,
) -> Tensor:
    """``left @ right + x @ weight`` (``weight.T`` if ``transposed``), rounded once, and then ``bias`` added.

    ``x`` is [..., m]. ``low_rank`` is ``left`` [tokens, r] and ``right`` [r, n], or empty for ``x @ weight`` without
    them. ``weight`` is a matrix, or with a ``layout`` one in NF4 and its scales, as from ``_packed``.
    """
    whole = _whole(x, weight, layout)
    factor = whole.t() if transposed else whole
    result = x.new_empty((*x.shape[:-1], factor.shape[1]))
    rows, sums = x.reshape(-1, x.shape[-1]), result.view(-1, factor.shape[1])
    if not low_rank:
        torch.mm(rows, factor, out=sums)
    elif x.is_cuda and x.dtype != torch.float32:
        _sum_on_gpu(sums, rows.contiguous(), factor, *low_rank)
    else:
        torch.mm(*low_rank, out=sums)
        sums.addmm_(rows, factor)
    return result if bias is None else result.add_(bias)


def _sum_on_gpu(result: Tensor, x: Tensor, weight: Tensor, left: Tensor, right: Tensor) -> None:
    if len(x) >= LEAST_ROWS and can_compile(x.device):
        from panda.models.adapters.low_rank_triton import can_multiply
        from panda.models.adapters.low_rank_triton import product_with_low_rank

        if can_multiply(x, weight, left, right):
            product_with_low_rank(x, weight, left, right, result)
            return
    total = torch.mm(x, weight, out_dtype=torch.float32)
    total += torch.mm(left, right, out_dtype=torch.float32)
    result.copy_(total)


def _sum_without_values(
    x: Tensor, weight: Sequence[Tensor], layout: Sequence[int], transposed: bool, *low_rank_and_bias: Any
) -> Tensor:
    outputs, inputs = layout[:2] if layout else weight[0].shape
    return x.new_empty((*x.shape[:-1], outputs if transposed else inputs))


def _whole(x: Tensor, weight: Sequence[Tensor], layout: Sequence[int]) -> Tensor:
    """``weight`` [outputs, inputs] in the type of ``x``: itself, or dequantised where it has a ``layout``."""
    matrix, *scales = weight
    if not layout:
        return matrix
    functional: Any = import_module("bitsandbytes.functional")
    outputs, inputs, block, *block_of_scales = layout
    nested: dict[str, Any] = {}
    if block_of_scales:
        offset, absmax, code = scales[1:]
        state = functional.QuantState(absmax, code=code, blocksize=block_of_scales[0], dtype=torch.float32)
        nested = {"offset": offset, "state2": state}
    shape = torch.Size((outputs, inputs))
    state = functional.QuantState(scales[0], shape=shape, blocksize=block, quant_type="nf4", dtype=x.dtype, **nested)
    result: Tensor = functional.dequantize_4bit(matrix, state)
    return result


def _whole_without_values(x: Tensor, weight: Sequence[Tensor], layout: Sequence[int]) -> Tensor:
    return x.new_empty(tuple(layout[:2]))


def _summed(
    x: Tensor,
    weight: Sequence[Tensor],
    layout: Sequence[int],
    transposed: bool,
    low_rank: Sequence[Tensor],
    bias: Tensor | None,
    *,
    in_line: bool,
) -> Tensor:
    """As `_sum`. With ``in_line`` compiled code launches the kernel itself: the operation takes the host 0.2 ms."""
    launched = in_line and torch.compiler.is_compiling() and x.is_cuda and x.dtype.itemsize == 2
    if launched and low_rank and not layout and x.numel() >= LEAST_ROWS * x.shape[-1]:
        (whole,) = weight
        factor = whole.t() if transposed else whole
        sums: Tensor = torch.ops.panda.product_with_low_rank(x.contiguous(), factor, *low_rank)
        return sums if bias is None else sums + bias
    result: Tensor = torch.ops.panda.sum_of_products(x, weight, layout, transposed, low_rank, bias)
    return result


torch.library.impl(SUM, "default", _sum)
torch.library.register_fake(SUM, _sum_without_values)
torch.library.impl(DEQUANTISED, "default", _whole)
torch.library.register_fake(DEQUANTISED, _whole_without_values)


def _inner(given: Tensor, a: Tensor, scale: float) -> Tensor:
    """What the adapter's second matrix is given, [tokens, r], from ``given`` [..., inputs]."""
    return given.reshape(-1, given.shape[-1]) @ a.t() * scale


class _AdaptedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, settings: Settings, x: Tensor, dropped: Tensor | None, a: Tensor, b: Tensor, *frozen: Any
    ) -> Tensor:
        """``x`` [..., inputs] to [..., outputs]. ``dropped`` is what the adapter is given instead, if anything.

        ``a`` is [r, inputs] and ``b`` [outputs, r]; ``frozen`` the bias, or None, and the weight with its scales.
        """
        scale, keep, in_line, layout = settings
        bias, *weight = frozen
        given = x if dropped is None else dropped
        inner = _inner(given, a, scale)
        if keep and layout:
            weight, layout = [torch.ops.panda.dequantised(x, weight, layout)], ()
        ctx.save_for_backward(given, inner, a, b, *weight)
        ctx.scale, ctx.layout, ctx.apart, ctx.in_line = scale, layout, dropped is not None, in_line
        return _summed(x, weight, layout, True, [inner, b.t()], bias, in_line=in_line)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        given, inner, a, b, *weight = ctx.saved_tensors
        rows = grad.reshape(-1, grad.shape[-1])
        grad_inner = rows @ b * ctx.scale
        grad_a = grad_inner.t() @ given.reshape(-1, given.shape[-1])
        grad_b = rows.t() @ inner
        grad_x = grad_dropped = None
        if ctx.needs_input_grad[1]:
            low_rank = [] if ctx.apart else [grad_inner, a]
            grad_x = _summed(grad, weight, ctx.layout, False, low_rank, None, in_line=ctx.in_line)
        if ctx.needs_input_grad[2]:
            grad_dropped = (grad_inner @ a).view(given.shape)
        return None, grad_x, grad_dropped, grad_a, grad_b, *[None] * (len(ctx.needs_input_grad) - 5)


class OneRounding:
    """Replaces the forward of peft's layers with one adapter. All but the plain case is still computed by peft."""

    reads_parts = True
    """Forward reads the weights of the layer's parts itself, without calling them."""
    keeps_dequantised = False
    """Whether backward uses forward's dequantised weight again."""
    in_line = False
    """Whether compiled code may launch the kernel, which asks nothing of its factors then."""

    def forward(self: Any, x: Tensor, *arguments: Any, **keywords: Any) -> Tensor:
        if arguments or keywords or not _is_plain(self, x):
            result: Tensor = super().forward(x, *arguments, **keywords)  # type: ignore[misc]
            return result
        (name,) = self.active_adapters
        base, dropout = self.base_layer, self.lora_dropout[name]
        dropped = dropout(x) if isinstance(dropout, torch.nn.Dropout) and dropout.training else None
        layout, scales = _packed(base) if _is_packed(base) else ((), ())
        adapter = self.lora_A[name].weight, self.lora_B[name].weight
        if not torch.is_grad_enabled():
            # Without the function: compiled by torch 2.11, where there are no gradients, its `forward` is given each
            # argument in the place of the one before. Can go when 2.11 is not supported.
            low_rank = [_inner(x if dropped is None else dropped, adapter[0], self.scaling[name]), adapter[1].t()]
            weight = [base.weight, *scales]
            result = torch.ops.panda.sum_of_products(x, weight, layout, True, low_rank, base.bias)
            return result
        settings = self.scaling[name], self.keeps_dequantised, self.in_line, layout
        result = _AdaptedLinear.apply(settings, x, dropped, *adapter, base.bias, base.weight, *scales)  # type: ignore[no-untyped-call]
        return result


def round_once(model: torch.nn.Module, *, recomputed: bool = False) -> None:
    """Make the adapted linear layers of ``model`` round their sum once, in place.

    Those of another kind, such as DoRA's, int8's, and adapters on experts or embeddings, stay as they are. Where they
    are ``recomputed`` in full, backward uses the dequantised weights of forward again, and the sum stays an operation:
    torch 2.11 would keep what a kernel gives, for all layers at once.
    """
    in_line = not recomputed and _can_launch_in_line(model)
    for module in model.modules():
        layer: Any = module
        if _is_supported(layer):
            layer.__class__ = _class_on(type(layer))  # type: ignore[arg-type]
        if isinstance(layer, OneRounding):
            layer.keeps_dequantised, layer.in_line = recomputed, in_line and _has_whole_rows(layer)


def _can_launch_in_line(model: torch.nn.Module) -> bool:
    """Whether the kernel runs here, and can copy from each weight of ``model``.

    It copies from multiples of 16 bytes only. An engine lays trained weights, or those of a layer, one after the other
    in memory of its own, so each of them must be that long; compiled code does not look where they are.
    """
    if not torch.cuda.is_available():
        return False
    device = torch.device("cuda", torch.cuda.current_device())
    if not can_compile(device):
        return False
    from panda.models.adapters.low_rank_triton import is_hopper

    of_values = [parameter for parameter in model.parameters() if parameter.is_floating_point()]
    return is_hopper(device) and all(_fills(math.prod(_shape(parameter))) for parameter in of_values)


def _has_whole_rows(layer: Any) -> bool:
    matrices = (_shape(part) for part in layer.parameters())
    return all(_fills(size) for shape in matrices if len(shape) == 2 for size in shape)


def _fills(elements: int) -> bool:
    return elements * torch.bfloat16.itemsize % ALIGNMENT == 0


def _shape(parameter: Any) -> torch.Size:
    shape: torch.Size = getattr(parameter, "ds_shape", parameter.shape)  # ZeRO-3 keeps a part
    return shape


@functools.cache
def _class_on(of_peft: type) -> type:
    return type(f"OneRounding{of_peft.__name__}", (OneRounding, of_peft), {"__module__": __name__})


def _is_supported(layer: Any) -> bool:
    """Whether ``layer`` is peft's for a linear layer, whole or in 4 bits."""
    if type(layer) is lora.Linear:
        return type(layer.base_layer) is torch.nn.Linear and not layer.fan_in_fan_out
    # Asked of `lora` itself, it would import bitsandbytes.
    return type(layer) is getattr(sys.modules.get("peft.tuners.lora.bnb"), "Linear4bit", None)


def _is_plain(layer: Any, x: Tensor) -> bool:
    """Whether ``layer`` is in the state that this forward is for: one adapter, in the type of base and input."""
    if layer.disable_adapters or layer.merged or len(layer.active_adapters) != 1:
        return False
    (name,) = layer.active_adapters
    if name not in layer.lora_A or name in layer.lora_variant or layer.lora_bias[name]:
        return False
    base, of_a, of_b = layer.base_layer, layer.lora_A[name], layer.lora_B[name]
    if base.weight.requires_grad or (base.bias is not None and (base.bias.requires_grad or base.bias.dtype != x.dtype)):
        return False
    computed = base.weight.dtype
    if _is_packed(base):
        computed = base.compute_dtype if _quantisation(base).quant_type == "nf4" else None
    if not computed == of_a.weight.dtype == of_b.weight.dtype == x.dtype:
        return False
    if x.device.type != "meta" and torch.is_autocast_enabled(x.device.type):  # torch refuses to say for meta
        return False
    # A hook is called with its module, and these would not be. Under ZeRO-3 the engine moves its own to the layer.
    return not any(part._forward_hooks or part._forward_pre_hooks for part in (base, of_a, of_b))


def _is_packed(base: torch.nn.Module) -> bool:
    return type(base) is not torch.nn.Linear


def _quantisation(base: Any) -> Any:
    return getattr(base.weight, "quant_state", None) or base.quant_state  # ZeRO-3 may take the first one away


def _packed(base: Any) -> tuple[tuple[int, ...], tuple[Tensor, ...]]:
    """The shape and the block sizes of the weight of ``base``, a layer of bitsandbytes, and its scales."""
    state = _quantisation(base)
    inner = state.state2
    if inner is None:
        return (*state.shape, state.blocksize), (state.absmax,)
    return (*state.shape, state.blocksize, inner.blocksize), (state.absmax, state.offset, inner.absmax, inner.code)
