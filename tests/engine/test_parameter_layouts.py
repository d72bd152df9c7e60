"""What is read from DeepSpeed's wrappers is checked before it is believed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from panda.configuration.options import RunOptions
from panda.engine.deepspeed_config import deepspeed_config
from panda.engine.engine import Engine
from panda.engine.parameter_layouts import _check_cover
from panda.engine.parameter_layouts import layout_of
from panda.engine.processes import Processes
from panda.optim.layerwise import NVLamb
from panda.registry import UserError


def make_engine(processes: Processes, stage: int) -> tuple[torch.nn.Module, Engine]:
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 1))
    options = RunOptions(gradient_accumulation_steps=1, zero_stage=stage)
    optimizer = NVLamb(module.parameters())
    return module, Engine(module, optimizer, deepspeed_config(options, world_size=1, on_gpu=False), processes)


def test_names_and_segments_are_those_of_the_module(processes: Processes) -> None:
    module, engine = make_engine(processes, 2)
    (described,) = layout_of(module, engine.optimizer, processes).tensors
    assert described.parameters == ("0.weight", "0.bias", "1.weight", "1.bias")
    assert [(s.parameter, s.start, s.length, s.source) for s in described.segments] == [
        (0, 0, 12, 0),
        (1, 12, 3, 0),
        (2, 15, 3, 0),
        (3, 18, 1, 0),
    ]
    engine.close()


def test_another_order_or_offset_is_seen(processes: Processes) -> None:
    module, engine = make_engine(processes, 2)
    for attribute, wrong in {
        "round_robin_bit16_groups": lambda parameters: [*parameters[::-1]],
        "round_robin_bit16_offsets": lambda offsets: [*offsets[:3], offsets[3] + 1],
    }.items():
        (right,) = getattr(engine.optimizer, attribute)
        setattr(engine.optimizer, attribute, [wrong(right)])
        with pytest.raises(RuntimeError, match="not the one that panda knows"):
            layout_of(module, engine.optimizer, processes)
        setattr(engine.optimizer, attribute, [right])
    engine.close()


@pytest.mark.parametrize(
    ("ranks", "complete"),
    [
        ([[("a", 0, 4)], [("a", 4, 2)]], True),
        ([[("a", 4, 2)], [("a", 0, 4)]], True),
        ([[("a", 0, 4)], []], False),  # an end is missing
        ([[("a", 0, 3)], [("a", 4, 2)]], False),  # a gap
        ([[("a", 0, 5)], [("a", 4, 2)]], False),  # twice
        ([[], []], False),
    ],
)
def test_each_element_has_to_be_held_once(ranks: list[list[tuple[str, int, int]]], complete: bool) -> None:
    module = torch.nn.ParameterDict({"a": torch.nn.Parameter(torch.zeros(6))})
    everyone = [[(("a",), tuple((name, 0, length, source) for name, source, length in held))] for held in ranks]
    if complete:
        _check_cover(module, everyone)
    else:
        with pytest.raises(RuntimeError, match="a: DeepSpeed's optimizer does not hold each of its elements once"):
            _check_cover(module, everyone)


def test_ranks_have_to_step_the_same_parameters_together() -> None:
    module = torch.nn.ParameterDict({"a": torch.nn.Parameter(torch.zeros(6))})
    with pytest.raises(RuntimeError, match="other parameters together"):
        _check_cover(module, [[(("a",), (("a", 0, 6, 0),))], [(("a", "b"), ())]])


def test_a_wrapper_that_is_not_known_is_refused(processes: Processes) -> None:
    with pytest.raises(UserError, match=r"a SimpleNamespace, which panda does not know"):
        layout_of(torch.nn.Linear(1, 1), SimpleNamespace(), processes)


def test_a_mixture_of_experts_is_refused(processes: Processes) -> None:
    module, engine = make_engine(processes, 2)
    engine.optimizer.has_moe_layers = True
    with pytest.raises(UserError, match="experts of a mixture"):
        layout_of(module, engine.optimizer, processes)
    engine.close()


def test_masters_in_16_bits_are_refused(processes: Processes) -> None:
    module: Any = torch.nn.Linear(2, 2).bfloat16()
    with pytest.raises(UserError, match="master weights in fp32"):
        layout_of(module, NVLamb(module.parameters()), processes)
