"""The table and the trace of ``--profile``, which change nothing of the run."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from typing import cast

import pytest
import torch
from launching import metrics
from launching import run_panda

from panda.hooks.profile import Kernel
from panda.hooks.profile import Profile
from panda.hooks.profile import ProfileOptions
from panda.hooks.profile import device_time
from panda.hooks.profile import kernels_of

SMALL = (
    *("--arch", "llama-tiny", "--num_layers", 2, "--hidden_size", 32, "--intermediate_size", 48, "--num_heads", 2),
    *("--instruction_tuning_data_dir", "panda:data/sample/instruct", "--max_seq_length", 48, "--num_workers", 0),
    *("--per_gpu_train_batch_size", 3, "--gradient_accumulation_steps", 2, "--save_final", "false"),
)


def test_it_shows_the_parts_of_a_step_and_leaves_the_run_as_it_is(tmp_path: Path) -> None:
    for name, flags in {"plain": (), "profiled": ("--profile", "--profile_after", 1, "--profile_steps", 2)}.items():
        run = tmp_path / name
        done = run_panda("panda-train", *SMALL, "--max_steps", 4, *flags, "--output_dir", run, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    losses = [[record["loss"] for record in metrics(tmp_path / name)] for name in ("plain", "profiled")]
    assert losses[0] == losses[1]
    assert {file.name for file in (run / "profile").iterdir()} == {"parts-step3.txt", "trace-step3.json.gz"}

    table = (run / "profile" / "parts-step3.txt").read_text()
    assert table in done.stdout
    parts, operations = (part.splitlines() for part in table.strip().split("\n\n"))
    taken = {line[:24].strip(): float(line[24:34]) for line in parts[1:]}
    assert list(taken) == ["between steps", "counts", "forward", "backward", "optimizer", "whole step"]
    assert sum(list(taken.values())[:-1]) == pytest.approx(taken["whole step"], abs=0.03)
    assert taken["forward"] > 0.2 and taken["backward"] > 0.2
    products = next(line for line in operations if line.endswith(" aten::mm"))
    # 2 micro batches; 2 layers of 7 products and the head's, each once forward and twice backward.
    assert int(products.split()[2]) == 2 * (2 * 7 + 1) * 3

    trace = json.loads(gzip.decompress((run / "profile" / "trace-step3.json.gz").read_bytes()))
    assert sum(event.get("name") == "Optimizer.step#AdamW.step" for event in trace["traceEvents"]) == 2


def test_a_run_that_is_too_short_says_so(tmp_path: Path) -> None:
    done = run_panda(
        "panda-train", *SMALL, "--max_steps", 1, "--profile", "--output_dir", tmp_path / "run", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert "note: --profile needs 6 steps: this run is too short for it" in done.stdout
    assert not (tmp_path / "run" / "profile").exists()


@pytest.mark.parametrize(("total_steps", "begins"), [(5, False), (6, True)])
def test_nothing_is_profiled_where_the_steps_do_not_suffice(total_steps: int, begins: bool) -> None:
    profile = Profile(ProfileOptions(), cast(Any, None))
    begun: list[Any] = []
    profile._begin = begun.append  # type: ignore[method-assign]
    run: Any = SimpleNamespace(step=0, processes=SimpleNamespace(rank=0), plan=SimpleNamespace(total_steps=total_steps))
    profile.panda_run_start(run)
    for step in range(1, total_steps + 1):
        profile.panda_step_end(run, step)
    assert bool(begun) == begins


def test_the_time_of_the_device_is_what_it_computes_only_exchanges_and_waits() -> None:
    kernels = [
        Kernel("product", 1.0, 3.0),
        Kernel("ncclDevKernel_AllGather", 2.5, 4.0),  # half a second of it is hidden
        Kernel("product", 6.0, 7.0),
        Kernel("copy", 6.5, 8.0),  # on another stream
    ]
    assert dict(device_time(kernels, 10.0)) == {"computes": 4.0, "only exchanges": 1.0, "is idle": 5.0}
    assert dict(device_time([], 1.0)) == {"computes": 0.0, "only exchanges": 0.0, "is idle": 1.0}


def test_ranges_around_kernels_are_no_kernels() -> None:
    from torch._C._autograd import DeviceType

    def event(name: str, device: DeviceType, annotation: bool) -> Any:
        return SimpleNamespace(
            name=lambda: name,
            start_ns=lambda: 1_000_000_000,
            duration_ns=lambda: 500_000_000,
            device_type=lambda: device,
            is_user_annotation=lambda: annotation,
        )

    events = [
        event("product", DeviceType.CUDA, False),
        event("nccl:all_gather", DeviceType.CUDA, True),
        event("aten::mm", DeviceType.CPU, False),
    ]
    results = SimpleNamespace(events=lambda: events)
    profiler: Any = SimpleNamespace(profiler=SimpleNamespace(kineto_results=results))
    assert kernels_of(profiler) == [Kernel("product", 1.0, 1.5)]


def test_the_profiler_of_torch_has_what_is_read_of_it() -> None:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        torch.ones(2) @ torch.ones(2)
    results: Any = profiler.profiler.kineto_results
    for event in results.events():
        assert event.duration_ns() >= 0 and event.start_ns() > 0 and not event.is_user_annotation(), event.name()
    assert kernels_of(profiler) == []
