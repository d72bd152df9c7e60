"""Steps that are skipped neither write nor remove a checkpoint: a run that diverges keeps its last good one."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import torch
from launching import metrics

from panda.cli.runs import described
from panda.configuration.arguments import parse_arguments
from panda.configuration.configure import configure
from panda.engine.checkpoints.folders import complete_checkpoints
from panda.engine.processes import Processes
from panda.run.skipped import SkippedError
from panda.runner import train
from panda.tasks.text_task import TextTask

RUN = (
    *("--arch", "llama-tiny", "--num_layers", "1", "--hidden_size", "16", "--intermediate_size", "24"),
    *("--num_heads", "2", "--instruction_tuning_data_dir", "panda:data/sample/instruct", "--max_seq_length", "32"),
    *("--gradient_accumulation_steps", "1", "--num_workers", "0", "--prompts", "a"),
    *("-p", "no:plot", "-p", "no:tensorboard"),
)

ONE = ("--save_steps", "1", "--save_total_limit", "1")


@pytest.fixture
def bad_from(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The steps whose loss is NaN: from the first of these numbers on, until before the second."""
    steps: list[int] = [10**9, 10**9]
    taken = iter(range(1, 10**9))
    of_task = TextTask.loss

    def loss(self, module, batch):  # type: ignore[no-untyped-def]
        found = of_task(self, module, batch)
        is_bad = module.training and steps[0] <= next(taken) < steps[1]
        return found * torch.nan if is_bad else found

    monkeypatch.setattr(TextTask, "loss", loss)
    return steps


def status(run: Path) -> str:
    return str(described(run, run.parent)["status"])


def saved(run: Path) -> list[str]:
    return [path.name for path in complete_checkpoints(run / "checkpoints")]


def test_a_run_that_diverges_keeps_its_last_good_checkpoint(
    processes: Processes, tmp_path: Path, bad_from: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    bad_from[0] = 4
    run = tmp_path / "run"
    good = run / "checkpoints/step-00000003"
    recommended = (
        "last 4 steps were skipped, since their loss or gradients were not finite. The last good weights are in"
        f" {good}: `panda export {good} --output FOLDER`. `panda replay {run} 7` finds the rows. Mend the data, or"
        " lower `learning_rate`: continued unchanged, the run takes the same steps and ends in the same way.\n"
    )
    go_on = rf"to continue it: \S*panda-train --resume {good} --learning_rate 0\.0005$"
    with pytest.raises(SkippedError, match=re.escape(recommended) + go_on):
        flags = [*ONE, "--max_steps", "9", "--guard_patience", "4"]
        train(configure(parse_arguments([*RUN, "--output_dir", str(run), *flags])))
    said = capsys.readouterr().out
    assert "the run stopped after step 7, in" in said and "to continue it" not in said
    assert status(run) == "ended on skipped steps"
    assert saved(run) == ["step-00000003"]
    assert metrics(run)[-1]["skipped_steps"] == 4


def test_a_run_that_ends_on_skipped_steps_keeps_it_too(
    processes: Processes, tmp_path: Path, bad_from: list[int]
) -> None:
    bad_from[0] = 4
    run = tmp_path / "run"
    message = (
        r"of 6 the last 3 steps were skipped, .* nothing is exported. The last good weights are in .*step-00000003:"
    )
    with pytest.raises(SkippedError, match=message):
        train(configure(parse_arguments([*RUN, "--output_dir", str(run), *ONE, "--max_steps", "6"])))
    assert saved(run) == ["step-00000003"]
    assert not (run / "export").exists()
    assert status(run) == "ended on skipped steps"


def test_a_checkpoint_that_is_due_at_a_skipped_step_follows_the_next_that_is_taken(
    processes: Processes, tmp_path: Path, bad_from: list[int]
) -> None:
    bad_from[:] = [4, 5]
    run = tmp_path / "due"
    train(configure(parse_arguments([*RUN, "--output_dir", str(run), "--max_steps", "6", "--save_steps", "4"])))
    assert saved(run) == ["step-00000005", "step-00000006"]


def test_what_was_trained_before_skipped_steps_at_the_end_is_saved_and_nothing_removed_for_it(
    processes: Processes, tmp_path: Path, bad_from: list[int]
) -> None:
    bad_from[0] = 4
    run, few = tmp_path / "end", ("--save_steps", "2", "--save_total_limit", "1", "--max_steps", "5")
    go_on = (
        rf"weights are in {run}/checkpoints/step-00000005: .*\nto continue it: .*--resume \S+/step-00000002 --learning"
    )
    with pytest.raises(SkippedError, match=f"(?s)the last 2 steps were skipped.*{go_on}"):
        train(configure(parse_arguments([*RUN, "--output_dir", str(run), *few])))
    assert saved(run) == ["step-00000002", "step-00000005"]
    # Nothing is left to train, and it still does not call that the end of a run.
    with pytest.raises(SkippedError, match=f"(?s)the last 2 steps were skipped.*{go_on}"):
        train(configure(parse_arguments(["--resume", str(run)])))
    assert not (run / "export").exists()
    assert saved(run) == ["step-00000002", "step-00000005"]
    bad_from[0] = 10**9  # what is said helps
    train(configure(parse_arguments(["--resume", str(run / "checkpoints/step-00000002"), "--learning_rate", "5e-4"])))
    assert (run / "export").exists() and status(run) == "finished"


def test_what_a_killed_start_had_not_removed_is_removed_where_nothing_is_left_to_train(
    processes: Processes, tmp_path: Path
) -> None:
    run = tmp_path / "killed"
    train(configure(parse_arguments([*RUN, "--output_dir", str(run), "--save_steps", "1", "--max_steps", "2"])))
    assert saved(run) == ["step-00000001", "step-00000002"]
    shutil.rmtree(run / "export")  # now it is as one that was killed between saving and removing
    train(configure(parse_arguments(["--resume", str(run), *ONE])))
    assert saved(run) == ["step-00000002"]
