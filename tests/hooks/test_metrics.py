"""metrics.jsonl: every record, once, whatever happened before."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from panda.hooks.metrics import Metrics
from panda.hooks.metrics import read_evaluations
from panda.hooks.metrics import read_metrics
from panda.registry import NoOptions
from panda.registry.contexts import PluginContext


def metrics() -> Metrics:
    return Metrics(NoOptions(), PluginContext())


def started(run: Any) -> Metrics:
    plugin = metrics()
    plugin.panda_run_start(run)
    return plugin


def steps(run: Any) -> list[int]:
    return [json.loads(line)["step"] for line in (run.directory / "metrics.jsonl").read_text().splitlines()]


def test_a_record_is_a_line_and_on_disk_at_once(make_run: Any, record: Any) -> None:
    run = make_run()
    plugin = started(run)
    for step in (1, 2):
        plugin.panda_log(record(step))
        assert read_metrics(run.directory) == [record(number) for number in range(1, step + 1)]
    lines = (run.directory / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [record(1), record(2)]
    assert list(json.loads(lines[0])) == list(record(1))


def test_a_full_disk_is_told_with_the_file(make_run: Any, record: Any) -> None:
    run = make_run()
    plugin = started(run)
    assert plugin.opened is not None
    plugin.opened.stream.close()
    plugin.opened.stream = open("/dev/full", "a", encoding="utf-8")  # noqa: SIM115
    with pytest.raises(OSError, match="No space left") as caught:
        plugin.panda_log(record(1))
    assert caught.value.filename == str(run.directory / "metrics.jsonl")
    plugin.panda_exception()  # does not try again


def test_a_run_without_records_leaves_an_empty_file(make_run: Any) -> None:
    run = make_run()
    started(run).panda_run_end()
    assert (run.directory / "metrics.jsonl").read_text() == ""


def test_a_resumed_run_goes_on_behind_its_checkpoint(make_run: Any, record: Any) -> None:
    plugin = started(make_run())
    for step in range(1, 8):
        plugin.panda_log(record(step))
    plugin.panda_exception()
    run = make_run(step=4)
    plugin = started(run)
    assert steps(run) == [1, 2, 3, 4]
    for step in range(5, 11):
        plugin.panda_log(record(step))
    assert steps(run) == list(range(1, 11))


def test_a_line_that_a_killed_run_cut_off_is_no_obstacle(make_run: Any, record: Any) -> None:
    run = make_run(step=2)
    whole = "".join(json.dumps(record(step)) + "\n" for step in (1, 2))
    (run.directory / "metrics.jsonl").write_text(whole + json.dumps(record(3))[:25])
    assert [line["step"] for line in read_metrics(run.directory)] == [1, 2]
    started(run).panda_log(record(3))
    assert steps(run) == [1, 2, 3]


def test_one_damaged_line_does_not_drop_the_rest(
    make_run: Any, record: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(step=5)
    lines = [json.dumps(record(step)).encode() for step in range(1, 6)]
    lines[1], lines[3] = b'{"step": 2, "loss": "\xff', b"[" * 100_000
    lines.append(json.dumps(record(1) | {"step": True}).encode())
    lines.append(json.dumps(record(5) | {"scores": {"ours": [2**63]}}).encode())
    lines.append(json.dumps({"step": -(2**63) - 1}).encode())
    (run.directory / "metrics.jsonl").write_bytes(b"\n".join([*lines, b"{}", b""]))
    assert [line["step"] for line in read_metrics(run.directory)] == [1, 3, 5]
    assert "metrics.jsonl:2 and 4 more lines: damaged, and left out" in capsys.readouterr().err
    started(run)
    assert steps(run) == [1, 3, 5]


def test_records_survive_a_death_while_a_run_resumes(
    make_run: Any, record: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    plugin = started(make_run())
    for step in range(1, 5):
        plugin.panda_log(record(step))
    plugin.panda_exception()

    def dumps(what: Any, **options: Any) -> str:
        if what["step"] == 3:
            raise KeyboardInterrupt
        return json.JSONEncoder().encode(what)

    run = make_run(step=4)
    with monkeypatch.context() as patch:
        patch.setattr("panda.hooks.record_file.json.dumps", dumps)
        with pytest.raises(KeyboardInterrupt):
            started(run)
    assert steps(run) == [1, 2, 3, 4]
    assert [path.name for path in run.directory.iterdir() if path.suffix == ".jsonl"] == ["metrics.jsonl"]


def test_only_rank_0_writes(make_run: Any, record: Any) -> None:
    run = make_run(rank=1)
    started(run).panda_run_end()
    assert [path.name for path in run.directory.iterdir()] == ["config.yaml"]


@pytest.mark.parametrize("end", ["panda_run_end", "panda_exception"])
def test_the_file_is_closed_however_a_run_ends(make_run: Any, end: str) -> None:
    plugin = started(make_run())
    file = plugin.opened
    getattr(plugin, end)()
    assert file is not None
    assert file.stream.closed
    getattr(plugin, end)()


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_no_finite_number_is_null(make_run: Any, record: Any, loss: float) -> None:
    run = make_run()
    started(run).panda_log(record(1, loss=loss))
    [read] = read_metrics(run.directory)
    assert read == record(1) | {"loss": None}
    assert '"loss": null' in (run.directory / "metrics.jsonl").read_text()


def test_a_directory_without_metrics_has_no_records(make_run: Any) -> None:
    assert read_metrics(make_run().directory) == []


def test_evaluations_are_lines_between_the_records(make_run: Any, record: Any, evaluation: Any) -> None:
    run = make_run()
    plugin = started(run)
    for step in range(1, 4):
        plugin.panda_log(record(step))
        plugin.panda_evaluation(run, evaluation(step))
    assert steps(run) == [1, 1, 2, 2, 3, 3]
    started(make_run(step=2))  # resumed
    assert read_metrics(run.directory) == [record(1), record(2)]
    assert read_evaluations(run.directory) == [evaluation(1), evaluation(2)]
