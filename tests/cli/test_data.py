"""``panda data`` and ``panda prepare``: what they say is what is there."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from launching import run_panda

from panda.cli import check
from panda.cli import data
from panda.cli import prepare

ROWS = [
    *({"input": "a" * length, "target": "xyz"} for length in (1, 5, 5, 30)),
    {"input": "a"},
    {"input": "a", "target": ""},
    {"input": "b", "target": ""},
]


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A configuration file, in the working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    (tmp_path / "rows.json").write_text(json.dumps(ROWS))
    (tmp_path / "run.yaml").write_text(
        "arch: llama-tiny\ninstruction_tuning_data_dir: rows.json\nmax_seq_length: 24\ntoken_cache: cache\n"
        "batching: packed\ngradient_accumulation_steps: 4\n"
    )
    return "run.yaml"


def test_data_shows_counts_lengths_reasons_and_samples(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert data.main([config]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "1 file, 7 rows, 4 samples"
    # BOS, prompt, newline, three letters, EOS: 7, 11, 11, and 36 cut to 24
    assert lines[1] == f"{7 + 11 + 11 + 24} tokens, 16 with loss (30.2%)"
    assert lines[2] == "tokenizer: panda:data/sample/tokenizer, with 259 entries"
    assert lines[3] == "1 of 4 samples (25.0%) is cut to 24 tokens (max_seq_length)"
    assert lines[4] == "3 of 7 rows cannot be used:"
    assert lines[5] == "          2  field 'target' is empty"
    assert "          1  no field 'target'" in lines[6]
    assert "  rows.json, row 5: no field 'target'" in lines[8]
    assert lines[9] == "  rows.json, rows 6, 7: field 'target' is empty"
    assert any(line.startswith("   7 to  8") and line.endswith(" 1") for line in lines)
    assert any(line.endswith("──  1 of 4 samples (25.0%) is cut to 24 tokens") for line in lines)
    assert "  padded   100.0% data, 1.0 samples and 13 tokens a row" in lines
    assert "  packed   100.0% data, 1.3 samples and 18 tokens a row  <- this run" in lines
    shown = [lines[n + 1] + "\n" + lines[n + 2] for n, line in enumerate(lines) if line.startswith("-- sample")]
    assert len(shown) == 3 and all("\n»xyz</s>«" in text for text in shown)
    assert Path("runs/instruct-llama-tiny-lengths.png").read_bytes().startswith(b"\x89PNG")


def test_data_and_check_name_unused_fields_and_what_is_held_out(
    config: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file below the training data is held out; of the rows in it, one is also in another file."""
    held_out = [{"input": "q", "target": "r"}, {"input": "s", "target": "t", "id": "u"}]
    Path("data/val").mkdir(parents=True)
    Path("data/val/held.json").write_text(json.dumps(held_out))
    copy = {"target": "r", "input": "q", "id": 1, "turns": [1]}
    Path("data/rows.json").write_text(json.dumps([{"input": "a", "target": "b", "id": 2}, copy]))
    flags = ["--instruction_tuning_data_dir", "data", "--eval_data_dir", "data/val"]
    for command in (data, check):
        assert command.main([config, *flags]) == 0
        lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
        for expected in (
            "the field 'id' is not used (2 rows)",
            "the field 'turns' is not used (1 row)",
            "instruction_tuning_data_dir: 1 file is held out by eval_data_dir, and not trained on",
            "the field 'id' is not used (1 row)",
            "1 of 2 held-out samples are also in the training data, and are trained on",
        ):
            assert expected in lines, command.__name__
        assert any("2 samples" in line for line in lines)


STEERING = "\x1b]0;x\x07[bold]b[/bold] :smile:\u202e"


def test_text_of_data_is_shown_as_it_is_and_never_steers_the_terminal(
    config: str, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"input": f"a{STEERING}", "target": f"b\r{STEERING}"}, {"messages": [{"role": STEERING, "content": ""}]}]
    Path("rows.json").write_text(json.dumps(rows))
    assert data.main([config, "--max_seq_length", "200"]) == 0
    out = capsys.readouterr().out
    shown = "\\x1b]0;x\\x07[bold]b[/bold] :smile:\\u202e"
    assert f"a{shown}" in out and f"b\\r{shown}" in out
    assert f"turn 1 of 'messages' has the role '{shown}'" in out
    assert "\x1b" not in out and "\u202e" not in out
    Path("rows.json").write_text(json.dumps(rows[1:]))
    assert data.main([config]) == 2
    assert shown in (error := capsys.readouterr().err) and "\x1b" not in error


def test_prepare_fills_the_cache_and_a_run_takes_it_from_there(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert prepare.main([config]) == 0
    out = capsys.readouterr().out
    assert "1 file, 7 rows: 4 samples, 53 tokens, 16 with loss\n1 of 4 samples (25.0%) is cut to 24 tokens" in out
    assert "bad row: rows.json, row 5: no field 'target'" in out
    [made] = [path for path in Path("cache").iterdir() if (path / "manifest.json").exists()]
    before = os.stat(made / "manifest.json").st_mtime_ns
    flags = ["--max_steps", 1, "--output_dir", "run", "--num_layers", 1, "--hidden_size", 32, "-p", "no:tensorboard"]
    done = run_panda("panda-train", "--config", config, *flags, cwd=Path.cwd())
    assert done.returncode == 0, done.stderr
    assert " in packed rows of up to 24: 100.0% data, " in done.stdout
    assert [path for path in Path("cache").iterdir() if (path / "manifest.json").exists()] == [made]
    assert os.stat(made / "manifest.json").st_mtime_ns == before


def test_a_part_of_the_data_is_held_out_for_evaluation(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert prepare.main([config, "--eval_fraction", "0.25", "--max_samples", "4"]) == 0
    out = capsys.readouterr().out
    assert "1 file, 7 rows: 3 samples, " in out and "evaluation data: 1 sample, " in out
    assert "eval_fraction: 1 of 4 samples is held out, and not trained on\n" in out


def test_prepare_and_check_read_what_is_evaluated_on(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("held_out.jsonl").write_text('{"input": "a", "target": "b"}\n{"input": "a"}\n')
    assert prepare.main([config, "--eval_data_dir", "held_out.jsonl"]) == 0
    out = capsys.readouterr().out
    assert "evaluation data: bad row: held_out.jsonl, row 2: no field 'target'" in out
    assert "evaluation data: 1 file, 2 rows: 1 sample, 5 tokens, 2 with loss\n" in out
    assert len(list(Path("cache").glob("*/manifest.json"))) == 2
    assert check.main([config, "--eval_data_dir", "held_out.jsonl"]) == 0
    assert (
        "held_out.jsonl: 1 sample of 2 rows in 1 file\n            5 tokens, 2 of them with loss\n"
        in capsys.readouterr().out
    )


@pytest.mark.parametrize("command", [data, prepare])
def test_help_and_nothing_at_all(command: object, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--help"]) == 0  # type: ignore[attr-defined]
    assert "example: panda " in capsys.readouterr().out
    assert command.main([]) == 2  # type: ignore[attr-defined]
    assert "no configuration is given" in capsys.readouterr().err


def test_another_tokenizer_or_option_is_another_place(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    def places() -> set[str]:
        return {path.parent.name for path in Path("cache").glob("*/manifest.json")}

    assert prepare.main([config]) == 0
    assert len(places()) == 1
    for number, change in enumerate([("--separator", "="), ("--max_seq_length", "23"), ("--num_workers", "0")], 2):
        assert prepare.main([config, *change]) == 0
        assert len(places()) == min(number, 3), "workers change no token"
