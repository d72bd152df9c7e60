"""What the optimizer tells of each parameter, from a run to its files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from launching import exported_weights
from launching import metrics
from launching import run_panda

from panda.hooks.layers import Layers
from panda.registry import NoOptions
from panda.registry.contexts import PluginContext

SMALL = (
    *("--arch", "llama-tiny", "--num_layers", 2, "--hidden_size", 32, "--intermediate_size", 48, "--num_heads", 2),
    *("--instruction_tuning_data_dir", "panda:data/sample/instruct", "--max_seq_length", 48, "--num_workers", 0),
    *("--per_gpu_train_batch_size", 3, "--gradient_accumulation_steps", 1, "--max_steps", 2, "--plugins", "layers"),
)


def test_trust_ratios_are_recorded_by_parameter_and_in_summary(tmp_path: Path) -> None:
    run = tmp_path / "run"
    done = run_panda("panda-train", *SMALL, "--optimizer", "LAMB", "--output_dir", run, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (run / "layers.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2]
    # Ones, and Adam's first update is about one.
    assert rows[0]["trust_ratio"]["model.norm.weight"] == pytest.approx(1, rel=0.05)
    for row, record in zip(rows, metrics(run), strict=True):
        ratios = row["trust_ratio"]
        assert ratios.keys() == exported_weights(run).keys()
        assert record["trust_ratio_min"] == min(ratios.values()) < 0.1
        assert record["trust_ratio_max"] == max(ratios.values())
        assert record["trust_ratio_min"] < record["trust_ratio_median"] < record["trust_ratio_max"]


def test_a_resumed_run_goes_on_behind_its_checkpoint(make_run: Any) -> None:
    plugin = Layers(NoOptions(), PluginContext())
    for start, last in ((0, 4), (2, 5)):
        run = make_run(step=start)
        plugin.panda_run_start(run)
        for step in range(start + 1, last + 1):
            run.observations = {"trust_ratio": {"a": float(10 * start + step)}}
            plugin.panda_log(run, {"step": step})
    rows = [json.loads(line) for line in (run.directory / "layers.jsonl").read_text().splitlines()]
    assert [(row["step"], row["trust_ratio"]["a"]) for row in rows] == [(1, 1), (2, 2), (3, 23), (4, 24), (5, 25)]


def test_a_record_before_the_first_step_that_counted_is_no_error(make_run: Any) -> None:
    """fp16 begins with steps that are skipped, until its loss scale fits; the optimizer has nothing to tell yet."""
    run = make_run()
    plugin = Layers(NoOptions(), PluginContext())
    plugin.panda_run_start(run)
    plugin.panda_log(run, {"step": 1})
    assert json.loads((run.directory / "layers.jsonl").read_text()) == {"step": 1}


def test_an_optimizer_that_tells_nothing_is_an_error(tmp_path: Path) -> None:
    done = run_panda("panda-train", *SMALL, "--output_dir", tmp_path / "run", cwd=tmp_path)
    assert done.returncode == 2
    assert "the optimizer AdamW reports nothing of single parameters; nvlamb does" in done.stderr
