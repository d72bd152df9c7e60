"""Tokenised once: what comes out of the cache is what was put in, or it is made again, or refused in clear words."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from collections.abc import Iterator
from concurrent.futures import Future
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from panda.data import content_hash
from panda.data import token_cache
from panda.data import tokenising
from panda.data.json_reader import JsonReader
from panda.data.reading import BadRow
from panda.data.reading import Row
from panda.data.recipe import Recipe
from panda.data.token_cache import TokenCache
from panda.data.token_dataset import SampleBlock
from panda.data.token_dataset import TokenDataset
from panda.files.activity import Activity
from panda.files.activity import activity
from panda.files.locks import held
from panda.registry import NoOptions
from panda.registry import UserError
from panda.registry.contexts import ReaderContext

made: Counter[str] = Counter()
"""Rows that were tokenised in this process, by the file they came from."""


def tokenise(rows: list[Row | BadRow]) -> SampleBlock:
    """A token a character."""
    block = SampleBlock()
    block.report.rows = len(rows)
    for row in rows:
        made[row.file.name] += 1
        if isinstance(row, BadRow):
            block.report.add_bad(row)
        else:
            text = row.fields["text"]
            block.add([ord(character) for character in text], bytes(1) + b"\1" * (len(text) - 1))
    return block


def write(file: Path, texts: list[str]) -> Path:
    """As if it had been there for a minute."""
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    os.utime(file, (time.time() - 60, time.time() - 60))
    return file


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    made.clear()
    file = write(tmp_path / "a.jsonl", ["hello", "there 🐼"[:5], "again"])
    return Recipe("data_dir", "a.jsonl", [file], JsonReader(NoOptions(), ReaderContext()), tokenise, 300, {"task": 1})


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files count as settled at once, though no test can make one that was changed a minute ago: ctime is now."""
    monkeypatch.setattr(content_hash, "_SETTLED_SECONDS", -1.0)


@pytest.fixture
def cache(tmp_path: Path) -> TokenCache:
    return TokenCache(tmp_path / "cache")


def texts(dataset: TokenDataset) -> list[str]:
    return ["".join(map(chr, dataset[index]["token_ids"])) for index in range(len(dataset))]


def folder_of(dataset: TokenDataset) -> Path:
    assert dataset.directory is not None
    return dataset.directory


def test_what_is_cached_is_what_was_made(recipe: Recipe, cache: TokenCache) -> None:
    write(recipe.files[0], ["hello", "there"])
    with recipe.files[0].open("a") as file:
        file.write("7\n")
    in_memory, first, second = recipe.in_memory(), cache.samples(recipe), cache.samples(recipe)
    assert made["a.jsonl"] == 6, "the third time nothing is tokenised"
    for dataset in (in_memory, first, second):
        assert texts(dataset) == ["hello", "there"]
        assert dataset[0]["supervised"].tolist() == [False, True, True, True, True]
        assert (dataset.tokens, dataset.supervised_tokens) == (10, 8)
        assert (dataset.report.files, dataset.report.rows, dataset.report.bad_rows) == (1, 3, 1)
        assert dataset.report.first_bad_lines()[0].endswith("row 3: expected an object, {...}, found a number")
    assert folder_of(first) == folder_of(second)
    assert not list(cache.folder.glob(".tmp-*"))


def test_the_arrays_are_mapped_and_cannot_be_written(recipe: Recipe, cache: TokenCache) -> None:
    dataset = cache.samples(recipe)
    assert isinstance(dataset.arrays["token_ids"].base, np.memmap)
    with pytest.raises(ValueError, match="read-only"):
        dataset.arrays["token_ids"][0] = 1


def test_tokens_of_a_large_vocabulary_keep_their_value(recipe: Recipe, cache: TokenCache) -> None:
    write(recipe.files[0], ["\N{PANDA FACE}" * 3])
    dataset = cache.samples(replace(recipe, vocabulary=200_000))
    assert dataset[0]["token_ids"].tolist() == [ord("\N{PANDA FACE}")] * 3


@pytest.mark.parametrize(
    "change",
    [
        lambda recipe: replace(recipe, ingredients={"task": 2}),
        lambda recipe: replace(recipe, files=[write(recipe.files[0], ["other"])]),
        lambda recipe: replace(recipe, files=[*recipe.files, write(recipe.files[0].with_name("b.jsonl"), ["more"])]),
    ],
    ids=["options", "content", "a file more"],
)
def test_what_decides_the_tokens_decides_the_place(
    recipe: Recipe, cache: TokenCache, change: Callable[[Recipe], Recipe]
) -> None:
    before = folder_of(cache.samples(recipe))
    assert folder_of(cache.samples(change(recipe))) != before


def test_the_name_and_time_of_a_file_do_not(recipe: Recipe, cache: TokenCache) -> None:
    before = folder_of(cache.samples(recipe))
    moved = recipe.files[0].rename(recipe.files[0].with_name("moved.jsonl"))
    os.utime(moved)
    assert folder_of(cache.samples(replace(recipe, files=[moved]))) == before
    assert made["moved.jsonl"] == 0


def test_a_change_that_keeps_size_and_nearly_the_time_is_seen(recipe: Recipe, cache: TokenCache) -> None:
    """A file that was just written is not remembered by its time stamp: it may change within the same one."""
    file = recipe.files[0]
    now = time.time_ns()
    file.write_text('{"text": "one"}\n')
    os.utime(file, ns=(now, now))
    assert texts(cache.samples(recipe)) == ["one"]
    file.write_text('{"text": "two"}\n')
    os.utime(file, ns=(now, now))
    assert texts(cache.samples(recipe)) == ["two"]


@pytest.mark.usefixtures("settled")
def test_a_change_that_keeps_size_and_time_is_seen(recipe: Recipe, cache: TokenCache) -> None:
    """As `rsync --inplace --times` makes one, or a program that sets the time back."""
    file = recipe.files[0]
    for text in ("one", "two"):
        time.sleep(0.02)  # not within the same tick of a coarse clock
        file.write_text(json.dumps({"text": text}))
        os.utime(file, ns=(0, 0))
        assert texts(cache.samples(recipe)) == [text]


def test_the_ending_of_a_file_decides_how_it_is_read(recipe: Recipe, cache: TokenCache) -> None:
    before = folder_of(cache.samples(recipe))
    for name in ("a.json", "a.tsv"):
        moved = recipe.files[0].with_name(name)
        moved.write_bytes(recipe.files[0].read_bytes())
        assert folder_of(cache.samples(replace(recipe, files=[moved]))) != before


@pytest.mark.usefixtures("settled")
def test_the_content_of_a_file_is_read_once(recipe: Recipe, cache: TokenCache, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.samples(recipe)

    def read_again(*arguments: Any) -> Any:
        raise AssertionError("a file is hashed again")

    monkeypatch.setattr(content_hash.hashlib, "file_digest", read_again)
    assert len(cache.samples(recipe)) == 3


@pytest.mark.usefixtures("settled")
def test_what_is_slow_at_a_start_says_how_far_it_is(
    recipe: Recipe, cache: TokenCache, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shown: list[Activity] = []

    @contextmanager
    def noted(what: str, total: float | None = None, **options: Any) -> Iterator[Activity]:
        with activity(what, total, **options) as found:
            shown.append(found)
            yield found

    monkeypatch.setattr(token_cache, "activity", noted)
    cache.samples(recipe)
    reading, tokenising = (next(each for each in shown if each.what.startswith(word)) for word in ("read", "tok"))
    assert reading.what == f"reading {recipe.location} to know its content"
    assert reading.done == reading.total == sum(file.stat().st_size for file in recipe.files)
    assert (tokenising.what, tokenising.done) == (f"tokenising {recipe.location}", 3)
    assert re.fullmatch(r"\d+ tokens", tokenising.facts[0]) and tokenising.facts[1].endswith(" tokens/s")
    shown.clear()
    cache.samples(recipe)
    assert all(each.done == 0 for each in shown), "nothing is read again"
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("name", ["token_ids.bin", "supervised.bin", "offsets.bin", "manifest.json"])
@pytest.mark.parametrize("damage", ["cut", "changed", "missing"])
def test_a_damaged_cache_is_made_again(
    recipe: Recipe, cache: TokenCache, capsys: pytest.CaptureFixture[str], name: str, damage: str
) -> None:
    file = folder_of(cache.samples(recipe)) / name
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-2])
    elif damage == "changed":
        content = bytearray(file.read_bytes())
        content[3] ^= 0xFF
        file.write_bytes(content)
        os.utime(file, (time.time() + 1, time.time() + 1))  # not within the same tick of a coarse clock
    else:
        file.unlink()
    made.clear()
    assert texts(cache.samples(recipe)) == ["hello", "there", "again"]
    assert made["a.jsonl"] == 3
    if damage != "missing":
        assert "is damaged and is made again" in capsys.readouterr().err
    made.clear()
    assert len(cache.samples(recipe)) == 3 and not made


def test_data_without_a_usable_row_is_an_error_the_second_time_too(recipe: Recipe, cache: TokenCache) -> None:
    write(recipe.files[0], [])
    recipe.files[0].write_text("[1, 2]")
    for _ in range(2):
        with pytest.raises(UserError, match=r"data_dir: 'a\.jsonl' has no row that can be trained on"):
            cache.samples(recipe)


def test_a_failure_leaves_nothing_behind(recipe: Recipe, cache: TokenCache) -> None:
    recipe.files[0].write_text('[{"text": "cut sho')
    with pytest.raises(UserError, match="is it cut short"):
        cache.samples(recipe)
    assert [path.name for path in cache.folder.iterdir() if path.is_dir() and path.name != "hashes"] == []


def test_a_file_that_changes_while_it_is_read_is_an_error(recipe: Recipe, cache: TokenCache) -> None:
    def growing(rows: list[Row | BadRow]) -> SampleBlock:
        with recipe.files[0].open("a") as file:
            file.write('{"text": "late"}\n')
        return tokenise(rows)

    with pytest.raises(UserError, match=r"a\.jsonl: the file changed while it was read"):
        cache.samples(replace(recipe, tokenise=growing))
    assert [path.name for path in cache.folder.iterdir() if path.is_dir() and path.name != "hashes"] == []


def test_a_file_that_goes_before_it_is_read_is_an_error(
    recipe: Recipe, cache: TokenCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("panda.data.token_cache._stamps", lambda recipe: recipe.files[0].unlink())
    with pytest.raises(UserError, match=f"{recipe.files[0]} has been removed since the files were listed"):
        cache.samples(recipe)


def test_a_full_disk_is_an_error_that_says_what_to_do(
    recipe: Recipe, cache: TokenCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """/dev/full is a disk without room."""

    class Full(token_cache._Writer):
        def __init__(self, folder: Path, name: str, type_name: str) -> None:
            super().__init__(folder, name, type_name)
            self.file = open("/dev/full", "wb")  # noqa: SIM115

    monkeypatch.setattr(token_cache, "_Writer", Full)
    with pytest.raises(UserError, match=r"token_cache: cannot write to '.*cache': the disk is full\. Make room there"):
        cache.samples(recipe)
    assert [path.name for path in cache.folder.iterdir() if path.is_dir() and path.name != "hashes"] == []


def test_a_cache_that_cannot_be_made_is_an_error(recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"token_cache: cannot make '.*file/cache'"):
        TokenCache(tmp_path / "file" / "cache").samples(recipe)


def test_what_a_killed_process_left_is_removed(recipe: Recipe, cache: TokenCache) -> None:
    folder = folder_of(cache.samples(recipe))
    left = folder.with_name(f".tmp-{folder.name}")
    folder.rename(left)
    cache.samples(recipe)
    assert folder.exists() and not left.exists()


# -- several processes ------------------------------------------------------------------------


def test_processes_tokenise_in_order_and_in_bounded_numbers(
    recipe: Recipe, cache: TokenCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenising, "ROWS_AT_ONCE", 7)
    written = [f"text {number}" for number in range(500)]
    write(recipe.files[0], written)
    blocks = list(tokenising.tokenised_blocks(recipe.files, recipe.reader, tokenise, processes=3))
    assert ["".join(map(chr, block.arrays["token_ids"])) for block in blocks[1:3]] == [
        "".join(written[:7]),
        "".join(written[7:14]),
    ]
    assert sum(map(len, blocks)) == 500
    assert not made, "nothing was tokenised here"


@pytest.mark.parametrize("processes", [1, 2])
def test_an_exception_while_tokenising_surfaces_with_its_traceback(recipe: Recipe, processes: int) -> None:
    def broken(rows: list[Row | BadRow]) -> SampleBlock:
        raise ZeroDivisionError("in the tokenizer")

    with pytest.raises(ZeroDivisionError, match="in the tokenizer"):
        list(tokenising.tokenised_blocks(recipe.files, recipe.reader, broken, processes=processes))


def test_a_tokenising_process_that_is_killed_is_an_error_and_no_hang(recipe: Recipe) -> None:
    def killed(rows: list[Row | BadRow]) -> SampleBlock:
        os.kill(os.getpid(), 9)
        raise AssertionError

    with pytest.raises(UserError, match="a process was killed from outside"):
        list(tokenising.tokenised_blocks(recipe.files, recipe.reader, killed, processes=2))


def test_a_tokenising_process_that_is_killed_while_it_sends_is_an_error_and_no_hang(recipe: Recipe) -> None:
    def killed(rows: list[Row | BadRow]) -> SampleBlock:
        def cut_short(connection: Connection, content: bytes, write: object = None) -> None:
            os.write(connection.fileno(), content[: len(content) // 2])
            os.kill(os.getpid(), signal.SIGKILL)

        Connection._send = cut_short  # type: ignore[attr-defined]
        return tokenise(rows)

    with pytest.raises(UserError, match="a process was killed from outside"):
        list(tokenising.tokenised_blocks(recipe.files, recipe.reader, killed, processes=2))


def test_tokenising_processes_end_with_the_one_that_started_them(recipe: Recipe) -> None:
    """Each of them has the writing end of a pipe, which can be read to its end once all are gone."""
    reading, writing = os.pipe()

    def say_so(rows: list[Row | BadRow]) -> SampleBlock:
        os.write(writing, b".")
        return tokenise(rows)

    if (child := os.fork()) == 0:
        try:
            for _ in tokenising.tokenised_blocks(recipe.files, recipe.reader, say_so, processes=3):
                signal.pause() if made["paused"] else made.update(paused=1)  # at the second block: they have started
        finally:
            os._exit(1)
    os.close(writing)
    assert os.read(reading, 1) == b"."
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    while select.select([reading], [], [], 60)[0]:
        if not os.read(reading, 100):
            break
    else:
        pytest.fail("a tokenising process lives on")
    os.close(reading)


STARTING = """
import sys, time
from pathlib import Path
sys.path.insert(0, {here!r})
import test_token_cache as t
from panda.data.recipe import Recipe
from panda.data.token_cache import TokenCache
from panda.files.activity import Activity
from panda.files.activity import activity

def slowly(rows):
    print("tokenising", flush=True)
    time.sleep(0.5)
    return t.tokenise(rows)

reader = t.JsonReader(t.NoOptions(), t.ReaderContext())
recipe = Recipe("data_dir", "a.jsonl", [Path({file!r})], reader, slowly, 300, {{"task": 1}})
print(t.texts(TokenCache(Path({cache!r})).samples(recipe)))
"""


def test_of_several_that_start_at_once_one_tokenises_and_the_others_wait(recipe: Recipe, cache: TokenCache) -> None:
    program = STARTING.format(here=str(Path(__file__).parent), file=str(recipe.files[0]), cache=str(cache.folder))
    processes = [subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) for _ in range(3)]
    outputs = [process.communicate(timeout=600)[0] for process in processes]
    assert all("['hello', 'there', 'again']" in output for output in outputs), outputs
    assert sum(output.count("tokenising\n") for output in outputs) == 1


def test_who_waits_is_told_who_tokenises(
    recipe: Recipe, cache: TokenCache, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tell, is_told = token_cache._say_who_tokenises, threading.Event()
    monkeypatch.setattr(token_cache, "_say_who_tokenises", lambda holder: (tell(holder), is_told.set()))
    folder = folder_of(cache.samples(recipe))
    shutil.rmtree(folder)
    with ThreadPoolExecutor(1) as pool:
        with held(cache.folder / f"{folder.name}.lock"):
            waiting = pool.submit(cache.samples, recipe)
            assert is_told.wait(20)
        assert texts(waiting.result()) == ["hello", "there", "again"]
    said = f"rank 0 is waiting: the same data is being tokenised by process {os.getpid()} on "
    assert said in capsys.readouterr().out


def test_where_there_are_no_locks_all_tokenise_and_one_result_is_kept(
    recipe: Recipe, cache: TokenCache, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Threads: the second begins when the first has begun, and ends when that has a result."""

    def none_here(*arguments: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    begun, first_is_done = threading.Event(), threading.Event()

    def second(rows: list[Row | BadRow]) -> SampleBlock:
        begun.set()
        assert first_is_done.wait(60)
        return tokenise(rows)

    def first(rows: list[Row | BadRow]) -> SampleBlock:
        results.append(pool.submit(cache.samples, replace(recipe, tokenise=second)))
        assert begun.wait(60)
        return tokenise(rows)

    monkeypatch.setattr("fcntl.flock", none_here)
    results: list[Future[TokenDataset]] = []
    with ThreadPoolExecutor(1) as pool:
        try:
            datasets = [cache.samples(replace(recipe, tokenise=first))]
        finally:
            first_is_done.set()
        datasets += [result.result() for result in results]
    assert [texts(dataset) for dataset in datasets] == [["hello", "there", "again"]] * 2
    [folder] = {folder_of(dataset) for dataset in datasets}
    assert {path.name for path in cache.folder.iterdir()} == {"hashes", folder.name, f"{folder.name}.lock"}
    assert f"{cache.folder}: cannot be locked (Function not implemented)" in capsys.readouterr().err


@pytest.mark.usefixtures("settled")
def test_a_hash_that_was_half_written_is_computed_again(tmp_path: Path) -> None:
    file, memory = write(tmp_path / "rows.json", ["a"]), tmp_path / "hashes"
    expected = content_hash.content_hash(file, memory, lambda count: None)
    [note] = [path for path in memory.iterdir() if path.name != "lock"]
    whole = note.read_text()
    for end in range(len(whole)):
        note.write_text(whole[:end])
        read: list[int] = []
        assert content_hash.content_hash(file, memory, read.append) == expected
        assert read and note.read_text() == whole


@pytest.mark.usefixtures("settled")
def test_of_several_that_start_at_once_one_hashes_and_the_others_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Threads: each opens the lock file itself, and the system tells these apart, as it does processes."""
    file = tmp_path / "rows.json"
    file.write_text("[]")
    os.utime(file, (1, 1))
    read: list[str] = []
    together, digest = threading.Barrier(4), hashlib.file_digest

    def slowly(stream: Any, name: str) -> Any:
        read.append(name)
        time.sleep(0.2)
        return digest(stream, name)

    def start(_: int) -> str:
        together.wait()
        return content_hash.content_hash(file, tmp_path / "hashes", lambda count: None)

    monkeypatch.setattr(content_hash.hashlib, "file_digest", slowly)
    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(start, range(4))) == {hashlib.sha256(b"[]").hexdigest()}
    assert read == ["sha256"]


def test_where_nothing_can_be_remembered_it_is_hashed_all_the_same(tmp_path: Path) -> None:
    file, memory = tmp_path / "rows.json", tmp_path / "a file"
    content = b"[]" * 300_000
    file.write_bytes(content)
    memory.touch()
    told: list[int] = []
    assert content_hash.content_hash(file, memory, told.append) == hashlib.sha256(content).hexdigest()
    assert sum(told) == len(content) and len(told) > 2
