"""Forward and backward of linear layers with adapters: milliseconds, peak memory, and what a small update becomes.

    python bench/lora_layer.py                      # 4 x 2048 tokens, rank 64, bf16, whole and in NF4; a minute
    python bench/lora_layer.py --shape mlp --steps 50

Run it from the root of the repository, with panda and bitsandbytes installed. Each row is the same layers with the
same weights: without adapters, with peft's forward, and with panda's (panda/models/adapters/one_rounding.py). `mlp` is
the feed-forward part of a LLaMA layer, three linear layers, and is also compiled, and recomputed in backward, where
NF4 weights are dequantised three times, or twice when the second result is kept. Peak memory is above that of weights
and input. `update` is the change of the output by adapters that add a thousandth to it, projected on the change in
float32: 1.00 where nothing is lost to rounding. All rows of a table come from one process and device.
"""

from __future__ import annotations

import argparse
import copy
import gc
import platform
import statistics
import sys
import time
from collections.abc import Callable
from collections.abc import Iterator
from datetime import UTC
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from peft import LoraConfig
from peft import inject_adapter_in_model
from torch.utils.checkpoint import checkpoint

from panda.models.adapters.one_rounding import round_once

SHAPES = {  # inputs, and outputs; or width and inner width
    "4096x4096": (4096, 4096),
    "4096x11008": (4096, 11008),
    "mlp": (4096, 11008),
    "tiny": (64, 128),
    "tiny-mlp": (64, 128),
}


class Layers(torch.nn.Module):
    """One linear layer, or the three of a LLaMA's feed-forward part."""

    def __init__(self, shape: str) -> None:
        super().__init__()
        inputs, outputs = SHAPES[shape]
        self.up = torch.nn.Linear(inputs, outputs, bias=False)
        if shape.endswith("mlp"):
            self.gate = torch.nn.Linear(inputs, outputs, bias=False)
            self.down = torch.nn.Linear(outputs, inputs, bias=False)
        for parameter in self.parameters():
            torch.nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not hasattr(self, "down"):
            return self.up(x)  # type: ignore[no-any-return]
        return self.down(torch.nn.functional.silu(self.gate(x)) * self.up(x))  # type: ignore[no-any-return]


def packed(layers: Layers, dtype: torch.dtype) -> tuple[Any, Layers]:
    """``layers`` in NF4, and what they are when dequantised to float32."""
    import bitsandbytes

    whole = copy.deepcopy(layers).float()
    for name, layer in list(layers.named_children()):
        kind: dict[str, Any] = {"compress_statistics": True, "quant_type": "nf4"}
        new = bitsandbytes.nn.Linear4bit(
            layer.in_features, layer.out_features, bias=False, compute_dtype=dtype, device="meta", **kind
        )
        new.support_avx512bf16_for_cpu = False
        weight = layer.weight.data
        new.weight = bitsandbytes.nn.Params4bit(weight.cpu(), requires_grad=False, module=new, **kind).to(weight.device)
        setattr(layers, name, new)
        exact = bitsandbytes.functional.dequantize_4bit(new.weight.data, new.weight.quant_state)
        whole.get_submodule(name).weight.data.copy_(exact)  # type: ignore[union-attr, operator]
    layers.is_loaded_in_4bit = True  # type: ignore[assignment]
    return layers, whole


def with_adapters(layers: Any, rank: int) -> Any:
    names = [name for name, _ in layers.named_children()]
    torch.manual_seed(1)
    return inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=16, lora_dropout=0.0, target_modules=names), layers)


@torch.no_grad()
def change(layers: Any, x: torch.Tensor, size: float) -> torch.Tensor:
    """The change of the output, in float32, from adapters without effect to those with B of ``size``."""
    results = []
    for factor in (0.0, size):
        torch.manual_seed(2)
        for name, parameter in layers.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape) * factor)
        results.append(layers(x).float())
    return results[1] - results[0]


def update(layers: Any, whole: Any, x: torch.Tensor, rank: int) -> float:
    """The change by small adapters of ``layers``, projected on that of ``whole``, the same in float32."""
    x = x[:, : 2048 // len(x)]
    # Output and input are about 1; A x has 1 / sqrt(3) as peft draws A, so B's terms add up to a thousandth.
    size = 1e-3 * (3 / rank) ** 0.5 / (16 / rank)
    expected = change(whole, x.float(), size)
    found = change(layers, x, size)
    return ((found * expected).sum() / expected.square().sum()).item()


def measure(step: Callable[[], Any], steps: int, device: torch.device) -> tuple[float, float]:
    """Milliseconds of a step, the median of three runs of ``steps`` steps, and its peak MiB above those before it."""
    on_gpu = device.type == "cuda"
    for _ in range(3):
        step()
    before = torch.cuda.memory_allocated() if on_gpu else 0
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(3):
        if on_gpu:
            torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(steps):
            step()
        if on_gpu:
            torch.cuda.synchronize()
        times.append(1000 * (time.perf_counter() - begin) / steps)
    return statistics.median(times), (torch.cuda.max_memory_allocated() - before) / 2**20 if on_gpu else float("nan")


def variants(shape: str, weights: str) -> Iterator[tuple[str, str]]:
    """Whose forward is measured, and how it is run."""
    ways = ["plain"]
    if shape.endswith("mlp"):
        ways += ["compiled", "recomputed"]
    for way in ways:
        yield from ((whose, way) for whose in ("no adapters", "peft", "panda"))
    if weights == "nf4" and "recomputed" in ways:
        yield "panda", "recomputed, kept"


def row(shape: str, weights: str, whose: str, way: str, given: argparse.Namespace) -> tuple[float, float, str]:
    """Milliseconds, MiB, and the share of a small update, for one line of the table."""
    dtype, device = torch.bfloat16, torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    with device:
        layers: Any = Layers(shape).to(dtype).requires_grad_(False)
        whole: Any = copy.deepcopy(layers).float()
        if weights == "nf4":
            layers, whole = packed(layers, dtype)
        x = torch.randn(given.rows, given.length, SHAPES[shape][0], dtype=dtype)
        if whose != "no adapters":
            layers, whole = with_adapters(layers, given.rank), with_adapters(whole, given.rank)
            for name, parameter in layers.named_parameters():
                if "lora_" in name:
                    parameter.data = parameter.data.to(dtype)
                    whole.get_parameter(name).data.copy_(parameter.data)
        if whose == "panda":
            round_once(layers, recomputed=way == "recomputed, kept")
        share = ""
        if way == "plain" and whose != "no adapters":
            share = f"{update(layers, whole, x, given.rank):.2f}"
        gradient = torch.randn_like(layers(x))
    del whole
    if way == "compiled":
        layers.compile()
    x.requires_grad_()

    def step() -> None:
        y = checkpoint(layers, x, use_reentrant=False) if way.startswith("recomputed") else layers(x)
        y.backward(gradient)
        for tensor in (x, *layers.parameters()):
            tensor.grad = None

    return *measure(step, given.steps, device), share


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=["4096x4096", "4096x11008", "mlp"])
    parser.add_argument("--weights", nargs="+", choices=["bf16", "nf4"], default=["bf16", "nf4"])
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=2048, help="tokens of a row")
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--steps", type=int, default=20, help="steps that are timed, three times")
    given = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    name = torch.cuda.get_device_name() if on_gpu else platform.processor() or platform.machine()
    versions = ", ".join(f"{package} {metadata.version(package)}" for package in ("torch", "peft", "bitsandbytes"))
    print(
        f"{datetime.now(UTC):%Y-%m-%d}, {name}, {versions}, {given.rows} x {given.length} tokens, rank {given.rank}\n"
    )
    print("| shape | weights | adapters | run | ms | over none | peak MiB | update |\n" + "|---" * 8 + "|")
    for shape in given.shape:
        for weights in given.weights:
            alone: dict[str, float] = {}
            for whose, way in variants(shape, weights):
                milliseconds, peak, share = row(shape, weights, whose, way, given)
                over = milliseconds / alone.setdefault(way.removesuffix(", kept"), milliseconds)
                cells = [shape, weights, whose, way, f"{milliseconds:.3f}", f"{over:.2f}", f"{peak:,.0f}", share]
                print(f"| {' | '.join(cells)} |", flush=True)
                torch.compiler.reset()
                gc.collect()
                if on_gpu:
                    torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
