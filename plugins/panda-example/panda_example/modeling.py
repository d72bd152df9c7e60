"""The network of ``gru``. It imports torch, so only the factory imports this module."""

from __future__ import annotations

import torch
from torch import nn


class GruLanguageModel(nn.Module):
    """Embedding, GRU layers (arXiv 1406.1078), linear head. Causal: a state depends only on earlier tokens."""

    def __init__(self, vocab_size: int, hidden_size: int, num_layers: int, dropout: float) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, hidden_size)
        # A list of layers instead of one GRU with many: panda makes a parameter group of each `layers.N`,
        # which bounds how much ZeRO copies at once.
        self.layers = nn.ModuleList(nn.GRU(hidden_size, hidden_size, batch_first=True) for _ in range(num_layers))
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(hidden_size, vocab_size)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Logits [rows, length, vocabulary] of the token after each of ``input_ids``, int64 [rows, length]."""
        hidden = self.dropout(self.embedding(input_ids))  # [rows, length, hidden]
        for layer in self.layers:
            states, _ = layer(hidden)
            hidden = self.dropout(states)
        logits: torch.Tensor = self.head(hidden)
        return logits
