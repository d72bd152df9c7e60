"""Models and tokenizers by their names on the Hugging Face hub, which is served here, from the command line."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_files import llama
from checkpoint_files import save_hf
from checkpoint_files import save_meta
from checkpoint_files import save_pickle
from hub_server import Hub
from hub_server import hub_of
from launching import BIN
from launching import ENVIRONMENT
from launching import exported_weights

DATA = ["--instruction_tuning_data_dir", "panda:data/sample/instruct"]
RUN = [
    *("--max_seq_length", 64, "--max_steps", 1, "--num_workers", 0, "--gradient_accumulation_steps", 1),
    *("--learning_rate", 1e-30, "-p", "no:tensorboard", "-p", "no:plot", "--prompts", "x"),
]
"""A step that changes no weight: what is exported is what was loaded."""


@pytest.fixture(scope="module")
def model() -> Any:
    return llama()


@pytest.fixture(scope="module")
def hub(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    root = tmp_path_factory.mktemp("hub")
    tiny = save_hf(model, root / "org" / "tiny")
    # What many models have beside what transformers reads: pickles, formats of other programs, weights twice.
    torch.save(model.state_dict(), tiny / "pytorch_model.bin")
    shutil.copy(sorted(tiny.glob("model-*"))[0], tiny / "consolidated.safetensors")
    (tiny / "README.md").write_text("Tiny.")
    for folder in ("onnx", "original"):
        (tiny / folder).mkdir()
        (tiny / folder / "params.json").write_text("{}")
        (tiny / folder / "model.safetensors").write_bytes(bytes(100))
    save_hf(model, root / "org" / "gated", shards=False)
    save_meta(model, root / "org" / "cut")
    save_pickle(model, root / "org" / "old")
    shutil.copytree(tiny, root / "org" / "bare", ignore=shutil.ignore_patterns("tokenizer*"))
    with hub_of(root) as serving:
        serving.gated.add("org/gated")
        yield serving


@pytest.fixture
def environment(hub: Hub, tmp_path: Path) -> dict[str, str]:
    """Of a user with an empty cache whose hub is ``hub``."""
    hub.asked.clear()
    online = {"HF_HUB_OFFLINE": "0", "NO_PROXY": "127.0.0.1,localhost"}
    return online | {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "home")}


def snapshot(tmp_path: Path, name: str) -> Path:
    found = list((tmp_path / "home" / "hub" / f"models--org--{name}" / "snapshots").iterdir())
    assert len(found) == 1
    return found[0]


def run(command: str, *argv: object, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own from the start: where the hub is, is read when its client is imported."""
    words = [str(BIN / command), *map(str, argv)]
    return subprocess.run(words, cwd=cwd, env=ENVIRONMENT | environment, capture_output=True, text=True, timeout=600)


def assert_exported(run: Path, model: Any) -> None:
    found, expected = exported_weights(run), model.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_two_ranks_fetch_what_they_need_once_and_a_run_without_network_takes_it_from_the_cache(
    hub: Hub, model: Any, environment: dict[str, str], tmp_path: Path
) -> None:
    command = [*("--model", "llama", "--ckpt_path", "org/tiny"), *DATA, *RUN, "--output_dir", "first"]
    launcher = ("--standalone", "--nproc_per_node=2", "--no-python", BIN / "panda-train")
    done = run("torchrun", *launcher, *command, cwd=tmp_path, **environment)
    assert done.returncode == 0, done.stdout + done.stderr
    weights = snapshot(tmp_path, "tiny")
    assert f"weights     {weights} (Hugging Face hub): safetensors, llama" in done.stdout
    assert "tokenizer   org/tiny, the checkpoint's own, 259 entries\n" in done.stdout
    tiny = hub.root / "org" / "tiny"
    shards = [file.name for file in tiny.glob("model-*")]
    assert len(shards) > 2
    needed = [file.name for file in tiny.glob("*.json")] + shards
    assert hub.fetched() == sorted(needed) == sorted(file.name for file in weights.iterdir())
    assert_exported(tmp_path / "first", model)
    assert (tmp_path / "first" / "export" / "tokenizer.json").exists()
    config = (tmp_path / "first" / "config.yaml").read_text()
    assert "\nckpt_path: org/tiny\n" in config and "\ntokenizer:" not in config, "runs on another machine too"

    hub.asked.clear()
    offline = environment | {"HF_HUB_OFFLINE": "1"}
    again = ["--model", "hf", "--ckpt_path", "org/tiny", "--tokenizer", "org/tiny", *DATA, *RUN]
    done = run("panda-train", *again, "--output_dir", "second", cwd=tmp_path, **offline)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"weights     {weights} (Hugging Face hub, from its cache): safetensors, llama\n" in done.stdout
    assert hub.asked == []
    assert_exported(tmp_path / "second", model)


def test_no_weights_are_fetched_for_a_run_that_is_wrong_otherwise_nor_for_a_tokenizer(
    hub: Hub, environment: dict[str, str], tmp_path: Path
) -> None:
    wrong = ["--instruction_tuning_data_dir", "nowhere", "--max_seq_length", 64]
    done = run("panda-train", "--model", "llama", "--ckpt_path", "org/tiny", *wrong, cwd=tmp_path, **environment)
    assert done.returncode == 2 and "'nowhere' does not exist" in done.stderr
    right = ["--instruction_tuning_data_dir", "panda:data/sample/instruct", "--tokenizer", "org/cut"]
    done = run("panda", "prepare", "--arch", "llama-tiny", *right, cwd=tmp_path, **environment)
    assert done.returncode == 0, done.stderr
    assert not [name for name in hub.fetched() if name.endswith((".safetensors", ".bin"))]
    assert (snapshot(tmp_path, "cut") / "tokenizer.json").exists()


def test_a_download_that_breaks_off_is_told_and_what_came_whole_is_kept(
    hub: Hub, environment: dict[str, str], tmp_path: Path
) -> None:
    """Of files of which no index says how many there are."""
    first, second = sorted(file.name for file in (hub.root / "org" / "cut").glob("consolidated.*"))
    hub.cut[second] = 1000
    make = ["delta", "make", "--target", "org/cut", "--base", "org/cut", "--output", "delta", "--allow_pickle"]
    done = run("panda", *make, cwd=tmp_path, **environment)
    hub.cut.clear()
    assert done.returncode == 2
    told = f"error: {hub.endpoint}/org/cut could not be fetched: RemoteProtocolError: peer closed connection"
    assert told in done.stderr and "running the command again fetches the rest" in done.stderr
    there = {file.name for file in snapshot(tmp_path, "cut").iterdir()}
    assert {first, "params.json", "tokenizer.json"} <= there and second not in there
    assert not (tmp_path / "delta").exists()

    hub.asked.clear()
    done = run("panda", *make, cwd=tmp_path, **environment)
    assert done.returncode == 0, done.stderr
    assert hub.fetched() == [second]


SCRIPT = """
import json, sys
from panda.cli.train import main
for words in json.loads(sys.argv[1]):
    assert main(words) == 2
assert "torch" not in sys.modules
"""
TOLD = {
    ("--ckpt_path", "org/nope"): r"there is no model at http:\S+/org/nope, or you have no access to it",
    ("--ckpt_path", "org/gated"): r"gated: Access to model org/gated is restricted.*`hf auth login`.*HF_TOKEN",
    ("--ckpt_path", "org/old"): r"holds its weights in pickles .* add `--allow_pickle`",
    ("--ckpt_path", "org/bare"): r"has no tokenizer that transformers loads",
    ("--tokenizer", "org/nope"): r"tokenizer: 'org/nope' is neither a folder .* there is no model at http",
    ("--tokenizer", "org/bare"): r"tokenizer: 'org/bare' on the Hugging Face hub has no tokenizer",
}


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({}, TOLD),
        (
            {"HF_ENDPOINT": "http://127.0.0.1:9"},
            {("--ckpt_path", "org/tiny"): r"http://127.0.0.1:9/org/tiny could not be fetched: ConnectError: "},
        ),
        ({"HF_HUB_OFFLINE": "1"}, {("--ckpt_path", "org/tiny"): r"is not asked, since HF_HUB_OFFLINE is set\."}),
    ],
    ids=["online", "down", "offline"],
)
def test_what_the_hub_does_not_give_is_told_at_once_with_what_to_do(
    environment: dict[str, str], tmp_path: Path, changed: dict[str, str], told: dict[tuple[str, ...], str]
) -> None:
    commands = [["--model", "llama", *words, *DATA, "--max_seq_length", "64"] for words in told]
    command = [sys.executable, "-c", SCRIPT, json.dumps(commands)]
    env = ENVIRONMENT | environment | changed
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == len(told), done.stderr
    for error, expected in zip(errors, told.values(), strict=True):
        assert re.search(expected, error), error
    assert not (tmp_path / "runs").exists()
