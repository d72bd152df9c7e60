"""Bad input, as a user meets it: one clear error from the command line, with the file, and no traceback."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from panda.cli import prepare

GOOD = {"input": "a", "target": "b"}
JUNK = bytes(range(256)) * 40


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.json", b"", ["a.json: the file is empty"]),
        ("a.jsonl", b"\n\n", ["a.jsonl: the file is empty"]),
        ("a.json", json.dumps([GOOD] * 3)[:-9].encode(), ["a.json:1:", "is it cut short?"]),
        ("a.json", b'[{"text": "a"}]', ["no field 'input' and no 'target'", "messages", "its fields are: 'text'"]),
        ("a.json", JUNK, ["not UTF-8: byte 0x80"]),
        ("a.jsonl", b"{" + JUNK[:127] * 99, ["has no row that can be trained on", "not valid JSON at line 1"]),
        ("a.json", '{"input": "caf\xe9"}'.encode("latin-1"), ["a.json:1: not UTF-8: byte 0xe9", "Convert the file"]),
        ("a.json", b'[1, "a", null, [], {"input": 1, "target": []}]', ["found a number", "'input' is a number"]),
        ("a.json.gz", b"\x1f\x8b\x08\x00cut", ["a.json.gz: not a complete gzip file"]),
        ("a\x1b[2J.json", b"", ["a\\x1b[2J.json: the file is empty"]),
        ("a.bin", b"text", [".csv or .tsv or .json or .jsonl", "; it has .bin", "panda list readers"]),
    ],
    ids=[
        "empty",
        "blank",
        "truncated",
        "wrong names",
        "junk",
        "junk that is UTF-8",
        "not UTF-8",
        "mixed types",
        "gzip",
        "a name that steers the terminal",
        "other files",
    ],
)
def test_bad_input_is_one_clear_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, content: bytes, words: list[str]
) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / name).write_bytes(content)
    flags = ["--arch", "llama-tiny", "--instruction_tuning_data_dir", str(tmp_path / "data")]
    assert prepare.main([*flags, "--token_cache", str(tmp_path / "cache")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "Traceback" not in error and "\x1b" not in error
    for word in words:
        assert word in error


def test_a_line_of_a_megabyte_among_others_is_a_sample_that_is_cut(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [GOOD, {"input": "word " * 200_000, "target": "b"}, GOOD]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    flags = ["--arch", "llama-tiny", "--instruction_tuning_data_dir", str(tmp_path / "a.jsonl")]
    assert prepare.main([*flags, "--token_cache", str(tmp_path / "cache")]) == 0
    out = capsys.readouterr().out
    assert "1 of 3 samples (33.3%) is cut to 2,048 tokens (max_seq_length)" in out
    assert f"3 rows: 3 samples, {5 + 2048 + 5:,} tokens" in out
