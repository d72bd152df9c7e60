from __future__ import annotations

from pathlib import Path

import pytest

from panda.configuration.options import RunOptions
from panda.registry import Catalog
from panda.registry import UserError
from panda.registry.flat_yaml import load_flat_yaml
from panda.registry.options import Given
from panda.registry.resolve import resolve


def load(tmp_path: Path, text: str | bytes) -> dict[str, Given]:
    file = tmp_path / "run.yaml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return load_flat_yaml(file)


def refusal(tmp_path: Path, text: str | bytes) -> str:
    with pytest.raises(UserError) as caught:
        load(tmp_path, text)
    message = str(caught.value)
    assert message.startswith(str(tmp_path / "run.yaml"))
    return message.removeprefix(str(tmp_path / "run.yaml"))


def test_scalars_keep_their_own_characters(tmp_path: Path) -> None:
    given = load(tmp_path, "a: 1e-4\nb: 12:30:00\nc: 007\nd: 1_000\ne: 2024-01-01\nf: 'no'\ng: hello  # said\n")
    assert {key: entry.value for key, entry in given.items()} == {
        "a": "1e-4",
        "b": "12:30:00",
        "c": "007",
        "d": "1_000",
        "e": "2024-01-01",
        "f": "no",
        "g": "hello",
    }


def test_yaml_words_are_what_yaml_says_unless_quoted(tmp_path: Path) -> None:
    given = load(tmp_path, "a: no\nb: Yes\nc: 'yes'\nd: ~\ne:\nf: \"null\"\ng: off\n")
    assert [entry.value for entry in given.values()] == [False, True, "yes", None, None, "null", False]
    assert given["a"].text == "no"


def test_each_key_knows_its_line(tmp_path: Path) -> None:
    given = load(tmp_path, "# a comment\n\nfirst: 1\nlist:\n  - a\n  - b\nlast: 2\n")
    lines = {key: entry.origin.rpartition(":")[2] for key, entry in given.items()}
    assert lines == {"first": "3", "list": "4", "last": "7"}
    assert given["first"].origin == f"{tmp_path / 'run.yaml'}:3"


def test_lists_of_scalars_are_taken(tmp_path: Path) -> None:
    given = load(tmp_path, "a: [x, 1, no]\nb:\n- y\nc: []\n")
    assert [entry.value for entry in given.values()] == [("x", "1", False), ("y",), ()]


def test_a_repeated_key_is_refused_with_both_lines(tmp_path: Path) -> None:
    message = refusal(tmp_path, "seed: 1\nother: 2\nseed: 3\n")
    assert message == f":3: 'seed' is given twice, first at {tmp_path / 'run.yaml'}:1. Keep one."


@pytest.mark.parametrize(
    "text", ["a: 1\noptimizer:\n  name: adamw\n", "a: 1\noptimizer: [[1]]\n", "a: 1\noptimizer: [{b: 1}]\n"]
)
def test_a_nested_value_is_one_that_no_option_takes(tmp_path: Path, text: str) -> None:
    given = load(tmp_path, text)
    assert [key for key, each in given.items() if each.is_nested] == ["optimizer"]
    with pytest.raises(UserError) as caught:
        resolve(Catalog(), RunOptions, given)
    assert f"{tmp_path / 'run.yaml'}:2: the value of 'optimizer' is nested." in str(caught.value)


@pytest.mark.parametrize("text", ["", "# only a comment\n", "---\n"])
def test_an_empty_file_is_an_empty_configuration(tmp_path: Path, text: str) -> None:
    assert load(tmp_path, text) == {}


def test_invalid_yaml_is_named_with_its_line(tmp_path: Path) -> None:
    message = refusal(tmp_path, "a: 1\nb: [1, 2\nc: 3\n")
    assert message.startswith(":3: not valid YAML: while parsing a flow sequence, ")
    assert refusal(tmp_path, "a: 1\nb: c: d\n") == ":2: not valid YAML: mapping values are not allowed here."
    assert "tab" in refusal(tmp_path, "a:\n\tb\n") or "\\t" in refusal(tmp_path, "a:\n\tb\n")
    assert "not valid YAML" in refusal(tmp_path, "a: \x01\n")


def test_two_documents_are_refused(tmp_path: Path) -> None:
    message = refusal(tmp_path, "a: 1\n---\nb: 2\n")
    assert message == ":2: not valid YAML: expected a single document in the stream, but found another document."


@pytest.mark.parametrize(("text", "found"), [("- a\n- b\n", "a list"), ("just words\n", "the text 'just words'")])
def test_what_is_no_mapping_is_refused(tmp_path: Path, text: str, found: str) -> None:
    assert refusal(tmp_path, text) == f":1: expected `key: value` lines, found {found}."


def test_a_key_that_is_no_word_is_refused(tmp_path: Path) -> None:
    assert refusal(tmp_path, "a: 1\n[b, c]: 1\n") == ":2: a key must be a word."


def test_a_file_that_is_not_there_is_named_with_the_folder_that_was_searched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        load_flat_yaml(Path("missing.yaml"))
    assert str(caught.value) == f"missing.yaml: no such configuration file (looked in {tmp_path})."


def test_a_folder_and_a_file_that_is_not_utf8_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="it is a folder, not a configuration file"):
        load_flat_yaml(tmp_path)
    assert "cannot be read" in refusal(tmp_path, "a: é\n".encode("latin-1"))


def test_a_byte_order_mark_is_no_part_of_the_first_key(tmp_path: Path) -> None:
    assert list(load(tmp_path, b"\xef\xbb\xbfseed: 1\n")) == ["seed"]


def test_an_alias_stands_for_its_anchor_and_a_tag_runs_nothing(tmp_path: Path) -> None:
    given = load(tmp_path, "a: &x 3\nb: *x\nc: !!python/name:os.system ''\nd: !!bool perhaps\n")
    assert [entry.value for entry in given.values()] == ["3", "3", "", "perhaps"]


def test_lists_in_lists_without_end_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("a: " + "[" * 2000)
    with pytest.raises(UserError, match=r"run.yaml: nested too deeply"):
        load_flat_yaml(file)
