"""Which hooks a run calls, and when, as recorded by a plugin."""

from __future__ import annotations

import shutil
from itertools import count
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from distributions import Distributions
from launching import metrics

from panda.configuration.arguments import parse_arguments
from panda.configuration.configure import configure
from panda.engine.checkpoints import writing
from panda.engine.checkpoints.manifest import read_progress
from panda.engine.engine import Engine
from panda.registry import UserError
from panda.run.outlook import announce
from panda.runner import train
from panda.tasks.instruct import Instruct

RECORDER = """
calls = []

@register_plugin("recorder")
class Recorder:
    def __init__(self, options, context): pass

    @hookimpl
    def panda_run_start(self, run): calls.append(("start", run.step))

    @hookimpl
    def panda_step_end(self, run, step): calls.append(("step", step))

    @hookimpl
    def panda_log(self, run, record): calls.append(("log", record["step"]))

    @hookimpl
    def panda_evaluation(self, run, record): calls.append(("evaluated", record["step"]))

    @hookimpl
    def panda_epoch_end(self, run, epoch): calls.append(("epoch", epoch))

    @hookimpl
    def panda_checkpoint_saved(self, run, path): calls.append(("saved", path.name))

    @hookimpl
    def panda_run_end(self, run): calls.append(("end", len(run.answers)))

    @hookimpl
    def panda_exception(self, run, error):
        calls.append(("exception", str(error)))
        raise OSError("no space for a picture")
"""
FAILING = """
@register_plugin("failing")
class Failing:
    def __init__(self, options, context): pass

    @hookimpl(trylast=True)
    def panda_step_end(self, run, step):
        if step == 2:
            raise RuntimeError("boom")
"""
HOOKED = """
@register_optimizer("hooked")
def build(options, context):
    from torch.optim import SGD

    return SGD(context.param_groups)

@hookimpl
def panda_step_end(run, step):
    raise RuntimeError("boom")
"""
REFUSING = """
@hookimpl
def panda_step_end(run, step):
    raise UserError("give --max_steps 3")
"""
LEAVING = """
@hookimpl
def panda_step_end(run, step):
    raise SystemExit(0)
"""
UNSAVING = """
@hookimpl
def panda_save_state(run):
    return {"seen": [{1, 2}]}

@hookimpl
def panda_load_state(run, state):
    pass
"""
FULL = """
@hookimpl
def panda_step_end(run, step):
    raise OSError(28, "No space left on device", "pictures")
"""

DRAWING = """
drawn = []

@hookimpl
def panda_run_start(run):
    import random
    import numpy
    import torch
    drawn.append((random.random(), numpy.random.random(), torch.rand(1).item()))
"""


TORN = """
from panda.tasks.instruct import Instruct, InstructOptions

@register_task("torn", options=InstructOptions)
class Torn(Instruct):
    torn = "dataset"

    def dataset(self):
        if self.torn == "dataset":
            raise RuntimeError("torn")
        return super().dataset()

    def loss(self, model, batch):
        raise RuntimeError("torn")
"""


@pytest.fixture
def recorded(distributions: Distributions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """``recorded(*flags)``: what was called in a run over five rows, two a step."""
    sources = {"recorder": RECORDER, "failing": FAILING, "full": FULL, "refusing": REFUSING, "drawing": DRAWING}
    sources |= {"leaving": LEAVING, "unsaving": UNSAVING}
    distributions.install(
        "recording",
        {
            "plugins": {name: f"recording.{name}" for name in sources},
            "optimizers": {"hooked": "recording.hooked"},
            "tasks": {"torn": "recording.torn"},
        },
        {f"recording.{name}": source for name, source in (sources | {"hooked": HOOKED, "torn": TORN}).items()},
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("panda.run.ending.ANSWER_TOKENS", 2)  # answers take longer than the training
    rows = "\n".join(f'{{"input": "{letter}", "target": "{letter}"}}' for letter in "abcde")
    (tmp_path / "rows.jsonl").write_text(rows)

    def run(*flags: str) -> list[tuple[str, Any]]:
        import recording.recorder

        recording.recorder.calls.clear()
        argv = (
            "--arch llama-tiny --num_layers 1 --hidden_size 16 --intermediate_size 16 --num_heads 1 --num_workers 0"
            " --instruction_tuning_data_dir rows.jsonl --gradient_accumulation_steps 1 -p no:tensorboard -p no:plot"
        )
        train(configure(parse_arguments([*argv.split(), "--plugins", "recorder", *flags])))
        found: list[tuple[str, Any]] = recording.recorder.calls
        return found

    return run


def test_hooks_are_called_at_their_moments(processes: Any, recorded: Any) -> None:
    flags = "--per_gpu_train_batch_size 2 --num_train_epochs 2 --logging_steps 2 --save_steps 2"
    assert recorded(*flags.split()) == [
        ("start", 0),
        ("step", 1),
        ("step", 2),
        ("log", 2),
        ("saved", "step-00000002"),
        ("step", 3),  # which ends with the last row of the first epoch
        ("epoch", 0),
        ("step", 4),
        ("log", 4),
        ("saved", "step-00000004"),
        ("step", 5),
        ("log", 5),
        ("epoch", 1),
        ("saved", "step-00000005"),
        ("end", 2),
    ]


def test_evaluations_come_before_the_checkpoint_of_their_step(processes: Any, recorded: Any) -> None:
    flags = "--per_gpu_train_batch_size 2 --max_steps 5 --eval_steps 2 --save_steps 2 --eval_data_dir rows.jsonl"
    moments = [call for call in recorded(*flags.split()) if call[0] in ("log", "evaluated", "saved", "end")]
    assert moments == [
        ("log", 1),
        ("log", 2),
        ("evaluated", 2),
        ("saved", "step-00000002"),
        ("log", 3),
        ("log", 4),
        ("evaluated", 4),
        ("saved", "step-00000004"),
        ("log", 5),
        ("evaluated", 5),
        ("saved", "step-00000005"),
        ("end", 2),
    ]


def test_a_part_of_the_data_is_evaluated_on_and_a_run_with_another_part_is_not_continued(
    processes: Any, recorded: Any
) -> None:
    flags = ("--output_dir", "out", "--eval_fraction", "0.25")
    assert ("evaluated", 1) in recorded("--max_steps", "1", *flags)
    assert ("evaluated", 2) in recorded("--max_steps", "2", *flags, "--resume", "auto")
    with pytest.raises(UserError, match="data"):
        recorded("--max_steps", "3", "--output_dir", "out", "--eval_fraction", "0.5", "--resume", "auto")


def test_a_finished_run_can_be_evaluated(processes: Any, recorded: Any) -> None:
    recorded("--max_steps", "1", "--output_dir", "out")
    calls = recorded("--max_steps", "1", "--output_dir", "out", "--resume", "auto", "--eval_data_dir", "rows.jsonl")
    assert [call for call in calls if call[0] in ("step", "evaluated", "saved")] == [("evaluated", 1)]


def test_a_finished_run_is_left_as_it_is(
    processes: Any, recorded: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--output_dir", "out", "--save_steps", "1")
    two, held_out = ("--max_steps", "2"), ("--eval_data_dir", "rows.jsonl")
    recorded(*flags, *two, *held_out)
    times = {file: file.stat().st_mtime_ns for file in (tmp_path / "out").rglob("*") if file.name != ".lock"}
    for more in ((*flags, *two, *held_out, "--resume", "auto"), ("--max_steps", "1", "--resume", "out")):
        assert recorded(*more) == []
        assert "out: nothing is left to do: 2 steps are done and exported" in capsys.readouterr().out
    assert {file: file.stat().st_mtime_ns for file in times} == times
    assert {file for file in (tmp_path / "out").rglob("*") if file.name != ".lock"} == set(times)

    (tmp_path / "others.jsonl").write_text('{"input": "x", "target": "y"}')
    assert ("evaluated", 2) in recorded(*flags, *two, "--resume", "auto", "--eval_data_dir", "others.jsonl")
    assert "samples a row" not in capsys.readouterr().out
    assert ("step", 3) in recorded(*flags, "--resume", "auto", "--max_steps", "3")
    assert recorded(*flags, "--resume", "auto", "--max_steps", "3") == []
    # New prompts are answered, and a missing export is written.
    asked = (*flags, "--resume", "auto", "--max_steps", "3", "--prompts", "z")
    assert ("end", 1) in recorded(*asked)
    assert recorded(*asked) == []
    shutil.rmtree(tmp_path / "out" / "export")
    assert ("end", 1) in recorded(*asked)
    assert (tmp_path / "out" / "export" / "model.safetensors").exists()
    # From an earlier step, the run trains again and ends again.
    assert ("end", 2) in recorded("--max_steps", "1", "--resume", "out/checkpoints/step-00000001")


@pytest.mark.parametrize("saved", [(), ("--save_steps", "2")])
def test_a_run_without_a_last_checkpoint_is_finished_by_its_export(
    processes: Any, recorded: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], saved: tuple[str, ...]
) -> None:
    flags = ("--output_dir", "out", "--save_final", "false", *saved)
    assert [call for call in recorded(*flags, "--max_steps", "3") if call[0] == "saved"] == [
        ("saved", "step-00000002")
    ] * len(saved[:1])
    assert (tmp_path / "out" / "export" / "model.safetensors").exists()
    assert recorded(*flags, "--max_steps", "3", "--resume", "auto") == []
    assert "nothing is left to do: 3 steps are done and exported" in capsys.readouterr().out
    assert recorded(*flags, "--max_steps", "2", "--resume", "auto") == []
    assert "nothing is left to do: 3 steps are done and exported" in capsys.readouterr().out
    with pytest.raises(UserError, match="this run cannot continue that one: seed was 42 and is 2"):
        recorded(*flags, "--max_steps", "3", "--resume", "auto", "--seed", "2")
    if not saved:  # nothing better is written over the export
        for more in (("--max_steps", "4"), ("--max_steps", "3", "--prompts", "z")):
            with pytest.raises(UserError, match="ended after 3 steps without a checkpoint"):
                recorded(*flags, *more, "--resume", "auto")
    shutil.rmtree(tmp_path / "out" / "export")
    steps = [number for call, number in recorded(*flags, "--max_steps", "3", "--resume", "auto") if call == "step"]
    assert steps == ([3] if saved else [1, 2, 3])


def test_what_an_export_would_replace_is_refused_before_a_step(processes: Any, recorded: Any) -> None:
    import recording.recorder

    flags = ("--output_dir", "out")
    recorded(*flags, "--max_steps", "1")
    Path("out/export/notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"an export would replace it, and it holds 'notes\.txt'"):
        recorded(*flags, "--max_steps", "2", "--resume", "auto")
    assert recording.recorder.calls == [] and Path("out/export/notes.txt").read_text() == "mine"


def test_a_run_that_stopped_before_its_export_is_completed(
    processes: Any, recorded: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its last checkpoint exists, but its export does not."""
    flags = ("--max_steps", "1", "--output_dir", "out")
    with monkeypatch.context() as patch:
        patch.setattr("panda.runner.finish", lambda run: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            recorded(*flags)
    assert ("end", 2) in recorded(*flags, "--resume", "auto")


def test_missing_held_out_data_is_reported_before_anything_is_built(
    recorded: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("panda.runner.trained_model", lambda *_, **__: pytest.fail("it built a model"))
    with pytest.raises(UserError, match=r"eval_data_dir.*nowhere"):
        recorded("--eval_data_dir", "nowhere")


def test_a_run_whose_directory_another_one_takes_says_where_it_is(
    processes: Any, recorded: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two that start at once announce the same one."""

    def announce_late(*arguments: Any) -> Path | None:
        announced = announce(*arguments)
        assert announced is not None
        announced.mkdir(parents=True)
        (announced / "provenance.json").touch()
        return announced

    monkeypatch.setattr("panda.runner.announce", announce_late)
    recorded("--max_steps", "1", "--run_name", "x")
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("output ")]
    assert lines == ["output      runs/x", "output      runs/x-2, since another run has taken runs/x"]
    assert (Path("runs/x-2") / "metrics.jsonl").exists()


def test_a_step_that_ends_several_epochs_ends_each(processes: Any, recorded: Any) -> None:
    calls = recorded("--per_gpu_train_batch_size", "20", "--num_train_epochs", "4")
    assert [call for call in calls if call[0] in ("step", "epoch")] == [("step", 1), *(("epoch", e) for e in range(4))]


def test_the_first_error_is_the_one_that_is_seen(
    processes: Any, recorded: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(RuntimeError, match="boom") as caught:
        recorded("failing")
    out_of = (
        "This came out of the hook {0} of plugin {1!r}: recording 1.0 (entry point panda.plugins: {1} = recording.{1})."
    )
    assert caught.value.__notes__ == [
        out_of.format("panda_step_end", "failing") + " `-p no:failing` runs without it.",
        "then a panda_exception hook failed: OSError('no space for a picture') "
        + out_of.format("panda_exception", "recorder")
        + " `-p no:recorder` runs without it.",
    ]
    assert "the run stopped after step 2" in capsys.readouterr().out, "the others are called all the same"


def test_a_failing_hook_in_the_module_of_a_component_is_named(processes: Any, recorded: Any) -> None:
    with pytest.raises(RuntimeError, match="boom") as caught:
        recorded("--optimizer", "hooked")
    assert caught.value.__notes__[0] == (
        "This came out of the hook panda_step_end of optimizer 'hooked': recording 1.0 (entry point"
        " panda.optimizers: hooked = recording.hooked)."
    )


def test_an_exception_in_a_task_names_its_distribution(
    processes: Any, recorded: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for part in ("dataset", "loss"):
        monkeypatch.setattr("recording.torn.Torn.torn", part)
        with pytest.raises(RuntimeError, match="torn") as caught:
            recorded("--task", "torn")
        assert caught.value.__notes__[0] == (
            f"This came out of {'the loss' if part == 'loss' else '`dataset`'} of task 'torn': recording 1.0"
            " (entry point panda.tasks: torn = recording.torn)."
        )


def test_a_user_error_in_a_hook_is_not_blamed_on_it(processes: Any, recorded: Any) -> None:
    with pytest.raises(UserError, match="--max_steps 3") as caught:
        recorded("refusing")
    assert not any("came out of the hook panda_step_end" in note for note in caught.value.__notes__)


def test_a_plugin_that_ends_the_process_does_not_end_the_run_well(processes: Any, recorded: Any) -> None:
    with pytest.raises(
        UserError, match=r"the hook panda_step_end of plugin leaving ended the process \(SystemExit: 0\)"
    ):
        recorded("leaving")


def test_a_checkpoint_is_complete_without_the_state_of_a_plugin_that_fails(
    processes: Any, recorded: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """The run ends, and no work is lost."""
    flags = ("--output_dir", "out", "--max_steps", "2")
    with pytest.raises(UserError, match=r"returned at \['seen'\]\[0\] a set\. It returns .* a fault of recording 1\.0"):
        recorded("unsaving", *flags, "--save_steps", "1")
    assert "note: out/checkpoints/step-00000001 is complete but for the state" in capsys.readouterr().out
    calls = recorded(*flags, "--resume", "auto", "--save_steps", "0")
    assert ("start", 1) in calls and ("step", 1) not in calls


def test_a_full_disk_is_reported_without_a_traceback(processes: Any, recorded: Any) -> None:
    with pytest.raises(
        UserError,
        match=r"out: a file of the run or of a plugin .* the disk is full \(pictures\)\. Make room, .* Complete",
    ):
        recorded("full", "--output_dir", "out")


def test_a_run_that_skips_every_step_ends_with_an_error(
    processes: Any, recorded: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("panda.tasks.instruct.Instruct.loss", _not_a_number)
    with pytest.raises(UserError, match="step 3: the last 3 steps were skipped"):
        recorded("--per_gpu_train_batch_size", "1", "--guard_patience", "3")


def _not_a_number(task: Any, model: Any, batch: Any) -> Any:
    return model(batch.input_ids).logits.sum() * float("nan")


def test_skipped_steps_are_counted_across_resumes(
    processes: Any, recorded: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, calls = Instruct.loss, count(1)

    def not_a_number_in_the_second_and_fourth(task: Any, model: Any, batch: Any) -> Any:
        return (_not_a_number if next(calls) in (2, 4) else plain)(task, model, batch)

    monkeypatch.setattr(Instruct, "loss", not_a_number_in_the_second_and_fourth)
    flags = ("--output_dir", "out", "--per_gpu_train_batch_size", "1", "--resume", "auto", "--max_steps")
    recorded(*flags, "3")
    recorded(*flags, "5")
    assert [record["skipped_steps"] for record in metrics(tmp_path / "out")] == [0, 1, 1, 2, 2]
    assert read_progress(tmp_path / "out/checkpoints/step-00000005", {}).skipped_steps == 2


def test_speed_excludes_saving_and_evaluating(
    processes: Any, recorded: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a clock on which a step takes 2 seconds, and saving and evaluating many."""
    now = 0.0

    def taking(seconds: float, do: Any) -> Any:
        def done(*arguments: Any, **keywords: Any) -> Any:
            nonlocal now
            now += seconds
            return do(*arguments, **keywords)

        return done

    monkeypatch.setattr("time.perf_counter", lambda: now)
    for owner, name, seconds in (
        (Engine, "step", 2.0),
        (Engine, "evaluate", 5000.0),
        (writing, "write_deepspeed_files", 1000.0),
    ):
        monkeypatch.setattr(owner, name, taking(seconds, getattr(owner, name)))
    every = "--logging_steps 1 --save_steps 1 --eval_steps 1 --eval_data_dir rows.jsonl"
    recorded("--max_steps", "3", "--per_gpu_train_batch_size", "2", "--output_dir", "out", *every.split())
    records = metrics(tmp_path / "out")
    steps = [record for record in records if "loss" in record]
    assert [record["step_seconds"] for record in steps] == [2.0, 2.0, 2.0]
    tokens = [record["tokens"] for record in steps]
    assert [record["tokens_per_second"] for record in steps] == [(b - a) / 2 for a, b in pairwise([0, *tokens])]
    assert len(records) == 6 and now == 3 * 6002, "each was saved and evaluated"


def test_a_run_on_other_ranks_draws_new_random_numbers(processes: Any, recorded: Any) -> None:
    recorded("drawing", "--max_steps", "2", "--output_dir", "out", "--zero_stage", "0", "--save_steps", "1")
    for step in ("1", "2"):
        checkpoint = f"out/checkpoints/step-0000000{step}"
        recorded("drawing", "--max_steps", "3", "--output_dir", step, "--zero_stage", "1", "--resume", checkpoint)
    import recording.drawing

    for numbers in zip(*recording.drawing.drawn, strict=True):
        assert len(set(numbers)) == 3
