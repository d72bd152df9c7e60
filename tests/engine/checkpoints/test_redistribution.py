"""A run that goes on with other ranks, or under another ZeRO stage, goes where it would have gone."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import ZERO3_AT_ONCE
from launching import exported_weights
from launching import losses
from launching import train_many

from panda.configuration.options import RunOptions
from panda.engine.checkpoints.folders import Progress
from panda.engine.checkpoints.writing import load_checkpoint
from panda.engine.checkpoints.writing import save_checkpoint
from panda.engine.deepspeed_config import deepspeed_config
from panda.engine.engine import Engine
from panda.engine.parameter_layouts import read_layout
from panda.engine.processes import Processes
from panda.optim.layerwise import NVLamb
from panda.registry import UserError

SAMPLES_A_STEP, ACCUMULATION, STEPS, MIDDLE = 12, 2, 6, 3
RUN: tuple[object, ...] = (
    *("--arch", "llama-tiny", "--num_layers", 2, "--hidden_size", 32, "--intermediate_size", 48, "--num_heads", 2),
    *("--instruction_tuning_data_dir", "panda:data/sample/instruct", "--max_seq_length", 48, "--num_workers", 0),
    *(
        "--gradient_accumulation_steps",
        ACCUMULATION,
        "--lr_scheduler",
        "cosine",
        "--warmup_steps",
        2,
        "--learning_rate",
        0.003,
    ),
    *("--weight_decay", 0.5, "--weight_decay_on", "matrices", "--max_grad_norm", 0.5),
    *("--max_steps", STEPS, "--save_steps", MIDDLE, "--prompts", "a"),
)
OPTIMIZERS = ("adamw", "nvlamb")
MOVES = [  # ranks and ZeRO stage, before and after; the folder of the run before is made once
    ((1, 0), (2, 1)),
    ((1, 0), (2, 3)),
    ((1, 2), (3, 2)),
    ((2, 1), (1, 0)),
    ((2, 1), (3, 1)),
    ((2, 2), (1, 3)),
    ((2, 3), (1, 1)),
    ((2, 3), (3, 3)),
    ((2, 3), (2, 2)),
    ((3, 2), (2, 1)),  # three ranks share nothing evenly: the last one's part ends in padding
    ((3, 3), (1, 2)),
]


def flags(optimizer: str, place: tuple[int, int]) -> list[object]:
    ranks, stage = place
    micro = SAMPLES_A_STEP // (ACCUMULATION * ranks)
    more = ["--deepspeed_config", "zero3.json"] if stage == 3 else []
    return [*RUN, "--optimizer", optimizer, "--zero_stage", stage, "--per_gpu_train_batch_size", micro, *more]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of each optimizer without a break, runs to the middle, and runs that go on from those elsewhere."""
    folder = tmp_path_factory.mktemp("redistribution")
    zero = {**ZERO3_AT_ONCE, "sub_group_size": 5000}  # several sub-groups: each has a step of its own
    (folder / "zero3.json").write_text(json.dumps({"zero_optimization": zero}))
    runs: dict[int, list[list[object]]] = {1: [], 2: [], 3: []}
    for optimizer in OPTIMIZERS:
        runs[1].append([*flags(optimizer, (1, 0)), "--output_dir", folder / f"{optimizer}-whole"])
        for before in dict.fromkeys(before for before, _ in MOVES):
            runs[before[0]].append([*flags(optimizer, before), "--output_dir", folder / name(optimizer, before)])
    for ranks, some in runs.items():
        train_many(some, ranks=ranks, cwd=folder)
    for ranks in (1, 2, 3):
        train_many(
            [
                [
                    *flags(optimizer, after),
                    *("--output_dir", folder / name(optimizer, before, after)),
                    *("--resume", folder / name(optimizer, before) / f"checkpoints/step-{MIDDLE:08d}"),
                ]
                for optimizer, (before, after) in itertools.product(OPTIMIZERS, MOVES)
                if after[0] == ranks
            ],
            ranks=ranks,
            cwd=folder,
        )
    return folder


def name(optimizer: str, *places: tuple[int, int]) -> str:
    return "-".join([optimizer, *(f"{ranks}x{stage}" for ranks, stage in places)])


@pytest.mark.parametrize(("before", "after"), MOVES)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_other_ranks_and_stages_go_on_as_one_process_without_a_break(
    folder: Path, optimizer: str, before: tuple[int, int], after: tuple[int, int]
) -> None:
    whole, moved = folder / f"{optimizer}-whole", folder / name(optimizer, before, after)
    assert losses(moved) == pytest.approx(losses(whole)[MIDDLE:], rel=1e-6)
    expected, found = exported_weights(whole), exported_weights(moved)
    for key, weight in expected.items():
        assert (found[key] - weight).norm() <= 1e-6 * weight.norm(), key


class Counting(torch.nn.Module):
    """A buffer that training changes."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen += len(x)
        return x


def make_engine(processes: Processes, stage: int, precision: str, kind: str = "nvlamb") -> Engine:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 7), Counting(), torch.nn.Linear(7, 3))
    decayed = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    others = [parameter for parameter in model.parameters() if parameter.dim() < 2]
    groups = [{"params": decayed, "weight_decay": 0.5}, {"params": others, "weight_decay": 0.0}]
    optimizer = {"nvlamb": NVLamb, "adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}[kind](groups, lr=0.01)
    options = RunOptions(gradient_accumulation_steps=1, zero_stage=stage, precision=precision)  # type: ignore[arg-type]
    return Engine(model, optimizer, deepspeed_config(options, world_size=1, on_gpu=False), processes)


class Batch:
    tokens = units = 4
    idle = False

    def to(self, device: torch.device) -> Batch:
        return self


def loss_sum(model: Any, batch: Batch) -> torch.Tensor:
    result: torch.Tensor = model(torch.randn(4, 5).to(next(model.parameters()).dtype)).float().square().sum()
    return result


def everything(engine: Engine) -> dict[str, torch.Tensor]:
    """Master weights and state of each parameter, and buffers, by name."""
    _, tensors = read_layout(engine.module, engine.optimizer)
    found: dict[str, torch.Tensor] = dict(engine.module.named_buffers())
    for layout in tensors:
        held = {"master": layout.tensor.detach(), **engine.own_optimizer.state[layout.tensor]}
        for segment in layout.segments:
            for key, value in held.items():
                whole = not torch.is_tensor(value) or value.dim() == 0
                found[f"{layout.parameters[segment.parameter]} {key}"] = (
                    torch.as_tensor(value)
                    if whole
                    else value.reshape(-1)[segment.start : segment.start + segment.length].clone()
                )
    return found


@pytest.mark.parametrize("kind", ["nvlamb", "adamw"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_every_wrapper_gives_and_takes_masters_and_moments_to_the_bit(
    processes: Processes, tmp_path: Path, precision: str, kind: str
) -> None:
    for before, after in [(0, 1), (1, 2), (2, 3), (3, 0), (1, 3), (3, 1)]:
        engine = make_engine(processes, before, precision, kind)
        for _ in range(3):
            engine.step([Batch()], loss_sum)
        saved = save_checkpoint(engine, tmp_path / f"{before}-{after}", Progress(3), {})
        expected = everything(engine)
        other = make_engine(processes, after, precision, kind)
        load_checkpoint(other, saved)
        found = everything(other)
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            assert torch.equal(found[key], value), (before, after, key)
        weights = [{key: tensor.read() for key, tensor in each.weights().items()} for each in (engine, other)]
        assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


def test_every_wrapper_goes_on_with_the_loss_scale_of_fp16(
    processes: Processes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DeepSpeed takes fp16 for missing on a CPU; torch has it."""
    from deepspeed.accelerator import get_accelerator

    def loss_scaler(engine: Engine) -> Any:
        return getattr(engine.optimizer, "loss_scaler", None) or engine.optimizer.loss_scale_config

    monkeypatch.setattr(get_accelerator(), "is_fp16_supported", lambda: True)
    for before, after in [(0, 1), (1, 3), (3, 0), (2, 3)]:
        engine = make_engine(processes, before, "fp16")
        for _ in range(3):
            engine.step([Batch()], loss_sum)
        held = {"cur_scale": 256.0, "cur_iter": 1700, "last_overflow_iter": 1250}
        vars(loss_scaler(engine)).update(held)
        saved = save_checkpoint(engine, tmp_path / f"{before}-{after}", Progress(3), {})
        other = make_engine(processes, after, "fp16")
        assert not load_checkpoint(other, saved)
        assert {key: getattr(loss_scaler(other), key) for key in held} == held, (before, after)
        assert other.step([Batch()], loss_sum).applied


def test_a_checkpoint_that_does_not_say_what_lies_where_needs_the_ranks_that_it_had(
    processes: Processes, tmp_path: Path
) -> None:
    engine = make_engine(processes, 1, "fp32")
    engine.step([Batch()], loss_sum)
    saved = save_checkpoint(engine, tmp_path, Progress(1), {})
    (saved / "layout-00000.json").unlink()
    with pytest.raises(UserError, match=r"layout-00000\.json is missing"):
        load_checkpoint(make_engine(processes, 2, "fp32"), saved)
    with pytest.raises(UserError, match="the same number of ranks, ZeRO stage"):
        load_checkpoint(make_engine(processes, 2, "fp32"), saved, is_checked=True)


def test_another_model_and_state_that_cannot_be_cut_are_told(processes: Processes, tmp_path: Path) -> None:
    engine = make_engine(processes, 1, "fp32")
    engine.step([Batch()], loss_sum)
    saved = save_checkpoint(engine, tmp_path, Progress(1), {})
    layout = json.loads((saved / "layout-00000.json").read_text())
    layout["tensors"][0]["segments"][0][2] -= 1
    (saved / "layout-00000.json").write_text(json.dumps(layout))
    with pytest.raises(UserError, match=r"lacks part of 0\.weight"):
        load_checkpoint(make_engine(processes, 2, "fp32"), saved, is_checked=True)

    engine = make_engine(processes, 0, "fp32", "adamw")
    engine.step([Batch()], loss_sum)
    for kind, value in {"blocks": torch.zeros(2), "bytes": torch.zeros(35, dtype=torch.uint8), "more": {}}.items():
        for state in engine.own_optimizer.state.values():
            state[kind] = value
        saved = save_checkpoint(engine, tmp_path / kind, Progress(1), {})
        with pytest.raises(UserError, match=f"{kind} of this optimizer does not have one number per element"):
            load_checkpoint(make_engine(processes, 1, "fp32", "adamw"), saved)
        for state in engine.own_optimizer.state.values():
            del state[kind]
