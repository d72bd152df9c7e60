"""The activations that a training step of a model keeps for its backward pass, in bytes, without running it.

A forward pass of the outline on the meta device, where nothing is computed, shows which tensors autograd saves: so
this holds for any model whose forward runs there, and knows no architecture. Layers of the same kind count as often as
there are of them, and are traced once.

What is approximated: attention is that of a fused kernel (its inputs, its output, and a number for each row and head;
a mask is kept as numbers, as torch's kernel for masks does), experts do the work of those that a token uses, and
compiled layers keep what ``_kept_when_compiled`` says.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from dataclasses import field
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - the customary name
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from panda.models.adapters.experts import expert_parameters
from panda.models.forward.cross_entropy import LOGITS_AT_ONCE
from panda.models.forward.layers import CHEAP_TERMS
from panda.weights.layer_names import layer_of
from panda.weights.nested import tensors_in

PRODUCTS = ("aten.mm", "aten.addmm", "aten.bmm", "aten.baddbmm", "aten._grouped_mm", "panda.sum_of_products")
"""Matrix products, as in layers.py."""
RANDOM = ("aten.native_dropout", "aten.bernoulli", "aten.rand", "aten.rand_like")
"""What cannot be computed again without its random numbers, which compiled code does not keep."""
GRADIENTS_AT_ONCE = 3
"""Gradients of a layer's largest tensors that exist at a time in its backward pass: of a product, and of its factors.

Counted for LLaMA's feed-forward block; what was measured is in docs/memory.md.
"""


@dataclass(frozen=True)
class LayerFootprint:
    """Bytes of one layer, for one row."""

    input: int
    """What full checkpointing keeps."""
    stored: int
    """What autograd saves."""
    compiled: int
    """What it saves of a compiled layer, which computes again what is only elementwise."""
    selective: int
    """What selective checkpointing keeps."""
    largest: int
    """The largest single tensor."""


@dataclass(frozen=True)
class Footprint:
    """Bytes of activations for one row of ``length`` tokens; rows are independent, so these are multiplied by rows."""

    length: int
    layers: tuple[tuple[LayerFootprint, int], ...]
    """Each kind of layer, and how many there are."""
    outside: int
    """What is saved outside of layers: of the embedding and the last normalisation."""
    logits: int
    """While the loss is computed, without the part that does not depend on rows."""
    logits_at_most: int | None
    """The most that the logits of all rows take, where they exist a part at a time; None for all at once."""
    head_gradient: int
    """fp32 sum and product of the gradient of a trained output head, where the loss computes it."""
    attention_width: int = 0
    """Heads times their size, summed over the layers: attention multiplies that many numbers for two tokens."""
    approximate: str = ""
    """Why the figures are less exact than they could be; empty where they are not."""

    def kept(self, checkpointing: str, *, compiled: bool) -> int:
        """Bytes kept for one row from the forward pass to the backward pass."""
        return self.outside + sum(count * _kept(layer, checkpointing, compiled) for layer, count in self.layers)

    def working(self, checkpointing: str, *, compiled: bool) -> int:
        """Bytes on top of these for one row while the backward pass of a layer runs: recomputed, and gradients."""
        return max((_working(layer, checkpointing, compiled) for layer, _ in self.layers), default=0)

    def loss(self, rows: int) -> int:
        """Bytes on top of these while the loss of ``rows`` rows is computed."""
        logits = rows * self.logits
        if self.logits_at_most is not None:
            logits = min(logits, self.logits_at_most)
        return logits + self.head_gradient


def _kept(layer: LayerFootprint, checkpointing: str, compiled: bool) -> int:
    if checkpointing == "full":
        return layer.input
    if checkpointing == "selective":
        return min(layer.selective, layer.compiled) if compiled else layer.selective
    return layer.compiled if compiled else layer.stored


def _working(layer: LayerFootprint, checkpointing: str, compiled: bool) -> int:
    whole = layer.compiled if compiled else layer.stored
    recomputed = max(0, whole - _kept(layer, checkpointing, compiled)) if checkpointing != "none" else 0
    return recomputed + GRADIENTS_AT_ONCE * layer.largest


# -- tracing ------------------------------------------------------------------------------------


@dataclass
class _Trace:
    """What happened in a forward pass: the tensors of each layer, by storage."""

    bytes: dict[int, int] = field(default_factory=dict)
    made: dict[int, tuple[str, list[int]]] = field(default_factory=dict)
    """For each storage: the operation that made it, and the storages that it read."""
    products: dict[int, int] = field(default_factory=dict)
    """Results of matrix products, with the number of terms of each sum."""
    factors: set[int] = field(default_factory=set)
    """What matrix products and attention read."""
    attention: set[int] = field(default_factory=set)
    saved: dict[str | None, dict[int, int]] = field(default_factory=dict)
    """By layer (None outside of them): storages that autograd saves, with their bytes."""
    inputs: dict[str, int] = field(default_factory=dict)
    """By layer: the storage of its first argument."""
    ops: dict[str, set[int]] = field(default_factory=dict)
    """By layer: the storages that it made."""
    widths: Counter[str | None] = field(default_factory=Counter)
    """By layer: heads times their size in attention."""
    layer: str | None = None
    alive: list[Any] = field(default_factory=list)
    """Keeps storages, whose addresses are their identities here."""

    def storage(self, tensor: torch.Tensor) -> int:
        storage = tensor.untyped_storage()
        key: int = storage._cdata
        if key not in self.bytes:
            self.alive.append(storage)
            self.bytes[key] = storage.nbytes()
        return key

    def save(self, tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, torch.nn.Parameter) and tensor.device.type == "meta":
            key = self.storage(tensor)
            self.saved.setdefault(self.layer, {})[key] = self.bytes[key]
        return tensor


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, trace: _Trace) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.trace = trace

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        trace, name = self.trace, str(func).rpartition(".")[0]
        read = [trace.storage(one) for one in tensors_in((args, kwargs or {}))]
        for tensor in tensors_in(result):
            key = trace.storage(tensor)
            if key in read:
                continue  # a view, or in place
            trace.made.setdefault(key, (name, read))
            trace.ops.setdefault(trace.layer or "", set()).add(key)
            if name in PRODUCTS:
                left = args[1] if name in ("aten.addmm", "aten.baddbmm") else args[0]
                trace.products[key] = left.shape[-1]
        if name in PRODUCTS:
            trace.factors.update(read)
        return result


class _Attention(torch.autograd.Function):
    """Stands for a fused attention kernel: saves what it saves, and computes nothing."""

    @staticmethod
    def forward(ctx: Any, trace: _Trace, query: Any, key: Any, value: Any, mask: Any) -> Any:
        output = query.new_empty(*query.shape[:-1], value.shape[-1])
        log_sums = query.new_empty(query.shape[:-1], dtype=torch.float32)
        bias = [] if mask is None else [query.new_empty(mask.shape) if mask.dtype == torch.bool else mask]
        kept = [query, key, value, output, log_sums, *bias]
        trace.attention.update(trace.storage(tensor) for tensor in (output, log_sums, *bias))
        trace.factors.update(trace.storage(tensor) for tensor in kept)
        ctx.save_for_backward(*kept)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        raise AssertionError("a trace has no backward pass")


class _OnGpu(TorchFunctionMode):
    """Attention and dropout as they run on a GPU: as one kernel each."""

    def __init__(self, trace: _Trace) -> None:
        super().__init__()
        self.trace = trace

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            return self._attention(*args, **(kwargs or {}))
        if func is F.dropout:
            return self._dropout(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _dropout(self, input: Any, p: float = 0.5, training: bool = True, inplace: bool = False) -> Any:
        return torch.native_dropout(input, p, training)[0] if training and p else input

    def _attention(self, query: Any, key: Any, value: Any, attn_mask: Any = None, *_: Any, **__: Any) -> Any:
        self.trace.widths[self.trace.layer] += query.shape[1] * query.shape[-1] if query.dim() == 4 else 0
        # A kernel's output lies in memory as transformers wants it next, so that making it contiguous copies nothing.
        rows = (*query.shape[:1], query.shape[2], query.shape[1], value.shape[-1])
        output = _Attention.apply(self.trace, query, key, value, attn_mask)  # type: ignore[no-untyped-call]
        return output.reshape(rows).transpose(1, 2) if output.dim() == 4 else output


def footprint(model: torch.nn.Module, *, length: int, masked: bool) -> Footprint:
    """The activations of ``model``, with its adapters, on the meta device and in the types that it computes in.

    It is put into training mode, and its forward must not be used afterwards. Rows have ``length`` tokens; ``masked``
    ones have positions that tell the samples in them apart by a mask. By a kernel they need as much as single samples.
    """
    model.train()
    trace = _Trace()
    approximate = ""
    layers = {name: module for name, module in model.named_modules() if layer_of(name) == name}
    kinds = {name: _kind(module) for name, module in layers.items()}
    _follow(layers, kinds, trace)
    stands_in = _replace_experts(model)
    if stands_in:
        approximate = "experts do the work of those that a token uses"
    ids = torch.zeros(1, length, dtype=torch.int64, device="meta")
    positions = {"position_ids": torch.zeros(1, length, dtype=torch.int64, device="meta")} if masked else {}
    body = _body(model)
    try:
        hooks = torch.autograd.graph.saved_tensors_hooks(trace.save, lambda tensor: tensor)
        with torch.device("meta"), _OnGpu(trace), _Watch(trace), hooks:
            body(ids, **positions)
    except Exception:  # whatever its code does with values that do not exist
        return _by_linear_layers(model, layers, kinds, length)
    parameters = {trace.storage(tensor) for tensor in (*model.parameters(), *model.buffers())}
    counted = Counter(kinds.values())
    found, width = [], trace.widths[None]
    for name, kind in kinds.items():
        if kind in counted:
            count = counted.pop(kind)
            found.append((_of_layer(trace, name, parameters), count))
            width += count * trace.widths[name]
    outside = sum(size for key, size in trace.saved.get(None, {}).items() if key not in parameters)
    return Footprint(length, tuple(found), outside, *_logits(model, length), width, approximate)


def _kind(layer: torch.nn.Module) -> Any:
    shapes = tuple((name, tuple(p.shape), p.requires_grad) for name, p in layer.named_parameters())
    return type(layer), shapes, getattr(layer, "attention_type", getattr(layer, "layer_type", None))


def _follow(layers: dict[str, torch.nn.Module], kinds: dict[str, Any], trace: _Trace) -> None:
    """Make each layer say when it runs; later ones of a kind return what the first one did."""
    results: dict[Any, Any] = {}
    for name, layer in layers.items():
        layer.forward = _followed(layer.forward, name, kinds[name], results, trace)


def _followed(
    forward: Callable[..., Any], name: str, kind: Any, results: dict[Any, Any], trace: _Trace
) -> Callable[..., Any]:
    def followed(*arguments: Any, **keywords: Any) -> Any:
        if kind in results:
            return results[kind]
        arguments, keywords = _with_gradient(arguments), _with_gradient(keywords)
        first = next(tensors_in((arguments, keywords)), None)
        if first is not None:
            trace.inputs[name] = trace.storage(first)
        before, trace.layer = trace.layer, name
        try:
            results[kind] = forward(*arguments, **keywords)
        finally:
            trace.layer = before
        return results[kind]

    return followed


def _with_gradient(given: Any) -> Any:
    """``given``, a layer's arguments, with gradients for its activations: those of a frozen embedding have none."""
    if isinstance(given, torch.Tensor):
        is_activation = given.is_floating_point() and given.dim() >= 3 and given.device.type == "meta"
        return given.detach().requires_grad_() if is_activation and not given.requires_grad else given
    if isinstance(given, tuple):
        return (*map(_with_gradient, given[:1]), *given[1:])
    if isinstance(given, dict):
        return {key: _with_gradient(each) if key == "hidden_states" else each for key, each in given.items()}
    return given


def _replace_experts(model: torch.nn.Module) -> bool:
    """Let experts do, for each token, the work of as many as it uses, whose choice is not known. Whether there are."""
    owners = {name.rpartition(".")[0] for name in expert_parameters(model)}
    for name in owners:
        owner = model.get_submodule(name)
        owner.forward = _as_used(owner)
    return bool(owners)


def _as_used(experts: Any) -> Callable[..., Any]:
    def forward(hidden: torch.Tensor, *arguments: Any, **_: Any) -> torch.Tensor:
        given = [one for one in arguments if isinstance(one, torch.Tensor)]
        chosen = given[0].shape[-1] if given else 1
        weights = [one for one in given if one.is_floating_point() and one.shape[-1] == chosen]
        width = hidden.shape[-1]
        rows = hidden.reshape(-1, width).repeat_interleave(chosen, 0, output_size=hidden.numel() // width * chosen)
        for parameter in experts.parameters(recurse=False):
            if parameter.dim() != 3:
                continue
            matrix = parameter[0]
            if rows.shape[-1] not in matrix.shape:  # the gate's and the other half, multiplied
                gate, up = rows.chunk(2, -1)
                rows = F.silu(gate) * up
            rows = rows @ (matrix if matrix.shape[0] == rows.shape[-1] else matrix.t())
        factors = weights[0] if weights else rows.new_empty(len(rows) // chosen, chosen)
        weighted = rows.reshape(-1, chosen, width) * factors.reshape(-1, chosen, 1).to(rows.dtype)
        return weighted.sum(1).reshape(hidden.shape)

    return forward


def _body(model: Any) -> Callable[..., Any]:
    """The part of ``model`` before its output head, where there is one."""
    inner = model.get_base_model() if hasattr(model, "peft_config") else model
    body: Callable[..., Any] = getattr(inner, "base_model", inner) if getattr(inner, "sums_loss", False) else inner
    return body


def _of_layer(trace: _Trace, name: str, parameters: set[int]) -> LayerFootprint:
    given = trace.inputs.get(name)
    saved = {key: size for key, size in trace.saved.get(name, {}).items() if key not in parameters}
    made = trace.ops.get(name, set())
    own = {key for key in saved if key in made or key == given or key in trace.attention}
    dear = {key for key, terms in trace.products.items() if key in made and terms >= CHEAP_TERMS}
    dear |= {key for key in trace.attention if key in saved}
    entry = trace.bytes.get(given, 0) if given is not None else 0
    selective = entry + sum(trace.bytes[key] for key in dear if key != given)
    return LayerFootprint(
        input=entry,
        stored=sum(saved[key] for key in own),
        compiled=_kept_when_compiled(trace, own, given),
        selective=selective,
        largest=max((trace.bytes[key] for key in made), default=0),
    )


def _kept_when_compiled(trace: _Trace, saved: set[int], given: int | None) -> int:
    """The bytes that a compiled layer keeps of what it would save.

    It keeps its input, what matrix products and attention read or write, and computes the rest again from that; where
    that is not enough, it keeps the cheapest tensor to compute it from.
    """
    kept = {key for key in saved if key in trace.factors or _is_dear(trace, key)}
    if given is not None:
        kept.add(given)
    for key in sorted(saved - kept, key=lambda one: -trace.bytes[one]):
        kept |= _cheapest(trace, key, kept)[1]
    return sum(trace.bytes[key] for key in kept)


def _cheapest(trace: _Trace, key: int, kept: set[int]) -> tuple[int, set[int]]:
    """The bytes and storages to keep besides ``kept``, so that ``key`` needs no matrix product to be computed again."""
    if key in kept or key not in trace.made:
        return 0, set()  # parameters and arguments are there
    own = trace.bytes[key], {key}
    if _is_dear(trace, key):
        return own
    total, needed = 0, set(kept)
    for source in trace.made[key][1]:
        cost, more = _cheapest(trace, source, needed)
        total, needed = total + cost, needed | more
        if total > own[0]:
            return own
    return total, needed - kept


def _is_dear(trace: _Trace, key: int) -> bool:
    """Whether compiled code does not compute the storage ``key`` again."""
    return key in trace.products or key in trace.attention or (key in trace.made and trace.made[key][0] in RANDOM)


def _logits(model: Any, length: int) -> tuple[int, int | None, int]:
    """Bytes of a row's logits in the loss, the most of all of them, and of a trained head's gradient there."""
    inner = model.get_base_model() if hasattr(model, "peft_config") else model
    head = inner.get_output_embeddings() if hasattr(inner, "get_output_embeddings") else None
    weight = getattr(head, "weight", None)
    if weight is None:
        return 0, None, 0
    vocabulary, narrow = len(weight), weight.element_size()
    if not getattr(inner, "sums_loss", False):
        return length * vocabulary * (2 * narrow + 3 * 4), None, 0  # of them and their gradients, in both types
    gradient = weight.numel() * (4 + narrow) if weight.requires_grad else 0
    return length * vocabulary * 2 * 4, LOGITS_AT_ONCE * 2 * 4, gradient  # they and their exponentials


def _by_linear_layers(
    model: torch.nn.Module, layers: dict[str, torch.nn.Module], kinds: dict[str, Any], length: int
) -> Footprint:
    """For a model whose forward does not run on the meta device: the inputs and outputs of its linear layers."""
    counted = Counter(kinds.values())
    found = []
    for name, kind in kinds.items():
        if kind not in counted:
            continue
        sizes = [(p.shape[1], p.shape[0], p.element_size()) for p in layers[name].parameters() if p.dim() == 2]
        total = sum((wide + narrow) * size for wide, narrow, size in sizes) * length
        first = sizes[0][0] * sizes[0][2] * length if sizes else 0
        largest = max((max(wide, narrow) * size for wide, narrow, size in sizes), default=0) * length
        found.append((LayerFootprint(first, total, total, total // 2 + first, largest), counted.pop(kind)))
    why = "its forward does not run without data: inputs and outputs of linear layers are counted"
    return Footprint(length, tuple(found), 0, *_logits(model, length), approximate=why)
