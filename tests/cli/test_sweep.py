"""``panda sweep``. Its runs are of a small program that writes what a run does."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from panda.cli import grid
from panda.cli import sweep
from panda.cli.main import main
from panda.configuration.arguments import parse_arguments
from panda.files.locks import held
from panda.registry import UserError
from panda.run.interruption import PASSED_ON

CONFIG = "panda:configs/instruct-tiny.yaml"
PROGRAM = """
import json, os, signal, sys, time
from pathlib import Path
from panda.configuration.arguments import parse_arguments
from panda.configuration.configure import configure
from panda.run.description import config_text
flags = dict(zip(sys.argv[1::2], sys.argv[2::2]))
run = Path(flags["--output_dir"])
with open("started", "a") as file:
    print(run.name, os.environ.get("OTHER", ""), file=file)
if flags["--seed"] == "3":
    sys.exit(2 if flags["--learning_rate"] == "0.5" else 75)
def save(*_):
    sys.exit(130)
signal.signal(signal.SIGINT, save)
if flags["--seed"] == "9":
    Path("asleep").touch()
    time.sleep(60)
(run / "export").mkdir(parents=True, exist_ok=True)
(run / "config.yaml").write_text(config_text(configure(parse_arguments(sys.argv[1:])).resolved))
(run / "provenance.json").write_text(json.dumps({"total_steps": 2, "end": {"step": 2}}))
record = {"learning_rate": 1, "grad_norm": 1, "tokens_per_second": 9, "step_seconds": 30.0, "tokens": 1}
losses = [2.0, float(flags["--learning_rate"]) + int(flags["--seed"])]
(run / "metrics.jsonl").write_text("".join(
    json.dumps(record | {"step": step, "loss": loss}) + "\\n" for step, loss in enumerate(losses, 1)))
"""
Sweeps = Callable[..., int]


@pytest.fixture
def sweeps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Sweeps:
    """``sweeps(*argv)``: the exit code of ``panda sweep``, with PROGRAM in the place of panda-train."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "program.py").write_text(PROGRAM)
    monkeypatch.setattr(sweep, "_program", lambda launch: [sys.executable, "program.py"])
    return lambda *argv: main(["sweep", CONFIG, "--max_steps", "2", *argv])


def started(folder: Path) -> list[str]:
    """The runs that were started since the last question."""
    file = folder / "started"
    lines = file.read_text().splitlines() if file.exists() else []
    file.unlink(missing_ok=True)
    return [line.strip() for line in lines]


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("1e-4,3e-4", [["1e-4"], ["3e-4"]]),
        ("a, b", [["a"], ["b"]]),
        ("[a,b],[c]", [["a", "b"], ["c"]]),
        ("[a, b],c", [["a", "b"], ["c"]]),
        (r"a\,b,c", [["a,b"], ["c"]]),
        (r"x.[01]\,2,y", [["x.[01],2"], ["y"]]),
        (r".*\.[0-9,]+", [[r".*\.[0-9,]+"]]),
        ("[ab].*[cd],x", [["[ab].*[cd]"], ["x"]]),
        ("", [[""]]),
    ],
)
def test_commas_separate_values_except_in_brackets(text: str, values: list[list[str]]) -> None:
    assert grid.split_values(text) == values


@pytest.mark.parametrize("text", ["a,", ",a", "a,,b", "[]", "[a,],b"])
def test_a_value_that_is_missing_is_said(text: str) -> None:
    with pytest.raises(UserError, match="a value between commas is missing"):
        grid.split_values(text)


def test_the_grid_is_printed_as_commands_that_panda_train_reads(
    sweeps: Sweeps, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--use_lora", "--lora_target_modules", "[q_proj,v_proj],all-linear", "--adam_betas", "0.9", "0.95"]
    assert sweeps("--learning-rate", "1e-4,3e-4", *flags, "-p", "no:plot", "--print", "--output_dir", "s") == 0
    commands = [shlex.split(line) for line in capsys.readouterr().out.splitlines()]
    assert len(commands) == 4 and {command[0] for command in commands} == {"panda-train"}
    given = [parse_arguments(command[1:]).given for command in commands]
    assert [(each["learning_rate"].value, each["lora_target_modules"].value) for each in given] == [
        ("1e-4", ("q_proj", "v_proj")),
        ("1e-4", "all-linear"),
        ("3e-4", ("q_proj", "v_proj")),
        ("3e-4", "all-linear"),
    ]
    assert {each["adam_betas"].value for each in given} == {("0.9", "0.95")}
    assert all("no:plot" in each["plugins"].value and each["resume"].value == "auto" for each in given)  # type: ignore[operator]
    places = [Path(str(each["output_dir"].value)) for each in given]
    assert len({*places}) == 4 and {place.parent for place in places} == {Path("s")}
    assert places[3].name == "learning_rate=3e-4,lora_target_modules=all-linear"
    assert not (tmp_path / "s").exists() and started(tmp_path) == []


def test_two_runs_in_one_folder_are_refused(sweeps: Sweeps, capsys: pytest.CaptureFixture[str]) -> None:
    assert sweeps("--prompts", "a+b,[a,b]", "--print") == 2
    assert "two of the runs would be in one folder, prompts=a+b" in capsys.readouterr().err


def test_a_run_knows_that_its_signals_come_twice() -> None:
    """From the scheduler that signals all processes of a job, and from the sweep."""
    code = f"import os, sys; sys.exit(7 if {PASSED_ON!r} in os.environ else 0)"
    assert sweep._run([sys.executable, "-c", code]) == (7, False)


def test_names_of_folders_are_of_what_differs_and_apart() -> None:
    assert grid.name_of(["1e-4"]) == "1e-4" and grid.name_of(["q", "v"]) == "q+v"
    odd = [grid.name_of([text]) for text in ("a/b", "a-b", "a:b", "x" * 50, "x" * 51, "..", ".")]
    assert len({*odd}) == 7 and not any("/" in name or len(name) > 50 for name in odd)


def test_all_mistakes_are_said_before_the_first_run(
    sweeps: Sweeps, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sweeps("--learning_rate", "1e-3,3e-3", "--seed", "0,x", "--sed", "1", "--lora_r", "8,0") == 2
    assert capsys.readouterr().err == (
        "error: --sed: unknown key 'sed'. Did you mean 'seed'?\n"
        "  learning_rate=1e-3,seed=0,lora_r=0 and 3 more: --lora_r: '0' is not an integer >= 1 and <= 65536.\n"
        "  learning_rate=1e-3,seed=x,lora_r=8 and 3 more: --seed: 'x' is not an integer >= 0 and < 4294967296.\n"
    )
    for argv, told in (
        (["--seed", "0"], "nothing varies: give a flag several values, as in `--learning_rate 1e-4,3e-4`."),
        (
            ["--seed", "0", "1"],
            "nothing varies: give a flag several values, as in `--learning_rate 1e-4,3e-4`. `--seed 0 1` is one value,"
            " a list: `--seed 0,1` is several.",
        ),
        (["--seed", "0,0"], "--seed: '0' is given twice."),
        (["--run_name", "a,b"], "--run_name: a sweep names its runs and resumes them itself. Leave it out."),
    ):
        assert sweeps(*argv) == 2
        assert capsys.readouterr().err == f"error: {told}\n"
    assert started(tmp_path) == [] and not (tmp_path / "runs").exists()


def test_a_sweep_goes_on_with_what_is_left_and_a_failure_ends_no_other(
    sweeps: Sweeps, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["--seed", "1,3,2", "--learning_rate", "0.5,0.25"]
    names = [f"seed={seed},learning_rate={rate}" for seed in (1, 3, 2) for rate in ("0.5", "0.25")]
    assert sweeps(*argv) == 1
    assert started(tmp_path) == names
    out = capsys.readouterr().out
    assert f"{names[2]} has failed (exit code 2); the sweep goes on" in out
    assert f"{names[3]} has saved before its end; the sweep goes on" in out
    assert f"{names[2]}: failed before it began" in out
    assert (
        "least training loss: 1.2500, seed=1,learning_rate=0.25" in out
        and "4:00 of steps in 4 runs, without starts, evaluations and saves" in out
    )
    folder = tmp_path / "runs" / "sweep-instruct-tiny"
    assert (folder / "sweep.png").stat().st_size > 10_000
    assert sweeps(*argv) == 1
    assert started(tmp_path) == names[2:4]
    assert "6 runs in runs/sweep-instruct-tiny/, of which 4 have finished" in capsys.readouterr().out
    assert sweeps(*argv, "--print") == 0
    assert len(capsys.readouterr().out.splitlines()) == 2
    assert sweeps("--seed", "1,2", "--learning_rate", "0.5,0.25") == 0
    assert started(tmp_path) == []


def test_a_finished_run_of_another_configuration_is_not_taken_for_this_one(
    sweeps: Sweeps, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sweeps("--seed", "1,2", "--learning_rate", "0.5") == 0
    assert sweeps("--seed", "1,2", "--learning_rate", "0.25") == 2
    assert (
        "seed=1: runs/sweep-instruct-tiny/seed=1 has finished with learning_rate 0.5, and it is 0.25 now. Name another"
        " folder with `--output_dir`, or move this one away." in capsys.readouterr().err
    )
    started(tmp_path)
    assert main(["sweep", CONFIG, "--max_steps", "3", "--seed", "1,2", "--learning_rate", "0.5"]) == 0
    assert started(tmp_path) == ["seed=1", "seed=2"], "they have more steps to do"
    capsys.readouterr()
    assert main(["sweep", CONFIG, "--max_steps", "1", "--seed", "1,2,4", "--learning_rate", "0.5"]) == 2
    assert capsys.readouterr().err.splitlines()[0] == (
        "error: seed=1: runs/sweep-instruct-tiny/seed=1 has done 2 steps, and is asked for fewer now (max_steps 1)."
        " Name another folder with `--output_dir`, or move this one away."
    )
    assert started(tmp_path) == []
    assert main(["sweep", CONFIG, "--max_steps", "3", "--seed", "4,5", "--learning_rate", "0.5"]) == 0
    assert capsys.readouterr().out.endswith("\nnot of this grid, in the same folder: 2 runs (seed=1, seed=2)\n")


def test_messages_name_values_as_they_were_written(sweeps: Sweeps, capsys: pytest.CaptureFixture[str]) -> None:
    assert sweeps("--lr_multipliers", "a/b=x,c=1", "--seed", "0,1") == 2
    assert capsys.readouterr().err.startswith("error: lr_multipliers=a/b=x,seed=0 and 1 more: ")


@pytest.mark.parametrize(
    ("now", "before", "is_less"), [(1, 2, True), (2, 1, False), (-1, 5, False), (5, -1, True), (None, 1, False)]
)
def test_which_limit_is_lower(now: int | None, before: int, is_less: bool) -> None:
    assert sweep._is_less(now, before) == is_less


def test_one_sweep_at_a_time_trains_in_a_folder(
    sweeps: Sweeps, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "s").mkdir()
    with held(tmp_path / "s" / sweep.LOCK):
        assert sweeps("--seed", "1,2", "--learning_rate", "0.5", "--output_dir", "s") == 2
        assert "error: s: another sweep is training in it: process" in capsys.readouterr().err
        assert started(tmp_path) == []
        assert sweeps("--seed", "1,2", "--learning_rate", "0.5", "--output_dir", "s", "--print") == 0


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="no parent that can be watched")
def test_a_run_is_asked_to_end_where_its_sweep_is_killed(tmp_path: Path) -> None:
    run = (
        "import pathlib, signal, sys, time; signal.signal(15, lambda *_: sys.exit(pathlib.Path('told').touch()));"
        " pathlib.Path('asleep').touch(); time.sleep(60)"
    )
    code = f"import sys; from panda.cli import sweep; sweep._run([sys.executable, '-c', {run!r}])"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path)
    wait_for(tmp_path / "asleep")
    process.kill()
    process.wait()
    wait_for(tmp_path / "told")


def wait_for(file: Path) -> None:
    deadline = time.monotonic() + 50
    while not file.exists():
        assert time.monotonic() < deadline, file
        time.sleep(0.01)


def test_a_signal_ends_the_run_once_it_has_saved_and_the_sweep(
    sweeps: Sweeps, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt() -> None:
        while not (tmp_path / "asleep").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell that starts the tests behind it has it ignored
    thread = threading.Thread(target=interrupt, daemon=True)
    thread.start()
    with pytest.raises(SystemExit) as ended:
        sweeps("--seed", "9,1", "--learning_rate", "0.5")
    assert ended.value.code == 75
    assert "the sweep was interrupted in seed=9; the same command goes on with it" in capsys.readouterr().out
    assert started(tmp_path) == ["seed=9"]
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)


def test_each_run_is_started_by_a_launcher_that_is_named(
    sweeps: Sweeps, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert sweeps("--seed", "1,2", "--learning_rate", "0.5", "--launch", "env OTHER=launched") == 0
    assert started(tmp_path) == ["seed=1 launched", "seed=2 launched"]
    assert sweeps("--seed", "4,5", "--learning_rate", "0.5", "--launch", "no-such-launcher") == 2
    assert "error: --launch: 'no-such-launcher' cannot be started: No such file" in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert sweeps("--seed", "4,5") == 2
    assert "error: a sweep is not started by a launcher" in capsys.readouterr().err


def test_evaluations_decide_where_there_are_any(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    points = [grid.Point(name, tmp_path / name, []) for name in ("a", "b")]
    for point, loss in zip(points, (1.0, 2.0), strict=True):
        (point.directory / "checkpoints").mkdir(parents=True)
        (point.directory / "config.yaml").write_text("task: instruct\n")
        (point.directory / "provenance.json").write_text("{}")
        record = {"step": 1, "loss": loss, "tokens": 1, "step_seconds": 1.0, "tokens_per_second": 1.0}
        record |= {"learning_rate": 1.0, "grad_norm": 1.0}
        lines = [record, {"step": 1, "eval_loss": 5 - loss}]
        (point.directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    sweep.report(grid.Sweep(tmp_path, points, [], only_prints=False), [])
    assert "least evaluation loss: 3.0000, b\n" in capsys.readouterr().out
    for point, score in zip(points, (0.75, 0.5), strict=True):
        (point.directory / "config.yaml").write_text("best_metric: eval_f1\nbest_higher_is_better: true\n")
        file = point.directory / "metrics.jsonl"
        file.write_text(file.read_text().replace('"eval_loss"', f'"eval_f1": {score}, "eval_loss"'))
    sweep.report(sweep.Sweep(tmp_path, points, [], only_prints=False), [])
    assert "highest eval_f1: 0.7500, a\n" in capsys.readouterr().out
