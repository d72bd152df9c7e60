"""No password, key or token, and no user's folder, in what panda keeps of a run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from panda.cli.command import run_command
from panda.configuration.arguments import parse_arguments
from panda.configuration.configure import configure
from panda.files.private import private
from panda.files.private import private_command
from panda.files.private import without_secrets
from panda.registry import UserError
from panda.run.description import write_description
from panda.run.description import write_end


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("s3://me:pass word@host/x", "s3://me:pass word@host/x"),  # no URL
        ("https://me:pa55@host/x and http://tok@host", "https://***@host/x and http://***@host"),
        ("https://host/x?a=1&X-Amz-Signature=abc&sig=q", "https://host/x?a=1&X-Amz-Signature=***&sig=***"),
        ("hf_" + "a" * 30 + " is it", "*** is it"),
        ("hf_shape and sk-1 and mail@host", "hf_shape and sk-1 and mail@host"),
        ("from the environment: correct horse", "from the environment: ***"),
    ],
)
def test_secrets_are_known_by_their_form_or_from_the_environment(
    text: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACME_API_KEY", "correct horse")
    monkeypatch.setenv("ACME_KEY_FILE", "environment")  # where it is, not what it is
    monkeypatch.setenv("SHORT_TOKEN", "it")
    assert without_secrets(text) == expected


def test_flags_with_the_names_of_secrets_lose_their_values() -> None:
    given = [
        "panda-train",
        "--hub-token",
        "abc",
        "--api_key=abc",
        "--tokenizer",
        "abc",
        "--password",
        "--max_steps",
        "3",
    ]
    hidden = [
        "panda-train",
        "--hub-token",
        "***",
        "--api_key=***",
        "--tokenizer",
        "abc",
        "--password",
        "--max_steps",
        "3",
    ]
    assert private_command(given) == hidden


def test_the_folder_of_a_user_is_not_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/li")
    assert private(["/home/li/data", {"/home/li": 1}, ("see '/home/li'",)]) == ["~/data", {"~": 1}, ["see '~'"]]
    assert private(["/home/liu/data", "/x/home/li"]) == ["/home/liu/data", "/x/home/li"]
    monkeypatch.setenv("HOME", "/")
    assert private("/data") == "/data"


def test_none_is_in_provenance_or_in_a_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "li"))
    monkeypatch.setenv("HF_TOKEN", "geheim-geheim")
    (tmp_path / "li").mkdir()
    (tmp_path / "li/run.yaml").write_text("task: instruct\narch: llama-tiny\n")
    flags = ["--config", f"{tmp_path}/li/run.yaml"]
    monkeypatch.setattr("sys.argv", ["panda-train", *flags, "--wandb_key", "geheim-geheim"])
    resolved = configure(parse_arguments(flags)).resolved
    write_description(tmp_path, resolved, {}, {"checkpoint": f"{tmp_path}/li/base, by https://a:b@host"})
    text = (tmp_path / "provenance.json").read_text()
    assert f"{tmp_path}/li" not in text and "geheim" not in text and "a:b" not in text
    described = json.loads(text)
    assert described["command"][2] == "~/run.yaml" and described["origins"]["task"] == "~/run.yaml:1"
    assert described["checkpoint"] == "~/base, by https://***@host"

    def command(argv: list[str]) -> None:
        raise UserError("cannot reach https://me:geheim@host with geheim-geheim")

    assert run_command(command, []) == 2
    assert capsys.readouterr().err == "error: cannot reach https://***@host with ***\n"


@pytest.mark.parametrize("damaged", ["", "[]", "7", "{", "[" * 100_000, "\udcff"])
def test_a_damaged_record_of_a_run_is_written_again(damaged: str, tmp_path: Path) -> None:
    resolved = configure(parse_arguments(["--arch", "llama-tiny"])).resolved
    (tmp_path / "provenance.json").write_bytes(damaged.encode(errors="surrogateescape"))
    write_description(tmp_path, resolved, {}, {})
    assert json.loads((tmp_path / "provenance.json").read_text())["earlier_starts"] == []
    (tmp_path / "provenance.json").write_bytes(damaged.encode(errors="surrogateescape"))
    write_end(tmp_path, 3, {})
    assert json.loads((tmp_path / "provenance.json").read_text())["end"]["step"] == 3
