"""Finding out whether a model's logits are exactly its output head applied to its last hidden state.

Some models scale or cap their logits, or scale the hidden state before the head, and each family names that
differently in its configuration: so a forward of the model is observed.
"""

from __future__ import annotations

import copy
from typing import Any

import torch


def has_plain_head(model: Any) -> bool:
    """Whether logits of ``model``, of transformers, are ``last_hidden_state @ head.weight.T`` and nothing else.

    Its forward runs once, on a copy on the meta device, where nothing is computed. False where it cannot run there.
    """
    head = model.get_output_embeddings()
    if type(head) is not torch.nn.Linear or head.bias is not None:
        return False
    seen: dict[str, Any] = {}

    def of_base(module: Any, arguments: Any, output: Any) -> None:
        seen["hidden"] = (output.last_hidden_state, output.last_hidden_state._version)

    def of_head(module: Any, arguments: Any, output: Any) -> None:
        seen["input"], seen["output"] = arguments[0], (output, output._version)

    probe = copy.deepcopy(model).to("meta").eval()
    probe.base_model.register_forward_hook(of_base)
    probe.get_output_embeddings().register_forward_hook(of_head)
    try:
        with torch.no_grad(), torch.device("meta"):
            logits = probe(torch.zeros(1, 2, dtype=torch.int64, device="meta"), use_cache=True).logits
    except Exception:  # whatever its code does with values that do not exist
        return False
    if not {"hidden", "input", "output"} <= seen.keys():
        return False
    return _is(seen["input"], *seen["hidden"]) and _is(logits, *seen["output"])


def _is(tensor: torch.Tensor, other: torch.Tensor, version: int) -> bool:
    """Whether ``tensor`` is the whole of ``other``, and unchanged since ``other`` had ``version``."""
    return (
        tensor.shape == other.shape
        and tensor.dtype == other.dtype
        and tensor.untyped_storage()._cdata == other.untyped_storage()._cdata
        and tensor.storage_offset() == other.storage_offset()
        and tensor.stride() == other.stride()
        and tensor._version == version
    )
