"""The ``gru`` model, its architectures, and a hook that is active in the runs that choose it.

panda imports this module to validate options and print help, so nothing here imports torch at the top.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING
from typing import Annotated
from typing import Any

from panda import Meta
from panda import UserError
from panda import hookimpl
from panda import register_arch
from panda import register_model
from panda.registry.contexts import ModelContext

if TYPE_CHECKING:
    import torch
    from panda.runner import Run


@dataclass(frozen=True)
class GruOptions:
    """Options of the GRU model."""

    vocab_size: Annotated[int, Meta(ge=1)] | None = None
    """Rows of the embedding; by default one for each entry of the tokenizer."""
    hidden_size: Annotated[int, Meta(ge=1)] = 512
    """Width of the embedding and of each layer's state."""
    num_layers: Annotated[int, Meta(ge=1)] = 2
    """GRU layers, one on top of the other."""
    dropout: Annotated[float, Meta(ge=0, lt=1)] = 0.0
    """Share of the embedding's and of each layer's outputs that training sets to zero."""


@register_model("gru", options=GruOptions)
def build_gru(options: GruOptions, context: ModelContext) -> torch.nn.Module:
    """Recurrent language model of gated recurrent units (arXiv 1406.1078)."""
    vocab_size = options.vocab_size or context.vocab_size
    if vocab_size < context.vocab_size:
        raise UserError(f"vocab_size {vocab_size} is less than the tokenizer's {context.vocab_size} entries.")

    from panda_example.modeling import GruLanguageModel

    return GruLanguageModel(vocab_size, options.hidden_size, options.num_layers, options.dropout)


@register_arch("gru-small", model="gru")
def gru_small() -> dict[str, Any]:
    """Two layers of 512; 3.4M parameters with a vocabulary of bytes."""
    return {"hidden_size": 512, "num_layers": 2, "dropout": 0.1}


@register_arch("gru-tiny", model="gru")
def gru_tiny() -> dict[str, Any]:
    """Learns on two CPU cores in seconds."""
    return {"hidden_size": 128, "num_layers": 1}


@hookimpl
def panda_run_start(run: Run) -> None:
    """Print the size of the model's state. At the top of the module, so active if a name of this module is chosen."""
    if run.processes.rank == 0:
        options: GruOptions = run.resolved.components["model"].options
        numbers = options.num_layers * options.hidden_size
        print(f"gru: the state that is carried from token to token has {numbers:,} numbers", flush=True)
