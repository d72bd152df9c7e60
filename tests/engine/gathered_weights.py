"""Trains a small LLaMA on two ranks, with ZeRO-3 and without ZeRO: losses, gathers, and weights that stay.

``python gathered_weights.py OUTPUT.json``: for each way, the losses of three steps with both stages and, of the last
step with ZeRO-3, the elements of each gather, the number of collectives of panda's, and the bytes of released weights
that were alive after forward.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import deepspeed.runtime.zero.partition_parameters as partitioning
import torch
import torch.distributed as dist
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import LlamaConfig
from transformers import LlamaForCausalLM

from panda.configuration.options import RunOptions
from panda.engine import layer_weights
from panda.engine.deepspeed_config import deepspeed_config
from panda.engine.deepspeed_config import live_parameters
from panda.engine.engine import Engine
from panda.engine.gathering import layer_and_outside
from panda.engine.layer_weights import _Layer
from panda.engine.layer_weights import _Weights
from panda.engine.processes import Processes
from panda.engine.processes import join_processes
from panda.engine.processes import leave_processes
from panda.run.model import make_trainable

WAYS: dict[str, dict[str, Any]] = {
    "all weights": {},
    "all weights, recomputed": {"activation_checkpointing": "selective"},
    "all weights, compiled": {"compile": True},
    "adapters": {"use_lora": True},
    "adapters, compiled, recomputed": {"use_lora": True, "compile": True, "activation_checkpointing": "full"},
    "adapters, kept by all ranks": {"use_lora": True},
    "NF4, compiled": {"use_lora": True, "use_quant": True, "compile": True},
}
LAYERS, STEPS = 6, 3
TWO_PASSES, OTHER_ORDER = "two passes before backward", "layers in another order"
ODD, MOVED, OFFLOADED = "weights with padding", "shards that were moved", "weights on the host"
READ = "all layers stay, and weights are read in a step"
STAYING: dict[str, tuple[int, dict[str, Any]]] = {
    "two layers stay": (2, {}),
    "all layers stay": (LAYERS, {}),
    "all layers stay, with room for more": (LAYERS + 2, {}),
    "all layers stay, in two passes": (LAYERS, {}),
    "two layers stay, recomputed": (2, {"activation_checkpointing": "full"}),
    "two layers stay, with adapters": (2, {"use_lora": True}),
    READ: (LAYERS, {}),
}
MICRO_BATCHES = 3
"""Of the ways in which layers stay."""
UNUSUAL: dict[str, dict[str, Any]] = {
    TWO_PASSES: {},
    OTHER_ORDER: {"use_lora": True},
    ODD: {},
    MOVED: {"use_lora": True},
    OFFLOADED: {"use_lora": True},
} | {name: options for name, (_, options) in STAYING.items()}
"""Right, though layers do not run as they are expected to, or their shards do not lie as they are expected to."""


@dataclass
class Batch:
    ids: torch.Tensor
    tokens: int = 32
    units: int = 32
    idle: bool = False

    @property
    def real(self) -> torch.Tensor:
        return torch.ones_like(self.ids)

    def to(self, device: torch.device) -> Batch:
        return self


class Watch:
    """What DeepSpeed gathers and releases."""

    def __init__(self) -> None:
        self.gathers: list[int] = []
        self.collectives = 0
        self.released: list[tuple[StorageWeakRef, int]] = []
        gather, gather_some, release = partitioning._dist_allgather_fn, _Weights.gather, _Layer.release
        send = layer_weights.all_gather

        def gathering(source: torch.Tensor, target: torch.Tensor, group: Any = None) -> Any:
            self.gathers.append(target.numel())
            return gather(source, target, group)

        def gathering_some(weights: _Weights) -> Any:
            self.gathers.append(sum(parameter.ds_numel for parameter in weights.parameters))
            return gather_some(weights)

        def sending(*given: Any) -> None:
            self.collectives += 1
            send(*given)

        def releasing(layer: _Layer) -> None:
            storages = {parameter.data.untyped_storage().data_ptr(): parameter for parameter in layer.parameters}
            for parameter in storages.values():
                storage = parameter.data.untyped_storage()
                self.released.append((StorageWeakRef(storage), storage.nbytes()))
            release(layer)

        partitioning._dist_allgather_fn = gathering
        _Weights.gather, _Layer.release = gathering_some, releasing  # type: ignore[method-assign]
        layer_weights.all_gather = sending

    def clear(self) -> None:
        self.gathers.clear()
        self.collectives = 0
        self.released.clear()

    def alive(self) -> int:
        return sum(size for storage, size in self.released if not storage.expired())


def train(name: str, stage: int, processes: Processes, watch: Watch) -> dict[str, Any]:
    torch.manual_seed(0)
    way = (WAYS | UNUSUAL)[name]
    shape = {"hidden_size": 128, "num_hidden_layers": LAYERS, "num_attention_heads": 2}
    shape |= {"intermediate_size": 255, "mlp_bias": True} if name == ODD else {"intermediate_size": 256}
    config = LlamaConfig(vocab_size=64, use_cache=False, **shape)
    micro_batches = MICRO_BATCHES if name in STAYING else 1
    options = RunOptions(
        precision="fp32", zero_stage=stage, lora_dropout=0.0, gradient_accumulation_steps=micro_batches, **way
    )
    of_deepspeed = deepspeed_config(options, world_size=processes.world_size, on_gpu=False)
    if stage == 3:  # the size of the model's layers holds, and not that for CPUs
        del of_deepspeed["zero_optimization"]["stage3_prefetch_bucket_size"]
        of_deepspeed["zero_optimization"]["stage3_param_persistence_threshold"] = 3000 if "kept" in name else 0
        if name == OFFLOADED:
            of_deepspeed["zero_optimization"]["offload_param"] = {"device": "cpu"}
    model = make_trainable(LlamaForCausalLM(config), options, None, of_deepspeed, processes)
    if stage == 3 and name in STAYING:
        layer, outside = layer_and_outside(model)
        of_deepspeed["zero_optimization"]["stage3_max_live_parameters"] = live_parameters(
            layer, outside, STAYING[name][0]
        )
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    engine = Engine(model, optimizer, of_deepspeed, processes)
    alive = 0

    def loss_sum(module: Any, batch: Batch) -> torch.Tensor:
        nonlocal alive
        if "two passes" in name:
            with torch.no_grad():
                module(input_ids=batch.ids)
        if name == READ:
            assert all(weight.read().isfinite().all() for weight in engine.weights().values())
        logits = module(input_ids=batch.ids).logits
        alive = watch.alive()
        if "two passes" in name:
            logits = logits + module(input_ids=batch.ids.flip(1)).logits
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.ids.flatten(), reduction="sum")

    if name == OTHER_ORDER:
        inner: Any = model
        layers = inner.base_model.model.model.layers
        layers._modules = dict(zip(layers._modules, [*layers][::-1], strict=True))
    losses = []
    for step in range(STEPS):
        if name == MOVED and stage == 3 and step:
            parameters: list[Any] = list(model.parameters())
            for parameter in parameters:
                before = parameter.ds_tensor.data
                parameter.ds_tensor.data = before.clone()
                if not parameter.requires_grad:  # the trained ones' is that of the optimizer, too
                    before.fill_(float("nan"))
        watch.clear()
        seeds = torch.Generator().manual_seed(10 * step + processes.rank)
        batches = [Batch(torch.randint(64, (1, 32), generator=seeds)) for _ in range(micro_batches)]
        losses.append(engine.step(batches, loss_sum).loss.item())
    kept = sum(each.ds_numel for each in model.parameters() if getattr(each, "ds_persist", False))
    after_step = sum(each.numel() for each in model.parameters()) if stage == 3 else 0
    found = {"gathers": list(watch.gathers), "collectives": watch.collectives, "alive": alive, "kept": kept}
    with torch.no_grad():
        engine.evaluating()(input_ids=batches[0].ids)
    in_layers = [each for layer, each in model.named_parameters() if ".layers." in layer] if stage == 3 else []
    after_evaluation = sum(each.numel() for each in in_layers)
    engine.close()
    return {"losses": losses, "after a step": after_step, "after evaluation": after_evaluation} | found


def main() -> None:
    # Splits what is kept for backward as the compiler does, and compiles no C++.
    torch.compile = partial(torch.compile, backend="aot_eager_decomp_partition")
    processes, watch = join_processes(), Watch()
    found = {name: [train(name, stage, processes, watch) for stage in (0, 3)] for name in WAYS | UNUSUAL}
    if processes.rank == 0:
        Path(sys.argv[1]).write_text(json.dumps(found))
    dist.barrier()
    leave_processes()


if __name__ == "__main__":
    main()
