"""Data sets by their names on the Hugging Face hub, which is served here, in processes of their own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pytest
import yaml
from hub_server import Hub
from hub_server import hub_of
from launching import BIN
from launching import ENVIRONMENT
from pyarrow import parquet

OLD, NEW, SCRIPT, BARE = "a" * 40, "b" * 40, "c" * 40, "d" * 40
CARD = """---
configs:
- config_name: main
  data_files:
  - {split: train, path: "main/train-*"}
  - {split: test, path: "main/test-*"}
- config_name: more
  data_files: more.jsonl
---
"""


def rows(count: int, of: str) -> list[dict[str, str]]:
    return [{"question": f"{of} {number}?", "answer": f"say {number}"} for number in range(count)]


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    """``org/set`` with two commits, of which the old one is current, and data sets of other kinds."""
    root = tmp_path / "hub"
    for commit, count in ((OLD, 6), (NEW, 8)):
        folder = root / "datasets" / "org" / "set" / commit
        (folder / "main").mkdir(parents=True)
        (folder / "README.md").write_text(CARD)
        parts = {"train-00000-of-00002": count - 2, "train-00001-of-00002": 2, "test-00000-of-00001": 2}
        for name, number in parts.items():
            table = pyarrow.Table.from_pylist(rows(number, f"{commit[0]} {name}"))
            parquet.write_table(table, folder / "main" / f"{name}.parquet")
        (folder / "more.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows(3, "more"), {"a": 1}]))
    bare = root / "datasets" / "org" / "bare" / BARE
    bare.mkdir(parents=True)
    (bare / "train.csv").write_text("question,answer\na,b\n")
    (bare / "test.csv").write_text("question,answer\nc,d\n")
    script = root / "datasets" / "org" / "made" / SCRIPT
    script.mkdir(parents=True)
    (script / "made.py").write_text("raise SystemExit('this code was run')")
    for folder in (bare, script):
        (folder / ".gitattributes").touch()
    shutil.copytree(bare, root / "datasets" / "org" / "gated" / BARE)
    with hub_of(root) as serving:
        serving.heads |= {"org/set": OLD, "org/bare": BARE, "org/made": SCRIPT, "org/gated": BARE}
        serving.gated.add("org/gated")
        yield serving


@pytest.fixture
def environment(hub: Hub, tmp_path: Path) -> dict[str, str]:
    """Of a user with an empty cache whose hub is ``hub``."""
    online = {"HF_HUB_OFFLINE": "0", "NO_PROXY": "127.0.0.1,localhost", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    return ENVIRONMENT | online | {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "home")}


LOOK = """
import json, sys
from panda.configuration.arguments import parse_arguments
from panda.configuration.configure import configure
from panda.registry import UserError
from panda.run.first_look import look_for_inputs
from panda.run.sources import data_settings, with_lasting_sources
found = []
for given in json.loads(sys.argv[1]):
    try:
        words = ["--arch", "llama-tiny", "--instruction_tuning_data_dir", *given.split(" ")]
        configuration = with_lasting_sources(configure(parse_arguments(words)))
        look_for_inputs(configuration)
        found.append(data_settings(configuration.resolved)[0].value[0])
    except UserError as problem:
        found.append(f"error: {problem}")
assert "torch" not in sys.modules
print(json.dumps(found))
"""


def look(*locations: str, cwd: Path, environment: dict[str, str]) -> list[str]:
    """What each of ``locations`` is settled to at the start of a run, once its files are there; or an error.

    One may have more words after it.
    """
    command = [sys.executable, "-c", LOOK, json.dumps(locations)]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    print(done.stderr)
    found: list[str] = json.loads(done.stdout.splitlines()[-1])
    return found


def data_fetched(hub: Hub) -> list[str]:
    return [name for name in hub.fetched() if name not in ("README.md", ".gitattributes")]


def test_names_mean_files_of_a_commit_which_are_fetched_once(
    hub: Hub, environment: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ["org/set:main", "org/set:main:test", "org/set:more", f"org/set:main@{NEW}", "org/bare", "org/bare:test"]
    expected = [
        f"org/set:main:train@{OLD}",
        f"org/set:main:test@{OLD}",
        f"org/set:more:train@{OLD}",
        f"org/set:main:train@{NEW}",
        f"org/bare:default:train@{BARE}",
        f"org/bare:default:test@{BARE}",
    ]
    assert look(*names[:1], cwd=tmp_path, environment=environment) == expected[:1]
    assert data_fetched(hub) == ["train-00000-of-00002.parquet", "train-00001-of-00002.parquet"]
    assert look(*names, cwd=tmp_path, environment=environment) == expected
    assert len(data_fetched(hub)) == 2 + 1 + 1 + 2 + 1 + 1

    hub.asked.clear()
    offline = environment | {"HF_HUB_OFFLINE": "1"}
    assert look(*names, *expected, cwd=tmp_path, environment=offline) == [*expected, *expected]
    assert (
        f"note: org/set: {OLD} is the revision that the local cache has for main: the Hugging"
        in capsys.readouterr().out
    )
    down = environment | {"HF_ENDPOINT": "http://127.0.0.1:9"}
    assert look(names[0], expected[0], cwd=tmp_path, environment=down) == [expected[0], expected[0]]
    assert hub.asked == []
    assert (
        "that the local cache has for main: http://127.0.0.1:9/datasets/org/set could not be" in capsys.readouterr().out
    )

    hub.heads["org/set"] = NEW
    found = look("org/set:main", expected[0], cwd=tmp_path, environment=environment)
    assert found == [f"org/set:main:train@{NEW}", expected[0]], "a name means the current commit"


def test_what_the_hub_does_not_give_is_an_error_at_once(hub: Hub, environment: dict[str, str], tmp_path: Path) -> None:
    told = {
        "org/nope": r"'org/nope' does not exist (looked in",
        "org/nope:main": f"there is no data set at {hub.endpoint}/datasets/org/nope, or you have no access to it",
        "org/set": "org/set has several configurations, and none is named: it has main, more. Write org/set:main",
        "org/set:main:dev": "org/set:main has no split 'dev'; it has train and test. Name one: org/set:main:train",
        "org/set:main@dev": f"{hub.endpoint}/datasets/org/set has no such revision (Invalid rev id: dev).",
        "org/set:main:train[:10%]": "a part of a split cannot be named. `max_samples` uses",
        "org/gated": "is gated: Access to dataset org/gated is restricted.",
        "org/made": "org/made is made by a program of its repository, made.py, and panda runs no code of data sets.",
        "org/rows.jsonl": "'org/rows.jsonl' does not exist (looked in",
    }
    found = look(*told, cwd=tmp_path, environment=environment)
    for text, expected in zip(found, told.values(), strict=True):
        assert text.startswith("error: instruction_tuning_data_dir: ") and expected in text, text
    assert "and on the hub: there is no data set at" in found[0] and "on the hub" not in found[-1]
    assert data_fetched(hub) == []
    offline = environment | {"HF_HUB_OFFLINE": "1"}
    late = [
        "org/set:main --tokenizer nowhere",
        "org/set:main nowhere.json",
        "org/set:main --eval_data_dir nowhere.json",
    ]
    for text in look(*late, cwd=tmp_path, environment=environment):
        assert "nowhere" in text and text.startswith("error: ")
    assert data_fetched(hub) == [], "data is fetched once all else is there"
    [text] = look("org/set:main", cwd=tmp_path, environment=offline | {"HF_HOME": "none"})
    not_asked = "the Hugging Face hub is not asked, since HF_HUB_OFFLINE is set. Unset it, or name a folder."
    assert f"the data set 'org/set' is not in the local cache, and {not_asked}" in text


def test_a_path_of_the_same_form_is_the_path(hub: Hub, environment: dict[str, str], tmp_path: Path) -> None:
    local = tmp_path / "org" / "set"
    shutil.copytree(hub.root / "datasets" / "org" / "set" / NEW, local)
    names = ["org/set:main", "org/set/main", "org/set/more.jsonl", f"org/set:main@{OLD}"]
    found = look(*names, cwd=tmp_path, environment=environment)
    assert found == ["org/set:main:train", "org/set/main", "org/set/more.jsonl", f"org/set:main:train@{OLD}"]


def test_a_cache_that_datasets_filled_has_no_list_of_files(
    hub: Hub, environment: dict[str, str], tmp_path: Path
) -> None:
    [expected, _] = look("org/set:main", "org/set:main:test", cwd=tmp_path, environment=environment)
    [trees] = (tmp_path / "home").rglob("trees")
    shutil.rmtree(trees)
    offline = environment | {"HF_HUB_OFFLINE": "1"}
    found, text = look("org/set:main", "org/set:more", cwd=tmp_path, environment=offline)
    assert found == expected
    assert "The local cache may have only a part of it, and the hub was not asked." in text
    [part] = (tmp_path / "home").rglob("snapshots/*/main/train-00001*")
    part.unlink()
    [text] = look("org/set:main", cwd=tmp_path, environment=offline)
    assert "org/set: 1 of the 2 files main/train-*-of-00002.parquet are there" in text


def run(*argv: object, cwd: Path, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([*map(str, argv)], cwd=cwd, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def test_a_resumed_run_reads_the_commit_that_it_began_with(
    hub: Hub, environment: dict[str, str], tmp_path: Path
) -> None:
    command = [
        *(BIN / "panda-train", "--arch", "llama-tiny", "--instruction_tuning_data_dir", "org/set:main, org/set:more"),
        *("--data_weights", "1, 2", "--eval_data_dir", "org/set:main:test", "--output_dir", "run", "--resume", "auto"),
        *("--max_seq_length", 64, "--gradient_accumulation_steps", 1, "--num_workers", 0, "--prompts", "x"),
        *("-p", "no:tensorboard", "-p", "no:plot"),
    ]
    done = run(*command, "--max_steps", 1, cwd=tmp_path, environment=environment)
    train, more, held = f"org/set:main:train@{OLD}", f"org/set:more:train@{OLD}", f"org/set:main:test@{OLD}"
    assert f"data        {train}, {more}: 9 samples of 10 rows in 3 files\n" in done.stdout
    found = f"configuration main (and not more), split train (and not test), revision {OLD}, 2 files"
    assert f" org/set: {found}\n" in done.stdout
    assert f" org/set: configuration more (and not main), split train, revision {OLD}, 1 file\n" in done.stdout
    assert f" {held}: 2 samples of 2 rows in 1 file\n" in done.stdout
    assert "more.jsonl, row 4: " in done.stdout
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert config["instruction_tuning_data_dir"] == [train, more] and config["eval_data_dir"] == held
    recorded: list[dict[str, Any]] = json.loads((tmp_path / "run" / "provenance.json").read_text())["data_sets"]
    assert [each["location"] for each in recorded] == [held, train, more]
    assert {each["revision"] for each in recorded} == {OLD}
    assert all(os.path.exists(file) for each in recorded for file in each["files"])

    hub.heads["org/set"] = NEW
    done = run(*command, "--max_steps", 2, cwd=tmp_path, environment=environment)
    assert f"data        {train}, {more}: 9 samples" in done.stdout and "step 1 of 2" in done.stdout
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["eval_data_dir"] == held
    out = run(BIN / "panda", "tokenizer", "org/set:more", "--vocab_size", 270, cwd=tmp_path, environment=environment)
    assert f"org/set: configuration more (and not main), split train, revision {NEW}, 1 file\n" in out.stdout
    assert "tokenizer: 265 entries, from 3 rows" in out.stdout
