"""Step time and peak memory of nvlamb against fused AdamW, on the shapes of a LLaMA.

    python bench/optimizer_step.py --shape 1.3b 7b              # the tensors of ZeRO-0 and of ZeRO-1; no deepspeed
    python bench/optimizer_step.py --shape 1.3b --zero_stage 1  # through panda's engine, bf16
    torchrun --nproc_per_node 8 bench/optimizer_step.py --shape 7b --zero_stage 1

Run it from the root of the repository, with panda installed. Without --zero_stage it times only the
optimizer's own step, on fp32 weights and gradients (16 bytes a parameter: 7b needs 108 GB). With it, it times
a whole step of the engine (reducing, clipping, stepping, and the copy to bf16), with a model whose forward and
backward do nothing but make gradients. Medians; all rows of a table come from one process and device.
"""

from __future__ import annotations

import argparse
import gc
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from datetime import UTC
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from panda.optim.layerwise import NVLamb
from panda.registry.contexts import ParameterLayout
from panda.registry.contexts import Segment
from panda.registry.contexts import TensorLayout

SHAPES = {  # hidden, feed-forward, layers, vocabulary
    "tiny": (64, 176, 2, 259),
    "1.3b": (2048, 5504, 24, 32000),
    "7b": (4096, 11008, 32, 32000),
}
BETAS, EPSILON = (0.9, 0.99), 1e-6
OPTIMIZERS: dict[str, tuple[str, float]] = {
    "adamw, fused": ("adamw", 0.1),
    "nvlamb": ("nvlamb", 0.0),
    "nvlamb, weight decay": ("nvlamb", 0.1),
}


def layers_of(shape: str) -> list[list[tuple[int, ...]]]:
    """Shapes of the parameters, layer by layer; those outside the layers come first."""
    hidden, inner, layers, vocabulary = SHAPES[shape]
    block = [(hidden, hidden)] * 4 + [(inner, hidden)] * 2 + [(hidden, inner)] + [(hidden,)] * 2
    return [[(vocabulary, hidden), (hidden,), (vocabulary, hidden)], *[block] * layers]


def groups_of(shape: str, layout: str, device: torch.device) -> tuple[list[dict[str, Any]], ParameterLayout]:
    """One group a layer of fp32 tensors with gradients, parameters or one flat tensor; and where parameters lie."""
    groups, described = [], []
    for number, layer in enumerate(layers_of(shape)):
        tensors: list[torch.Tensor] = []
        sizes = [torch.Size(each).numel() for each in layer]
        for part in [sizes] if layout == "flat" else [[size] for size in sizes]:
            tensor = torch.empty(sum(part), device=device).normal_(std=0.02).requires_grad_()
            tensor.grad = torch.empty_like(tensor).normal_()
            starts = [sum(part[:before]) for before in range(len(part))]
            segments = [Segment(i, start, size, 0) for i, (start, size) in enumerate(zip(starts, part, strict=True))]
            names = tuple(f"{number}.{len(tensors)}.{i}" for i in range(len(part)))
            tensors.append(tensor)
            described.append(TensorLayout(tensor, names, tuple(segments)))
        groups.append({"params": tensors})
    return groups, ParameterLayout(tuple(described), lambda squares: squares)


def build(kind: str, groups: list[dict[str, Any]], decay: float) -> torch.optim.Optimizer:
    if kind == "adamw":
        return torch.optim.AdamW(groups, lr=1e-4, betas=BETAS, eps=EPSILON, weight_decay=decay, fused=True)
    return NVLamb(groups, lr=1e-4, betas=BETAS, eps=EPSILON, weight_decay=decay)


def measure(step: Callable[[], Any], steps: int, device: torch.device) -> tuple[float, float]:
    """Median milliseconds of a step, after three that warm up, and peak GiB over all of them."""
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    times = []
    for number in range(steps + 3):
        if on_gpu:
            torch.cuda.synchronize()
        begin = time.perf_counter()
        step()
        if on_gpu:
            torch.cuda.synchronize()
        if number >= 3:
            times.append(1000 * (time.perf_counter() - begin))
    return statistics.median(times), torch.cuda.max_memory_allocated() / 2**30 if on_gpu else float("nan")


def alone(shape: str, layout: str, kind: str, decay: float, steps: int, device: torch.device) -> tuple[float, float]:
    """The optimizer's own step. DeepSpeed steps flat tensors one call each, and parameters all in one call."""
    groups, described = groups_of(shape, layout, device)
    optimizer = build(kind, groups, decay)
    if isinstance(optimizer, NVLamb):
        optimizer.bind(described)
    built = optimizer.param_groups

    def step() -> None:
        if layout == "whole":
            optimizer.step()
            return
        for group in built:
            optimizer.param_groups = [group]
            optimizer.step()

    return measure(step, steps, device)


class Parameters(torch.nn.Module):
    """Parameters in layers, whose gradients cost next to nothing."""

    def __init__(self, shape: str) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(Layer(sizes) for sizes in layers_of(shape))

    def forward(self) -> torch.Tensor:
        loss: torch.Tensor = sum(layer() for layer in self.layers)
        return loss


class Layer(torch.nn.Module):
    def __init__(self, sizes: list[tuple[int, ...]]) -> None:
        super().__init__()
        self.weights = torch.nn.ParameterList(torch.empty(size).normal_(std=0.02) for size in sizes)

    def forward(self) -> torch.Tensor:
        loss: torch.Tensor = sum(weight.sum() for weight in self.weights)
        return loss


class Nothing:
    tokens = units = 1
    idle = False

    def to(self, device: torch.device) -> Nothing:
        return self


def through_engine(shape: str, stage: int, kind: str, decay: float, steps: int) -> tuple[float, float]:
    """A whole step of the engine."""
    from panda.configuration.options import RunOptions
    from panda.engine.deepspeed_config import deepspeed_config
    from panda.engine.engine import Engine
    from panda.engine.processes import join_processes
    from panda.optim.param_groups import param_groups

    processes = join_processes()
    on_gpu = processes.device.type == "cuda"
    with processes.device:
        module = Parameters(shape)
    groups = param_groups(module, learning_rate=1e-4, weight_decay=decay)
    options = RunOptions(zero_stage=stage, precision="bf16", gradient_accumulation_steps=1, max_grad_norm=1.0)
    config = deepspeed_config(options, world_size=processes.world_size, on_gpu=on_gpu)
    engine = Engine(module, build(kind, groups, decay), config, processes)
    result = measure(lambda: engine.step([Nothing()], lambda model, _: model()), steps, processes.device)
    engine.close()
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=["1.3b"])
    parser.add_argument("--steps", type=int, default=20, help="steps that are timed")
    parser.add_argument("--zero_stage", type=int, choices=range(4), help="measure through panda's engine")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    quiet = int(os.environ.get("RANK", "0")) > 0
    name = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or platform.machine()
    packages = ["torch"] if arguments.zero_stage is None else ["torch", "deepspeed"]
    versions = ", ".join(f"{package} {metadata.version(package)}" for package in packages)
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if not quiet:
        print(f"{datetime.now(UTC):%Y-%m-%d}, {ranks} x {name}, {versions}, median of {arguments.steps} steps\n")
        print("| shape | tensors | optimizer | ms a step | over AdamW | peak GiB |\n|---|---|---|---|---|---|")
    for shape in arguments.shape:
        engine = arguments.zero_stage is not None
        for layout in [f"ZeRO-{arguments.zero_stage}, bf16"] if engine else ["whole", "flat"]:
            base = None
            for label, (kind, decay) in OPTIMIZERS.items():
                if engine:
                    time_, peak = through_engine(shape, arguments.zero_stage, kind, decay, arguments.steps)
                else:
                    time_, peak = alone(shape, layout, kind, decay, arguments.steps, device)
                gc.collect()
                if device.type == "cuda":
                    torch.cuda.empty_cache()
                base = base or time_
                if not quiet:
                    row = [shape, layout, label, f"{time_:.2f}", f"{time_ / base:.2f}", f"{peak:.2f}"]
                    print(f"| {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
