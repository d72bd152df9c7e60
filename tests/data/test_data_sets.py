"""Data sets in the layouts of the hub and of the library `datasets`, which says what is in them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import datasets
import pytest

from panda.data.auto_reader import AutoOptions
from panda.data.auto_reader import AutoReader
from panda.data.data_sets import data_set_at
from panda.data.data_sets import settled
from panda.data.locations import data_files
from panda.data.locations import identities
from panda.data.locations import other_files
from panda.data.reading import BadRow
from panda.data.reading import Fields
from panda.registry import UserError
from panda.registry.contexts import ReaderContext

CARD = """---
license: mit
configs:
- config_name: main
  default: true
  data_files:
  - split: train
    path: main/part-*
  - split: test
    path: main/held.jsonl
- config_name: more
  data_dir: more
---
# A data set
"""
WITHOUT_DEFAULT = CARD.replace("  default: true\n", "")


def rows(count: int, of: str) -> list[dict[str, Any]]:
    return [{"question": f"{of} {number}?", "answer": f"say {number}"} for number in range(count)]


def write(file: Path, content: list[dict[str, Any]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in content))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in the layout of the hub, at ``org/set`` below the working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache of datasets")
    made = Path("org/set")
    write(made / "main" / "part-1.jsonl", rows(4, "one"))
    write(made / "main" / "part-0.jsonl", rows(3, "zero"))
    write(made / "main" / "held.jsonl", rows(2, "held"))
    write(made / "more" / "train-00000-of-00001.jsonl", rows(5, "more"))
    write(made / "more" / "dev.jsonl", rows(1, "dev"))
    write(Path("beside.jsonl"), rows(1, "beside"))
    (made / "README.md").write_text(CARD)
    return made


def read(location: str) -> list[dict[str, Any]]:
    """What panda reads at ``location``, as a run does: settled first."""
    reader = AutoReader(AutoOptions(), ReaderContext())
    found = []
    for file in data_files(settled(location), reader.suffixes, "KEY"):
        for row in reader.read(file):
            assert not isinstance(row, BadRow)
            found.append(dict(Fields(row.fields).items()))
    return found


@pytest.mark.parametrize(
    ("choice", "named"),
    [
        ("", ("main", "train")),
        (":main", ("main", "train")),
        (":test", ("main", "test")),
        (":main:test", ("main", "test")),
        (":more", ("more", "train")),
        (":more:validation", ("more", "validation")),
    ],
)
def test_a_folder_with_a_card_has_the_rows_that_datasets_finds_in_it(
    folder: Path, choice: str, named: tuple[str, str]
) -> None:
    expected = datasets.load_dataset(str(folder), named[0], split=named[1]).to_list()
    assert expected and read(f"org/set{choice}") == expected
    assert settled(f"org/set{choice}") == f"org/set:{':'.join(named)}"
    assert settled(f"org/set:{':'.join(named)}") == f"org/set:{':'.join(named)}"
    found = data_set_at(f"org/set{choice}")
    assert found is not None and (found.configuration, found.split, found.revision) == (*named, None)


def test_what_was_found_is_described_with_what_is_left_out(folder: Path) -> None:
    found = data_set_at(settled("org/set"))
    assert found is not None
    assert found.describe() == "org/set: configuration main (and not more), split train (and not test), 2 files"
    assert found.record() == {
        "location": "org/set:main:train",
        "name": "org/set",
        "configuration": "main",
        "split": "train",
        "revision": None,
        "files": ["org/set/main/part-0.jsonl", "org/set/main/part-1.jsonl"],
    }


@pytest.mark.parametrize(
    ("card", "choice", "told"),
    [
        (CARD, ":main:dev", r"org/set:main has no split 'dev'; it has train and test. Name one: org/set:main:train"),
        (CARD, ":dev", r"org/set:main has no split 'dev'"),
        (CARD, ":other:train", r"org/set has no configuration 'other'; it has main, more\."),
        (WITHOUT_DEFAULT, "", r"several configurations, and none is named: it has main, more. Write org/set:main"),
        (WITHOUT_DEFAULT, ":test", r"several configurations, and 'test' is none of them"),
        (CARD.replace("config_name: more", "config_name: test"), ":test", r"org/set:test:SPLIT or org/set:main:test\."),
        (
            CARD.replace("main/part-*", "../../*.jsonl"),
            "",
            r"its card names .*beside\.jsonl, which is not in its",
        ),
        (CARD.replace("main/part-*", "nothing/*"), "", r"the library `datasets` finds no files of splits in it"),
        (CARD.replace("split: test", "split: train"), ":test", "datasets"),
    ],
    ids=["split", "split-alone", "config", "several", "neither", "both", "elsewhere", "nothing", "broken"],
)
def test_what_it_lacks_is_an_error_with_what_there_is(folder: Path, card: str, choice: str, told: str) -> None:
    (folder / "README.md").write_text(card)
    with pytest.raises(UserError, match=told):
        settled(f"org/set{choice}")


def test_a_folder_without_a_card_is_all_its_files_unless_a_split_is_named(folder: Path) -> None:
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# Rows\nconfigs: none")
    assert settled("org/set") == "org/set"
    assert len(read("org/set")) == 15
    assert read("org/set:validation") == rows(1, "dev")
    (folder / "README.md").unlink()
    assert len(read("org/set")) == 15


@pytest.mark.parametrize("named", ["", "  config_name: old\n"])
def test_a_card_without_configurations(folder: Path, named: str) -> None:
    """As `push_to_hub` wrote it once. Splits follow from the names of files."""
    described = "  features:\n  - name: question\n    dtype: string\n  - name: answer\n    dtype: string\n"
    described += "  splits:\n  - name: train\n    num_examples: 5\n  - name: validation\n    num_examples: 1\n"
    (folder / "more" / "README.md").write_text(f"---\ndataset_info:\n{named}{described}---\n")
    assert read("org/set/more") == rows(5, "more")
    assert read("org/set/more:validation") == rows(1, "dev")
    assert settled("org/set/more").startswith("org/set/more:")


def test_what_the_card_says_of_reading_and_is_not_followed_is_said(folder: Path) -> None:
    (folder / "t.csv").write_text("question;answer\na;b\n")
    (folder / "README.md").write_text(
        '---\nconfigs:\n- config_name: main\n  data_files: t.csv\n  sep: ";"\n  quotechar: "\'"\n---\n'
    )
    found = data_set_at("org/set")
    assert found is not None
    assert found.describe().endswith("""its card says quotechar "'", sep ';', which is not followed""")


def test_files_that_the_reader_does_not_read_are_an_error(folder: Path) -> None:
    (folder / "README.md").write_text("---\nconfigs:\n- config_name: main\n  data_files: main/*\n---\n")
    (folder / "main" / "more.jsonl.lz4").write_bytes(b"")
    with pytest.raises(UserError, match=r"KEY: org/set:main:train has files that end in \.lz4, and the reader reads"):
        read("org/set")


def test_datasets_is_needed_for_a_card_only(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"org/set: .* library `datasets`.* pip install 'panda-train\[hub\]'"):
        settled("org/set")
    assert settled("org/set/main") == "org/set/main"


# -- what `datasets` writes ---------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A DatasetDict at ``saved`` and a Dataset at ``alone``, of several files, as `save_to_disk` writes them."""
    monkeypatch.chdir(tmp_path)
    train = datasets.Dataset.from_list(rows(12, "train")).shuffle(seed=1)
    both = datasets.DatasetDict(train=train, test=datasets.Dataset.from_list(rows(2, "test")))
    both.save_to_disk("saved", num_shards={"train": 3, "test": 1})
    train.save_to_disk("alone", num_shards=3)
    return Path("saved")


def test_a_saved_data_set_has_the_rows_that_datasets_loads(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = datasets.load_from_disk("saved")
    alone = datasets.load_from_disk("alone").to_list()
    monkeypatch.setitem(sys.modules, "datasets", None)  # which is not needed
    assert read("saved") == read("saved:train") == expected["train"].to_list() == alone == read("alone")
    assert read("saved:test") == read("saved/test") == expected["test"].to_list()
    assert settled("saved") == "saved:train" and settled("alone") == "alone"
    found = data_set_at("saved")
    assert found is not None
    assert found.describe() == "saved: split train (and not test), 3 files"
    assert identities("saved:test").isdisjoint(identities("saved"))
    assert not other_files(["saved", "alone"], (".arrow",))


def test_files_of_an_earlier_save_are_not_read(saved: Path) -> None:
    left = Path("alone/data-00003-of-00004.arrow")
    left.write_bytes(Path("alone/data-00000-of-00003.arrow").read_bytes())
    state = json.loads(Path("alone/state.json").read_bytes())
    state["_data_files"].reverse()
    Path("alone/state.json").write_text(json.dumps(state))
    assert read("alone") == datasets.load_from_disk("alone").to_list()


def test_saved_data_sets_within_other_folders(saved: Path) -> None:
    write(Path("all/rows.jsonl"), rows(1, "rows"))
    Path("alone").rename("all/alone")
    assert len(read("all")) == len(read("all/*")) == 13
    assert len(read("all/**")) == 13
    saved.rename("all/saved")
    told = r"KEY: .*all/saved is a data set with the splits train and test. Name it by itself, .*all/saved:train"
    with pytest.raises(UserError, match=told):
        read("all")


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("saved:dev", r"saved has no split 'dev'; it has train and test"),
        ("saved:main:train", r"saved:main:train: saved has splits, and no configurations"),
        ("alone:dev", r"alone has no split 'dev'; it has train\."),
    ],
)
def test_a_split_that_was_not_saved(saved: Path, name: str, told: str) -> None:
    with pytest.raises(UserError, match=told):
        settled(name)


def test_a_saved_data_set_that_is_damaged(saved: Path) -> None:
    Path("alone/data-00001-of-00003.arrow").unlink()
    with pytest.raises(UserError, match=r"alone: state\.json names data-00001-of-00003\.arrow, which is not there"):
        settled("alone")
    Path("alone/state.json").write_text("{")
    with pytest.raises(UserError, match=r"alone/state\.json: cannot be read"):
        settled("alone")
    Path("alone/state.json").write_text("{}")
    with pytest.raises(UserError, match=r"alone/state\.json: it names no files of data"):
        settled("alone")
    (saved / "dataset_dict.json").write_text('{"splits": ["test"]}')
    with pytest.raises(UserError, match=r"saved has no split 'train'; it has test"):
        settled("saved")


def test_what_datasets_prepared_in_its_cache(folder: Path) -> None:
    """The cache of a data set that `load_dataset` has loaded, which may be all that a machine without network has."""
    split = datasets.load_dataset(str(folder), "main", split="train", cache_dir="prepared")
    [info] = Path("prepared").rglob("dataset_info.json")
    assert read(str(info.parent)) == split.to_list()
    assert read(f"{info.parent}:test") == rows(2, "held")


@pytest.mark.parametrize("revision", ["a" * 40, None])
def test_the_revision_of_a_local_copy(folder: Path, revision: str | None) -> None:
    """`hf download --local-dir` notes the commit of each file."""
    for number, commit in enumerate([revision, revision] if revision else ["a" * 40, "b" * 40]):
        note = folder / ".cache" / "huggingface" / "download" / "main" / f"part-{number}.jsonl.metadata"
        note.parent.mkdir(parents=True, exist_ok=True)
        note.write_text(f"{commit}\netag\n1700000000.0\n")
    found = data_set_at("org/set")
    assert found is not None and found.revision == revision


@pytest.mark.parametrize("location", ["x" * 5000, "a/" + "b" * 5000 + ".json", "a\0b", "org/set.json", ""])
def test_what_is_no_data_set_is_left_as_it_is(location: str) -> None:
    assert settled(location) == location
