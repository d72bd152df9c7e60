"""The parts that a task gives a model beside its checkpoint, such as a reward head: made, and filled."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Mapping

import torch

from panda.registry import UserError
from panda.weights.parts import divided
from panda.weights.stored_tensor import Weights


def new_parts(
    extend: Callable[[], Mapping[str, torch.nn.Module]], base: torch.nn.Module, seed: int
) -> dict[str, torch.nn.Module]:
    """What ``extend`` makes for ``base``, drawn from ``seed``. Leaves torch's random numbers as they are.

    Raises UserError where it is no module, or has the name of something that the model has, and where it freezes
    weights, which checkpoints of whole models would lack.
    """
    trained = [parameter.requires_grad for parameter in base.parameters()]
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(seed)
        parts = dict(extend())
    if trained != [parameter.requires_grad for parameter in base.parameters()]:
        raise UserError("task: `extend` froze parameters of the model. Leave them trained: `use_lora` freezes a model.")
    for name, part in parts.items():
        if not isinstance(part, torch.nn.Module) or hasattr(base, name) or "." in name:
            raise UserError(
                f"task: `extend` returned {name!r}, a {type(part).__name__}. Return modules, by names without dots that"
                f" {type(base).__name__} does not have."
            )
    return parts


@torch.no_grad()
def fill_parts(parts: Mapping[str, torch.nn.Module], stored: Weights, source: str) -> frozenset[str]:
    """Give ``parts`` the weights that are ``stored`` of them, and return the names of those that have some.

    Raises UserError where only some of a part's are there, or have other shapes.
    """
    found = set()
    for name, part in parts.items():
        state = {f"{name}.{key}": tensor for key, tensor in part.state_dict(keep_vars=True).items()}
        given = divided(stored, [name])[1]
        if not given:
            continue
        if any(key not in given or given[key].shape != tuple(tensor.shape) for key, tensor in state.items()):
            raise UserError(f"{source}: its tensors of {name!r}, which the task adds, have other names or shapes.")
        for key, tensor in state.items():
            tensor.copy_(given[key].read())
        found.add(name)
    return frozenset(found)
