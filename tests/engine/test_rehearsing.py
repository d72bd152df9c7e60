"""A step that is rehearsed leaves nothing: the steps after it are those of a run without it, to the bit."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from launching import EVERY_WAY
from launching import run_script

from panda.configuration.options import RunOptions
from panda.engine.deepspeed_config import deepspeed_config
from panda.engine.engine import Engine
from panda.engine.processes import Processes
from panda.engine.rehearsing import rehearse
from panda.engine.rehearsing import what_forbids

ALL = [
    (precision, stage, offload)
    for precision, stage, offload in itertools.product(("fp32", "bf16", "fp16"), range(4), ("", "offload"))
    # panda refuses fp16 without ZeRO, and DeepSpeed offloads only with it.
    if (stage or not offload) and not (precision == "fp16" and stage == 0)
]
SOME = [
    *(("fp32", stage, "") for stage in range(4)),
    *(("bf16", stage, "") for stage in range(4)),
    *[
        ("fp32", 2, "offload"),
        ("bf16", 1, "offload"),
        ("bf16", 2, "offload"),
        ("bf16", 3, "offload"),
        ("fp16", 1, ""),
        ("fp16", 3, ""),
    ],
]
WAYS = ALL if EVERY_WAY else SOME


@pytest.fixture(scope="module", params=[1, 2], ids=["one rank", "two ranks"])
def found(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[object, ...], list[list[str]]]:
    """By way, what is not as without a rehearsal on each rank."""
    script, folder = Path(__file__).with_name("rehearsed_steps.py"), tmp_path_factory.mktemp("rehearsed")
    printed = run_script(script, json.dumps(WAYS), ranks=request.param, cwd=folder)
    lines = (json.loads(line) for line in printed.splitlines() if line.startswith('["'))
    return {tuple(way): problems for *way, problems in lines if isinstance(problems, list)}


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_nothing_is_left_of_what_is_rehearsed(
    found: dict[tuple[object, ...], list[list[str]]], way: tuple[object, ...]
) -> None:
    assert [problem for of_rank in found[way] for problem in of_rank] == []


class Batch:
    tokens = units = 2
    idle = False

    def to(self, device: torch.device) -> Batch:
        return self


@pytest.mark.parametrize(("precision", "zero_stage"), [("fp32", 0), ("bf16", 0), ("bf16", 1), ("bf16", 2), ("bf16", 3)])
def test_memory_for_states_is_held_until_there_are_some(
    processes: Processes, monkeypatch: pytest.MonkeyPatch, precision: Any, zero_stage: int
) -> None:
    model = torch.nn.Linear(64, 16, bias=False)
    options = RunOptions(precision=precision, zero_stage=zero_stage)
    config = deepspeed_config(options, world_size=1, on_gpu=False)
    engine, held, plain = Engine(model, torch.optim.AdamW(model.parameters()), config, processes), [], torch.empty

    def empty(*shape: Any, **keywords: Any) -> torch.Tensor:
        held.extend(shape if keywords.get("dtype") == torch.uint8 else ())
        return plain(*shape, **keywords)

    def loss_sum(module: Any, batch: Batch) -> torch.Tensor:
        result: torch.Tensor = module(torch.ones(2, 64).to(next(module.parameters()))).float().sum()
        return result

    monkeypatch.setattr(torch, "empty", empty)
    for _ in range(2):
        rehearse(engine, [Batch()], loss_sum, state_bytes=8.0)
        engine.step([Batch()], loss_sum)
    assert (held[0], held[-1]) == (8 * 64 * 16, 0)  # between them those of messages between ranks


def test_what_cannot_be_undone_is_not_rehearsed() -> None:
    optimizer = torch.optim.SGD([torch.zeros(1)])
    plain: Any = SimpleNamespace(judges=True, config={"zero_optimization": {"stage": 0}}, optimizer=optimizer)
    assert what_forbids(plain) == ""
    on_disk = {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme"}}}
    others: list[tuple[dict[str, Any], str]] = [
        ({"judges": False}, "ZenFlow"),
        ({"config": on_disk}, "NVMe"),
        ({"optimizer": SimpleNamespace()}, "SimpleNamespace"),
    ]
    for change, why in others:
        assert why in what_forbids(SimpleNamespace(**(vars(plain) | change)))  # type: ignore[arg-type]
