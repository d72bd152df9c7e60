"""Trains tiny models under ZeRO-3 without logits, or in one process with them, and writes losses and weights.

torchrun --nproc_per_node 2 tests/models/forward/train_with_loss_sum.py FILE
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - the customary name
from peft import LoraConfig
from peft import get_peft_model
from transformers import LlamaConfig
from transformers import LlamaForCausalLM

from panda.configuration.options import RunOptions
from panda.engine.deepspeed_config import deepspeed_config
from panda.engine.engine import Engine
from panda.engine.processes import join_processes
from panda.engine.processes import leave_processes
from panda.models.forward.cross_entropy import offer_loss_sum

sys.path.insert(0, str(Path(__file__).parents[2]))
from launching import ZERO3_AT_ONCE

VOCABULARY, ROWS = 53, 4


@dataclass
class Rows:
    input_ids: torch.Tensor
    labels: torch.Tensor

    idle = False

    @property
    def units(self) -> int:
        return self.supervised_tokens

    @property
    def tokens(self) -> int:
        return self.input_ids.numel()

    @property
    def supervised_tokens(self) -> int:
        return int((self.labels[:, 1:] != -100).sum())

    def to(self, device: torch.device) -> Rows:
        return self


def loss_sum(model: Any, rows: Rows) -> torch.Tensor:
    if getattr(model, "sums_loss", False):
        return model(rows.input_ids, labels=rows.labels, supervised_tokens=rows.supervised_tokens)
    logits = model(rows.input_ids).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), rows.labels[:, 1:].flatten(), reduction="sum")


processes = join_processes()
generator = torch.Generator().manual_seed(0)
input_ids = torch.randint(VOCABULARY, (ROWS, 9), generator=generator)
labels = input_ids.masked_fill(torch.rand(ROWS, 9, generator=generator) < 0.4, -100)
labels[:, 0] = -100
results = {}
for tied in (True, False):
    for adapters in (False, True):
        torch.manual_seed(0)
        shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
        model: Any = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, tie_word_embeddings=tied, **shape))
        if processes.world_size > 1:
            offer_loss_sum(model)
        if adapters:
            model = get_peft_model(model, LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.02, eps=1e-3)
        options = RunOptions(zero_stage=3 if processes.world_size > 1 else 0, gradient_accumulation_steps=2)
        config = deepspeed_config(options, world_size=processes.world_size, on_gpu=False)
        config["zero_optimization"] |= ZERO3_AT_ONCE
        engine = Engine(model, optimizer, config, processes)
        mine = range(processes.rank, ROWS, processes.world_size)
        micro_batches = [Rows(input_ids[[row]], labels[[row]]) for row in mine]
        losses = [float(engine.step(micro_batches, loss_sum).loss) for _ in range(5)]
        weights = {name: stored.read().tolist() for name, stored in engine.weights().items()}
        results[("tied" if tied else "untied") + " adapters" * adapters] = {"losses": losses, "weights": weights}
        engine.close()
if processes.rank == 0:
    with open(sys.argv[1], "w") as file:
        json.dump(results, file)
leave_processes()
