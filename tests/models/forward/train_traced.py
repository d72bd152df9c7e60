"""Trains configurations whose layers are traced and cut as for compiling, but run by PyTorch's own kernels.

torchrun --nproc_per_node 2 tests/models/forward/train_traced.py CONFIGURATIONS

What torch makes of compiled layers, forward and backward, is all there; generating code in C++ for each length of rows
and compiling it, which takes a minute of CPU time, is left out.
"""

from __future__ import annotations

import functools
import json
import sys

import torch

from panda.testing.train_many import train_many

torch.compile = functools.partial(torch.compile, backend="aot_eager_decomp_partition")
train_many(json.loads(sys.argv[1]))
