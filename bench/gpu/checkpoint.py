"""Makes a checkpoint of random bf16 weights of a shape: drawn on the device, a few gigabytes at a time. Its tokenizer
is panda's own, whose tokens are bytes; the embedding has the rows of the shape."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors.torch import save_file

import panda
from bench.gpu.cases import Shape

SHARD_BYTES = 2 * 2**30
WRITERS = 4
"""Shards that are written at the same time: one thread does not fill a fast disk."""
DEVIATION = 0.02


def make_checkpoint(shape: Shape, folder: Path) -> None:
    """Write a checkpoint that transformers loads to ``folder``, which is there only once it is whole."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    shards = list(_shards(shape))
    names = [f"model-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)]
    with ThreadPoolExecutor(WRITERS) as pool:
        writing = [pool.submit(_write, *each, partial) for each in zip(range(len(shards)), names, shards, strict=True)]
        for each in writing:
            each.result()
    index = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
    (partial / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    (partial / "config.json").write_text(json.dumps(shape.config(), indent=2))
    for file in (Path(panda.__file__).parent / "data/sample/tokenizer").glob("*.json"):
        shutil.copy(file, partial)
    partial.rename(folder)
    # Else the system writes it to the disk in the next minute. Steps of 3 to 10 s in the runs that followed are thought
    # to have waited for that, in order to write a line of their log (7B on four H100s, 2026-11-27).
    os.sync()


def tensors(shape: Shape) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and sizes of all parameters, in the order of the model."""
    hidden, inner = shape.hidden, shape.inner
    narrow = hidden // shape.heads * shape.key_value_heads
    yield "model.embed_tokens.weight", (shape.vocabulary, hidden)
    for number in range(shape.layers):
        layer = f"model.layers.{number}."
        for name, rows in (("q", hidden), ("k", narrow), ("v", narrow), ("o", hidden)):
            yield f"{layer}self_attn.{name}_proj.weight", (rows, hidden)
        for name, size in (("gate", (inner, hidden)), ("up", (inner, hidden)), ("down", (hidden, inner))):
            yield f"{layer}mlp.{name}_proj.weight", size
        for name in ("input_layernorm", "post_attention_layernorm"):
            yield f"{layer}{name}.weight", (hidden,)
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (shape.vocabulary, hidden)


def _shards(shape: Shape) -> Iterator[dict[str, tuple[int, ...]]]:
    shard: dict[str, tuple[int, ...]] = {}
    held = 0
    for name, size in tensors(shape):
        wanted = 2 * torch.Size(size).numel()
        if shard and held + wanted > SHARD_BYTES:
            yield shard
            shard, held = {}, 0
        shard[name] = size
        held += wanted
    yield shard


def _write(seed: int, name: str, shard: dict[str, tuple[int, ...]], folder: Path) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    generator = torch.Generator(device).manual_seed(seed)

    def drawn(key: str, size: tuple[int, ...]) -> torch.Tensor:
        empty = torch.empty(size, dtype=torch.bfloat16, device=device)
        if "norm" in key:
            return empty.fill_(1.0).cpu()
        return empty.normal_(std=DEVIATION, generator=generator).cpu()

    save_file({key: drawn(key, size) for key, size in shard.items()}, folder / name, metadata={"format": "pt"})
