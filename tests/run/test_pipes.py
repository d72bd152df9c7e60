"""Data that comes through a pipe is read once, and kept."""

from __future__ import annotations

import gzip
import json
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from panda.cli import prepare
from panda.configuration.arguments import parse_arguments
from panda.configuration.configure import Configuration
from panda.configuration.configure import configure
from panda.registry import UserError
from panda.run.description import config_text
from panda.run.sources import with_lasting_sources

ROWS = b"".join(json.dumps({"input": f"ask {n}", "target": "say"}).encode() + b"\n" for n in range(5))


@pytest.fixture
def pipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[bytes], str]:
    """``pipe(content)``: the path of a pipe through which ``content`` comes."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PANDA_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("WORLD_SIZE", raising=False)

    def make(content: bytes) -> str:
        out, into = os.pipe()
        threading.Thread(target=write, args=(into, content)).start()
        return f"/dev/fd/{out}"

    return make


def write(descriptor: int, content: bytes) -> None:
    with open(descriptor, "wb") as into:
        into.write(content)


def configured(*flags: str) -> Configuration:
    return with_lasting_sources(configure(parse_arguments(["--arch", "llama-tiny", *flags])))


@pytest.mark.parametrize("content", [ROWS, gzip.compress(ROWS)], ids=["plain", "gzip"])
def test_the_run_reads_a_copy_which_its_configuration_names(
    pipe: Callable[[bytes], str], content: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    assert prepare.main(["--arch", "llama-tiny", "--instruction_tuning_data_dir", pipe(content)]) == 0
    out = capsys.readouterr().out
    assert "1 file, 5 rows: 5 samples" in out
    [kept] = Path("cache/pipes").iterdir()
    assert kept.read_bytes() == content
    assert f"instruction_tuning_data_dir: it is kept as {kept.absolute()}" in out
    again = configured("--instruction_tuning_data_dir", pipe(content))
    assert list(Path("cache/pipes").iterdir()) == [kept]
    assert yaml.safe_load(config_text(again.resolved))["instruction_tuning_data_dir"] == str(kept.absolute())


def test_a_pipe_may_be_one_of_several_paths_and_have_a_name(pipe: Callable[[bytes], str]) -> None:
    Path("rows.json").write_bytes(ROWS)
    os.mkfifo("named.csv")
    threading.Thread(target=lambda: Path("named.csv").write_bytes(b"input,target\na,b\n")).start()
    core = configured("--eval_data_dir", "rows.json", "named.csv", pipe(ROWS)).options
    assert core.eval_data_dir is not None
    first, named, last = core.eval_data_dir
    assert first == "rows.json" and named.endswith(".csv") and Path(last).read_bytes() == ROWS
    assert Path(named).read_bytes() == b"input,target\na,b\n"


def test_what_several_processes_cannot_read_is_said(
    pipe: Callable[[bytes], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match="nothing came through the pipe"):
        configured("--eval_data_dir", pipe(b""))
    assert list(Path("cache/pipes").iterdir()) == []
    with pytest.raises(UserError, match=r"'/dev/fd/999' is a pipe, which only one process can read.*panda prepare"):
        configured("--eval_data_dir", "/dev/fd/999")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="a pipe, which only one process can read"):
        configured("--eval_data_dir", pipe(ROWS))
