"""Attention of packed rows by a kernel for samples of any length, without a mask.

A mask of packed rows has a number for each pair of tokens of a row, and keeps torch from its fast kernels. The kernel
here takes the place where each sample begins instead, computes nothing between samples, and is faster than causal
attention over the whole row. It is used where ``why_masked`` finds nothing against it; everywhere else, as on a CPU and
in float32, attention is SDPA's with a mask. The kernel is torch's, or FlashAttention 4's where a run asks for it.

To transformers each kernel is an implementation of attention, of ``KERNELS``. Without ``sample_bounds`` it is SDPA.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from collections.abc import Iterator
from contextlib import contextmanager
from contextlib import suppress
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
from transformers import AttentionInterface
from transformers import AttentionMaskInterface
from transformers import PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from panda.models.forward.flash_attention_4 import HEAD_SIZES
from panda.models.forward.flash_attention_4 import flash_attention_4
from panda.models.forward.flash_attention_4 import why_not as why_not_4
from panda.models.forward.packed_rows import is_told_packing
from panda.models.forward.packed_rows import leave_out
from panda.models.forward.packed_rows import rows_now
from panda.registry.errors import in_brief

varlen_attn: Any = None
with suppress(ImportError):  # torch before 2.10
    from torch.nn.attention.varlen import varlen_attn

VARLEN, FLASH_4 = "panda_varlen", "panda_flash_4"
KERNELS = {VARLEN: "the varlen kernel", FLASH_4: "FlashAttention 4"}
"""Implementations of attention, and what they are called."""
LARGEST_HEAD = 256
"""Numbers in a head, at most; FlashAttention also wants a multiple of 8."""

_parameters = inspect.signature(varlen_attn).parameters if varlen_attn else {}
_HAS_WINDOW = "window_size" in _parameters
_SHARED_HEADS = {"enable_gqa": True} if "enable_gqa" in _parameters else {}
"""How to say that queries share keys: torch 2.11 needs not be told, later versions refuse if they are not."""


def why_masked(model: torch.nn.Module, device: torch.device, dtype: torch.dtype) -> str:
    """Why packed rows of ``model``, trained in ``dtype`` on ``device``, need a mask; empty where the kernel serves.

    ``model`` may be without weights: its forward is run on the meta device, where attention and masks only note how
    they are called.
    """
    if device.type != "cuda":
        return f"there is no kernel for a {device.type.upper()}"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"there is no kernel for {str(dtype).removeprefix('torch.')}"
    if not _HAS_WINDOW or not torch.backends.cuda.is_flash_attention_available():
        return f"torch {torch.__version__} has no kernel for it"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return f"there is no kernel for {torch.cuda.get_device_name(device)}"
    return what_forbids_kernel(model, dtype)


def what_forbids_kernel(model: torch.nn.Module, dtype: torch.dtype) -> str:
    """What in ``model`` the kernel cannot do; empty for nothing."""
    if not isinstance(model, PreTrainedModel) or not is_told_packing(model):
        return "the model is not one that panda builds"
    implementation = model.config._attn_implementation
    if implementation != "sdpa":
        return f"the model's attention is {implementation}"
    asked = _asked(model, dtype)
    if not asked.objections and not asked.sizes:
        return "the model does not leave its attention to transformers"
    return next(iter(asked.objections), "")


def why_not_flash_4(model: Any, device: torch.device, dtype: torch.dtype) -> str:
    """Why a model with which ``why_masked`` finds nothing wrong cannot use FlashAttention 4; empty where it can."""
    if dtype != torch.bfloat16:
        return "it was tried in bf16 only"
    if why := why_not_4(device):
        return why
    asked = _asked(model, dtype)
    untried = [f"heads of {size} numbers" for size in sorted(asked.sizes - set(HEAD_SIZES))]
    untried += ["sliding windows"] * asked.windowed
    return next(iter(asked.objections), f"it was not tried with {untried[0]}" if untried else "")


def attend_by_kernel(model: Any, kernel: str = VARLEN) -> None:
    """Make ``model``, with which ``why_masked`` finds nothing wrong, use ``kernel`` where it is given bounds.

    Its forward then takes ``sample_bounds``, int32 [samples + 1], where samples begin in the rows one after the other,
    and ``longest_sample``, which none exceeds. It says so with ``takes_bounds``.
    """
    # Not by `set_attn_implementation`, which warns where a model does not leave attention to transformers.
    model.config._attn_implementation = kernel
    model.takes_bounds = True


def attend_with_mask(model: Any) -> None:
    """Make ``model`` use a mask, and ignore the bounds of samples, which batches carry for another model."""
    leave_out(model, "sample_bounds", "longest_sample")


def takes_bounds(model: torch.nn.Module) -> bool:
    """Whether ``model`` was made to use the kernel, so that batches have to say where samples begin."""
    return any(getattr(part, "takes_bounds", False) for part in model.modules())


def _by_torch(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    bounds: torch.Tensor,
    longest: int,
    scale: float | None,
    window: int | None,
) -> torch.Tensor:
    before = -1 if window is None else window - 1
    attended: torch.Tensor = varlen_attn(
        query, key, value, bounds, bounds, longest, longest, scale=scale, window_size=(before, 0), **_SHARED_HEADS
    )
    return attended


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    kernel: Callable[..., torch.Tensor],
    scaling: float | None = None,
    sliding_window: int | None = None,
    sample_bounds: torch.Tensor | None = None,
    longest_sample: int | None = None,
    **more: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention within samples: [rows, length, heads, size] of ``query`` [rows, heads, length, size].

    Keys and values may have fewer heads, and values be smaller. A token sees at most ``sliding_window`` tokens, itself
    included.
    """
    if sample_bounds is None:
        whole: tuple[torch.Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **more
        )
        return whole
    rows, heads, length, size = query.shape
    smaller = value.shape[-1]
    if smaller < size:
        value = torch.nn.functional.pad(value, (0, size - smaller))
    flat = (each.transpose(1, 2).reshape(rows * length, each.shape[1], size) for each in (query, key, value))
    attended = kernel(*flat, bounds=sample_bounds, longest=longest_sample, scale=scaling, window=sliding_window)
    return attended.view(rows, length, heads, size)[..., :smaller], None


def _mask(**keywords: Any) -> torch.Tensor | None:
    if rows_now.get() == "bounded":
        return None
    mask: torch.Tensor | None = sdpa_mask(**keywords)
    return mask


# -- asking a model how it calls attention ------------------------------------------------------


class _Calls:
    """How a model calls attention, as far as the kernel cannot do that."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.objections: list[str] = []
        self.sizes: set[int] = set()
        """Of heads: numbers in each."""
        self.windowed = False

    def see(self, tensors: tuple[torch.Tensor, ...], mask: torch.Tensor | None, keywords: dict[str, Any]) -> None:
        """Take in a call with queries, keys and values, ``mask``, and ``keywords``."""
        self.sizes.add(tensors[0].shape[-1])
        self.objections += self._objections(tensors, mask, keywords)

    def _objections(
        self, tensors: tuple[torch.Tensor, ...], mask: torch.Tensor | None, keywords: dict[str, Any]
    ) -> Iterator[str]:
        query, key, value = tensors
        window = keywords.pop("sliding_window", None)
        self.windowed |= window is not None
        if keywords.pop("sample_bounds", None) is None or keywords.pop("longest_sample", None) is None:
            yield "the model's layers do not pass on where samples begin"
        if keywords.pop("dropout", 0.0):
            yield "the model has dropout in its attention"
        if getattr(mask, "window", 0) != window or keywords.pop("is_causal", None) is False:
            yield "the model has attention that is not causal, or has a mask of its own"
        if {tensor.dtype for tensor in tensors} != {self.dtype}:
            yield f"the model's attention is not in {str(self.dtype).removeprefix('torch.')}"
        size = query.shape[-1]
        if size > LARGEST_HEAD or size % 8 or key.shape[-1] != size or value.shape[-1] > size:
            yield f"the model has heads of {size} numbers"
        unknown = [name for name, given in keywords.items() if name not in _HARMLESS and not _is_flag(given)]
        if unknown:
            yield f"the model's attention takes {', '.join(sorted(unknown))}"


_HARMLESS = frozenset({"scaling", "position_ids"})
_calls: ContextVar[_Calls] = ContextVar("calls")


def _is_flag(given: Any) -> bool:
    return given is None or isinstance(given, bool)


def _asked_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **keywords: Any,
) -> tuple[torch.Tensor, None]:
    _calls.get().see((query, key, value), attention_mask, keywords)
    rows, heads, length, _ = query.shape
    return value.new_empty(rows, length, heads, value.shape[-1]), None


def _asked_mask(**keywords: Any) -> torch.Tensor:
    """A mask that knows its ``window``: the tokens that one sees, None for all before it, 0 if it is not causal."""
    mask: Any = torch.empty(1, 1, _LENGTH, _LENGTH, dtype=torch.bool, device="meta")
    mask.window = keywords.get("local_size") if keywords.get("allow_is_causal_skip", False) else 0
    return mask  # type: ignore[no-any-return]


def _asked(model: PreTrainedModel, dtype: torch.dtype) -> _Calls:
    """How ``model``, trained in ``dtype``, calls attention."""
    asked = _Calls(dtype)
    training = model.training
    with _answering(model, "panda_asked", asked):
        try:
            model.train()  # dropout in attention is there only now
            _run_without_weights(model.base_model, dtype)
        except Exception as problem:  # the code of any model, which may need values
            asked.objections.append(f"the model cannot be tried without weights ({in_brief(problem)})")
        finally:
            model.train(training)
    return asked


@contextmanager
def _answering(model: PreTrainedModel, implementation: str, calls: _Calls) -> Iterator[None]:
    """Let ``calls`` see how ``model`` calls attention in the meantime."""
    before = model.config._attn_implementation
    token = _calls.set(calls)
    try:
        model.config._attn_implementation = implementation
        yield
    finally:
        model.config._attn_implementation = before
        _calls.reset(token)


_LENGTH = 8


@torch.no_grad()
def _run_without_weights(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Run the forward of ``model`` on a row of two samples, on the meta device, where nothing is computed."""
    tensors = {
        name: torch.empty_like(parameter, dtype=dtype, device="meta") for name, parameter in model.named_parameters()
    }
    tensors |= {name: buffer.to("meta") for name, buffer in model.named_buffers()}
    tokens = torch.empty(1, _LENGTH, dtype=torch.int64, device="meta")
    bounds = torch.empty(3, dtype=torch.int32, device="meta")
    given = {"position_ids": tokens, "sample_bounds": bounds, "longest_sample": _LENGTH // 2}
    torch.func.functional_call(model, tensors, (tokens,), given)


for _name, _kernel in ((VARLEN, _by_torch), (FLASH_4, flash_attention_4)):
    AttentionInterface.register(_name, partial(_attention, kernel=_kernel))
    AttentionMaskInterface.register(_name, _mask)
AttentionInterface.register("panda_asked", _asked_attention)
AttentionMaskInterface.register("panda_asked", _asked_mask)
