"""loss.png: there however a run ends, and a picture."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
from matplotlib.image import imread

from panda.hooks.plot import Plot
from panda.hooks.plot import _smoothed
from panda.hooks.plot import draw_loss
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
        draw_loss(records, tmp_path / "loss.png", title=title)
    assert_picture(tmp_path / "loss.png")


def test_the_smoothed_curve_of_a_constant_is_that_constant() -> None:
    assert _smoothed([3.0] * 50) == pytest.approx([3.0] * 50)


def test_the_smoothed_curve_is_the_weighted_mean_of_what_came_before() -> None:
    assert _smoothed([1.0, 2.0, 4.0]) == pytest.approx(
        [1.0, (0.9 * 1 + 2) / 1.9, (0.81 * 1 + 0.9 * 2 + 4) / (0.81 + 0.9 + 1)]
    )


def test_evaluations_are_a_curve_of_their_own(make_run: Any, record: Any, evaluation: Any, drawn: list[Any]) -> None:
    run = make_run(step=2)
    lines = [record(1), record(2), evaluation(2), record(3), evaluation(3)]
    (run.directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    plugin = started(run)
    for step in (3, 4):
        plugin.panda_log(record(step))
    plugin.panda_evaluation(evaluation(4, loss=float("nan")))
    plugin.panda_run_end(run)
    assert_picture(run.directory / "loss.png")
    (figure,) = drawn
    curves = {line.get_label(): line.get_xdata().tolist() for axes in figure.axes for line in axes.lines}
    assert curves["loss"] == [1, 2, 3, 4] and curves["evaluation"] == [2, 4]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The figures that are saved."""
    from matplotlib.figure import Figure

    figures: list[Any] = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (figures.append(self), save(self, *a, **k))[1])
    return figures
