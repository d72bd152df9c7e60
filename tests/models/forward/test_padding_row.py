"""Padding freezes no row: where the end token pads, its embedding learns as in a model without a padding row."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from checkpoint_files import llama

from panda.configuration.arguments import parse_arguments
from panda.configuration.configure import configure
from panda.engine.processes import Processes
from panda.run.model import make_trainable
from panda.weights.stored_tensor import weights_of


class Plain(torch.nn.Module):
    """A model of a package, with a padding row."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(259, 8, padding_idx=2)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.embedding(input_ids) @ self.embedding.weight.detach().t()


@pytest.mark.parametrize("kind", ["transformers", "package"])
def test_the_row_of_the_padding_token_has_a_gradient(kind: str) -> None:
    resolved = configure(parse_arguments(["--arch", "llama-tiny"])).resolved
    model: Any = llama(pad_token_id=2) if kind == "transformers" else Plain()
    trained: Any = make_trainable(model, resolved.core, weights_of(model), {}, Processes(0, 1, torch.device("cpu")))
    output = trained(torch.tensor([[5, 2, 7, 2, 9]]))
    getattr(output, "logits", output).sum().backward()
    embedding = model.get_input_embeddings() if kind == "transformers" else model.embedding
    assert embedding.weight.grad[2].abs().sum() > 0
    assert embedding.weight.grad[3].abs().sum() == 0
