"""A schedule is tried over the steps of a run before anything else is built."""

from __future__ import annotations

from typing import Any

import pytest
import torch  # noqa: F401 - in VALUES
from distributions import Distributions

from panda.configuration.arguments import parse_arguments
from panda.configuration.configure import configure
from panda.optim.schedules import MOST_TRIED
from panda.optim.schedules import steps_to_try
from panda.registry import UserError
from panda.run.assembly import build_schedule

WRONG = """
import torch

@register_lr_scheduler("wrong")
def wrong(options, context):
    'Wrong at its last step.'
    values = {VALUES}
    return lambda completed: 1.0 if completed + 1 < context.total_steps else values[context.total_steps % 10]
"""
VALUES = "[-1e-9, float('nan'), float('inf'), None, '1', 1j, 0, 2.5, True, torch.tensor(0.5)]"
COUNTING = """
@register_lr_scheduler("wrong")
def wrong(options, context):
    'Counts its calls.'
    calls = []
    return lambda completed: calls.append(completed) or len(calls) / 1e6
"""


def built(name: str, total: int) -> Any:
    resolved = configure(
        parse_arguments(["--arch", "llama-7b", "--lr_scheduler", name, "-p", "no:tensorboard"])
    ).resolved
    return build_schedule(resolved, total)


@pytest.mark.parametrize(("last", "is_right"), [(number, 6 <= number < 9) for number in range(10)])
def test_each_factor_is_a_number_that_is_not_negative(distributions: Distributions, last: int, is_right: bool) -> None:
    distributions.install("acme", {"lr_schedulers": {"wrong": "acme"}}, {"acme": WRONG.replace("{VALUES}", VALUES)})
    total = 1230 + last
    if is_right:
        assert built("wrong", total)(total - 1) is not None
        return
    with pytest.raises(
        UserError, match=rf"lr_scheduler 'wrong' at .*the step after 1,2{28 + last + 1} of 1,2\d\d"
    ) as e:
        built("wrong", total)
    assert "acme" in str(e.value) and str(eval(VALUES)[last]) in str(e.value)


def test_a_factor_follows_from_the_number_of_steps_alone(distributions: Distributions) -> None:
    """A schedule is asked by each rank, by this trial and by hooks: one that counts calls would give each another."""
    distributions.install("acme", {"lr_schedulers": {"wrong": "acme"}}, {"acme": COUNTING})
    with pytest.raises(UserError, match="returned 3e-06 for the step after 2, and 4e-06 when it was asked again"):
        built("wrong", 3)


def test_of_a_very_long_run_some_steps_are_tried_with_the_first_and_the_last() -> None:
    for total in (1, 7, MOST_TRIED, 10**9):
        tried = list(steps_to_try(total))
        assert len(tried) == min(total, MOST_TRIED) == len(set(tried))
        assert tried[0] == 0 and tried[-1] == total - 1 and tried == sorted(tried)


@pytest.mark.parametrize("name", ["warmup", "constant", "linear", "cosine", "wsd", "poly"])
@pytest.mark.parametrize("total", [1, 3, 1000])
def test_those_of_panda_pass(name: str, total: int) -> None:
    built(name, total)
