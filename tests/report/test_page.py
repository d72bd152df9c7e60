"""The page of ``panda report``: what it says, and that nothing in a run becomes markup."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from panda.cli import report
from panda.hooks.curves import Recorded
from panda.report.html import element
from panda.report.html import html
from panda.report.page import page
from panda.report.reported import Answer
from panda.report.reported import Data
from panda.report.reported import Missing
from panda.report.reported import Piece
from panda.report.reported import Reported
from panda.report.reported import ShownSample
from panda.report.reported import public

EVIL = "</script><script>evil()</script><img src=x onerror='evil()'>\"&\x00\u202e\ud800"


class Parsed(HTMLParser):
    """The tags, their attributes and the text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.texts: list[str] = []
        self.contents: dict[str, str] = {}
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        if self.tags[-1:] in (["script"], ["style"]) and self.tags[-1] not in self.contents:
            self.contents[self.tags[-1]] = data
        elif self.tags[-1:] == ["wbr"]:
            self.texts[-1] += data
        else:
            self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())


def record(step: int, **others: Any) -> dict[str, Any]:
    speed = {"tokens_per_second": 100.0, "step_seconds": 2.0, "data_wait": 0.25}
    return (
        {"step": step, "loss": 3.0 / step, "learning_rate": 1e-3, "grad_norm": 1.0, "tokens": 64 * step}
        | speed
        | others
    )


def write(run: Path, records: list[dict[str, Any]], *, config: str = "task: instruct\n", **provenance: Any) -> Path:
    (run / "checkpoints").mkdir(parents=True)
    (run / "config.yaml").write_text(config)
    (run / "provenance.json").write_text(json.dumps({"total_steps": 10} | provenance))
    (run / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in records))
    return run


def made(folder: Path, *argv: str) -> Parsed:
    """The page that the command writes of what ``argv`` says."""
    out = folder / "out.html"
    assert report.main([*argv, "--out", str(out)]) == 0
    return Parsed(out.read_text())


# -- nothing becomes markup


def test_only_what_is_made_as_an_element_is_markup() -> None:
    assert html("<b>", element("i", "<", title='"x"')) == '&lt;b&gt;<i title="&quot;x&quot;">&lt;</i>'
    assert "\x00" not in html(EVIL) and "\u202e" not in html(EVIL)
    html(EVIL).encode()


def test_no_text_of_a_run_becomes_markup() -> None:
    records = [record(step, **{EVIL: float(step % 7)}) for step in range(1, 5)]
    said: dict[str, Any] = dict.fromkeys(("status", "run", "task"), EVIL)
    numbers = {"step": 4, "total_steps": 9, "loss": 1.0, "least_loss": 1.0, "tokens_per_second": 1.0}
    reported = Reported(
        Recorded(EVIL, records),
        said | numbers,
        {EVIL: EVIL, "list": [EVIL]},
        {EVIL: {EVIL: [EVIL, {EVIL: EVIL}]}, "origins": {EVIL: EVIL}, "command": [EVIL], "packages": {EVIL: EVIL}}
        | {"components": {EVIL: {"distribution": EVIL}}, "end": {"stopped": {"by": EVIL, "reason": EVIL}}},
        data=Data({EVIL: EVIL}, [EVIL], [(1, 4, 3), (5, 8, 1)], 8, EVIL),
        samples=[
            ShownSample(EVIL, [Piece(EVIL, 1, on, loss) for on, loss in ((False, None), (True, None), (True, 2.0))])
        ],
        which_samples=EVIL,
        no_losses=EVIL,
        answers=[Answer(EVIL, {EVIL: EVIL})],
        which_answers=EVIL,
        memory={EVIL: 1.0},
        skipped=[{"step": EVIL, "why": EVIL, "loss": EVIL}],
        profile=EVIL,
    )
    written = page([reported, Reported(Recorded("other", []), reported.row, {}, {}, answers=Missing(EVIL))])
    parsed = Parsed(written)
    assert [tag for tag in parsed.tags if tag in ("script", "img", "style", "iframe")] == ["style", "script"]
    assert not [name for name, _ in parsed.attributes if name.startswith("on")]
    assert parsed.text.count("evil()") > 40
    # And if something did, a browser would not run it: only this script has the hash.
    [policy] = [value for name, value in parsed.attributes if name == "content" and "script-src" in str(value)]
    digest = base64.b64encode(hashlib.sha256(parsed.contents["script"].encode()).digest()).decode()
    assert policy is not None and "default-src 'none'" in policy and f"script-src 'sha256-{digest}';" in policy
    assert not re.findall(r"""(?:src|href)=["'](?!#|data:)""", written)
    assert "@import" not in written and "url(" not in written


# -- what is said


def test_a_page_has_the_curves_and_the_best_evaluation(tmp_path: Path) -> None:
    evaluations = [
        {"step": step, "eval_loss": loss, "eval_seconds": 4.0} for step, loss in ((10, 2.0), (20, 1.0), (30, 1.5))
    ]
    records = [record(step, skipped_steps=step // 15, reward=step / 7) for step in range(1, 31)]
    run = write(tmp_path / "run", [*records, *evaluations], started="2026")
    page = made(tmp_path, str(run), "--recorded_only")
    assert "best 1 at step 20" in page.text and "1.5000 at last, best 1.0000 at step 20" in page.text
    for title in ("learning rate", "gradient norm, before clipping", "tokens a second", "reward"):
        assert title in page.text
    assert "steps that were skipped or left out" in page.text
    assert "training steps 45.0 s (62.5%) waiting for data 15.0 s (20.8%) evaluating 12.0 s (16.7%)" in page.text


def test_configurations_are_shown_with_origins_and_differences(tmp_path: Path) -> None:
    configs = ["learning_rate: 0.1\nseed: 1\nadamw.lr: 3\n", "learning_rate: 0.2\nseed: 1\nprecision: bf16\n"]
    runs = [
        write(
            tmp_path / name, [record(1)], config=config, origins={"learning_rate": "--learning_rate", "seed": "default"}
        )
        for name, config in zip(("first", "second"), configs, strict=True)
    ]
    text = made(tmp_path, *map(str, runs), "--recorded_only").text
    assert "What differs key first second learning_rate 0.1 0.2 adamw.lr 3 – precision – bf16 first key" in text
    assert "key value from learning_rate 0.1 --learning_rate" in text
    assert "2 keys with their defaults" in text  # seed, and the one whose origin is not on record


def test_neither_secrets_nor_home_folders_are_on_a_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    config = f"ckpt_path: {tmp_path}/models/m\ndata: /home/somebody/rows.json\nname: x-0123456789abcdef\n"
    run = write(tmp_path / "run", [record(1)], config=config, command=["panda-train", "hf_" + "a" * 30])
    page = made(tmp_path, str(run))  # not found here: the reasons are on the page, too
    whole = page.text + str(page.attributes)
    assert str(tmp_path) not in whole and "somebody" not in whole and "~/rows.json" in whole and "~/models/m" in whole
    assert "0123456789abcdef" not in whole and "aaaa" not in whole
    assert public({"/Users/a/x": ["/home/b", "/x/home/c"]}) == {"~/x": ["~", "/x/home/c"]}


# -- runs of which little is left


def test_a_run_of_which_nothing_is_on_record(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text("")
    (run / "provenance.json").write_text("")  # as it is at first
    text = made(tmp_path, str(run)).text
    assert "No step is on record yet." in text and "provenance.json is missing or damaged" in text
    assert "Answers cannot be shown" in text and "Samples cannot be shown" in text


def test_damaged_lines_are_left_out_and_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write(tmp_path / "run", [record(step) for step in range(1, 4)])
    file = run / "metrics.jsonl"
    # Not JSON; no record; an integer that is too large; records with values that are no numbers, and with a step from
    # before.
    damaged = ['{"step": 3, "loss": "x"', "[1]", "\x00", json.dumps(record(4, tokens=10**400))]
    strange = [record(2, grad_norm="x", tokens=None, step_seconds=[]), record(4, loss=None)]
    file.write_text("\n".join([*damaged, *map(json.dumps, strange), file.read_text()]))
    for over in ("steps", "tokens", "hours"):
        page = made(tmp_path, str(run), "--recorded_only", "--x", over)
        assert "run: 4 damaged lines are left out of it." in page.text
    assert capsys.readouterr().err.count("damaged, and left out") == 1


def test_a_page_of_many_steps_stays_small(tmp_path: Path) -> None:
    records = [
        record(step, loss=3.0 + step % 17 / 10, grad_norm=1e4 if step == 7777 else step % 13)
        for step in range(1, 30_001)
    ]
    run = write(tmp_path / "run", records)
    page = made(tmp_path, str(run), "--recorded_only")
    assert (tmp_path / "out.html").stat().st_size < 250_000
    assert "1 record above the frame, up to 10k; marked at the edge." in page.text


def test_the_profile_and_skipped_steps_of_a_run_are_shown(tmp_path: Path) -> None:
    run = write(tmp_path / "run", [record(1, memory_gib=3.25), record(2, memory_gib=2.0)])
    (run / "profile").mkdir()
    (run / "profile" / "parts-step6.txt").write_text("part of a step  ms\nbackward 12.5\n")
    (run / "skipped.jsonl").write_text('{"step": 2, "why": "loss is not finite", "loss": null, "learning_rate": 1}\n')
    text = made(tmp_path, str(run), "--recorded_only").text
    assert "backward 12.5" in text and "1 skipped step step why loss gradient norm 2 loss is not finite null" in text
    assert "most that was allocated 3.2 GiB" in text


def test_answers_to_evaluation_data_are_those_at_first_and_at_last(tmp_path: Path) -> None:
    run = write(tmp_path / "run", [record(1)])
    asked = {"set": "", "prompt": "how many", "reference": "seven", "ended": True}
    lines = [
        {"step": step, "sample": sample, "answer": f"say {step} to {sample}", "scores": {"rouge": step / 10}} | asked
        for step in (0, 5, 10)
        for sample in (3, 8)
    ]
    damaged = {"step": 10, "set": "", "sample": 3, "answer": 7}
    larger = {"step": 11, "set": "", "sample": 3, "answer": "beyond 64 bits", "scores": {"rouge": 10**400}} | asked
    other = {"step": 10, "set": "", "sample": 3, "answer": "to another question"} | asked | {"prompt": "another"}
    written = [*lines, damaged, larger, other]
    (run / "eval_answers.jsonl").write_text("".join(json.dumps(line) + "\n" for line in written))
    text = made(tmp_path, str(run), "--recorded_only", "--answers", "1").text
    assert "before training (rouge 0) say 0 to 3 after step 10 (rouge 1) say 10 to 3 in the data seven" in text
    assert "say 5" not in text and "to 8" not in text and "beyond 64" not in text and "to another" not in text


# -- errors


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["nowhere"], "error: nowhere: expected a run directory, with the config.yaml of its run in it.\n"),
        (["run", "--out", "x.pdf"], "error: --out: 'x.pdf' is not a file in an existing folder that ends in .html.\n"),
        (["run", "--samples", "-1"], "error: --samples, --answers: expected a number from 0 on.\n"),
    ],
)
def test_what_cannot_be_reported(
    argv: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "run", [])
    assert report.main(argv) == 2
    assert capsys.readouterr().err == message
