"""Ranks decide and fail together: none waits for one that has given up."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import BIN
from launching import run_script
from launching import start
from launching import zero3_at_once

from panda.engine.processes import _begin_alone
from panda.engine.processes import _set_allocator
from panda.engine.processes import own_device
from panda.registry import UserError

DECIDING = """
from panda.engine.processes import join_processes, leave_processes
from panda.registry import UserError

processes = join_processes()

def told():
    raise UserError("name another folder")

def outcome(decide, how=processes.from_rank_0):
    try:
        return how(decide)
    except Exception as error:
        return f"{type(error).__name__}: {error}" + "".join(f" ({note})" for note in getattr(error, "__notes__", ()))

def on(rank, fail):
    return lambda: fail() if processes.rank == rank else 7

found = [outcome(decide) for decide in (lambda: 7 + processes.rank, told, lambda: 1 / 0, lambda: "after")]
print(f"{processes.rank} {found}", flush=True)
tried = (told, on(1, told), on(0, lambda: 1 / 0), lambda: 1 / 0, lambda: "after")
found = [outcome(do, processes.together) for do in tried]
print(f"{processes.rank} together {found}", flush=True)
leave_processes()
"""


def test_what_rank_0_decides_or_fails_to_reaches_every_rank(tmp_path: Path) -> None:
    script = tmp_path / "deciding.py"
    script.write_text(DECIDING)
    printed = run_script(script, ranks=2, cwd=tmp_path)
    failed, named = "ZeroDivisionError: division by zero", "rank 0 failed: ZeroDivisionError('division by zero')"
    both = f"{failed} (ranks 0 and 1 failed: ZeroDivisionError('division by zero'))"
    told = "UserError: name another folder"
    for rank, third in enumerate([f"{failed} ({named})", f"AnotherRankError: {named}"]):
        assert f"{rank} {[7, told, third, 'after']}" in printed
        of_rank_1 = "UserError: rank 1: name another folder"
        assert f"{rank} together {[told, of_rank_1, third, both, 'after']}" in printed


@pytest.mark.parametrize(("started", "gpus"), [({"LOCAL_WORLD_SIZE": "4"}, "2 GPUs"), ({"LOCAL_RANK": "1"}, "1 GPU")])
def test_more_processes_than_gpus_are_refused_on_all_of_them(
    monkeypatch: pytest.MonkeyPatch, started: dict[str, str], gpus: str
) -> None:
    for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: int(gpus[0]))
    assert own_device() == torch.device("cuda", 0)
    for name, value in started.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(
        UserError, match=rf"{gpus} can be seen\. Start {gpus[0]} \(`torchrun --nproc_per_node {gpus[0]}`"
    ):
        own_device()


def test_a_machine_without_a_network_interface_is_told_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def begin(*arguments: Any, **options: Any) -> None:
        raise RuntimeError("[enforce fail at device.cc:212] ifa != nullptr. Unable to find interface for: [127.0.0.1]")

    monkeypatch.setattr(torch.distributed, "init_process_group", begin)
    with pytest.raises(UserError, match="ip link set lo up"):
        _begin_alone("gloo")


def test_more_ranks_than_gpus_are_tested_on_the_cpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    (tmp_path / "seen.py").write_text("import os\nprint(os.environ.get('CUDA_VISIBLE_DEVICES'))\n")
    for ranks, seen in ((1, "7"), (2, "")):
        printed = run_script(tmp_path / "seen.py", cwd=tmp_path, ranks=ranks, CUDA_VISIBLE_DEVICES="7")
        assert printed.splitlines() == [seen] * ranks


@pytest.mark.skipif(not hasattr(torch._C, "_accelerator_setAllocatorSettings"), reason="torch has only the older name")
def test_the_allocator_is_set_without_a_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _set_allocator("expandable_segments:False")


def test_zero_3_on_two_ranks_says_nothing_of_deprecated_collectives(tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text(json.dumps([{"input": "a" * length, "target": "b"} for length in range(1, 9)]))
    tiny = "--arch llama-tiny --num_layers 1 --hidden_size 16 --intermediate_size 24 --num_heads 2 --max_seq_length 32"
    run = "--instruction_tuning_data_dir rows.json --max_steps 1 --gradient_accumulation_steps 1 --save_final false"
    flags = [*tiny.split(), *run.split(), *zero3_at_once(tmp_path)]
    with start(BIN / "panda-train", *flags, cwd=tmp_path, ranks=2) as started:
        done = started.wait()
    assert done.returncode == 0, done.stderr
    assert "FutureWarning" not in done.stdout + done.stderr
