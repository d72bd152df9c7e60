"""Each file by its ending: as if the reader for it had been named, and only panda's own without being named."""

from __future__ import annotations

import csv
import gzip
import json
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from distributions import Distributions
from pyarrow import feather
from pyarrow import parquet

from panda.cli import prepare
from panda.data.auto_reader import AutoOptions
from panda.data.auto_reader import AutoReader
from panda.data.locations import data_files
from panda.registry import Catalog
from panda.registry import UserError
from panda.registry.contexts import ReaderContext

ROWS = [{"input": "a", "target": "b"}, {"input": "c", "target": "d\ne"}]


def write_all(folder: Path) -> Path:
    """``ROWS`` in a file of every kind, each in a name of its own, in the order of names; texts are only text."""
    folder.mkdir()
    (folder / "1.json").write_text(json.dumps(ROWS))
    (folder / "2.JSONL.gz").write_bytes(gzip.compress("\n".join(map(json.dumps, ROWS)).encode()))
    for name, delimiter in (("3.csv", ","), ("4.tsv", "\t")):
        with (folder / name).open("w", newline="") as file:
            writer = csv.DictWriter(file, ["input", "target"], delimiter=delimiter)
            writer.writeheader()
            writer.writerows(ROWS)
    table = pyarrow.Table.from_pylist(ROWS)
    parquet.write_table(table, folder / "5.parquet")
    feather.write_feather(table, folder / "6.arrow")
    (folder / "7.txt").write_text("some text")
    return folder


def reader(**options: Any) -> AutoReader:
    return AutoReader(AutoOptions(**options), ReaderContext())


def test_a_folder_of_every_kind_of_file_is_read_as_each_kind_is(tmp_path: Path) -> None:
    auto = reader()
    files = data_files(str(write_all(tmp_path / "data")), auto.suffixes, "option")
    assert [file.name[0] for file in files] == list("1234567")
    rows = [dict(row.fields) for file in files for row in auto.read(file)]  # type: ignore[union-attr]
    assert rows == [*ROWS * 6, {"text": "some text"}]


def test_the_options_of_each_reader_reach_it(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\ntwo")
    (tmp_path / "a.csv").write_text("a;b\n1;2\n")
    auto = reader(text_document="line", csv_delimiter=";")
    assert [len(list(auto.read(tmp_path / name))) for name in ("a.txt", "a.csv")] == [2, 1]
    catalog = Catalog()
    own = [catalog.load(offer) for offer in catalog.offers("reader") if offer.is_own]
    of_all = {field.name for component in own if component for field in fields(component.options)}
    assert of_all == {field.name for field in fields(AutoOptions)}


def test_documentation_beside_data_is_read_only_where_it_is_named(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("about the data")
    (tmp_path / "a.json").write_text(json.dumps(ROWS))
    auto = reader()
    assert [file.name for file in data_files(str(tmp_path), auto.suffixes, "option")] == ["a.json"]
    [file] = data_files(str(tmp_path / "README.md"), auto.suffixes, "option")
    assert [row.fields for row in auto.read(file)] == [{"text": "about the data"}]  # type: ignore[union-attr]


def test_a_file_that_is_named_and_has_an_unknown_ending_is_json(tmp_path: Path) -> None:
    (tmp_path / "rows.data").write_text(json.dumps(ROWS))
    assert [row.fields for row in reader().read(tmp_path / "rows.data")] == ROWS  # type: ignore[union-attr]


def test_an_installed_reader_changes_nothing_until_it_is_named(
    tmp_path: Path, distributions: Distributions, capsys: pytest.CaptureFixture[str]
) -> None:
    source = """
        from panda.data.reading import Row

        @register_reader("shout")
        class Shout:
            '''Lines as rows.'''
            suffixes = (".json", ".shout")
            def __init__(self, options, context):
                pass
            def read(self, file):
                yield Row({"input": "x", "target": file.read_text()}, file, 1)
        """
    distributions.install("acme", {"readers": {"shout": "acme_reader"}}, {"acme_reader": source})
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.json").write_text(json.dumps(ROWS))
    (tmp_path / "data" / "b.shout").write_text("y")
    flags = ["--arch", "llama-tiny", "--instruction_tuning_data_dir", str(tmp_path / "data")]
    flags += ["--token_cache", str(tmp_path / "cache")]
    assert prepare.main(flags) == 0
    out = capsys.readouterr().out
    assert "1 file, 2 rows" in out and "1 file is of other kinds, and not read: .shout" in out
    assert "acme_reader" not in sys.modules
    assert prepare.main([*flags, "--reader", "shout"]) == 0
    assert "2 files, 2 rows" in capsys.readouterr().out


def test_a_library_that_is_missing_is_missed_where_a_file_needs_it_and_before_anything_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_all(tmp_path / "data")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    files = data_files(str(data), reader().suffixes, "option")
    reader().check(files[:4])
    with pytest.raises(UserError, match=r"pip install 'panda-train\[data\]'"):
        reader().check(files)
    monkeypatch.setattr("panda.run.preparation.Preparation.__init__", None)
    flags = ["--arch", "llama-tiny", "--instruction_tuning_data_dir", str(data)]
    assert prepare.main(flags) == 2
    assert "needs pyarrow" in capsys.readouterr().err
