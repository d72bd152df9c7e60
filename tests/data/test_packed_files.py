"""Packed files: what is in them, whatever they are called, and clear words for those that are damaged."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from panda.cli import prepare
from panda.data.auto_reader import AutoOptions
from panda.data.auto_reader import AutoReader
from panda.data.locations import data_files
from panda.data.packed_files import ENDINGS
from panda.data.packed_files import beginning
from panda.data.reading import Row
from panda.registry import UserError
from panda.registry.contexts import ReaderContext

ROWS = [{"text": f"row {number} 🐼"} for number in range(3000)]
CONTENT = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
PACKING = {
    ".gz": gzip.compress,
    ".bz2": lambda content: bz2.compress(content, 1),
    ".xz": lzma.compress,
    ".zst": lambda content: pyarrow.compress(content, "zstd", asbytes=True),
}


def read(file: Path) -> list[object]:
    reader = AutoReader(AutoOptions(), ReaderContext())
    return [row.fields if isinstance(row, Row) else row.problem for row in reader.read(file)]


def test_each_packing_has_a_test() -> None:
    assert tuple(PACKING) == ENDINGS


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_packed_file_is_what_is_in_it_whatever_its_name(tmp_path: Path, ending: str) -> None:
    pack = PACKING[ending]
    packed = pack(CONTENT[:5000]) + pack(CONTENT[5000:])  # as `cat` and pigz join them
    for name in (f"a.jsonl{ending}", f"a.JSON{ending.upper()}", "a.jsonl", "a", "a.log"):
        (tmp_path / name).write_bytes(packed)
        assert read(tmp_path / name) == ROWS
    (tmp_path / f"a.tsv{ending}").write_bytes(pack(b"text\tx\na,b\t1\n"))
    assert read(tmp_path / f"a.tsv{ending}") == [{"text": "a,b", "x": "1"}]
    (tmp_path / f"a.txt{ending}").write_bytes(pack(b"a\n"))
    assert read(tmp_path / f"a.txt{ending}") == [{"text": "a"}]
    suffixes = AutoReader(AutoOptions(), ReaderContext()).suffixes
    names = {file.name for file in data_files(str(tmp_path), suffixes, "option")}
    assert names == {f"a.jsonl{ending}", f"a.JSON{ending.upper()}", "a.jsonl", f"a.tsv{ending}", f"a.txt{ending}"}


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_packed_file_that_is_damaged_or_none_is_an_error(tmp_path: Path, ending: str) -> None:
    file = tmp_path / f"a.jsonl{ending}"
    whole = PACKING[ending](CONTENT)
    damaged = whole[:60] + b"\xff" * 20 + whole[80:]
    contents = [whole[:-30], whole[: len(whole) // 2], damaged]
    for content in contents if ending != ".zst" else contents[:2]:  # this one has no checksum
        file.write_bytes(content)
        with pytest.raises(UserError, match=rf"a\.jsonl\{ending}: (not a complete \w+ file|cannot be read)"):
            read(file)
    file.write_bytes(CONTENT)
    with pytest.raises(UserError, match=rf"a\.jsonl\{ending}: its name is that of a packed file"):
        read(file)
    file.write_bytes(b"")
    with pytest.raises(UserError, match=rf"a\.jsonl\{ending}: the file is empty"):
        read(file)


def test_a_text_that_begins_as_the_name_of_a_packing_is_a_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("BZh, as bzip2 begins")
    assert read(tmp_path / "a.txt") == [{"text": "BZh, as bzip2 begins"}]


@pytest.mark.parametrize("form", ["parquet", "file", "stream"])
@pytest.mark.parametrize("name", ["5f70bf18a086", "a.data"])
def test_a_file_without_a_known_ending_is_read_as_what_it_begins_as(tmp_path: Path, form: str, name: str) -> None:
    table = pyarrow.Table.from_pylist(ROWS[:3])
    if form == "parquet":
        parquet.write_table(table, tmp_path / name)
    else:
        new = pyarrow.ipc.new_file if form == "file" else pyarrow.ipc.new_stream
        with new(str(tmp_path / name), table.schema) as writer:
            writer.write_table(table)
    assert [row.fields for row in AutoReader(AutoOptions(), ReaderContext()).read(tmp_path / name)] == ROWS[:3]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("a".encode("utf-16"), "It begins as UTF-16. Convert it to UTF-8."),
        (b"PAR1\xff", "It begins as Parquet. Name it so that it ends in .parquet"),
        (b"PK\x03\x04\xff", "It begins as a zip archive. Unpack it."),
        (b"caf\xe9", "Convert the file to UTF-8."),
    ],
)
@pytest.mark.parametrize("name", ["a.json", "a.csv", "a.txt"])
def test_what_is_not_text_is_called_what_it_is(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as error:
        read(tmp_path / name)
    assert words in str(error.value)


def test_without_pyarrow_zstd_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.jsonl.zst").write_bytes(PACKING[".zst"](CONTENT))
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    flags = ["--task", "pretrain", "--arch", "llama-tiny", "--pretraining_data_dir", str(tmp_path / "a.jsonl.zst")]
    assert prepare.main([*flags, "--token_cache", str(tmp_path / "cache")]) == 2
    assert "a.jsonl.zst: zstd needs pyarrow. Install it: pip install" in capsys.readouterr().err
    assert beginning(tmp_path / "nothing") == b""
