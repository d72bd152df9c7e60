"""Tensor parallelism: several neighbouring ranks hold one model together, in FairScale's layers.

A model states which of its layers can be split (``TensorParallelPlan``), and this module splits them. It and
split_layers.py are the only ones that import fairscale, whose last release is 0.4.13 of December 2022.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import replace
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from panda.engine.processes import Processes
from panda.registry import UserError
from panda.registry.contexts import TensorParallelPlan
from panda.weights.stored_tensor import Weights


def make_groups(size: int) -> Any:
    """Join groups of ``size`` neighbouring ranks, and groups of the ranks with the same place in them.

    Returns what DeepSpeed takes as ``mpu``. Every rank must call this.
    """
    from fairscale.nn.model_parallel import initialize

    initialize.destroy_model_parallel()  # of an earlier run in the same processes: FairScale keeps groups in globals
    with redirect_stdout(io.StringIO()):  # FairScale 0.4.13 prints its arguments
        initialize.initialize_model_parallel(size)
    return initialize


def plan_of(module: Any, name: str, size: int) -> TensorParallelPlan:
    """How the model ``name`` is split over ``size`` ranks. Raises UserError if it cannot be."""
    plan: TensorParallelPlan | None = getattr(module, "tensor_parallel_plan", None)
    if plan is None:
        raise UserError(
            f"tensor_parallel_size: model {name!r} does not say how it is split over ranks (it has no"
            " `tensor_parallel_plan`). Leave it out; `zero_stage: 3` spreads the weights of any model."
        )
    indivisible = {key: value for key, value in plan.sizes.items() if value % size}
    if indivisible:
        rows = indivisible.get("vocab_size")
        more = f" `vocab_size: {-(-rows // size) * size}` has rows that no token uses." if rows else ""
        raise UserError(
            f"tensor_parallel_size: {size} ranks cannot share model {name!r} evenly: it has"
            f" {', '.join(f'{key} {value}' for key, value in indivisible.items())}. Give a size that divides"
            f" {'them' if len(indivisible) > 1 else 'it'}, or a model of other sizes.{more}"
        )
    return plan


def split(module: torch.nn.Module, plan: TensorParallelPlan, processes: Processes) -> None:
    """Replace each layer in ``plan`` by one of FairScale's with this rank's shard, which works with the other ranks.

    A split parameter is marked, for DeepSpeed (``model_parallel``) and for panda (``split_dimension``). A
    parameter that several layers share stays one.
    """
    from fairscale.nn.model_parallel.layers import ColumnParallelLinear
    from fairscale.nn.model_parallel.layers import VocabParallelEmbedding

    from panda.engine.split_layers import Column
    from panda.engine.split_layers import Row
    from panda.engine.split_layers import sum_gradient_once

    group = processes.mpu and processes.mpu.get_model_parallel_group()
    shards: dict[torch.nn.Parameter, torch.nn.Parameter] = {}

    def shard(parameter: torch.nn.Parameter | None, dimension: int) -> torch.nn.Parameter | None:
        if parameter is not None and parameter not in shards:
            part = _part(parameter.detach(), dimension, processes).clone()
            new: Any = torch.nn.Parameter(part, requires_grad=parameter.requires_grad)
            # FairScale 0.4.13 does not mark its parameters, and DeepSpeed 0.19.8 counts unmarked ones on one rank only:
            # the norm of the gradients, and so clipping, would be wrong.
            new.model_parallel, new.split_dimension, new.whole_shape = True, dimension, tuple(parameter.shape)
            shards[parameter] = new
        return None if parameter is None else shards[parameter]

    # FairScale 0.4.13 initialises a whole weight on every rank, in host memory, and keeps a shard of it. The weights
    # are there already, so FairScale's are dropped, layer by layer.
    keywords: dict[str, Any] = {"init_method": lambda weight: weight}
    for name, layer in _layers(module, plan.column):
        column = Column(layer.in_features, layer.out_features, layer.bias is not None, gather_output=False, **keywords)
        column.group, column.weight, column.bias = group, shard(layer.weight, 0), shard(layer.bias, 0)
        module.set_submodule(name, column)
    for name, layer in _layers(module, plan.row):
        row = Row(layer.in_features, layer.out_features, layer.bias is not None, input_is_parallel=True, **keywords)
        row.group, row.weight, row.bias = group, shard(layer.weight, 1), layer.bias
        module.set_submodule(name, row)
    for name, layer in _layers(module, plan.vocabulary):
        if isinstance(layer, torch.nn.Embedding):
            rows: Any = VocabParallelEmbedding(layer.num_embeddings, layer.embedding_dim, **keywords)
            if layer.padding_idx is not None and rows.vocab_start_index <= layer.padding_idx < rows.vocab_end_index:
                rows.padding_idx = (
                    layer.padding_idx - rows.vocab_start_index
                )  # FairScale expects its place in the shard
        else:
            rows = ColumnParallelLinear(layer.in_features, layer.out_features, layer.bias is not None, **keywords)
            rows.bias = shard(layer.bias, 0)
            rows.vocabulary_group = group
        rows.weight = shard(layer.weight, 0)
        module.set_submodule(name, rows)
    for _, block in _layers(module, plan.blocks):
        sum_gradient_once(block, group)


def shards_of(weights: Weights, module: torch.nn.Module, processes: Processes) -> Weights:
    """This rank's shards of ``weights``, which are whole, for the split ``module``."""
    parameters = dict(module.named_parameters())
    parts = dict(weights)
    for name, stored in weights.items():
        dimension = getattr(parameters.get(name), "split_dimension", None)
        if dimension is not None:
            read = partial(_read_part, stored.read, dimension, processes)
            parts[name] = replace(stored, shape=tuple(parameters[name].shape), read=read)
    return parts


def split_dimensions(module: torch.nn.Module) -> dict[str, int]:
    """The dimension along which each split parameter of ``module`` is split, by each of its names."""
    named = module.named_parameters(remove_duplicate=False)
    return {name: parameter.split_dimension for name, parameter in named if hasattr(parameter, "split_dimension")}


def joined(tensor: torch.Tensor, processes: Processes) -> torch.Tensor:
    """``tensor`` joined from the shards of all ranks, if it is split. Every rank must call this."""
    dimension = getattr(tensor, "split_dimension", None)
    if dimension is None:
        return tensor.detach()
    parts = [torch.empty_like(tensor) for _ in range(processes.tensor_ranks)]
    dist.all_gather(parts, tensor.detach().contiguous(), group=processes.mpu.get_model_parallel_group())
    return torch.cat(parts, dimension)


def counts_here(parameter: torch.Tensor, processes: Processes) -> bool:
    """Whether ``parameter`` counts on this rank in a sum over the model. One that is not split counts on one rank."""
    return processes.tensor_rank == 0 or hasattr(parameter, "split_dimension")


def _layers(module: torch.nn.Module, patterns: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    for pattern in patterns:
        matching = [(name, layer) for name, layer in module.named_modules() if fnmatchcase(name, pattern)]
        assert matching, f"the plan of {type(module).__name__} has a pattern that matches no layer: {pattern}"
        yield from matching


def _part(whole: torch.Tensor, dimension: int, processes: Processes) -> torch.Tensor:
    return whole.chunk(processes.tensor_ranks, dimension)[processes.tensor_rank]


def _read_part(read: Any, dimension: int, processes: Processes) -> torch.Tensor:
    return _part(read(), dimension, processes).contiguous()
