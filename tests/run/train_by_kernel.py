"""Trains as train_many.py does, but as on a GPU in 16 bits: attention by the varlen kernel, and rows of few lengths."""

from __future__ import annotations

import json
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import panda.run.assembly
import panda.run.preparation
from panda.data.packing import Layout
from panda.models.forward.varlen_attention import what_forbids_kernel
from panda.testing.train_many import train_many

sys.path.insert(0, str(Path(__file__).parents[1]))
from varlen_on_cpu import varlen_on_cpu


def few_lengths(*arguments: Any) -> Layout:
    return Layout(*arguments[:-1], few_lengths=True)


panda.run.assembly.Layout = few_lengths  # type: ignore[assignment, misc]
panda.run.preparation.why_not_flash_4 = lambda model, device, dtype: ""
metadata.version = lambda name, version=metadata.version: "0" if name == "flash-attn-4" else version(name)  # type: ignore[misc]
panda.run.preparation.why_masked = lambda model, device, dtype: what_forbids_kernel(model, torch.bfloat16)
with varlen_on_cpu() as calls:
    train_many(json.loads(sys.argv[1]))
    print("calls of the kernel:", len(calls))
