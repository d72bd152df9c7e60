"""What the memory of a GPU holds during a training step, by kind: data, and the formulas of what DeepSpeed keeps.

They are read from the code of DeepSpeed 0.19.8, by the wrappers in wrappers.py. Elements are those of this rank's
share of the model under tensor parallelism; padding to equal shares is not counted.
"""

from __future__ import annotations

from dataclasses import dataclass
from dataclasses import fields
from dataclasses import replace
from typing import Any

from panda.configuration.options import RunOptions
from panda.engine.deepspeed_config import LARGEST_LAYER
from panda.engine.deepspeed_config import SMALLEST_BUCKET
from panda.engine.deepspeed_config import live_parameters
from panda.engine.deepspeed_config import sums_in_fp32
from panda.engine.deepspeed_config import zero_3_sizes

GIB = 2**30
ELEMENTS = {
    "reduce_bucket_size": 500_000_000,
    "sub_group_size": 1_000_000_000,
    "stage3_max_live_parameters": 1_000_000_000,
}
"""DeepSpeed's defaults of sizes in elements. ZeRO-3 has others where the model has layers (``zero_3_sizes``)."""
REDUCED_AT_ONCE = 1 << 29
"""Elements of the fp32 sums of bf16 gradients that ranks add up at once (gradient_sums.py)."""


@dataclass(frozen=True)
class MemoryParts:
    """Bytes of one GPU at the moment of a step at which it holds most."""

    weights: int = 0
    """In the type of the forward pass, or quantised: trained ones and frozen ones."""
    reference: int = 0
    """A second, frozen model that the task compares with."""
    masters: int = 0
    """fp32 copies of the trained weights, which the optimizer steps."""
    copies: int = 0
    """fp32 copies of the trained weights that plugins hold, such as an average."""
    optimizer: int = 0
    """The optimizer's states."""
    accumulators: int = 0
    """Sums of the gradients of micro batches, where they are apart from the gradients."""
    gradients: int = 0
    activations: int = 0
    """Kept for the backward pass, and what a layer's backward pass computes from them."""
    logits: int = 0
    buffers: int = 0
    """Of communication, of gathered and of dequantised weights."""
    context: int = 0
    """What CUDA and its libraries take, and memory that the allocator cannot use: outside of torch's own count."""

    @property
    def total(self) -> int:
        """All of them."""
        return sum(getattr(self, each.name) for each in fields(self))

    @property
    def allocated(self) -> int:
        """What torch counts: ``torch.cuda.max_memory_allocated``."""
        return self.total - self.context

    @property
    def standing(self) -> int:
        """What is held between steps too, whatever the batches are."""
        return self.weights + self.reference + self.masters + self.copies + self.optimizer + self.accumulators

    def describe(self) -> str:
        """The parts in GiB, the largest first; those that round to nothing are left out."""
        kinds = sorted(self.by_kind().items(), key=lambda kind: -kind[1])
        said = [f"{NAMES[name]} {gib(size)}" for name, size in kinds if gib(size) != "0.0"]
        return ", ".join(said) or "next to nothing"

    def by_kind(self) -> dict[str, int]:
        """The parts that are not zero, by name."""
        return {each.name: size for each in fields(self) if (size := getattr(self, each.name))}


NAMES = {
    "weights": "weights",
    "reference": "the frozen reference",
    "masters": "fp32 master weights",
    "copies": "copies of weights that plugins hold",
    "optimizer": "optimizer states",
    "accumulators": "sums of gradients",
    "gradients": "gradients",
    "activations": "activations",
    "logits": "logits",
    "buffers": "buffers",
    "context": "CUDA and unused memory",
}
"""The name of each part in messages."""


def gib(size: int) -> str:
    """``size``, in bytes, in GiB with one digit after the point."""
    return f"{size / GIB:,.1f}"


@dataclass(frozen=True)
class Sizes:
    """How large a model is on one tensor-parallel rank."""

    trained: int
    """Elements that are trained."""
    frozen: int
    """Bytes of the weights that are not."""
    elements: int
    """Elements of all weights, as DeepSpeed counts them: quantised ones in the type that stores them."""
    largest: int
    """Elements of the largest trained weight."""
    largest_group: int
    """Elements of the largest parameter group: those of a layer."""
    dequantised: int = 0
    """Bytes of the largest quantised weight when it is dequantised; 0 for none."""
    dequantised_layer: int = 0
    """The same of the largest layer."""
    layer: int = 0
    """Elements of the largest layer, as in ``elements``; 0 for a model without layers."""
    outside: int = 0
    """Elements outside of layers."""


@dataclass(frozen=True)
class Held:
    """What DeepSpeed and the optimizer hold for a model on one GPU."""

    parts: MemoryParts
    step: int
    """Bytes that come on top in the optimizer's step, when there are no activations."""


def held(
    sizes: Sizes,
    options: RunOptions,
    config: dict[str, Any],
    *,
    world_size: int,
    state_bytes: float,
    copies: int = 0,
) -> Held:
    """What is held with ``config``, DeepSpeed's, on ``world_size`` ranks.

    ``state_bytes``: of the optimizer, for each element that is trained. ``copies``: those of the trained weights that
    plugins hold.
    """
    zero: dict[str, Any] = config["zero_optimization"]
    ranks, element = max(1, world_size // options.tensor_parallel_size), 4 if options.precision == "fp32" else 2
    # A layer that is computed again in full keeps them until its backward pass has used them.
    dequantised = sizes.dequantised_layer if options.activation_checkpointing == "full" else sizes.dequantised
    parts = MemoryParts(
        weights=element * sizes.trained + sizes.frozen,
        copies=4 * copies * -(-sizes.trained // (ranks if options.zero else 1)),
        optimizer=round(state_bytes * sizes.trained),
        gradients=element * sizes.largest,
        buffers=dequantised,
    )
    by_stage = (_stage_0, _stage_1_and_2, _stage_1_and_2, _stage_3)[options.zero]
    result = by_stage(parts, sizes, options, zero, ranks, element)
    on_host = ("masters", "copies", "optimizer", "accumulators")
    offloaded = dict.fromkeys(on_host, 0) if is_offloaded(zero, "offload_optimizer") else {}
    if options.zero == 3 and is_offloaded(zero, "offload_param"):
        offloaded["weights"] = 0
    return replace(result, parts=replace(result.parts, **offloaded))


def is_offloaded(zero: dict[str, Any], key: str) -> bool:
    return bool((zero.get(key) or {}).get("device", "none") != "none")


def _elements(zero: dict[str, Any], key: str) -> int:
    return int(zero.get(key, ELEMENTS[key]))


def _stage_0(
    parts: MemoryParts, sizes: Sizes, options: RunOptions, zero: dict[str, Any], ranks: int, element: int
) -> Held:
    """Gradients stay; in 16 bits there are fp32 masters, and an fp32 copy of the gradients in the step."""
    in_16_bits = element == 2
    parts = replace(parts, gradients=element * sizes.trained, masters=4 * sizes.trained * in_16_bits)
    if ranks > 1:
        parts = replace(
            parts, buffers=parts.buffers + element * min(sizes.trained, _elements(zero, "reduce_bucket_size"))
        )
    return Held(parts, 4 * sizes.trained * in_16_bits)


def _stage_1_and_2(
    parts: MemoryParts, sizes: Sizes, options: RunOptions, zero: dict[str, Any], ranks: int, element: int
) -> Held:
    """Masters and states are partitioned, and in stage 2 the gradients' sums as well.

    ``BF16_Optimizer``, of bf16 with stage 1, keeps whole fp32 sums. ``DeepSpeedZeroOptimizer``, of the rest, has an
    fp32 copy of the weights in fp32 too, and a bucket for the gradients, in full from the start.
    """
    share = -(-sizes.trained // ranks)
    parts = replace(parts, masters=4 * share, optimizer=-(-parts.optimizer // ranks))
    whole = 4 * sizes.trained
    if options.zero == 1 and options.precision == "bf16" and not is_offloaded(zero, "offload_optimizer"):
        return Held(replace(parts, accumulators=whole), element * min(sizes.trained, REDUCED_AT_ONCE) * (ranks > 1))
    buckets = 2 if zero.get("overlap_comm") else 1
    bucket = buckets * element * _elements(zero, "reduce_bucket_size")
    parts = replace(parts, buffers=parts.buffers + bucket)
    in_step = 4 * -(-sizes.largest_group // ranks)
    if options.zero == 2:
        return Held(replace(parts, accumulators=(4 if sums_in_fp32(options) else element) * share), in_step)
    if element == 4:  # the gradients are their own sums
        return Held(replace(parts, gradients=whole), in_step)
    return Held(replace(parts, accumulators=whole), in_step + 4 * share)


def _stage_3(
    parts: MemoryParts, sizes: Sizes, options: RunOptions, zero: dict[str, Any], ranks: int, element: int
) -> Held:
    """All is partitioned, with a copy of the weights in fp32 too.

    Weights are gathered for the layers that are near. Gradients of two layers are alive, while a rank's part of those
    of a layer arrives; outside of layers they go through a bucket, and where their sums are on the host, all of them.
    """
    zero = zero_3_sizes(sizes.elements, sizes.trained, sizes.layer, sizes.outside) | zero
    share = -(-sizes.trained // ranks)
    live = _elements(zero, "stage3_max_live_parameters")
    if 0 < sizes.layer <= LARGEST_LAYER:  # gathered whole, whatever the limit is
        live = max(live, live_parameters(sizes.layer, sizes.outside))
    live = min(sizes.elements, live) if ranks > 1 else 0
    bucket, reduced = _elements(zero, "reduce_bucket_size"), 0
    if 0 < sizes.layer <= LARGEST_LAYER and not is_offloaded(zero, "offload_optimizer"):
        reduced = -(-sizes.layer * sizes.trained // sizes.elements)
        bucket = min(bucket, SMALLEST_BUCKET, sizes.outside)
    buffers = parts.buffers + element * (live + -(-reduced // ranks) + bucket)
    parts = replace(
        parts,
        weights=-(-parts.weights // ranks),
        masters=4 * share,
        optimizer=-(-parts.optimizer // ranks),
        accumulators=(4 if sums_in_fp32(options) else element) * share,
        gradients=max(parts.gradients, element * 2 * reduced),
        buffers=buffers,
    )
    return Held(parts, 4 * min(share, _elements(zero, "sub_group_size")))
