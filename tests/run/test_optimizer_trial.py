"""An optimizer of a package is looked at when it is made: whether it has all parameters, and what it declares."""

from __future__ import annotations

import pytest
import torch
from distributions import Distributions

from panda.configuration.arguments import parse_arguments
from panda.configuration.configure import configure
from panda.registry import UserError
from panda.run.assembly import build_optimizer

OPTIMIZERS = """
import torch

def made(groups, lr=1.0):
    return torch.optim.SGD(groups, lr=lr)

@register_optimizer("whole")
def whole(options, context):
    return made([{**group, "lr": 1e-3} for group in reversed(context.param_groups)])

@register_optimizer("part")
def part(options, context):
    return made([{**group, "params": group["params"][:1]} for group in context.param_groups])

@register_optimizer("copies")
def copies(options, context):
    clone = lambda p: p.detach().clone().requires_grad_()
    return made([{**group, "params": [clone(p) for p in group["params"]]} for group in context.param_groups])

@register_optimizer("unbound", needs="norms")
def unbound(options, context):
    return made(context.param_groups)
"""


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("whole", None),
        ("part", r"was given 4 parameters, of which its optimizer leaves out 2; it has 0 others.* a fault of acme 1.0"),
        ("copies", r"was given 4 parameters, of which its optimizer leaves out 4; it has 4 others"),
        ("unbound", r"declares needs='norms', and its optimizer has no method `bind`.* a fault of acme 1.0"),
    ],
)
def test_what_an_optimizer_has_to_have(distributions: Distributions, name: str, said: str | None) -> None:
    names = dict.fromkeys(("whole", "part", "copies", "unbound"), "acme")
    distributions.install("acme", {"optimizers": names}, {"acme": OPTIMIZERS})
    resolved = configure(parse_arguments(["--arch", "llama-7b", "--optimizer", name, "-p", "no:tensorboard"])).resolved
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    if said is None:
        assert len(build_optimizer(resolved, model, torch.device("cpu")).param_groups) == 2
        return
    with pytest.raises(UserError, match=said):
        build_optimizer(resolved, model, torch.device("cpu"))
