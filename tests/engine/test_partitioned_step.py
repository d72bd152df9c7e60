"""A step under ZeRO-3 with few calls is DeepSpeed's own, to the bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from panda.configuration.options import RunOptions
from panda.engine import engine as engines
from panda.engine.deepspeed_config import deepspeed_config
from panda.engine.engine import Engine
from panda.engine.processes import Processes

LAYERS = 3


class Batch:
    tokens = units = 4
    idle = False

    def __init__(self, values: torch.Tensor) -> None:
        self.values = values

    @property
    def real(self) -> torch.Tensor:
        return torch.ones(4)

    def to(self, device: torch.device) -> Batch:
        return self


def loss_sum(module: Any, batch: Batch) -> torch.Tensor:
    result: torch.Tensor = module(batch.values).square().sum()
    return result


class Marked(torch.optim.AdamW):
    """Not torch's own."""


def engine_of(
    processes: Processes, kind: type[torch.optim.AdamW] = torch.optim.AdamW, sub_group_size: int = 10**9
) -> Engine:
    torch.manual_seed(0)
    module = torch.nn.Sequential(*(torch.nn.Linear(8, 8) for _ in range(LAYERS)))
    optimizer = kind(
        [{"params": list(layer.parameters()), "lr": 0.1 / (place + 1)} for place, layer in enumerate(module)]
    )
    options = RunOptions(precision="fp32", zero_stage=3, gradient_accumulation_steps=1, max_grad_norm=0.5)
    config = deepspeed_config(options, world_size=1, on_gpu=False)
    config["zero_optimization"]["sub_group_size"] = sub_group_size
    return Engine(module, optimizer, config, processes)


def trained(engine: Engine, steps: int = 4) -> list[Any]:
    """Norms, whether steps were taken, and weights; the third step has a gradient that is not finite."""
    found: list[Any] = []
    for step in range(steps):
        values = torch.randn(4, 8, generator=torch.Generator().manual_seed(step))
        result = engine.step([Batch(values * (float("inf") if step == 2 else 1))], loss_sum)
        found += [float(result.grad_norm), result.applied]
    weights = {name: stored.read() for name, stored in engine.weights().items()}
    return [*found, {name: weight.tolist() for name, weight in weights.items()}]


@pytest.mark.parametrize("sub_group_size", [10**9, 50])
def test_norms_and_weights_are_those_of_deepspeed_to_the_bit(
    processes: Processes, monkeypatch: pytest.MonkeyPatch, sub_group_size: int
) -> None:
    engine = engine_of(processes, sub_group_size=sub_group_size)
    here = trained(engine)
    engine.close()
    monkeypatch.setattr(engines, "step_with_few_calls", lambda optimizer: None)
    engine = engine_of(processes, sub_group_size=sub_group_size)
    assert here == trained(engine)
    assert here[1::2][:4] == [True, True, False, True]
    engine.close()


@pytest.mark.parametrize(("kind", "groups"), [(torch.optim.AdamW, 1), (Marked, LAYERS)])
def test_torchs_optimizers_see_one_group_at_a_time(
    processes: Processes, kind: type[torch.optim.AdamW], groups: int
) -> None:
    engine = engine_of(processes, kind)
    seen: list[int] = []
    engine.own_optimizer.register_step_pre_hook(lambda own, *_: seen.append(len(own.param_groups)))
    trained(engine, steps=1)
    assert seen == [groups] * LAYERS
    assert len(engine.own_optimizer.param_groups) == LAYERS
    engine.close()


def test_a_step_that_fails_leaves_all_groups(processes: Processes) -> None:
    engine = engine_of(processes)

    def fail(*_: Any) -> None:
        raise RuntimeError("here")

    handle = engine.own_optimizer.register_step_pre_hook(fail)
    with pytest.raises(RuntimeError, match="here"):
        trained(engine, steps=1)
    handle.remove()
    assert [group["params"] for group in engine.own_optimizer.param_groups] == [[]] * LAYERS
    engine.close()


def test_shards_that_were_moved_have_their_places_after_a_step(processes: Processes) -> None:
    engine = engine_of(processes)
    expected = trained(engine, steps=2)
    engine.close()
    engine = engine_of(processes)
    shards = engine.optimizer.fp16_partitioned_groups
    shards[1][1].data = shards[1][1].clone()
    assert trained(engine, steps=2) == expected
    flat = engine.optimizer.lp_param_buffer.untyped_storage().data_ptr()
    assert {shard.untyped_storage().data_ptr() for group in shards for shard in group} == {flat}
    engine.close()
