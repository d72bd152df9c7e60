"""Steps of NVLAMB or Muon through panda's engine, many configurations in one group of processes.

torchrun --nproc_per_node 2 tests/engine/lamb_steps.py CONFIGURATIONS.json OUT

CONFIGURATIONS holds an object of objects by name: ``network``, run ``options``, keys for ``deepspeed``,
``adapt`` and ``naive``, or ``muon``. OUT/NAME.pt is what each came to; test_sharded_lamb.py and
test_sharded_muon.py judge it.
"""

from __future__ import annotations

import gc
import json
import sys
from dataclasses import dataclass
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from panda.registry.contexts import ParameterLayout
from panda.registry.contexts import Segment

RATE, BETAS, EPSILON, DECAY = 0.01, (0.9, 0.99), 1e-4, 0.1
STEPS, SAVED = 10, 5
COUNTS = (2, 2, 4, 4, 2, 2)
"""Supervised tokens of the micro batches of a step: 16, so that dividing is exact in 16 bits too."""
ROWS = 2
"""Rows of a micro batch."""


class Network(nn.Module):
    """Odd sizes, so that parameters straddle any partition; norms, biases, a zero tensor and a frozen one."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(6, 9), nn.LayerNorm(9), nn.Tanh(), nn.Linear(9, 6, bias=False)) for _ in range(2)
        )
        self.frozen = nn.Linear(6, 6)
        self.head = nn.Linear(6, 1)
        nn.init.zeros_(self.head.weight)
        self.frozen.requires_grad_(False)

    def forward(self, numbers: list[tuple[int, int]]) -> torch.Tensor:
        generators = [torch.Generator().manual_seed(1000 * step + row) for step, row in numbers]
        tokens = torch.stack([torch.randint(11, (5,), generator=generator) for generator in generators])
        hidden = self.embed(tokens)
        for layer in self.layers:
            hidden = hidden + layer(hidden)
        out = self.head(self.frozen(hidden)).squeeze(-1)
        wanted = torch.stack([torch.randn(5, generator=generator) for generator in generators]).to(out.dtype)
        loss: torch.Tensor = ((out - wanted) ** 2).sum()
        return loss


class Term(nn.Module):
    """A weight whose gradient is a whole number, small enough for 8 bits of mantissa."""

    def __init__(self, number: int, *shape: int) -> None:
        super().__init__()
        self.number = number
        self.weight = nn.Parameter(torch.randn(shape))

    def forward(self, numbers: list[tuple[int, int]]) -> torch.Tensor:
        loss = self.weight.new_zeros(())
        for step, row in numbers:
            generator = torch.Generator().manual_seed(1000 * step + row + 100_000 * self.number)
            factors = torch.randint(-4, 5, self.weight.shape, generator=generator)
            loss = loss + (self.weight * factors.to(self.weight.dtype)).sum()
        return loss


class Terms(nn.Module):
    """A loss whose gradients are exact in bf16, so that a run in bf16 can be compared to 1e-6."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Term(n, *shape) for n, shape in enumerate([(11, 6), (9, 6), (9,), (6, 9), (1,)]))

    def forward(self, numbers: list[tuple[int, int]]) -> torch.Tensor:
        losses: torch.Tensor = sum(layer(numbers) for layer in self.layers)
        return losses


NETWORKS = {"network": Network, "terms": Terms}


def make_network(name: str) -> nn.Module:
    torch.manual_seed(3)
    return NETWORKS[name]()


def groups_of(module: nn.Module) -> list[dict[str, Any]]:
    """Three groups: matrices, decayed, of each half of the module, and vectors, which are not."""
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    matrices = [parameter for parameter in parameters if parameter.ndim > 1]
    return [
        {"params": matrices[:2], "lr": RATE, "weight_decay": DECAY},
        {"params": [parameter for parameter in parameters if parameter.ndim == 1], "lr": 2 * RATE, "weight_decay": 0.0},
        {"params": matrices[2:], "lr": RATE, "weight_decay": DECAY},
    ]


@dataclass
class Rows:
    """A micro batch: rows by step and number."""

    numbers: list[tuple[int, int]]
    units: int
    tokens: int = 0
    idle: bool = False

    def to(self, device: torch.device) -> Rows:
        return self


def micro_batches(step: int, rank: int, ranks: int) -> list[Rows]:
    """This rank's micro batches; on all ranks together the same twelve rows."""
    mine = range(rank * len(COUNTS) // ranks, (rank + 1) * len(COUNTS) // ranks)
    return [Rows([(step, ROWS * number + row) for row in range(ROWS)], COUNTS[number]) for number in mine]


def loss_sum(module: nn.Module, batch: Rows) -> torch.Tensor:
    loss: torch.Tensor = module(batch.numbers)
    return loss


def make_muon(module: nn.Module) -> torch.optim.Optimizer:
    """Muon with AdamW for what is no matrix of a hidden layer."""
    from panda.optim.muon import MuonOptions
    from panda.optim.muon import build_muon
    from panda.optim.parameter_kinds import describe_parameters
    from panda.registry.contexts import OptimizerContext

    options = MuonOptions(adam_betas=BETAS, adam_epsilon=EPSILON, adamw_learning_rate=RATE / 2)
    described, device = describe_parameters(module), torch.device("cpu")
    return build_muon(options, OptimizerContext(groups_of(module), device, described=described, learning_rate=RATE))


def one_parameter_each(layout: ParameterLayout) -> ParameterLayout:
    """What LAMB takes for true that nobody tells: each tensor that it is given is a layer."""
    described = [
        replace(tensor, parameters=("",), segments=(Segment(0, 0, tensor.tensor.numel(), 0),))
        for tensor in layout.tensors
    ]
    return ParameterLayout(tuple(described), lambda squares: squares)


def main(configurations: dict[str, dict[str, Any]], out: Path) -> None:
    from panda.configuration.options import RunOptions
    from panda.engine.checkpoints.writing import Progress
    from panda.engine.checkpoints.writing import load_checkpoint
    from panda.engine.checkpoints.writing import save_checkpoint
    from panda.engine.deepspeed_config import deepspeed_config
    from panda.engine.engine import Engine
    from panda.engine.processes import join_processes
    from panda.engine.processes import leave_processes
    from panda.optim.layerwise import NVLamb

    processes = join_processes()
    gc.freeze()  # DeepSpeed collects garbage at each group of a BF16_Optimizer: half a second, of what was imported

    def make_engine(name: str, configuration: dict[str, Any]) -> Engine:
        module = make_network(configuration["network"])
        optimizer: Any = make_muon(module) if configuration.get("muon") else None
        optimizer = optimizer or NVLamb(
            groups_of(module), betas=BETAS, eps=EPSILON, adapt=configuration.get("adapt", "all")
        )
        if configuration.get("naive"):
            optimizer.bind = lambda layout: NVLamb.bind(optimizer, one_parameter_each(layout))
        file = out / f"{name}.json"
        if processes.rank == 0:
            file.write_text(json.dumps(configuration.get("deepspeed", {})))
        processes.barrier()
        options = RunOptions(
            **configuration["options"],
            gradient_accumulation_steps=len(COUNTS) // processes.world_size,
            deepspeed_config=str(file),
        )
        config = deepspeed_config(options, world_size=processes.world_size, on_gpu=False)
        return Engine(module, optimizer, config, processes)

    def steps(engine: Engine, numbers: range) -> None:
        for step in numbers:
            engine.scale_learning_rate(1.0 + step % 3)
            engine.step(micro_batches(step, processes.rank, processes.world_size), loss_sum)

    for name, configuration in configurations.items():
        engine = make_engine(name, configuration)
        steps(engine, range(SAVED))
        checkpoint = save_checkpoint(engine, out / f"{name}-checkpoints", Progress(SAVED), {})
        steps(engine, range(SAVED, STEPS))
        trained, ratios = trained_weights(engine), engine.observations().get("trust_ratio")
        engine.close()
        resumed = make_engine(name, configuration)
        load_checkpoint(resumed, checkpoint)
        steps(resumed, range(SAVED, STEPS))
        again = trained_weights(resumed)
        resumed.close()
        if processes.rank == 0:
            result = {
                "weights": trained,
                "resumed": again,
                "ratios": ratios,
            }
            torch.save(result, out / f"{name}.pt")
    leave_processes()


def trained_weights(engine: Any) -> dict[str, torch.Tensor]:
    """Trainable weights in fp32: under 16 bits the masters, as DeepSpeed's own functions give them."""
    from deepspeed.utils import safe_get_full_fp32_param

    if next(engine.module.parameters()).dtype == torch.float32:
        return {name: stored.read() for name, stored in engine.weights().items()}
    if hasattr(engine.optimizer, "fp32_groups"):  # without ZeRO
        pairs = zip(engine.optimizer.fp16_groups, engine.optimizer.fp32_groups, strict=True)
        masters = {parameter: master for group in pairs for parameter, master in zip(*group, strict=True)}
        return {name: masters[parameter].detach().clone() for name, parameter in engine.module.named_parameters()}
    return {name: safe_get_full_fp32_param(p).detach().clone() for name, p in engine.module.named_parameters()}


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
