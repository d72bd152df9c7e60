"""As much of a run as panda's own lifecycle plugins look at, and records to give them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from panda.data.order import BatchPlan
from panda.data.order import SampleOrder
from panda.data.packing import Layout
from panda.data.token_dataset import SampleBlock
from panda.data.token_dataset import TokenDataset
from panda.run.state import Run


class _Run(SimpleNamespace):
    newest_checkpoint = Run.newest_checkpoint


MakeRun = Callable[..., Any]


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    """``make_run(step=3, rank=1)``: a run in one directory, whatever its step."""

    def make(step: int = 0, rank: int = 0, resumed_from: Path | None = None) -> Any:
        block = SampleBlock()
        for _ in range(1234):
            block.add([1, 5, 6, 2], bytes([0, 0, 1, 1]))
        dataset = TokenDataset.of(block)
        plan = BatchPlan(samples=1234, micro_batch=2, accumulation=4, ranks=2, epochs=1, max_steps=10)
        directory = tmp_path / "my-run"
        directory.mkdir(exist_ok=True)
        (directory / "config.yaml").write_text("seed: 42\n")
        return _Run(
            directory=directory,
            processes=SimpleNamespace(rank=rank, world_size=2, device=torch.device("cpu")),
            dataset=dataset,
            task=SimpleNamespace(shown=(), unit="supervised_tokens"),
            plan=plan,
            layout=Layout(dataset, SampleOrder(dataset.sources, seed=1), plan, "padded", 16),
            evaluations={},
            resumed_from=resumed_from,
            resolved=SimpleNamespace(core=SimpleNamespace(user_dir=None), lasting={}),
            step=step,
            begun=time.perf_counter(),
            answers=[],
            checkpoints=[],
            schedule=lambda completed: 1.0,
            observations={},
            evaluation_is_recorded=False,
            engine=SimpleNamespace(optimizer_observes=True),
        )

    return make


@pytest.fixture
def record() -> Callable[..., dict[str, Any]]:
    """``record(step)``: what is logged at a step."""

    def make(step: int, loss: float | None = None, **more: float) -> dict[str, Any]:
        return {
            **more,
            "step": step,
            "loss": 5.5 * math.exp(-step / 30) + 0.1 * math.sin(step) + 0.2 if loss is None else loss,
            "learning_rate": 1e-3 * min(1, step / 20),
            "grad_norm": 1.25,
            "tokens": 100 * step,
            "supervised_tokens": 40 * step,
            "tokens_per_second": 12345.6,
            "step_seconds": 0.25,
            "data_wait": 0.01,
        }

    return make


@pytest.fixture
def evaluation() -> Callable[..., dict[str, Any]]:
    """``evaluation(step)``: the record of an evaluation."""

    def make(step: int, loss: float = 1.5) -> dict[str, Any]:
        return {"step": step, "eval_loss": loss, "eval_tokens": 9, "eval_supervised_tokens": 4, "eval_seconds": 0.25}

    return make
