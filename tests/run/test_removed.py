"""A run whose directory is removed saves what it has trained, says so once, and ends."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from panda.configuration.arguments import parse_arguments
from panda.configuration.configure import configure
from panda.run.interruption import Interrupted
from panda.run.loop import Loop
from panda.runner import train

TINY = "--arch llama-tiny --num_layers 1 --hidden_size 16 --intermediate_size 16 --num_heads 1 --num_workers 0"
SHORT = "--gradient_accumulation_steps 1 --max_seq_length 64 --per_gpu_train_batch_size 4 --max_steps 3"


@pytest.mark.parametrize("replaced", [False, True])
def test_a_run_directory_that_is_removed(
    processes: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, replaced: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("rows.json").write_text(json.dumps([{"input": letter, "target": letter} for letter in "abcd"]))
    words = [*TINY.split(), *SHORT.split(), "--instruction_tuning_data_dir", "rows.json", "--save_steps", "1"]
    words += ["-p", "no:plot", "-p", "no:tensorboard"]
    trained = Loop.trained

    def removing(loop: Loop, *given: Any) -> Any:
        if loop.run.step == 1:
            shutil.rmtree(loop.run.directory)
            if replaced:
                Path("out").mkdir()
                Path("out/of another").touch()
        return trained(loop, *given)

    with monkeypatch.context() as patch, pytest.raises(Interrupted) as ended:
        patch.setattr(Loop, "trained", removing)
        train(configure(parse_arguments([*words, "--output_dir", "out"])))
    kept = Path("out-2" if replaced else "out")
    said = str(ended.value)
    assert "out was removed while the run used it: the run has ended after step 2 of 3" in said
    assert f"{kept}/checkpoints/step-00000002 is saved" in said
    resumed = train(configure(parse_arguments([*words, "--output_dir", str(kept), "--resume", "auto"])))
    assert resumed is not None and resumed.step == 3
    if replaced:
        assert [path.name for path in Path("out").iterdir()] == ["of another"]
