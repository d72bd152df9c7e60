"""Matching stored tensors with a module: names and shapes of a checkpoint against those of the module."""

from __future__ import annotations

import re
from dataclasses import replace

import torch

from panda.registry import UserError
from panda.weights.stored_tensor import StoredTensor
from panda.weights.stored_tensor import Weights

_SHOWN = 8


_COMPUTED = re.compile(r"(^|\.)(rotary\w*\.(inv_freq|cos_cached|sin_cached)|masked_bias|causal_mask|position_ids)$")
_WRAPPERS = re.compile(r"^module\.|(?<![^.])(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_MASK = re.compile(r"(^|\.)(attn|attention)\.bias$")


def is_computed(name: str, tensor: StoredTensor) -> bool:
    """Whether ``tensor`` is one that old programs stored, and that is computed from the configuration.

    Frequencies and angles of rotary embeddings, numbers of positions, and causal masks, which GPT-2 and models after
    it had under the name of a bias.
    """
    *ones, rows, columns = tensor.shape if len(tensor.shape) > 1 else (0, 0)
    is_mask = set(ones) <= {1} and 0 < rows == columns
    return bool(_COMPUTED.search(name) or (is_mask and _MASK.search(name)))


def matched(
    module: torch.nn.Module, weights: Weights, *, source: str, grow_rows: tuple[int, int] | None = None
) -> Weights:
    """For each parameter and persistent buffer of ``module``, under its first name, the tensor of ``weights``.

    ``grow_rows`` (from, to): a tensor of ``from`` rows, one for each entry of a vocabulary, is extended to ``to``
    rows where the module has that many; new rows are the mean of the others. ``source`` is what errors call the
    checkpoint. Raises UserError with the names of all tensors that are missing, unexpected or of another shape, and
    where one parameter of the module is several unequal tensors of the checkpoint.
    """
    wanted: dict[str, torch.Tensor] = module.state_dict(keep_vars=True)
    stored = _with_prefix(module, wanted, weights)
    names: dict[int, list[str]] = {}
    for name, target in wanted.items():
        names.setdefault(id(target), []).append(name)

    found: dict[str, StoredTensor] = {}
    missing, misshaped = [], []
    for aliases in names.values():
        held = next((alias for alias in aliases if alias in stored), None)
        if held is None:
            missing.append(" = ".join(aliases))
            continue
        _refuse_unequal([(alias, stored[alias]) for alias in aliases if alias in stored], source)
        tensor, shape = stored[held], tuple(wanted[held].shape)
        if grow_rows and shape[:1] == (grow_rows[1],) and tensor.shape == (grow_rows[0], *shape[1:]):
            tensor = _grown(tensor, grow_rows[1])
        if tensor.shape != shape:
            misshaped.append(f"{held} is {list(tensor.shape)} and should be {list(shape)}")
        found[aliases[0]] = tensor
    computed = {name for name, _ in module.named_buffers(remove_duplicate=False)}
    ignored = getattr(module, "_keys_to_ignore_on_load_unexpected", None) or ()
    unexpected = [
        name
        for name in stored
        if name not in wanted
        and name not in computed
        and not is_computed(name, stored[name])
        and not any(re.search(pattern, name) for pattern in ignored)
    ]
    refuse_unlike(source, missing, unexpected, misshaped)
    return found


def refuse_unlike(source: str, missing: list[str], unexpected: list[str], misshaped: list[str]) -> None:
    """Raise UserError if any names of tensors are given. ``source`` is what it calls the checkpoint."""
    problems = [
        f"{what}: {_listed(which)}"
        for what, which in (
            ("missing from it", missing),
            ("in it and not in the model", unexpected),
            ("of another shape", misshaped),
        )
        if which
    ]
    if problems:
        raise UserError(
            f"{source}: its tensors are not those of the model.\n"
            + "\n".join(problems)
            + "\nIs it a checkpoint of another architecture or size? Nothing was loaded."
        )


def unwrapped(module: torch.nn.Module, weights: Weights) -> Weights:
    """``weights`` without the parts that wrappers of torch add to names: `torch.compile`, DDP, FSDP, checkpointing."""
    own = module.state_dict(keep_vars=True)
    if any(_WRAPPERS.search(name) for name in own):
        return weights
    return {_WRAPPERS.sub("", name): tensor for name, tensor in weights.items()}


def _refuse_unequal(tensors: list[tuple[str, StoredTensor]], source: str) -> None:
    """Raise UserError where ``tensors``, which are one parameter of a module, differ."""
    (first, kept), *others = tensors
    for name, other in others:
        if other.shape != kept.shape or not torch.equal(kept.read(), other.read()):
            raise UserError(
                f"{source}: its configuration says that {first} and {name} are one tensor (tied embeddings), but the"
                " files have different numbers for the two. If the head is one of its own, write"
                ' `"tie_word_embeddings": false` in config.json; otherwise remove the other from the files.'
            )


def _with_prefix(module: torch.nn.Module, wanted: dict[str, torch.Tensor], weights: Weights) -> Weights:
    """``weights`` by the names in ``module``, which have a prefix if ``weights`` were saved from its inner model."""
    prefix = f"{getattr(module, 'base_model_prefix', '')}."
    if prefix == "." or any(name.startswith(prefix) for name in weights):
        return weights
    return {prefix + name if prefix + name in wanted else name: tensor for name, tensor in weights.items()}


def _grown(tensor: StoredTensor, rows: int) -> StoredTensor:
    def read() -> torch.Tensor:
        known = tensor.read()
        mean = known.float().mean(0, keepdim=True).to(known.dtype)
        return torch.cat([known, mean.expand(rows - len(known), *known.shape[1:])])

    return replace(tensor, shape=(rows, *tensor.shape[1:]), read=read)


def _listed(names: list[str]) -> str:
    more = f", and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
