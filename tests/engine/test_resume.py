"""Train 2N = train N, stop, resume, N more: the same bits."""

from __future__ import annotations

import errno
import json
import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from distributions import installed_for_runs
from launching import BIN
from launching import assert_same_end
from launching import metrics
from launching import run_panda
from launching import start
from launching import train_many
from safetensors.torch import load_file

from panda.configuration.arguments import parse_arguments
from panda.configuration.configure import configure
from panda.engine.checkpoints.folders import Manifest
from panda.engine.checkpoints.folders import Progress
from panda.engine.checkpoints.folders import find_checkpoint
from panda.engine.checkpoints.folders import write_manifest
from panda.engine.processes import Processes
from panda.registry import UserError
from panda.run.directory import find_directory
from panda.run.directory import hold_continued
from panda.run.directory import make_directory
from panda.run.directory_lock import FILE
from panda.run.directory_lock import RunLock
from panda.run.directory_lock import check_free
from panda.runner import train

SHAPE = ("--arch", "llama-tiny", "--num_layers", 2, "--hidden_size", 32, "--intermediate_size", 48, "--num_heads", 2)
COURSE = (
    *("--instruction_tuning_data_dir", "panda:data/sample/instruct", "--max_seq_length", 48, "--num_workers", 0),
    *("--per_gpu_train_batch_size", 3, "--gradient_accumulation_steps", 2, "--lr_scheduler", "cosine"),
    *("--warmup_steps", 2),
)
SMALL = (*SHAPE, *COURSE, "--max_steps", 6, "--save_steps", 3)
WAYS = {
    1: {
        "0": (),
        "1": ("--zero_stage", 1),
        "bf16": ("--precision", "bf16"),
        "packed": ("--batching", "packed"),
        "dropping": ("--model", "dropping"),
    },
    2: {
        **{str(stage): ("--zero_stage", stage) for stage in range(4)},
        "bf16": ("--precision", "bf16", "--zero_stage", 2),
        "packed": ("--batching", "packed", "--zero_stage", 3),
        "dropping": ("--model", "dropping"),
    },
}
"""Flags to try, by number of ranks and by name."""

DROPPING = """
@dataclass(frozen=True)
class Options:
    words: Annotated[str | None, Location()] = None

@register_model("dropping", options=Options)
def dropping(options, context):
    from torch import nn

    size = context.vocab_size
    return nn.Sequential(nn.Embedding(size, 16), nn.Dropout(0.3), nn.Linear(16, size))
"""
"""LLaMA draws no random numbers in training; this one does. It has a path among its options."""


def flags(way: tuple[object, ...]) -> list[object]:
    return [*(SMALL if "--model" not in way else SMALL[len(SHAPE) :]), *way]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For each way, a run of 6 steps, and one that continues its third step elsewhere."""
    folder = tmp_path_factory.mktemp("resume")
    environment = installed_for_runs(
        folder / "site", "dropping", {"models": {"dropping": "dropping_model"}}, {"dropping_model": DROPPING}
    )
    for ranks, ways in WAYS.items():
        runs = []
        for key, way in ways.items():
            name = f"{ranks}-{key}"
            words, moved = (
                (["--words", "words.txt"], ["--words", folder / "words.txt"]) if "dropping" in way else ([], [])
            )
            runs.append([*flags(way), *words, "--output_dir", folder / name])
            checkpoint = folder / name / "checkpoints" / "step-00000003"
            runs.append([*flags(way), *moved, "--output_dir", folder / f"{name}-resumed", "--resume", checkpoint])
        train_many(runs, ranks=ranks, cwd=folder, **environment)
    return folder


@pytest.mark.parametrize("name", [f"{ranks}-{key}" for ranks, ways in WAYS.items() for key in ways])
def test_a_resumed_run_ends_with_the_same_bits(folder: Path, name: str) -> None:
    whole, resumed = folder / name, folder / f"{name}-resumed"
    assert_same_end(resumed, whole, after=3)
    progress = [
        json.loads((run / "checkpoints/step-00000006/manifest.json").read_text())["progress"]
        for run in (whole, resumed)
    ]
    assert progress[0] == progress[1]


def test_killed_at_any_moment_resume_auto_ends_with_the_same_bits(folder: Path) -> None:
    """The run is killed without warning, twice, and continued in its own directory."""
    flags = [*map(str, SMALL[:-1]), "2", "--output_dir", str(folder / "killed"), "--resume", "auto"]
    for step in (2, 4):
        with start(BIN / "panda-train", *flags, cwd=folder) as started:
            deadline = time.monotonic() + 600
            while not (folder / f"killed/checkpoints/step-{step:08d}").exists():
                assert time.monotonic() < deadline, started.stderr.read_text()
                os.kill(started.pids[0], 0)  # ProcessLookupError: it ended by itself
                time.sleep(0.005)
            started.kill()
    done = run_panda("panda-train", *flags, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert_same_end(folder / "killed", folder / "1-0", after=0)


def test_each_rank_draws_random_numbers_of_its_own(folder: Path) -> None:
    checkpoint = folder / "2-dropping/checkpoints/step-00000003"
    states = [load_file(checkpoint / f"random-{rank:05d}.safetensors")["torch"] for rank in (0, 1)]
    assert not torch.equal(*states)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--seed", 43), "seed was 42 and is 43"),
        (("--adam_epsilon", 1e-3), "optimizer.adam_epsilon was 1e-06 and is 0.001"),
        (("--weight_decay", 0.5), "weight_decay was 0.0 and is 0.5"),
        (("--weight_decay_on", "matrices"), "weight_decay_on was 'all' and is 'matrices'"),
        (("--lr_multipliers", "*norm*=0.5"), r"lr_multipliers was \[\] and is \['\*norm\*=0.5'\]"),
        (("--precision", "bf16"), "precision was 'fp32' and is 'bf16'"),
        (("--separator", "#"), "data was "),
    ],
)
def test_a_run_that_would_be_another_is_refused(
    processes: Processes, folder: Path, more: tuple[object, ...], message: str
) -> None:
    argv = [*map(str, SMALL), *map(str, more), "--resume", str(folder / "1-0")]
    with pytest.raises(UserError, match=message):
        train(configure(parse_arguments(argv)))


def test_a_run_that_goes_back_sets_the_way_it_took_aside(folder: Path) -> None:
    run = folder / "back"
    again = [*SHAPE, *COURSE, "--max_steps", 4, "--save_steps", 1, "--save_total_limit", 1]
    train_many([[*SMALL, "--output_dir", run], [*again, "--resume", run / "checkpoints/step-00000003"]], cwd=folder)
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == [
        "abandoned-1-step-00000006",
        "latest",
        "step-00000004",
    ]
    assert find_checkpoint(run) == run / "checkpoints/step-00000004"
    assert [record["step"] for record in metrics(run)] == [1, 2, 3, 4]
    provenance = json.loads((run / "provenance.json").read_text())
    assert provenance["resumed_from"].endswith("step-00000003") and len(provenance["earlier_starts"]) == 1


def test_a_directory_that_holds_a_run_is_not_overwritten(folder: Path) -> None:
    before = (folder / "1-0/metrics.jsonl").read_text()
    done = run_panda("panda-train", *SMALL, "--output_dir", folder / "1-0", cwd=folder)
    assert done.returncode == 2
    assert "is not empty" in done.stderr and "--resume auto" in done.stderr
    assert (folder / "1-0/metrics.jsonl").read_text() == before


def test_nothing_to_resume_is_an_error(folder: Path) -> None:
    done = run_panda("panda-train", *SMALL, "--resume", folder / "nowhere", cwd=folder)
    assert done.returncode == 2
    assert "no complete checkpoint at" in done.stderr


# -- which directory, without training --------------------------------------------------------


@pytest.fixture
def two_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folders that look like two runs with a checkpoint each, one that lies alone, and one of somebody else's."""
    monkeypatch.chdir(tmp_path)
    for place in ("runs/instruct-llama-tiny/checkpoints", "other/checkpoints", "alone"):
        checkpoint = tmp_path / place / "step-00000001"
        checkpoint.mkdir(parents=True)
        write_manifest(checkpoint, Manifest(Progress(1), {}, {}))
    for run in ("runs/instruct-llama-tiny", "other"):
        (tmp_path / run / "provenance.json").write_text("{}")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").touch()
    return tmp_path


@pytest.mark.parametrize(
    ("argv", "directory", "checkpoint"),
    [
        ("", "runs/instruct-llama-tiny-2", None),
        ("--resume auto", "runs/instruct-llama-tiny", "runs/instruct-llama-tiny/checkpoints/step-00000001"),
        ("--resume auto --output_dir new", "new", None),
        ("--resume other", "other", "other/checkpoints/step-00000001"),
        ("--resume other/checkpoints/step-00000001 --output_dir other", "other", "other/checkpoints/step-00000001"),
        ("--resume other --output_dir new", "new", "other/checkpoints/step-00000001"),
        ("--resume alone/step-00000001", "runs/instruct-llama-tiny-2", "alone/step-00000001"),
    ],
)
def test_the_directory_of_a_run(two_runs: Path, argv: str, directory: str, checkpoint: str | None) -> None:
    resolved = configure(parse_arguments(["--arch", "llama-tiny", *argv.split()])).resolved
    expected = (Path(directory), Path(checkpoint) if checkpoint else None)
    assert find_directory(resolved) == expected
    with RunLock() as lock:
        continued, found = hold_continued(resolved, lock)
        assert (continued or make_directory(resolved, lock), found) == expected
        assert Path(directory).is_dir()
        with pytest.raises(UserError, match=f"{directory}: another run is using it: process {os.getpid()} on "):
            check_free(Path(directory))
    check_free(Path(directory))


@pytest.mark.parametrize(
    "argv",
    [
        "--output_dir other",
        "--output_dir mine",
        "--output_dir mine/thesis.txt",
        "--resume auto --output_dir mine",
        "--resume other --output_dir runs/instruct-llama-tiny",
        "--resume alone/step-00000001 --output_dir other",
    ],
)
def test_a_directory_of_something_else_is_refused(two_runs: Path, argv: str) -> None:
    resolved = configure(parse_arguments(["--arch", "llama-tiny", *argv.split()])).resolved
    with pytest.raises(UserError, match=r"is not empty|is a file"), RunLock() as lock:
        make_directory(resolved, lock)


def test_runs_that_start_at_once_get_a_directory_each(two_runs: Path) -> None:
    resolved = configure(parse_arguments(["--arch", "llama-tiny"])).resolved
    with ThreadPoolExecutor(8) as pool:
        chosen = list(pool.map(lambda _: make_directory(resolved, RunLock()), range(8)))
    assert len(set(chosen)) == 8


def test_of_runs_that_continue_one_at_once_the_second_is_told_who_is_at_work(two_runs: Path) -> None:
    resolved = configure(parse_arguments(["--arch", "llama-tiny", "--resume", "other"])).resolved
    with RunLock() as first, RunLock() as second:
        hold_continued(resolved, first)
        with pytest.raises(UserError, match=rf"another run is using it: process {os.getpid()} on .*output_dir"):
            hold_continued(resolved, second)
    with RunLock() as third:
        hold_continued(resolved, third)


def test_a_run_that_begins_where_another_just_began_is_refused(two_runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both had found the directory empty."""
    resolved = configure(parse_arguments(["--arch", "llama-tiny", "--resume", "auto", "--output_dir", "new"])).resolved
    with RunLock() as first, RunLock() as second:
        make_directory(resolved, first)
        with pytest.raises(UserError, match="another run is using it"):
            make_directory(resolved, second)
    with RunLock() as third, pytest.raises(UserError, match="another run has just started in it"):
        make_directory(resolved, third)


def test_a_run_goes_on_from_where_the_one_before_it_left_off(two_runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which had saved once more between the look and the lock."""
    resolved = configure(parse_arguments(["--arch", "llama-tiny", "--resume", "other"])).resolved
    newer = two_runs / "other/checkpoints/step-00000002"

    class Late(RunLock):
        def take(self, directory: Path) -> None:
            super().take(directory)
            shutil.copytree(newer.with_name("step-00000001"), newer)

    with Late() as lock:
        assert hold_continued(resolved, lock)[1] == Path("other/checkpoints/step-00000002")


def test_where_there_are_no_locks_a_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def none_here(*arguments: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", none_here)
    check_free(tmp_path)
    with RunLock() as lock:
        lock.take(tmp_path)
        check_free(tmp_path)
        assert "cannot be locked (Function not implemented)" in capsys.readouterr().err
        assert f"process {os.getpid()} on" in (tmp_path / FILE).read_text()
