"""The best checkpoint of runs that are interrupted, that skip steps, and that go on elsewhere or on other data.

In this process, with a plugin that says what each evaluation is worth.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from distributions import IMPORTS

from panda.configuration.arguments import parse_arguments
from panda.configuration.configure import configure
from panda.engine.checkpoints.folders import checkpoints
from panda.engine.checkpoints.manifest import read_manifest
from panda.registry import UserError
from panda.run.interruption import Interrupted
from panda.runner import Run
from panda.runner import train

WORTH = """
import json
import os
import signal
import time

@dataclass(frozen=True)
class WorthOptions:
    worth: str = ""
    also: str = ""

@register_plugin("worth", options=WorthOptions)
class Worth:
    def __init__(self, options, context):
        self.worth = json.loads(options.worth)
        self.do, _, step = options.also.partition("@")
        self.step = int(step or 0)
        self.saved = []

    @hookimpl
    def panda_run_start(self, run):
        if self.do == "save at the start":
            run.save_checkpoint()

    @hookimpl
    def panda_gradients(self, run, step, loss, grad_norm):
        if (self.do == "skip" and step == self.step) or (self.do == "skip from" and step >= self.step):
            run.skip_step("it looks bad")

    @hookimpl
    def panda_step_end(self, run, step):
        if self.do == "interrupt" and step == self.step:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.3)  # a thread hears it

    @hookimpl
    def panda_evaluation_metrics(self, resolved, task):
        return {"worth": "higher"}

    @hookimpl
    def panda_evaluation_start(self, run):
        run.log("worth", self.worth.get(str(run.step), -1))

    @hookimpl
    def panda_checkpoint_saved(self, run, path):
        self.saved.append(path.name)
        (run.directory / "heard.json").write_text(json.dumps(self.saved))
"""
RUN: tuple[object, ...] = (
    *("--arch", "llama-tiny", "--num_layers", 1, "--hidden_size", 16, "--intermediate_size", 24, "--num_heads", 2),
    *("--instruction_tuning_data_dir", "panda:data/sample/instruct", "--max_seq_length", 32, "--num_workers", 0),
    *("--gradient_accumulation_steps", 1, "--max_samples", 40, "--eval_fraction", 0.1, "--prompts", "a"),
    *("--output_dir", "run", "--save_total_limit", 1),
    *("--max_steps", 6, "--eval_steps", 2),
)
Trained = Callable[..., Run | None]


@pytest.fixture
def trained(processes: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Trained:
    """``trained({step: what its evaluation is worth}, "what is done@step", *flags)`` trains in the folder `run`."""
    (tmp_path / "worth.py").write_text(IMPORTS + WORTH)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("panda.run.ending.ANSWER_TOKENS", 2)

    def train_with(worth: dict[int, float], also: str = "", *flags: object, best: bool = True) -> Run | None:
        given = [*RUN, "--worth", json.dumps(worth), "--also", also, *flags]
        argv: dict[object, list[object]] = {}
        for each in given:
            if str(each).startswith("--"):
                argv[name := each] = []
            else:
                argv[name].append(each)
        argv["--plugins"] = ["./worth.py:worth", *argv.get("--plugins", [])]
        if best:
            argv |= {"--plugins": ["best_checkpoint", *argv["--plugins"]], "--best_metric": ["eval_worth"]}
        off = [part for each in ("no:plot", "no:tensorboard") for part in ("-p", each)]
        flat = [str(part) for name, values in argv.items() for part in (name, *values)]
        return train(configure(parse_arguments([*flat, *off])))

    return train_with


def on_disk(run: str = "run") -> tuple[list[int], str | None]:
    """The steps of the checkpoints of ``run``, and what `best` names."""
    folder = Path(run, "checkpoints")
    pointer = folder / "best"
    return (
        [int(path.name.removeprefix("step-")) for path in checkpoints(folder)],
        pointer.read_text().strip() if pointer.exists() else None,
    )


def passing(step: int) -> bool:
    return read_manifest(Path(f"run/checkpoints/step-{step:08d}")).passing


@pytest.mark.parametrize("steps", [4, 6])
def test_a_run_that_is_interrupted_in_the_step_of_its_best_evaluation_keeps_its_checkpoint(
    trained: Trained, capsys: pytest.CaptureFixture[str], steps: int
) -> None:
    """An interrupted run saves before it evaluates: its checkpoint is on disk when the evaluation asks for it."""
    flags, worth = ("--max_steps", steps, "--save_minutes", 1e-9), {2: 1, 4: 2}
    with pytest.raises(Interrupted):
        trained(worth, "interrupt@4", *flags)
    assert on_disk() == ([2, 4], "step-00000002") and passing(4) == (steps > 4), "the last step's lasts"
    trained(worth, "", *flags, "--resume", "auto")
    assert on_disk() == ([4] if steps == 4 else [4, 6], "step-00000004")
    assert json.loads(Path("run/heard.json").read_text())[0] == "step-00000004"
    assert not passing(4), "it was asked for"
    assert "best checkpoint: run/checkpoints/step-00000004 (eval_worth has been 2 at step 4 at best)" in (
        capsys.readouterr().out
    )


def test_a_checkpoint_that_is_asked_for_where_it_is_another_runs_is_saved(trained: Trained) -> None:
    with pytest.raises(Interrupted):
        trained({2: 1, 4: 2}, "interrupt@4")
    other = ("--resume", "run/checkpoints/step-00000004", "--output_dir", "other")
    trained({2: 1, 4: 2}, "", *other)
    assert on_disk("other") == ([4, 6], "step-00000004")
    assert on_disk() == ([2, 4], "step-00000002"), "of which it changes nothing"


def test_what_is_asked_for_before_the_first_step_is_not_saved_after_it(trained: Trained) -> None:
    trained({2: 1, 4: 2}, "", "--max_steps", 4)
    trained({2: 1, 4: 2}, "save at the start", "--resume", "auto")
    assert json.loads(Path("run/heard.json").read_text()) == ["step-00000004", "step-00000006"]


def test_the_best_evaluation_may_be_at_a_skipped_step(trained: Trained) -> None:
    """Its weights are those of the last step that was taken."""
    trained({2: 1, 4: 2}, "skip@4")
    assert on_disk() == ([4, 6], "step-00000004")
    assert json.loads(Path("run/heard.json").read_text()) == ["step-00000002", "step-00000004", "step-00000006"]


@pytest.mark.parametrize(
    ("worth", "left", "best"), [({2: 1, 4: 2}, [2, 4], "step-00000004"), ({2: 2, 4: 1}, [2, 6], "step-00000002")]
)
def test_a_run_that_ends_on_skipped_steps_has_its_best_checkpoint(
    trained: Trained, worth: dict[int, float], left: list[int], best: str
) -> None:
    with pytest.raises(UserError, match="ends on skipped steps"):
        trained(worth, "skip from@4")
    assert on_disk() == (left, best), "nothing is removed for a skipped step"


def test_a_checkpoint_that_save_steps_asks_for_waits_for_a_step_that_is_taken(trained: Trained) -> None:
    trained({}, "skip@4", "--save_steps", 4, "--save_total_limit", 9)
    assert on_disk() == ([2, 5, 6], "step-00000002")


def test_the_best_checkpoint_is_that_of_the_course_that_the_run_takes(
    trained: Trained, capsys: pytest.CaptureFixture[str]
) -> None:
    """And not the one that an earlier start left behind, nor a later one of the same name."""
    trained({2: 1, 4: 2, 6: 3}, "", "--save_total_limit", 3, "--save_steps", 2)
    assert on_disk() == ([2, 4, 6], "step-00000006")
    trained({4: 0, 6: 0}, "", "--resume", "run/checkpoints/step-00000002", "--save_steps", 2)
    assert on_disk() == ([2, 6], "step-00000002")
    assert "best checkpoint: run/checkpoints/step-00000002" in capsys.readouterr().out


def test_no_file_names_a_checkpoint_that_is_gone(trained: Trained) -> None:
    trained({2: 1}, "", "--max_steps", 2)
    assert on_disk() == ([2], "step-00000002")
    trained({}, "", "--resume", "auto", best=False)
    assert on_disk() == ([6], None)


def test_evaluations_on_other_data_are_not_compared(trained: Trained, capsys: pytest.CaptureFixture[str]) -> None:
    """Nor is a run ended since they are worse than those before on what it was evaluated on until then."""
    plugins = ("--plugins", "early_stopping", "rate_on_plateau")
    plugins += ("--early_stopping_metric", "eval_worth", "--early_stopping_patience", 2)
    plugins += ("--plateau_metric", "eval_worth", "--plateau_patience", 2)
    rows = [{"input": f"{number}", "target": f"{number + 1}"} for number in range(8)]
    for name, some in (("held", rows[:4]), ("other", rows[4:])):
        Path(f"{name}.json").write_text(json.dumps(some))
    held, other = (("--eval_fraction", 0, "--eval_data_dir", f"{name}.json") for name in ("held", "other"))
    trained({2: 9}, "", *plugins, *held, "--max_steps", 2)
    capsys.readouterr()
    run = trained({4: 1, 6: 0, 8: 2}, "", *plugins, *other, "--resume", "auto", "--max_steps", 8)
    assert run is not None and run.step == 8 and run.learning_rate_factor == 1
    assert on_disk() == ([8], "step-00000008")
    said = capsys.readouterr().out
    for plugin in ("best_checkpoint", "early_stopping", "rate_on_plateau"):
        assert f"note: {plugin}: evaluations until step-00000002 were on other held-out data: it starts afresh" in said
    trained({10: 1, 12: 0}, "", *plugins, *other, "--resume", "auto", "--max_steps", 12)
    assert on_disk() == ([8, 12], "step-00000008") and "other held-out data" not in capsys.readouterr().out


def test_a_run_that_was_stopped_and_killed_in_its_export_does_not_train_on(
    trained: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ("--plugins", "early_stopping", "--early_stopping_metric", "eval_worth", "--early_stopping_patience", 1)
    worth: dict[int, float] = {2: 0.5, 4: 0.4, 6: 0.9}
    with monkeypatch.context() as patch:
        patch.setattr("panda.runner.finish", lambda run: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            trained(worth, "", *flags)
    run = trained(worth, "", *flags, "--resume", "auto")
    assert run is not None and run.step == 4 and Path("run/export/config.json").exists()
    end = json.loads(Path("run/provenance.json").read_text())["end"]
    assert end["stopped"]["by"] == "plugin early_stopping"
    evaluated = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines() if "eval_loss" in line]
    assert [record["step"] for record in evaluated] == [2, 4]
    more = trained(worth, "", *flags[:-1], 3, "--resume", "auto")  # of other options it is not due
    assert more is not None and more.step == 6


def test_the_last_checkpoint_is_lasting_also_where_time_asked_for_it(trained: Trained) -> None:
    """Else the first one of a run that goes on from it would replace it."""
    often = ("--save_minutes", 1e-6, "--save_total_limit", 5, "--max_steps")
    trained({}, "", *often, 3, best=False)
    path = Path("run/checkpoints/step-00000003")
    assert not read_manifest(path).passing
    trained({}, "", *often, 6, "--save_final", "false", "--resume", "auto", best=False)
    assert path.exists() and not path.with_name("step-00000005").exists()
