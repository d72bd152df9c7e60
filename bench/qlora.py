"""Peak memory and tokens a second of QLoRA at LLaMA's sizes, with random weights and tokens, on one device.

    python bench/qlora.py llama-7b llama-13b --micro_batch 4
    python bench/qlora.py llama-65b --activation_checkpointing full

The base is created one linear layer at a time, on the device, and quantised at once: only the embedding and
the output head are ever in full precision. It is trained as `panda-train --use_quant` would, by panda's own
model, adapters, loss and engine. Prints one line of a table for each arch. MFU counts 4 x parameters +
12 x layers x width x length operations a token, relative to --peak_tflops.
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import time
from dataclasses import replace
from datetime import UTC
from datetime import datetime
from importlib import metadata
from typing import Any

os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

import torch

from panda.configuration.options import RunOptions
from panda.data.batches import Batch
from panda.engine.deepspeed_config import deepspeed_config
from panda.engine.engine import Engine
from panda.engine.processes import Processes
from panda.engine.processes import join_processes
from panda.engine.processes import leave_processes
from panda.models.adapters.lora import add_adapters
from panda.models.adapters.quantisation import quantise
from panda.models.forward.layers import compile_layers
from panda.models.forward.layers import recompute_activations
from panda.optim.param_groups import param_groups
from panda.registry import Catalog
from panda.registry import options
from panda.registry.contexts import ModelContext
from panda.tasks.language_modelling import LanguageModelling

VOCABULARY = 32_000


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("archs", nargs="+", help="such as llama-7b")
    parser.add_argument("--length", type=int, default=2048, help="tokens of a row")
    parser.add_argument("--micro_batch", type=int, default=1, help="rows")
    parser.add_argument("--accumulation", type=int, default=1, help="micro batches of a step")
    parser.add_argument("--supervised", type=float, default=1.0, help="share of tokens that carry loss")
    parser.add_argument("--steps", type=int, default=10, help="measured, after three that are not")
    parser.add_argument("--activation_checkpointing", choices=["none", "selective", "full"], default="none")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--quant_bits", type=int, choices=[4, 8], default=4)
    parser.add_argument("--lora_r", type=int, default=64)
    parser.add_argument("--precision", choices=["bf16", "fp32"], default="bf16")
    parser.add_argument("--peak_tflops", type=float, default=989.0, help="of the device, dense bf16")
    return parser.parse_args()


def build(arch: str, run: RunOptions, device: torch.device, length: int) -> tuple[Any, int]:
    """The quantised model with adapters, and the number of its parameters before quantisation."""
    catalog = Catalog()
    component = catalog.load(catalog.find("arch", arch))
    model_component = catalog.load(catalog.find("model", component.model))
    chosen = options.build(model_component.options, component.factory() | {"vocab_size": VOCABULARY})
    context = ModelContext(VOCABULARY, length, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    with torch.device("meta"):
        model: Any = model_component.factory(chosen, context)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    dtype = torch.bfloat16 if run.precision == "bf16" else torch.float32

    def fill(name: str, layer: torch.nn.Module) -> None:
        for key, weight in list(layer.named_parameters(recurse=False)):
            data = torch.empty(weight.shape, dtype=dtype, device=device).normal_(std=0.02)
            setattr(layer, key, torch.nn.Parameter(data))

    quantise(model, run, device, fill)
    for name, module in model.named_modules():
        if any(parameter.is_meta for parameter in module.parameters(recurse=False)):
            fill(name, module)
            if "norm" in name:
                torch.nn.init.ones_(module.weight)  # type: ignore[arg-type]
    rotary = model.model.rotary_emb
    for name, buffer in type(rotary)(model.config).named_buffers():
        setattr(rotary, name, buffer.to(device))
    return add_adapters(model, run), parameters


def measure(arch: str, given: argparse.Namespace, processes: Processes) -> str:
    device = processes.device
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    run = RunOptions(
        use_lora=True,
        use_quant=True,
        quant_bits=given.quant_bits,
        lora_r=given.lora_r,
        precision=given.precision,
        zero_stage=1,
        per_gpu_train_batch_size=given.micro_batch,
        gradient_accumulation_steps=given.accumulation,
    )
    torch.manual_seed(0)
    began = time.perf_counter()
    model, parameters = build(arch, run, device, given.length)
    seconds = time.perf_counter() - began
    built = torch.cuda.max_memory_allocated() if on_gpu else 0
    if given.activation_checkpointing != "none":
        recompute_activations(model, selective=given.activation_checkpointing == "selective")
    if given.compile:
        compile_layers(model, device)
    groups = param_groups(model, learning_rate=1e-4, weight_decay=0.0)
    optimizer = torch.optim.AdamW(groups, fused=on_gpu)
    engine = Engine(model, optimizer, deepspeed_config(run, world_size=1, on_gpu=on_gpu), processes)

    ids = torch.randint(3, VOCABULARY, (given.micro_batch, given.length))
    labels = ids.masked_fill(torch.rand(ids.shape) >= given.supervised, -100)
    labels[:, 0] = -100
    batch = Batch(
        torch.stack([ids, labels]), lengths=(ids.shape[1],) * len(ids), supervised_tokens=int((labels != -100).sum())
    )
    times = []
    for _ in range(3 + given.steps):
        began = time.perf_counter()
        result = engine.step([replace(batch) for _ in range(given.accumulation)], loss_sum)
        loss = float(result.loss)  # waits for the device
        times.append(time.perf_counter() - began)
    step = statistics.median(times[3:])
    tokens = ids.numel() * given.accumulation / step
    config = model.config
    operations = 4 * parameters + 12 * config.num_hidden_layers * config.hidden_size * given.length
    peak = torch.cuda.max_memory_allocated() if on_gpu else 0
    engine.close()
    return (
        f"| {arch} | {parameters / 1e9:.2f} B | {given.quant_bits} | {given.micro_batch} x {given.length} |"
        f" {given.activation_checkpointing} | {'yes' if given.compile else 'no'} | {seconds:.0f} |"
        f" {built / 2**30:.1f} | {peak / 2**30:.1f} | {step:.3f} | {tokens:,.0f} |"
        f" {tokens * operations / given.peak_tflops / 1e12:.1%} | {loss:.3f} |"
    )


def loss_sum(model: Any, batch: Batch) -> torch.Tensor:
    """The loss that all of panda's tasks share; it does not depend on the task."""
    return LanguageModelling.loss(None, model, batch)  # type: ignore[arg-type]


def main() -> None:
    given = arguments()
    processes = join_processes()
    device = torch.cuda.get_device_name() if processes.device.type == "cuda" else "CPU"
    packages = ("torch", "transformers", "deepspeed", "peft", "bitsandbytes")
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in packages)
    print(f"{datetime.now(UTC):%Y-%m-%d}, {device}, {versions}, rank {given.lora_r}, {given.precision}\n")
    print(
        "| arch | parameters | bits | batch | recomputed | compiled | build s | build GiB | peak GiB | step s |", end=""
    )
    print(" tokens/s | MFU | loss |\n" + "|---" * 13 + "|")
    for arch in given.archs:
        print(measure(arch, given, processes), flush=True)
        gc.collect()
        if processes.device.type == "cuda":
            torch.cuda.empty_cache()
    leave_processes()


if __name__ == "__main__":
    main()
