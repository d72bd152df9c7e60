"""Which files are read."""

from __future__ import annotations

import os
from collections.abc import Callable
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

import panda
from panda.data.locations import data_files
from panda.data.locations import files_by_location
from panda.data.locations import identities
from panda.data.locations import other_files
from panda.data.locations import repeated_paths
from panda.registry import UserError
from panda.registry.location import resolve_path

SUFFIXES = (".json", ".jsonl")


def touch(*files: Path) -> list[Path]:
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("{}")
    return list(files)


def test_files_are_found_recursively_and_in_sorted_order(tmp_path: Path) -> None:
    expected = touch(
        tmp_path / "a" / "z.json", tmp_path / "b.json", tmp_path / "c" / "d" / "e.jsonl", tmp_path / "c.JSON"
    )
    touch(tmp_path / "notes.txt", tmp_path / "c" / "data.json.gz")
    assert data_files(str(tmp_path), SUFFIXES, "option") == sorted(expected)


def test_no_file_is_left_out_because_of_words_in_its_path(tmp_path: Path) -> None:
    names = ["test.json", "valid.json", "latest/contest.json", "invalid/test/validation.jsonl", "dev/eval.json"]
    expected = touch(*(tmp_path / name for name in names))
    assert data_files(str(tmp_path), SUFFIXES, "option") == sorted(expected)


def test_hidden_files_and_folders_below_the_given_one_are_left_out(tmp_path: Path) -> None:
    root = tmp_path / ".cache" / "data"
    [seen] = touch(root / "a.json")
    touch(root / ".a.json.swp.json", root / ".ipynb_checkpoints" / "a.json")
    assert data_files(str(root), SUFFIXES, "option") == [seen]


def test_a_file_is_read_whatever_its_suffix(tmp_path: Path) -> None:
    [file] = touch(tmp_path / "rows.txt")
    assert data_files(str(file), SUFFIXES, "option") == [file]


def test_files_behind_symbolic_links_are_found(tmp_path: Path) -> None:
    touch(tmp_path / "elsewhere" / "a.json")
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "linked").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    touch(tmp_path / "other" / "b.json")
    (folder / "b.json").symlink_to(tmp_path / "other" / "b.json")
    assert data_files(str(folder), SUFFIXES, "option") == [folder / "b.json", folder / "linked" / "a.json"]
    assert repeated_paths(str(folder), SUFFIXES, "option") == 0


def test_a_file_to_which_several_paths_of_one_location_lead_is_read_once(tmp_path: Path) -> None:
    [file] = touch(tmp_path / "data" / "a.json")
    (tmp_path / "data" / "b.json").symlink_to(file)
    os.link(file, tmp_path / "data" / "c.json")
    assert data_files(str(tmp_path), SUFFIXES, "option") == [file]
    assert repeated_paths([str(tmp_path), str(tmp_path / "*" / "c.json")], SUFFIXES, "option") == 3


@pytest.mark.parametrize("pattern", ["{}/**/*.json", "{}/**", "{}/d*/**/*.json"])
def test_links_to_folders_above_do_not_multiply_what_a_pattern_matches(tmp_path: Path, pattern: str) -> None:
    """glob follows them forty folders deep, and two of them without an end that anyone would wait for."""
    [file] = touch(tmp_path / "data" / "x" / "a.json")
    for link in ("loop", "other loop", "x/loop"):
        (tmp_path / "data" / link).symlink_to(tmp_path / "data")
    assert data_files(pattern.format(tmp_path), SUFFIXES, "option") == [file]


@pytest.mark.parametrize("name", ["a.json", "deeper/b.json"])
def test_a_link_to_nothing_is_an_error_and_not_passed_over(tmp_path: Path, name: str) -> None:
    touch(tmp_path / "good.json", tmp_path / "deeper" / "good.json")
    (tmp_path / "README").symlink_to("nothing")
    (tmp_path / name).symlink_to("nothing")
    for location in (str(tmp_path), str(tmp_path / "**"), str(tmp_path / "**" / "*.json"), str(tmp_path / name)):
        with pytest.raises(UserError, match=f"{name}: cannot be read: it is a link to 'nothing', which does not exist"):
            data_files(location, SUFFIXES, "option")


def test_a_pipe_within_a_folder_is_an_error(tmp_path: Path) -> None:
    touch(tmp_path / "good.json")
    os.mkfifo(tmp_path / "pipe.json")
    with pytest.raises(UserError, match=r"pipe\.json: neither a file nor a folder"):
        data_files(str(tmp_path), SUFFIXES, "option")


def test_a_folder_that_cannot_be_read_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests may run as root, who may read everything."""
    touch(tmp_path / "good.json", tmp_path / "locked" / "a.json")

    def listed(folder: Path, iterdir: Callable[[Path], Iterator[Path]] = Path.iterdir) -> Iterator[Path]:
        if folder.name == "locked":
            raise PermissionError(13, "Permission denied")
        return iterdir(folder)

    monkeypatch.setattr(Path, "iterdir", listed)
    for location in (str(tmp_path), str(tmp_path / "**" / "*.json")):
        with pytest.raises(UserError, match="locked: cannot be read: Permission denied"):
            data_files(location, SUFFIXES, "option")


def test_what_cannot_be_the_name_of_a_file_is_an_error(tmp_path: Path) -> None:
    """An empty path would be the current folder: a variable of the shell that is not set."""
    [file] = touch(tmp_path / "good.json")
    for empty in ("", " ", [str(file), ""]):
        with pytest.raises(UserError, match="option: an empty path is given"):
            data_files(empty, SUFFIXES, "option")
    with pytest.raises(UserError, match=r"option: 'x{300}' cannot be read: File name too long"):
        data_files("x" * 300, SUFFIXES, "option")
    with pytest.raises(UserError, match=r"option: 'x\\x00' does not exist"):
        data_files("x\0", SUFFIXES, "option")


def test_a_symbolic_link_to_a_folder_above_ends(tmp_path: Path) -> None:
    [file] = touch(tmp_path / "data" / "a.json")
    (tmp_path / "data" / "loop").symlink_to(tmp_path / "data", target_is_directory=True)
    assert data_files(str(tmp_path / "data"), SUFFIXES, "option") == [file]


def test_several_paths_are_read_in_their_order_and_each_file_once(tmp_path: Path) -> None:
    z, a, b = touch(tmp_path / "z.json", tmp_path / "d" / "a.json", tmp_path / "d" / "b.json")
    (tmp_path / "link.json").symlink_to(b)
    locations = [str(z), str(tmp_path / "link.json"), str(tmp_path)]
    assert files_by_location(locations, SUFFIXES, "option") == [[z], [tmp_path / "link.json"], [a]]
    with pytest.raises(UserError, match=r"option: all files of '.*z\.json' are those of paths before it"):
        data_files([str(tmp_path), str(z)], SUFFIXES, "option")
    with pytest.raises(UserError, match="option: 'nowhere' does not exist"):
        data_files([str(z), "nowhere"], SUFFIXES, "option")
    with pytest.raises(UserError, match="option: no path is given"):
        data_files([], SUFFIXES, "option")


def test_patterns_name_files_by_an_ending_of_their_own_and_otherwise_what_is_there(tmp_path: Path) -> None:
    a, b, log, deep = touch(*(tmp_path / name for name in ("a.json", "b.jsonl", "c.log", "d/e.json")))
    touch(tmp_path / ".hidden.json")
    assert data_files(str(tmp_path / "*"), SUFFIXES, "option") == [a, b, deep]
    assert other_files(str(tmp_path / "*"), SUFFIXES) == {".log": 1}
    assert data_files(str(tmp_path / "*.log"), SUFFIXES, "option") == [log]
    assert data_files(str(tmp_path / "**" / "*.json"), SUFFIXES, "option") == [a, deep]
    assert data_files(str(tmp_path / "[bd]*"), SUFFIXES, "option") == [b, deep]
    assert len(identities([str(tmp_path / "*.js*"), str(tmp_path / "d")])) == 3
    with pytest.raises(UserError, match=r"option: nothing matches the pattern '.*\.csv'"):
        data_files(str(tmp_path / "*.csv"), SUFFIXES, "option")


def test_a_name_that_looks_like_a_pattern_is_a_name(tmp_path: Path) -> None:
    [file] = touch(tmp_path / "rows[1].json")
    assert data_files(str(file), SUFFIXES, "option") == [file]


def test_a_place_that_does_not_exist_is_an_error_with_the_key_the_place_and_the_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        data_files("no/such/folder", SUFFIXES, "instruction_tuning_data_dir")
    for part in ("instruction_tuning_data_dir", "'no/such/folder' does not exist", str(Path.cwd()), ".json or .jsonl"):
        assert part in str(error.value)


def test_an_empty_folder_is_an_error_that_says_so(tmp_path: Path) -> None:
    touch(tmp_path / "deeper" / ".hidden.json")
    with pytest.raises(UserError, match=r"option: '.*' has no file that ends in \.json or \.jsonl; it is empty"):
        data_files(str(tmp_path), SUFFIXES, "option")


@pytest.mark.parametrize(
    ("names", "seen"),
    [(["a.txt", "b.csv", "c.txt"], "it has .csv, .txt"), (["README"], "it has README")],
)
def test_a_folder_of_other_files_is_an_error_that_says_what_is_there(
    tmp_path: Path, names: list[str], seen: str
) -> None:
    touch(*(tmp_path / name for name in names))
    with pytest.raises(UserError) as error:
        data_files(str(tmp_path), SUFFIXES, "option")
    assert f"; {seen}. `reader` says how files are read" in str(error.value)


def test_panda_begins_a_path_inside_the_package_and_a_tilde_one_at_home(monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_path("panda:data/sample") == Path(panda.__file__).parent / "data" / "sample"
    assert resolve_path("panda:data/sample/tokenizer").is_dir()
    monkeypatch.setenv("HOME", "/home/someone")
    assert resolve_path("~/x") == Path("/home/someone/x")
    assert resolve_path("~root/x") == Path("/root/x")
    with pytest.raises(UserError, match=r"^'~nosuch/x': there is no user 'nosuch'\. Write the whole path\.$"):
        resolve_path("~nosuch/x")
    monkeypatch.setattr("pwd.getpwnam", lambda name: SimpleNamespace(pw_dir=f"/nonexistent/{name}"))
    with pytest.raises(UserError, match=r"^'~nobody/x': 'nobody' has no home folder \(/nonexistent/nobody does not"):
        resolve_path("~nobody/x")  # which root could make
    assert resolve_path("x/y") == Path("x/y")


def test_a_package_begins_a_path_inside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As ``panda:`` does, where that is there: ``FOLDER:SPLIT`` is written so, too, and a folder comes first."""
    (tmp_path / "site" / "acme_data" / "sample" / "rows").mkdir(parents=True)
    (tmp_path / "site" / "acme_data" / "__init__.py").write_text("raise AssertionError('imported')")
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.chdir(tmp_path)
    assert resolve_path("acme_data:sample") == tmp_path / "site" / "acme_data" / "sample"
    assert resolve_path("acme_data:other") == Path("acme_data:other")
    assert resolve_path("acme_data:") == Path("acme_data:")
    assert resolve_path("nothing_here:sample") == Path("nothing_here:sample")
    (tmp_path / "acme_data").mkdir()
    assert resolve_path("acme_data:sample") == Path("acme_data:sample")
    assert resolve_path("acme_data:sample/rows") == tmp_path / "site" / "acme_data" / "sample" / "rows"
