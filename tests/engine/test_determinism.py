"""`deterministic`: switched on for a run and off after it, recorded, and an operation that lacks it is an error."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from launching import BIN
from launching import exported_weights
from launching import losses
from launching import start
from launching import train_many

from panda.configuration.arguments import parse_arguments
from panda.configuration.configure import configure
from panda.engine.determinism import WORKSPACE
from panda.engine.determinism import deterministic
from panda.engine.processes import Processes
from panda.registry import UserError
from panda.runner import train
from panda.tasks.text_task import TextTask

RUN: tuple[object, ...] = (
    *("--arch", "llama-tiny", "--num_layers", 1, "--hidden_size", 32, "--intermediate_size", 48, "--num_heads", 2),
    *("--instruction_tuning_data_dir", "panda:data/sample/instruct", "--max_seq_length", 48, "--num_workers", 0),
    *("--gradient_accumulation_steps", 2, "--max_steps", 3, "--save_final", "false", "--prompts", "a"),
    *("--max_samples", 50, "--learning_rate", 0.003, "-p", "no:plot", "-p", "no:tensorboard"),
)


def switched() -> tuple[object, ...]:
    return (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.backends.cudnn.benchmark,
        torch.utils.deterministic.fill_uninitialized_memory,
        os.environ.get(WORKSPACE),
    )


def test_it_is_on_in_a_run_and_recorded(processes: Processes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, seen = switched(), []
    of_task = TextTask.loss

    def loss(self, module, batch):  # type: ignore[no-untyped-def]
        seen.append(switched())
        return of_task(self, module, batch)

    monkeypatch.setattr(TextTask, "loss", loss)
    for name, more in {"on": ["--deterministic"], "off": []}.items():
        seen.clear()
        train(configure(parse_arguments([*map(str, RUN), *more, "--output_dir", str(tmp_path / name)])))
        expected = (True, False, False, False, ":4096:8") if name == "on" else before
        assert set(seen) == {expected}
        assert switched() == before
    recorded = [json.loads((tmp_path / name / "provenance.json").read_text()) for name in ("on", "off")]
    assert recorded[0]["deterministic"]["algorithms"] is True
    assert recorded[0]["deterministic"][WORKSPACE] == ":4096:8"
    assert "deterministic" not in recorded[1]
    assert losses(tmp_path / "on") == losses(tmp_path / "off"), "on a CPU it changes nothing"


def test_what_torch_cannot_compute_alike_is_an_error_that_names_it() -> None:
    named = pytest.raises(UserError, match=r"^deterministic: torch .* cannot compute kthvalue CUDA to the same bits")
    with named, deterministic(True):
        raise RuntimeError("kthvalue CUDA does not have a deterministic implementation, but you set 'torch....")
    with pytest.raises(UserError, match="CUBLAS_WORKSPACE_CONFIG is"), deterministic(True):
        raise RuntimeError("... because it uses CuBLAS ... set CUBLAS_WORKSPACE_CONFIG=:4096:8")
    with pytest.raises(RuntimeError, match="another"), deterministic(True):
        raise RuntimeError("another")


def test_the_compiler_is_left_out_or_refused() -> None:
    assert configure(parse_arguments([*map(str, RUN), "--deterministic"])).resolved.core.compile is False
    with pytest.raises(UserError, match="deterministic with compile"):
        configure(parse_arguments([*map(str, RUN), "--deterministic", "--compile", "true"]))


def test_on_a_cpu_two_runs_give_the_same_bits(tmp_path: Path) -> None:
    """Without the key too, also on two ranks; each in processes of its own."""
    ways: dict[str, tuple[object, ...]] = {
        "lora": ("--use_lora", "--precision", "bf16"),
        "muon": ("--optimizer", "muon", "--zero_stage", 2),
        "packed": ("--batching", "packed", "--zero_stage", 3, "--deterministic"),
    }
    for number in (0, 1):
        train_many(
            [[*RUN, *way, "--output_dir", tmp_path / f"{name}-{number}"] for name, way in ways.items()],
            ranks=2,
            cwd=tmp_path,
        )
    for name in ways:
        first, second = tmp_path / f"{name}-0", tmp_path / f"{name}-1"
        assert losses(first) == losses(second), name
        if name != "lora":
            for key, weight in exported_weights(first).items():
                assert torch.equal(weight, exported_weights(second)[key]), (name, key)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("way", [(), ("--batching", "packed"), ("--use_lora",), ("--optimizer", "nvlamb")])
def test_on_a_gpu_two_runs_give_the_same_bits(tmp_path: Path, way: tuple[object, ...]) -> None:
    flags = [*map(str, (*RUN, "--precision", "bf16", "--deterministic", *way))]
    for name in ("first", "second"):
        with start(BIN / "panda-train", *flags, "--output_dir", name, cwd=tmp_path) as started:
            done = started.wait()
        assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "first") == losses(tmp_path / "second")
