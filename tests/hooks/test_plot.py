"""loss.png: there however a run ends, and a picture."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
from matplotlib.image import imread

from panda.hooks.curves import Recorded
from panda.hooks.curves import draw_run
from panda.hooks.plot import Plot
from panda.registry import NoOptions
from panda.registry.contexts import PluginContext


def started(run: Any) -> Plot:
    plugin = Plot(NoOptions(), PluginContext())
    plugin.panda_run_start(run)
    return plugin


def assert_picture(path: Path) -> None:
    picture = imread(path)
    height, width, _ = picture.shape
    assert width >= 600
    assert height >= 300
    assert len({tuple(pixel) for row in picture[::4, ::4] for pixel in row}) > 5, "the picture is blank"


@pytest.mark.parametrize("end", ["panda_run_end", "panda_exception"])
def test_the_picture_is_drawn_however_a_run_ends(make_run: Any, record: Any, end: str) -> None:
    run = make_run()
    plugin = started(run)
    for step in range(1, 101):
        plugin.panda_log(record(step))
    getattr(plugin, end)(run)
    assert_picture(run.directory / "loss.png")


def test_a_run_that_logged_nothing_has_no_picture(make_run: Any) -> None:
    run = make_run()
    started(run).panda_exception(run)
    assert [path.name for path in run.directory.iterdir()] == ["config.yaml"]


def test_a_resumed_run_draws_what_came_before_its_checkpoint_too(make_run: Any, record: Any) -> None:
    run = make_run(step=3)
    lines = "".join(json.dumps(record(step)) + "\n" for step in range(1, 6))
    (run.directory / "metrics.jsonl").write_text(lines)
    plugin = started(run)
    plugin.panda_log(record(4))
    assert plugin.records == [record(step) for step in range(1, 5)]


@pytest.mark.parametrize(
    "losses", [[1.0], [2.0, 1.0], [0.0] * 5, [float("nan")] * 3, [1.0, float("inf"), 2.0], [2.0, None] * 15]
)
@pytest.mark.parametrize("title", ["run", "pays $\\x$ now", "熊猫"])
def test_odd_records_and_names_still_make_a_picture(
    tmp_path: Path, record: Any, losses: list[float], title: str
) -> None:
    records = [record(step, loss) for step, loss in enumerate(losses, 1)]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        draw_run(Recorded(title, records), tmp_path / "loss.png")
    assert_picture(tmp_path / "loss.png")
