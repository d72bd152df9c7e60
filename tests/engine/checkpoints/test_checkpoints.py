"""Checkpoints are complete or absent, and hold what a run needs to go on."""

from __future__ import annotations

import hashlib
import json
import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from launching import start

from panda.configuration.options import RunOptions
from panda.engine.checkpoints import in_use
from panda.engine.checkpoints import writing
from panda.engine.checkpoints.folders import complete_checkpoints
from panda.engine.checkpoints.folders import damage
from panda.engine.checkpoints.folders import find_checkpoint
from panda.engine.checkpoints.folders import passed_over
from panda.engine.checkpoints.folders import set_aside
from panda.engine.checkpoints.in_use import being_read
from panda.engine.checkpoints.manifest import Manifest
from panda.engine.checkpoints.manifest import Progress
from panda.engine.checkpoints.manifest import Written
from panda.engine.checkpoints.manifest import read_manifest
from panda.engine.checkpoints.manifest import read_progress
from panda.engine.checkpoints.manifest import write_manifest
from panda.engine.checkpoints.weights import checkpoint_weights
from panda.engine.checkpoints.writing import finish_save
from panda.engine.checkpoints.writing import load_checkpoint
from panda.engine.checkpoints.writing import save_checkpoint
from panda.engine.deepspeed_config import deepspeed_config
from panda.engine.engine import Engine
from panda.engine.processes import Processes
from panda.files.whole import put
from panda.registry import UserError


class Growing(torch.nn.Module):
    """Multiplies by a buffer, which it changes in training."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("factor", torch.ones(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.factor += 0.25
        return x * self.factor.clone()


def make_engine(processes: Processes) -> Engine:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Dropout(0.5), Growing(), torch.nn.Linear(4, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    options = RunOptions(gradient_accumulation_steps=1)
    return Engine(model, optimizer, deepspeed_config(options, world_size=1, on_gpu=False), processes)


class Batch:
    tokens = units = 2
    idle = False

    def to(self, device: torch.device) -> Batch:
        return self


def loss_sum(model: Any, batch: Batch) -> torch.Tensor:
    """Draws inputs from each generator, so that the loss tells whether its state was restored."""
    inputs = torch.tensor([[random.random(), np.random.random(), 1.0, 2.0]]) + torch.rand(2, 4)
    result: torch.Tensor = model(inputs).sum()
    return result


def steps(engine: Engine, count: int) -> list[float]:
    return [float(engine.step([Batch()], loss_sum).loss) for _ in range(count)]


class Dies(BaseException):
    """In place of a process that ends there."""


@pytest.mark.parametrize("before", ["_remove_older", "after put"])
def test_a_start_with_nothing_to_train_finishes_a_save_that_was_cut_short(
    processes: Processes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: str
) -> None:
    """At any moment after its checkpoint was complete: no later save does it."""
    engine = make_engine(processes)

    def save(step: int) -> None:
        save_checkpoint(engine, tmp_path, Progress(step, 4, 8, 6), {"seed": 1})
        finish_save(processes, tmp_path, step, keep=2, kept=())

    def dies(*given: Any) -> None:
        if before == "after put":
            put(*given)
        raise Dies

    for step in (1, 2):
        save(step)
    with monkeypatch.context() as patched:
        patched.setattr(writing, before.removeprefix("after "), dies)
        with pytest.raises(Dies):
            save(3)
    assert (tmp_path / "step-00000001").exists()
    (tmp_path / ".tmp-latest").touch()  # of a process that was killed
    finish_save(processes, tmp_path, 3, keep=2, kept=())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-00000002", "step-00000003"]
    assert (tmp_path / "latest").read_text() == "step-00000003\n"


def test_weights_buffers_optimizer_and_random_state_come_back(processes: Processes, tmp_path: Path) -> None:
    engine = make_engine(processes)
    steps(engine, 2)
    saved = save_checkpoint(engine, tmp_path, Progress(2, 4, 8, 6), {"seed": 1})
    expected = steps(engine, 3)
    other = make_engine(processes)
    load_checkpoint(other, saved)
    assert steps(other, 3) == expected
    assert read_progress(saved, {"seed": 1}) == Progress(2, 4, 8, 6)
    with pytest.raises(UserError, match="seed was 1 and is 2"):
        read_progress(saved, {"seed": 2})


def test_the_newest_complete_checkpoint_is_found(processes: Processes, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    engine = make_engine(processes)
    assert find_checkpoint(tmp_path) is None
    first, second = (save_checkpoint(engine, folder, Progress(step), {}) for step in (9, 10))
    assert (folder / "latest").read_text().strip() == second.name
    assert find_checkpoint(tmp_path) == find_checkpoint(folder) == second
    assert find_checkpoint(first) == first
    assert find_checkpoint(folder / "latest") == second and passed_over(folder / "latest") == {}
    (folder / "best").write_text(first.name + "\n")
    assert find_checkpoint(folder / "best") == first and passed_over(folder / "best") == {}
    assert find_checkpoint(first / "manifest.json") is None

    largest = max(second.iterdir(), key=lambda file: file.stat().st_size)
    with largest.open("r+b") as file:  # a disk that was full
        file.truncate(10)
    with pytest.raises(UserError, match=r"the checkpoint is damaged: .* has 10 bytes and had"):
        find_checkpoint(second)
    assert find_checkpoint(tmp_path) == first
    (first / "manifest.json").write_text("{")
    assert find_checkpoint(tmp_path) is None


def test_a_file_whose_content_changed_is_told(processes: Processes, tmp_path: Path) -> None:
    """At its full size, which the manifest cannot tell, and torch.load does not."""
    engine = make_engine(processes)
    saved = save_checkpoint(engine, tmp_path, Progress(1), {})
    file = next(saved.glob("*model_states.pt"))
    content = bytearray(file.read_bytes())
    weight = engine.module[0].weight.detach().numpy().tobytes()
    content[content.index(weight)] ^= 1
    file.write_bytes(content)
    torch.load(file, weights_only=False)
    assert find_checkpoint(tmp_path) == saved
    for load in (lambda: load_checkpoint(engine, saved), lambda: checkpoint_weights(saved)):
        with pytest.raises(UserError, match=rf"1: the checkpoint is damaged: {file.name} has another content"):
            load()

    content[-22] ^= 1  # where the list of what is in it ends
    file.write_bytes(content)
    with pytest.raises(UserError, match=rf"step-00000001: the checkpoint is damaged: {file.name} has another content"):
        load_checkpoint(engine, saved)


def test_a_file_that_names_code_is_named_and_does_not_run(processes: Processes, tmp_path: Path) -> None:
    """Whoever changed it has changed its sha256, too."""

    class Payload:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "ran"),)

    engine = make_engine(processes)
    saved = save_checkpoint(engine, tmp_path, Progress(1), {})
    file = next(saved.glob("*model_states.pt"))
    torch.save(torch.load(file, weights_only=False) | {"more": Payload()}, file)
    manifest = read_manifest(saved)
    manifest.files[file.name] = Written(file.stat().st_size, hashlib.sha256(file.read_bytes()).hexdigest())
    write_manifest(saved, manifest)
    for load in (lambda: load_checkpoint(engine, saved), lambda: checkpoint_weights(saved)):
        with pytest.raises(UserError, match=rf"^{file}: it names posix\.mkdir, which neither panda nor DeepSpeed"):
            load()
    assert not (tmp_path / "ran").exists()


def test_an_interrupted_save_leaves_the_one_before(
    processes: Processes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(processes)
    first = save_checkpoint(engine, tmp_path, Progress(1), {})
    replace = os.replace
    for broken in ("json.dumps", "put", "pointer", "write_random_state"):

        def die(*arguments: Any, broken: str = broken, **keywords: Any) -> None:
            if broken != "pointer" or Path(arguments[0]).name == ".tmp-latest":
                raise KeyboardInterrupt
            replace(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr("os.replace" if broken == "pointer" else f"panda.engine.checkpoints.writing.{broken}", die)
            with pytest.raises(KeyboardInterrupt):
                save_checkpoint(engine, tmp_path, Progress(2), {})
        found = find_checkpoint(tmp_path)
        # Before the renaming the new one is absent, after it complete: `latest` is a convenience.
        assert found is not None and found.name == ("step-00000002" if broken == "pointer" else first.name)
        if broken == "pointer":
            json.loads((found / "manifest.json").read_text())
            found.rename(tmp_path / "aside")
    second = save_checkpoint(engine, tmp_path, Progress(2), {})
    assert find_checkpoint(tmp_path) == second
    assert not list(tmp_path.glob(".tmp-*"))


def test_a_full_disk_leaves_the_checkpoints_that_were_complete(
    processes: Processes, tmp_path: Path, full_disk: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(processes)
    first = save_checkpoint(engine, tmp_path, Progress(1), {})
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    random_state = (first / "random-00000.safetensors").stat().st_size
    weights = max(file.stat().st_size for file in first.glob("*model_states*"))
    # DeepSpeed's files; the random state, which is larger than those; the manifest, when all else is written.
    assert 1000 < weights < random_state
    for room, manifest in ((1000, "{}"), (weights + 1, "{}"), (random_state + 1, "x" * 2 * random_state)):
        with monkeypatch.context() as patch:
            patch.setattr("panda.engine.checkpoints.writing.json.dumps", lambda *_, text=manifest, **__: text)
            message = r"the checkpoint of step 2 cannot be written: the disk is full.*step-00000001, is untouched"
            with full_disk(room), pytest.raises(UserError, match=message) as caught:
                save_checkpoint(engine, tmp_path, Progress(2), {})
        assert str(tmp_path) in str(caught.value)
        assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before
    save_checkpoint(engine, tmp_path, Progress(2), {})
    assert [path.name for path in complete_checkpoints(tmp_path)] == ["step-00000001", "step-00000002"]


LIMITED = """
import os, resource, sys
if os.environ["RANK"] == "1":
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))
from panda.cli.train import main
sys.exit(main())
"""


def test_a_disk_that_is_full_for_one_rank_stops_all(tmp_path: Path) -> None:
    """Rank 1 may write files of 8 KiB, and its part of the optimizer is larger."""
    rows = "\n".join(f'{{"input": "{letter}", "target": "{letter}"}}' for letter in "abcde")
    (tmp_path / "rows.jsonl").write_text(rows)
    train = [
        *("--arch", "llama-tiny", "--num_layers", "1", "--num_workers", "0", "--zero_stage", "1", "--max_steps", "1"),
        *("--instruction_tuning_data_dir", "rows.jsonl", "--gradient_accumulation_steps", "1", "--output_dir", "run"),
    ]
    (tmp_path / "limited.py").write_text(LIMITED)
    with start(tmp_path / "limited.py", *train, cwd=tmp_path, ranks=2) as started:
        done = started.wait()
    [error] = [line for line in done.stderr.splitlines() if line.startswith("error")]
    assert error.startswith("error: rank 1: ")
    assert "the checkpoint of step 1 cannot be written: the disk is full" in error
    assert "None was complete before" in error
    assert list((tmp_path / "run/checkpoints").glob("*step-*")) == []


def test_old_checkpoints_are_removed_behind_a_newer_complete_one(processes: Processes, tmp_path: Path) -> None:
    engine = make_engine(processes)
    for step in range(1, 5):
        save_checkpoint(engine, tmp_path, Progress(step), {})
        finish_save(processes, tmp_path, step, keep=2, kept=())
    assert sorted(path.name for path in tmp_path.glob("step-*")) == ["step-00000003", "step-00000004"]


def test_a_checkpoint_that_a_command_reads_stays_until_the_next_save(
    processes: Processes, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(processes)
    first = save_checkpoint(engine, tmp_path, Progress(1), {})
    with being_read(tmp_path) as read:
        assert read == first
        for step in (2, 3):
            save_checkpoint(engine, tmp_path, Progress(step), {})
            finish_save(processes, tmp_path, step, keep=1, kept=())
        assert sorted(path.name for path in tmp_path.glob("step-*")) == ["step-00000001", "step-00000003"]
        assert damage(first) is None
    assert (
        "step-00000001 stays, since another process reads it; the next save, if any, removes it\n"
        in capsys.readouterr().out
    )
    last = save_checkpoint(engine, tmp_path, Progress(4), {})
    finish_save(processes, tmp_path, 4, keep=1, kept=())
    assert sorted(path.name for path in tmp_path.glob("step-*")) == ["step-00000004"]
    found = iter([first, last])  # it was there when it was looked for
    monkeypatch.setattr(in_use, "find_checkpoint", lambda path: next(found))
    with being_read(tmp_path) as read:
        assert read == last


def test_everything_is_on_disk_before_it_gets_its_name_and_then_the_names_are(
    processes: Processes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    renamed: list[tuple[str, list[str]]] = []
    fsync, replace = os.fsync, os.replace
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda fd: (synced.append(os.readlink(f"/proc/self/fd/{fd}")), fsync(fd)))
        patch.setattr(os, "replace", lambda a, b: (renamed.append((str(a), list(synced))), replace(a, b)))
        saved = save_checkpoint(make_engine(processes), tmp_path, Progress(1), {})
    [(temporary, before), (pointer, between)] = renamed
    files = {str(Path(temporary) / path.relative_to(saved)) for path in saved.rglob("*") if path.is_file()}
    assert len(files) > 2 and files | {temporary} <= set(before)
    assert pointer in before, "after the renaming nothing is written that may lack room"
    assert between[-2:] == [str(tmp_path), pointer] and synced[-1] == str(tmp_path)


def test_what_interrupted_saves_left_is_removed_by_the_next(processes: Processes, tmp_path: Path) -> None:
    (tmp_path / ".tmp-step-00000007").mkdir()
    (tmp_path / ".tmp-step-00000007" / "half.pt").touch()
    (tmp_path / ".tmp-latest").touch()
    save_checkpoint(make_engine(processes), tmp_path, Progress(8), {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-00000008"]


def test_no_file_names_a_checkpoint_that_is_set_aside_or_removed(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        folder = tmp_path / f"step-{step:08d}"
        folder.mkdir()
        write_manifest(folder, Manifest(Progress(step), {}, {}))
    latest, best = tmp_path / "latest", tmp_path / "best"
    latest.write_text("step-00000003\n")
    best.write_text("step-00000001\n")
    set_aside(tmp_path / "step-00000003", "abandoned")
    assert best.exists() and not latest.exists()
    assert in_use.remove_unless_read(tmp_path / "step-00000002") and best.exists()
    assert in_use.remove_unless_read(tmp_path / "step-00000001") and not best.exists()


def test_steps_are_compared_as_numbers(tmp_path: Path) -> None:
    for step in (99999999, 100000000):
        folder = tmp_path / f"step-{step:08d}"
        folder.mkdir()
        write_manifest(folder, Manifest(Progress(step), {}, {}))
    assert find_checkpoint(tmp_path) == tmp_path / "step-100000000"


def test_random_states_of_an_older_version_are_read(processes: Processes, tmp_path: Path) -> None:
    """Which had pickled Python's and numpy's as they are."""
    engine = make_engine(processes)
    saved = save_checkpoint(engine, tmp_path, Progress(1), {})
    random.seed(5), np.random.seed(6), torch.manual_seed(7)
    random.gauss(), np.random.normal()  # each keeps a second number
    state = {"python": random.getstate(), "numpy": np.random.get_state(), "torch": torch.get_rng_state()}
    expected = [(random.gauss(), np.random.normal(), torch.rand(()).item()) for _ in range(3)]
    (saved / "random-00000.safetensors").unlink()
    torch.save(state, saved / "random-00000.pt")
    load_checkpoint(engine, saved, is_checked=True)
    assert [(random.gauss(), np.random.normal(), torch.rand(()).item()) for _ in range(3)] == expected
    # The same from a checkpoint as it is written now.
    random.setstate(state["python"]), np.random.set_state(state["numpy"]), torch.set_rng_state(state["torch"])
    saved = save_checkpoint(engine, tmp_path, Progress(2), {})
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    load_checkpoint(engine, saved)
    assert [(random.gauss(), np.random.normal(), torch.rand(()).item()) for _ in range(3)] == expected
