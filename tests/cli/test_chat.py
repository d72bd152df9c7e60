"""What `panda chat` writes, and what it and `panda generate` refuse before a model is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from panda.answers.assistant import Sampling
from panda.cli.chat import Chat
from panda.cli.chat import that_fit
from panda.cli.main import main
from panda.registry import UserError


class Stub:
    """An assistant that has room for three tokens, one for each message."""

    positions = 3

    def encode(self, messages: list[dict[str, str]]) -> list[int]:
        return [int(message["content"]) for message in messages]

    def room(self, sampling: Sampling) -> int:
        return self.positions


def chat_after(count: int, chat: Chat | None = None) -> Chat:
    """``chat``, or a new one, in which ``count`` messages have been said."""
    stub: Any = Stub()
    chat = chat or Chat(stub, Sampling(), [])
    roles = ("user", "assistant")
    chat.messages = [{"role": roles[number % 2], "content": str(number)} for number in range(count)]
    return chat


def saved(path: Path) -> list[str]:
    return [message["content"] for message in json.loads(path.read_text())["messages"]]


def test_a_dialogue_is_saved_again_as_it_goes_on_and_another_does_not_replace_it(tmp_path: Path) -> None:
    chat, file = chat_after(2), tmp_path / "a.jsonl"
    chat.obey("/save", str(file))
    chat_after(4, chat).obey("/save", str(file))
    assert saved(file) == ["0", "1", "2", "3"]
    chat.reset()
    chat.messages = [{"role": "user", "content": "9"}]
    with pytest.raises(UserError, match=r"a.jsonl has an earlier dialogue of this chat, and keeps it"):
        chat.obey("/save", str(file))
    assert saved(file) == ["0", "1", "2", "3"]
    file.write_text("of somebody else")
    with pytest.raises(UserError, match=r"a.jsonl exists, and is not replaced"):
        chat_after(4, chat).obey("/save", str(file))
    file.unlink()
    chat.obey("/save", str(file))
    assert saved(file) == ["0", "1", "2", "3"]


def test_what_is_left_out_for_the_model_is_no_part_less_of_the_dialogue(capsys: pytest.CaptureFixture[str]) -> None:
    chat = chat_after(5)
    stub: Any = Stub()
    assert that_fit(stub, chat.sampling, chat.messages, 0) == [2, 3, 4]
    assert len(chat.messages) == 5
    assert "the dialogue's first exchange was left out; the model has 3 positions" in capsys.readouterr().err
    assert that_fit(stub, chat.sampling, chat_after(7).messages, 0) == [4, 5, 6]
    assert "the dialogue's first 2 exchanges were left out" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ("--top_p 0.9", "--top_p"),
        ("--seed 1", "--seed"),
        ("--top_p 0.9 --seed 0 --temperature 0", "--top_p and --seed"),
    ],
)
@pytest.mark.parametrize("command", ["chat runs", "generate runs --prompt x"])
def test_flags_of_sampling_without_a_temperature_are_refused(
    command: str, flags: str, named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command.split(), *flags.split()]) == 2
    assert capsys.readouterr().err == (
        f"error: {named}: without a temperature the likeliest token is always taken, and nothing is sampled. Add one,"
        f" such as `--temperature 0.7`, or leave {named} out.\n"
    )


@pytest.mark.parametrize(
    "line",
    [
        "generate {} --prompt x", "generate {}/export --prompt x", "generate {}/checkpoints/step-00000001 --prompt x",
        "chat {}", "eval {}", "eval {}/checkpoints", "eval {} --harness x", "export {}",
        "export {}/checkpoints/step-00000001", "report {}", "plot {}", "diff {} {}", "replay {} 1",
    ],
)  # fmt: skip
def test_runs_of_a_later_version_are_refused(line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    for folder in ("checkpoints/step-00000001", "export", "model"):
        (run / folder).mkdir(parents=True)
    (run / "config.yaml").write_text("key_of_the_future: 1\n")
    (run / "provenance.json").write_text('{"format": 999}')
    assert main(line.replace("{}", str(run)).split()) == 2
    assert f"{run}: it was written by a later version of panda, in format 999, and this" in capsys.readouterr().err
