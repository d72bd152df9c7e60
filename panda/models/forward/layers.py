"""Recomputing the activations of each layer of a model instead of storing them, and compiling each layer."""

from __future__ import annotations

import functools
from collections.abc import Callable
from collections.abc import Mapping
from contextlib import AbstractContextManager
from contextlib import nullcontext
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy
from torch.utils.checkpoint import checkpoint
from torch.utils.checkpoint import create_selective_checkpoint_contexts

from panda.files.compilers import what_compiling_lacks
from panda.registry import UserError
from panda.weights.layer_names import layer_of
from panda.weights.nested import tensors_in

CHEAP_TERMS = 256
"""A matrix product over fewer terms, such as an adapter's, costs less to recompute than to store."""

_PRODUCTS = frozenset(
    {
        *("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "bitsandbytes::gemm_4bit"),
        *("panda::sum_of_products", "panda::product_with_low_rank"),  # adapters/one_rounding.py
    }
)
_ATTENTION = (
    *("aten::_scaled_dot_product", "aten::_flash_attention", "aten::_efficient_attention"),
    *("torch_attn::_varlen_attn", "panda::flash_attention_4", "flash_attn::"),
)


def numbered_layers(model: torch.nn.Module, key: str) -> list[torch.nn.Module]:
    """The layers of ``model``. Raises UserError, about option ``key``, where it has none."""
    layers = [module for name, module in model.named_modules() if layer_of(name) == name]
    if not layers:
        raise UserError(
            f"{key}: {type(model).__name__} has no numbered layers (`layers.0`, `layers.1`, ...), to which it applies."
            f" Leave `{key}` out."
        )
    return layers


def recompute_activations(model: torch.nn.Module, *, selective: bool) -> None:
    """Make each layer of ``model`` store only its input, and run forward again in the backward pass.

    With ``selective`` it also stores what is expensive to compute, the results of attention and of large
    matrix products, and recomputes the rest: normalisation, activation functions, dropout, dequantisation
    and adapters' products. Random numbers are those of the first forward, so results do not change.
    """
    contexts = {"context_fn": functools.partial(create_selective_checkpoint_contexts, _keep_dear)} if selective else {}
    for layer in numbered_layers(model, "activation_checkpointing"):
        layer.forward = _recomputing(layer.forward, contexts)


def compile_layers(
    model: torch.nn.Module, device: torch.device, shapes: Mapping[tuple[int, int], int] | None = None
) -> None:
    """Make torch compile the forward of each layer when it first runs; layers of the same kind share the work.

    ``shapes``: how many micro batches of the run have so many rows of such a length. A shape that at least half of them
    have gets code of its own, for training; everything else shares code for any shape, which is slower. Both exist once
    a layer was run on the usual shape; what ``shapes`` does not have may be compiled later.

    Raises UserError where this machine cannot compile code for ``device``.
    """
    if missing := what_compiling_lacks(device):
        raise UserError(f"compile: {missing}. Or write `compile: false`.")
    # In code for any shape, a length that equals the size of another dimension is still a length, and numbers of a
    # layer, such as an epsilon, are constants.
    torch.fx.experimental._config.use_duck_shape = False
    torch._dynamo.config.specialize_float = True
    # A kind of layer may need: each code for input with and without a gradient, for one row and several, in evaluation.
    # All kinds count together, and what comes after 8 would never be compiled.
    torch._dynamo.config.recompile_limit = 64
    shapes = shapes or {}
    usual = max(shapes, key=shapes.__getitem__, default=None)
    if usual and 2 * shapes[usual] < sum(shapes.values()):
        usual = None
    for layer in numbered_layers(model, "compile"):
        layer.forward = _compiled(layer, usual, others=len(shapes) > 1)
        layer.is_compiled = True  # type: ignore[assignment]


def _compiled(layer: torch.nn.Module, usual: tuple[int, int] | None, *, others: bool) -> Callable[..., Any]:
    """The forward of ``layer``, compiled for input of the ``usual`` rows and length, and for any; for ``others`` early.

    Of one function, torch would run the code for any shape from then on that it has it, for the usual shape too.
    """
    forward = layer.forward
    # These do not find each other's code, since `dynamic` is part of what torch looks code up by.
    for_usual = torch.compile(forward, dynamic=False)
    for_any = torch.compile(forward, dynamic=True, options=_of_any_length())

    @functools.wraps(forward)
    def compiled(*arguments: Any, **keywords: Any) -> Any:
        nonlocal others
        if not arguments or arguments[0].shape[:2] != usual or not torch.is_grad_enabled():
            return for_any(*arguments, **keywords)
        if others:
            others = False
            _compile_ahead(for_any, layer, *arguments, **keywords)
        return for_usual(*arguments, **keywords)

    return compiled


def _of_any_length() -> dict[str, Any]:
    """Options of torch's compiler for code of rows of any length."""
    from torch._inductor import config

    # It makes the compiler choose by the number of tokens. Code is then for more of them than a bound or for fewer, and
    # the first short row waits seconds for its own (torch 2.11 and 2.13, 2026-11). Earlier versions may not have it.
    name = "mix_order_reduction"
    return {f"triton.{name}": False} if hasattr(config.triton, name) else {}


def _compile_ahead(
    forward: Callable[..., Any], layer: torch.nn.Module, given: torch.Tensor, *more: Any, **keywords: Any
) -> None:
    """Run ``forward`` of ``layer`` and its backward, without effect on gradients and random numbers."""
    on_gpu = [given.device] if given.device.type == "cuda" else []
    # Hooks of its own, since those of recomputation around the layer count what is saved.
    with torch.random.fork_rng(on_gpu), torch.autograd.graph.saved_tensors_hooks(_itself, _itself):
        alone = given.detach().requires_grad_(given.requires_grad)
        results = [each for each in tensors_in(forward(alone, *more, **keywords)) if each.requires_grad]
        if results:
            # What is asked for decides nothing: compiled code computes all gradients. They are not added to any.
            trained = (parameter for parameter in layer.parameters() if parameter.requires_grad)
            of = alone if alone.requires_grad else next(trained)
            torch.autograd.grad(results, of, [torch.zeros_like(each) for each in results], allow_unused=True)


def _itself(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def without_compiling(compiled: bool) -> AbstractContextManager[Any]:
    """Inside it, the layers of a model that is ``compiled`` run as they are.

    For rows of lengths that training does not have, as in a trial or in generation: their code would be of no use, and
    torch, having met rows of two lengths, would compile code for rows of any length, which is slower.
    """
    return torch.compiler.set_stance("force_eager") if compiled else nullcontext()


def _recomputing(forward: Callable[..., Any], contexts: dict[str, Any]) -> Callable[..., Any]:
    @functools.wraps(forward)
    def recomputing(*arguments: Any, **keywords: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*arguments, **keywords)
        return checkpoint(forward, *arguments, use_reentrant=False, **contexts, **keywords)

    return recomputing


def _keep_dear(context: Any, operation: Any, *arguments: Any, **keywords: Any) -> CheckpointPolicy:
    name = operation.name().partition(".")[0]
    if name.startswith(_ATTENTION) and "backward" not in name:
        return CheckpointPolicy.MUST_SAVE
    if name in _PRODUCTS:
        left = arguments[1] if name in ("aten::addmm", "aten::baddbmm") else arguments[0]
        if left.shape[-1] >= CHEAP_TERMS:
            return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE
