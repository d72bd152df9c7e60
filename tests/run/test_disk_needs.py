"""A run that has no room for what it writes is refused before its first step, with figures."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from panda.configuration.arguments import parse_arguments
from panda.configuration.configure import configure
from panda.engine.processes import Processes
from panda.registry import UserError
from panda.run import beginning
from panda.run import outlook
from panda.run.disk_needs import DiskNeeds
from panda.run.disk_needs import check_disk
from panda.run.disk_needs import disk_needs
from panda.runner import train

RUN = (
    *("--arch", "llama-tiny", "--num_layers", "1", "--hidden_size", "128", "--intermediate_size", "256"),
    *("--instruction_tuning_data_dir", "panda:data/sample/instruct", "--max_seq_length", "16", "--num_workers", "0"),
    *("--gradient_accumulation_steps", "1", "--max_steps", "2", "--save_steps", "1", "--prompts", "a"),
    *("-p", "no:plot", "-p", "no:tensorboard"),
)


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> Any:
    """``free(bytes)``: what the disk has from now on."""
    return lambda size: monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=size))


@pytest.mark.parametrize("more", [(), ("--precision", "bf16"), ("--zero_stage", "1")])
def test_what_a_run_writes_is_estimated(
    processes: Processes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: tuple[str, ...]
) -> None:
    found: list[DiskNeeds] = []
    monkeypatch.setattr(beginning, "disk_needs", lambda *given: found.append(disk_needs(*given)) or found[0])
    train(configure(parse_arguments([*RUN, *more, "--output_dir", str(tmp_path / "run")])))
    [needs] = found
    checkpoint = sum(f.stat().st_size for f in (tmp_path / "run/checkpoints/step-00000002").glob("*states.pt"))
    export = (tmp_path / "run/export/model.safetensors").stat().st_size
    assert needs.checkpoint == pytest.approx(checkpoint, rel=0.06)
    assert needs.export == pytest.approx(export, rel=0.02)
    assert (needs.lasting, needs.saves) == (2, 2)
    small = sum(f.stat().st_size for f in (tmp_path / "run").rglob("*") if f.is_file())
    for name in ("*states.pt", "random-*", "model.safetensors"):
        small -= sum(f.stat().st_size for f in (tmp_path / "run").rglob(name))
    assert small < needs.small < small + 80_000  # each takes whole blocks of the disk


def test_a_run_without_room_is_refused_before_its_first_step(processes: Processes, tmp_path: Path, free: Any) -> None:
    free(1000)
    message = (
        r"output_dir: .*run has room for 0.0 MB, and the run takes 5.7 MB: a checkpoint takes about 2.8 MB, each before"
        r" the last one is removed, the export about 0.9 MB, and other files 0.1 MB"
    )
    with pytest.raises(UserError, match=message):
        train(configure(parse_arguments([*RUN, "--output_dir", str(tmp_path / "run")])))
    assert not (tmp_path / "run").exists()
    (tmp_path / "run").mkdir()  # from which others may be removed first
    with pytest.raises(UserError, match=message):
        train(configure(parse_arguments([*RUN, "--output_dir", str(tmp_path / "run")])))
    assert not (tmp_path / "run/metrics.jsonl").exists() and not (tmp_path / "run/checkpoints").exists()


def test_a_run_without_room_is_refused_before_its_weights(
    processes: Processes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: Any
) -> None:
    monkeypatch.setattr("panda.runner.trained_model", None)  # not called
    free(1000)
    with pytest.raises(UserError, match=r"the run takes 5\.7 MB"):
        train(configure(parse_arguments([*RUN, "--output_dir", str(tmp_path / "run")])))


@pytest.mark.parametrize("more", [(), ("--use_lora", "true")], ids=["", "lora"])
def test_before_there_are_weights_it_is_estimated_alike(
    processes: Processes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: tuple[str, ...]
) -> None:
    found: list[DiskNeeds] = []
    for module in (outlook, beginning):
        monkeypatch.setattr(module, "disk_needs", lambda *given: found.append(disk_needs(*given)) or found[-1])
    train(configure(parse_arguments([*RUN, *more, "--output_dir", str(tmp_path / "run")])))
    before, after = found
    assert before == after


def test_room_for_fewer_checkpoints_than_are_kept_is_noted(tmp_path: Path, free: Any) -> None:
    needs = DiskNeeds(94 * 10**9, 13 * 10**9, lasting=10, saves=10)
    free(900 * 10**9)
    assert "the run keeps 10 checkpoints of about 94.0 GB each" in (check_disk(tmp_path, needs) or "")
    free(953 * 10**9)
    assert check_disk(tmp_path, needs) is None
    free(107 * 10**9 - 1)
    with pytest.raises(UserError, match=r"has room for 107.0 GB, and the run takes 188.0 GB: a checkpoint takes about"):
        check_disk(tmp_path, needs)
    free(13 * 10**9)
    assert check_disk(tmp_path, DiskNeeds(0, 13 * 10**9, lasting=0, saves=0)) is None


def test_a_checkpoint_is_written_before_the_last_one_is_removed(tmp_path: Path, free: Any) -> None:
    one, several = DiskNeeds(90, 10, lasting=1, saves=1, small=5), DiskNeeds(90, 10, lasting=1, saves=3, small=5)
    assert (one.least, one.most, several.least, several.most) == (105, 105, 185, 185)
    assert DiskNeeds(90, 200, lasting=1, saves=3).most == 290  # the export comes when the older one is gone
    assert DiskNeeds(90, 10, lasting=3, saves=4).most == 360
    free(104)
    with pytest.raises(UserError, match="the run takes"):
        check_disk(tmp_path, one)
    free(105)
    assert check_disk(tmp_path, one) is None
    with pytest.raises(UserError, match="each before the last one is removed"):
        check_disk(tmp_path, several)
