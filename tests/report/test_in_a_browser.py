"""The page in a real browser: it fetches nothing, complains of nothing, can be enlarged, and needs no script."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import Browser
from browser import found

from panda.hooks.curves import Recorded
from panda.report.page import page
from panda.report.reported import Answer
from panda.report.reported import Data
from panda.report.reported import Piece
from panda.report.reported import Reported
from panda.report.reported import ShownSample

pytestmark = pytest.mark.skipif(found() is None, reason="no browser (chromium, google-chrome)")

EVIL = (
    "</script><script>document.title = 'evil'</script><img src=http://127.0.0.1:9/x onerror=\"document.title='evil'\">"
)
ROW = {"status": "finished", "step": 100, "total_steps": 100, "loss": 1.0, "least_loss": 1.0, "tokens_per_second": 9.0}


def reported(name: str, scale: float) -> Reported:
    records = [
        {"step": step, "loss": 2 + scale * math.exp(-step / 20), "learning_rate": 1e-3, "grad_norm": 1 + step % 5}
        for step in range(1, 101)
    ]
    evaluations = [{"step": step, "eval_loss": 2.5 - step / 100} for step in (25, 50, 75, 100)]
    pieces = [Piece("long " * 40, 1, False, None), Piece(EVIL, 1, True, 1.5), Piece("x" * 500, 1, True, 6.0)]
    return Reported(
        Recorded(name, records, evaluations),
        ROW,
        {"learning_rate": scale, "prompts": EVIL, "ckpt_path": "/models/" + "deep/" * 40},
        {"origins": {"learning_rate": "--learning_rate"}, "command": ["panda-train", EVIL]},
        data=Data({"rows": "3"}, [EVIL], [(1, 4, 3), (5, 8, 9)], 8, "3 of 12 samples are cut to 8 tokens"),
        samples=[ShownSample(EVIL, pieces, loss=2.0)],
        answers=[Answer(EVIL, {"before training": EVIL, "after training": "good"})],
    )


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.fixture(scope="module", params=["one run", "several"])
def file(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    names = ["first"] if request.param == "one run" else ["first", "second", EVIL]
    path = tmp_path_factory.mktemp("pages") / "report.html"
    path.write_text(page([reported(name, 1.0 + number) for number, name in enumerate(names)]))
    return path


@pytest.mark.parametrize("width", [1280, 400])
@pytest.mark.parametrize("scripts", [True, False])
def test_a_page_asks_for_nothing_and_fits(browser: Browser, file: Path, width: int, scripts: bool) -> None:
    browser.open(file, width, scripts=scripts)
    wide = browser.ask("document.documentElement.scrollWidth")
    assert wide == width, "the page is wider than the window"
    assert browser.requests == [] and browser.complaints == []
    assert browser.ask("document.title").endswith("– panda")
    assert browser.ask("document.images.length") == 0
    assert browser.ask("getComputedStyle(document.querySelector('.hint')).display") == ("block" if scripts else "none")
    heights: list[float] = browser.ask(
        "[...document.querySelectorAll('.plot path[data-name]')].map(e => e.getBoundingClientRect().width)"
    )
    assert len(heights) >= 4 and min(heights) > width / 8, "a curve is not drawn"


def _plot(browser: Browser) -> tuple[float, float, float, float]:
    box = "(e => { const r = e.getBoundingClientRect(); return [r.left, r.top, r.width, r.height] })"
    found: Any = browser.ask(f"{box}(document.querySelector('.plot'))")
    return tuple(found)


def _views(browser: Browser) -> list[list[float]]:
    found: Any = browser.ask(
        "[...document.querySelectorAll('.plot[data-axes] .lines')]"
        ".map(e => e.getAttribute('viewBox').split(' ').map(Number))"
    )
    return list(found)


def test_a_part_of_the_curves_can_be_enlarged(browser: Browser, file: Path) -> None:
    browser.open(file)
    left, top, width, height = _plot(browser)
    middle = top + height / 2
    browser.mouse("mousePressed", left + width * 0.5, middle)
    browser.mouse("mouseMoved", left + width * 0.6, middle)
    browser.mouse("mouseReleased", left + width * 0.75, middle)
    views = _views(browser)
    assert len(views) >= 3
    for begin, _, wide, _ in views:
        assert begin == pytest.approx(50_000, abs=200) and wide == pytest.approx(25_000, abs=200)
    assert views[0][3] < 50_000, "the loss of that part does not fill the frame"
    ticks = browser.ask("[...document.querySelector('.plot').querySelectorAll('i.x b')].map(e => e.textContent)")
    assert {"50", "60", "70"} <= {*ticks}
    assert browser.ask("getComputedStyle(document.querySelector('button.all')).display") == "block"
    for kind, share in (("mousePressed", 0.2), ("mouseMoved", 0.5), ("mouseReleased", 0.6)):  # a part of that part
        browser.mouse(kind, left + width * share, middle)
    assert _views(browser)[-1][0::2] == pytest.approx([55_000, 10_000], abs=300)
    browser.ask("document.querySelector('.plot').focus()")
    browser.key("0")
    assert all(view == [0, 0, 100_000, 100_000] for view in _views(browser))
    browser.key("+")
    assert {tuple(view[0::2]) for view in _views(browser)} == {(25_000, 50_000)}
    browser.ask("document.querySelector('button.all').click()")
    assert all(view == [0, 0, 100_000, 100_000] for view in _views(browser))
    assert browser.complaints == [] and browser.requests == []


def test_the_values_under_the_pointer_are_those_on_record(browser: Browser, file: Path) -> None:
    browser.open(file)
    left, top, width, height = _plot(browser)
    browser.mouse("mouseMoved", left + width * 0.4, top + height / 2)
    said = browser.ask("document.querySelector('.read').textContent")
    assert said.startswith("40: ")
    value = float(said.split(" · ")[0].split()[-1])
    assert value == pytest.approx(2 + math.exp(-2), abs=0.02)  # smoothed, where there are several runs


def test_a_script_that_stood_in_a_page_would_not_run(browser: Browser, file: Path, tmp_path: Path) -> None:
    """The second line of defence, should a text ever become markup."""
    broken = tmp_path / "broken.html"
    broken.write_text(file.read_text().replace("<h1>", f"{EVIL}<h1>"))
    browser.open(broken)
    assert browser.ask("document.title") != "evil" and "Content Security Policy" in str(browser.complaints)
