"""``panda push``, to a hub on this machine: what is sent, who sees it, and what never leaves."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from checkpoint_files import llama
from checkpoint_files import save_hf
from hub_server import Hub
from hub_server import hub_of
from launching import BIN
from launching import ENVIRONMENT

from panda.cli.main import main as panda
from panda.weights.run_folders import CARD_MARK

TOKEN = "token-of-heron"


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder such as `panda export` writes, with a card."""
    folder = save_hf(llama(), tmp_path_factory.mktemp("model") / "export")
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n\nA heron.\n")
    return folder


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    with hub_of(tmp_path / "hub") as serving:
        serving.tokens[TOKEN] = "heron"
        yield serving


def push(hub: Hub, folder: Path, name: str, *flags: str, token: str | None = TOKEN) -> subprocess.CompletedProcess[str]:
    """In a process of its own: where the hub is, is read when its client is imported."""
    own = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": hub.endpoint, "HF_HOME": str(hub.root.parent / "home")}
    own |= {"NO_PROXY": "127.0.0.1", "HF_HUB_DISABLE_XET": "1"} | ({"HF_TOKEN": token} if token else {})
    environment = {key: value for key, value in ENVIRONMENT.items() if "TOKEN" not in key} | own
    words = [str(BIN / "panda"), "push", str(folder), name, *flags]
    return subprocess.run(words, env=environment, capture_output=True, text=True, timeout=300, check=False)


def content(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_a_runs_export_is_put_there_privately_and_again_without_sending_what_is_there(
    hub: Hub, exported: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "provenance.json").write_text("{}")
    (run / "checkpoints").mkdir()
    missing = push(hub, run, "heron/reeds")
    assert missing.returncode == 2 and "this run has no export yet. `panda export" in missing.stderr
    (run / "export").symlink_to(exported)
    done = push(hub, run, "heron/reeds")
    assert done.returncode == 0, done.stderr
    assert content(hub.root / "heron/reeds") == content(exported)
    assert "heron/reeds" not in hub.public and "private, new" in done.stdout and "README.md" in done.stdout
    assert f"pushed: {hub.endpoint}/heron/reeds/commit/" in done.stdout and "note:" not in done.stdout
    sent = [asked for asked in hub.asked if asked.startswith("PUT /large/")]
    assert len(sent) == len(list(exported.glob("*.safetensors"))) > 1
    again = push(hub, run / "export", "heron/reeds")
    assert again.returncode == 0 and "private, which is there" in again.stdout
    assert [asked for asked in hub.asked if asked.startswith("PUT /large/")] == sent


def test_which_weights_of_a_run_are_pushed_is_said(
    exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(exported, run / "export")
    (run / "config.yaml").write_text("best_metric: eval_f1\nbest_higher_is_better: true\n")
    (run / "provenance.json").write_text('{"end": {"step": 7}}')
    (run / "metrics.jsonl").write_text(
        "".join(json.dumps({"step": step, "eval_loss": 1.0, "eval_f1": 1 / step}) + "\n" for step in (400, 1200))
    )
    card = f"---\nlicense: mit\n---\n{CARD_MARK}\n# a\n\n- steps: 1,200 of 2,000\n"
    best = "note: the best evaluation was eval_f1 0.0025 at step 400: "
    for text, kept, said in (
        ("another card", False, []),
        (card, False, ["the weights after step 1,200", f"{best}no checkpoint of it is known"]),
        (card, True, [f"{best}`panda export {run}/checkpoints/step-00000400 --output FOLDER`, and push FOLDER"]),
        (card.replace("1,200 of", "400 of"), True, ["the weights after step 400"]),
    ):
        (run / "export/README.md").write_text(text)
        if kept:
            (run / "checkpoints/step-00000400").mkdir(parents=True, exist_ok=True)
            (run / "checkpoints/best").write_text("step-00000400\n")
        assert panda(["push", str(run), "heron/reeds", "--dry_run"]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert {*said} <= {*lines} and ("best evaluation" in str(lines)) == ("best evaluation" in str(said))


def test_an_interrupted_upload_goes_on_where_it_was(hub: Hub, exported: Path) -> None:
    hub.refused = 1
    failed = push(hub, exported, "heron/reeds")
    assert failed.returncode == 2 and "run the command again for the rest" in failed.stderr
    assert not (hub.root / "heron/reeds/config.json").exists()
    before = len(hub.stored)
    assert push(hub, exported, "heron/reeds").returncode == 0
    assert len(hub.stored) == len(list(exported.glob("*.safetensors"))) > before > 0
    sent = [asked for asked in hub.asked if asked.startswith("PUT /large/")]
    assert len(sent) == len(hub.stored) + 1, "one of them twice"


def test_who_sees_it_is_said_and_not_changed(hub: Hub, exported: Path) -> None:
    assert push(hub, exported, "heron/reeds", "--public").returncode == 0
    assert "heron/reeds" in hub.public
    (hub.root / "heron/reeds/other.txt").write_text("kept")
    refused = push(hub, exported, "heron/reeds")
    assert refused.returncode == 2 and "is there, and is public: add --public" in refused.stderr
    done = push(hub, exported, "heron/reeds", "--public")
    assert done.returncode == 0 and "1 other file stays there (other.txt)" in done.stdout
    hub.public.clear()
    refused = push(hub, exported, "heron/reeds", "--public")
    assert refused.returncode == 2 and "is there, and is private: leave --public out" in refused.stderr


@pytest.mark.parametrize(
    ("name", "token", "message"),
    [
        ("heron/reeds", None, r"needs a token that may write: make one at .*`hf auth login`, or put it into HF_TOKEN"),
        ("heron/reeds", "wrong-token", "does not know the token. Make one at"),
        ("egret/reeds", TOKEN, "the token may not write to"),
    ],
)
def test_a_token_that_is_missing_or_may_not_write(
    hub: Hub, exported: Path, name: str, token: str | None, message: str
) -> None:
    done = push(hub, exported, name, token=token)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert all(part in done.stderr for part in message.split(".*")), done.stderr
    assert not any(asked.startswith("PUT") for asked in hub.asked) and not (hub.root / name).exists()


SECRET = "hf_" + "a1B2" * 8
KEPT_BACK: dict[str, tuple[str, str]] = {
    ".env": ("KEY=1", "a file of this name holds secrets"),
    "deploy.pem": ("", "a file of this name holds secrets"),
    "notes.txt": (f"it is {SECRET}", "it has a text of the form of a secret"),
    "more/run.json": (json.dumps({"address": "https://me:pass@host/x"}), "it has a text of the form of a secret"),
    "deploy.txt": ("-----BEGIN OPENSSH PRIVATE KEY-----\nb3BlbnNz", "it has a text of the form of a secret"),
    "aws.ini": ("aws_secret_access_key = " + "a1/B" * 10, "it has a text of the form of a secret"),
    "Secrets.yaml": ("password: heron", "a file of this name holds secrets"),
    "train.log": (f"\udcff {SECRET}", "it has a text of the form of a secret"),
    "nul.log": (f"\0{SECRET}", "it has a text of the form of a secret"),
    "split.log": (" " * (2**22 - 10) + SECRET, "it has a text of the form of a secret"),
    "told.log": ("set heron-heron-heron", "it has the value of the environment variable ACME_TOKEN"),
    "data.jsonl": ("{}", "it is data"),
    "optimizer.pt": ("", "it is a state of training"),
    "zero_pp_rank_0_mp_rank_00_optim_states.pt": ("", "it is a state of training"),
}


@pytest.mark.parametrize("name", KEPT_BACK)
def test_what_others_must_not_get_is_not_sent(
    name: str,
    exported: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("ACME_TOKEN", "heron-heron-heron")
    text, reason = KEPT_BACK[name]
    folder = copy(exported, tmp_path / "model")
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(text.encode(errors="surrogateescape"))
    assert panda(["push", str(folder), "heron/reeds", "--dry_run"]) == 2
    captured = capsys.readouterr()
    assert "nothing is uploaded" in captured.err and f"{name}: {reason}" in captured.err
    assert SECRET not in captured.err + captured.out


def copy(exported: Path, folder: Path) -> Path:
    folder.mkdir()
    for file in exported.iterdir():
        os.link(file, folder / file.name)
    return folder


def test_folders_without_a_model_checkpoints_and_links_out_are_refused(
    exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.json").write_text("{}")
    (tmp_path / "run/checkpoints/step-00000001").mkdir(parents=True)
    linking = copy(exported, tmp_path / "linking")
    (linking / "vocab.txt").symlink_to("/etc/hostname")
    broken = copy(exported, tmp_path / "broken")
    (broken / "vocab.txt").symlink_to("gone.txt")
    os.mkfifo(copy(exported, tmp_path / "pipe") / "log")
    cases = {
        "broken": "vocab.txt: it is a link to nothing",
        "pipe": "log: it is no file",
        "empty": "it holds no model",
        "bare": "it holds no weights",
        "run/checkpoints/step-00000001": "it is a checkpoint, from which training goes on. `panda export",
        "linking": "vocab.txt: it is a link to /etc/hostname, outside of the folder",
        "gone": "there is no such folder",
    }
    for folder, message in cases.items():
        assert panda(["push", str(tmp_path / folder), "heron/reeds"]) == 2
        said = capsys.readouterr().err
        assert message in said and "Traceback" not in said, folder
    assert panda(["push", str(exported), "reeds"]) == 2
    assert "'reeds': expected OWNER/NAME" in capsys.readouterr().err


def test_a_dry_run_lists_files_and_says_what_is_odd(
    exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_KEY", "tokenizer")  # a word, not a secret
    folder = copy(exported, tmp_path / "adapters")
    (folder / "notes.bin2").write_bytes(b"\0://me@host")  # not an address
    (folder / "notes.txt").write_text("the tokenizer")
    (folder / "README.md").unlink()
    (folder / ".cache").mkdir()
    (folder / ".cache" / "seen").write_text("")
    named: dict[str, Any] = {"base_model_name_or_path": "/home/me/base"}
    (folder / "adapter_config.json").write_text(json.dumps(named))
    assert panda(["push", str(folder), "heron/reeds", "--dry_run", "--private"]) == 0
    first, printed = capsys.readouterr().out.split("\n", 1)
    assert "private is the default" in first
    total = sum(file.stat().st_size for file in folder.iterdir() if file.is_file())
    assert printed.splitlines()[0].endswith(f"{len(list(folder.iterdir())) - 1} files, {total / 1000:.1f} kB")
    assert "no model card" in printed and "hidden files stay here: .cache/seen" in printed
    assert "names its base '/home/me/base', a folder that others do not have" in printed
    assert printed.endswith("nothing is uploaded (--dry_run)\n")


def test_a_file_that_cannot_be_read_is_refused(
    exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copy(exported, tmp_path / "closed")
    (folder / "notes.txt").write_text("")
    opened = Path.open

    def refusing(path: Path, *args: Any, **named: Any) -> Any:
        if path.name == "notes.txt":  # a mode would not keep the superuser out
            raise PermissionError(13, "Permission denied")
        return opened(path, *args, **named)

    monkeypatch.setattr(Path, "open", refusing)
    assert panda(["push", str(folder), "heron/reeds", "--dry_run"]) == 2
    assert "notes.txt: it cannot be read" in capsys.readouterr().err
