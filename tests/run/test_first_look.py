"""What is looked for before torch is imported: files that the task has the reader read, and no others."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from distributions import Distributions

from panda.configuration.arguments import parse_arguments
from panda.configuration.configure import configure
from panda.registry import UserError
from panda.run.first_look import look_first
from panda.run.first_look import look_for_inputs

Look = Callable[[str], None]


@pytest.fixture
def look(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, distributions: Distributions) -> Look:
    """``look(flags)`` with ``array``, a task that reads files of its own, and ``lists``, with lists of files."""
    source = """
        @dataclass(frozen=True)
        class ArrayOptions:
            array: Annotated[str, Location()] = "tokens.npy"

        @register_task("array", options=ArrayOptions)
        def array(options, context):
            '''Tokens in an array.'''

        @dataclass(frozen=True)
        class ListsOptions:
            sources: Annotated[tuple[str, ...], Location(holds_data=True)] = ("a.json",)

        @register_task("lists", options=ListsOptions)
        def lists(options, context):
            '''Rows of several files.'''
        """
    distributions.install("acme", {"tasks": {"array": "acme_tasks", "lists": "acme_tasks"}}, {"acme_tasks": source})
    monkeypatch.chdir(tmp_path)
    (tmp_path / "held_out").mkdir()
    for name in ("held_out/tokens.npy", "a.json", "b.json"):
        (tmp_path / name).touch()
    return lambda flags: look_for_inputs(configure(parse_arguments(f"--arch llama-tiny {flags}".split())))


def test_a_task_with_files_of_its_own_is_evaluated_on_such_files(look: Look) -> None:
    look("--task array --eval_data_dir held_out")


def test_data_for_the_reader_is_looked_for(look: Look) -> None:
    look("--instruction_tuning_data_dir a.json --eval_data_dir b.json")
    with pytest.raises(UserError, match="eval_data_dir: 'held_out' has no file that ends in"):
        look("--instruction_tuning_data_dir a.json --eval_data_dir held_out")


def test_each_place_of_a_list_is_looked_for(look: Look) -> None:
    look("--task lists --sources a.json b.json")
    with pytest.raises(UserError, match=r"sources: 'c\.json' does not exist"):
        look("--task lists --sources a.json c.json")


def test_a_mix_of_nothing_is_refused_with_its_options(look: Look) -> None:
    with pytest.raises(UserError, match="mix: give instruction_tuning_data_dir"):
        look("--task mix")


@pytest.mark.parametrize("resume", ["", "--resume auto"])
def test_a_folder_that_cannot_be_looked_at_is_reported(look: Look, resume: str) -> None:
    """As one in a folder that the user may not enter, which the user of these tests, perhaps root, may."""
    flags = f"--arch llama-tiny --instruction_tuning_data_dir a.json --output_dir {'x' * 300} {resume}"
    with pytest.raises(UserError, match=r"output_dir: 'xxx.* is "):
        look_first(configure(parse_arguments(flags.split())), 1)
