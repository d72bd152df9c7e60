"""Every bit of a checkpoint counts: one that is flipped is damage, and never another number nor a traceback."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from panda.configuration.options import RunOptions
from panda.engine.checkpoints.folders import MANIFEST
from panda.engine.checkpoints.folders import DamagedError
from panda.engine.checkpoints.folders import Progress
from panda.engine.checkpoints.folders import check_contents
from panda.engine.checkpoints.folders import damage
from panda.engine.checkpoints.folders import find_checkpoint
from panda.engine.checkpoints.folders import read_manifest
from panda.engine.checkpoints.folders import read_progress
from panda.engine.checkpoints.folders import write_manifest
from panda.engine.checkpoints.weights import checkpoint_weights
from panda.engine.checkpoints.writing import load_checkpoint
from panda.engine.checkpoints.writing import save_checkpoint
from panda.engine.deepspeed_config import deepspeed_config
from panda.engine.engine import Engine
from panda.engine.processes import Processes
from panda.registry import UserError

FLIPS = 2000
"""Bits of each file, drawn once more in each run of the tests."""
PROGRESS = Progress(12, 48, 1000, 600.5, skipped_steps=1)


def an_engine(processes: Processes) -> Engine:
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 4)
    config = deepspeed_config(
        RunOptions(gradient_accumulation_steps=1, zero_stage=1, precision="bf16"), world_size=1, on_gpu=False
    )
    return Engine(model, torch.optim.AdamW(model.parameters(), lr=0.1), config, processes)


def write_more(checkpoint: Path) -> list[Path]:
    """What the plugins of a run keep."""
    (checkpoint / "plugins.json").write_text(json.dumps({"ema": {"values": {"decay": 0.999}}}))
    return [checkpoint / "plugins.json"]


@pytest.fixture(scope="module")
def saved(processes: Processes, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("flips")
    return save_checkpoint(an_engine(processes), folder, PROGRESS, {"seed": 42}, write=write_more)


@contextmanager
def flipped(file: Path, bit: int) -> Iterator[None]:
    """In the meantime ``bit`` of ``file`` is another. Written in place: ext4 syncs a file that is written again."""
    with file.open("r+b", buffering=0) as stream:
        stream.seek(bit // 8)
        byte = stream.read(1)[0]
        for value in (byte ^ 1 << bit % 8, byte):
            stream.seek(bit // 8)
            stream.write(bytes([value]))
            if value != byte:
                yield


def is_found(checkpoint: Path, file: Path) -> bool:
    """Whether ``file`` is found to be damaged. Without pytest.raises, which takes longer than the check."""
    try:
        check_contents(checkpoint, [file])
    except DamagedError:
        return True
    return False


def test_every_bit_of_a_manifest_counts(saved: Path, tmp_path: Path) -> None:
    file = saved / MANIFEST
    size = file.stat().st_size
    for bit in range(8 * size):
        with flipped(file, bit):
            assert damage(saved) is not None, bit
    assert read_progress(saved, {"seed": 42}) == PROGRESS
    content = file.read_bytes()
    for length in range(size):
        (tmp_path / MANIFEST).write_bytes(content[:length])
        assert damage(tmp_path) is not None, length


def test_every_bit_of_every_file_counts(saved: Path) -> None:
    manifest = read_manifest(saved)
    assert {Path(name).suffix for name in manifest.files} == {".pt", ".json", ".safetensors"}, manifest.files
    assert {str(path.relative_to(saved)) for path in saved.rglob("*") if path.is_file()} == {MANIFEST, *manifest.files}
    drawn = random.Random()
    for name in manifest.files:
        file, bits = saved / name, 8 * (saved / name).stat().st_size
        for bit in {*range(min(bits, 200)), *range(max(0, bits - 200), bits), *drawn.choices(range(bits), k=FLIPS)}:
            with flipped(file, bit):
                assert is_found(saved, file), (name, bit)
    check_contents(saved, [saved / name for name in manifest.files])


def test_what_reads_a_checkpoint_compares_first(processes: Processes, saved: Path) -> None:
    """For each file, one bit: each of the ways to read it raises."""
    engine = an_engine(processes)
    for name in read_manifest(saved).files:
        with flipped(saved / name, 80):
            assert find_checkpoint(saved) == saved, "sizes do not tell"
            with pytest.raises(UserError, match=f"00012: the checkpoint is damaged: {name} has another content"):
                load_checkpoint(engine, saved)
            if "model_states" in name:
                with pytest.raises(DamagedError):
                    checkpoint_weights(saved)


OTHER_FORMS: dict[str, Any] = {
    "nothing": None,
    "a number": 7,
    "a list": [],
    "files as a list": {"format": 1, "progress": {}, "agreement": {}, "files": ["a"]},
    "a size as text": {"format": 1, "progress": {}, "agreement": {}, "files": {"a": "7"}},
    "a file elsewhere": {"format": 1, "progress": {}, "agreement": {}, "files": {"../../a": 7}},
    "progress as a list": {"format": 1, "progress": [], "agreement": {}, "files": {}},
    "a step as text": {"format": 1, "progress": {"step": "7"}, "agreement": {}, "files": {}},
    "a step below 0": {"format": 1, "progress": {"step": -7}, "agreement": {}, "files": {}},
    "an unknown count": {"format": 1, "progress": {"stop": 7}, "agreement": {}, "files": {}},
    "no agreement": {"format": 1, "progress": {}, "agreement": None, "files": {}},
    "no format": {"progress": {}, "agreement": {}, "files": {}},
    "a format as text": {"format": "1", "progress": {}, "agreement": {}, "files": {}},
    "a truth as format": {"format": [1], "progress": {}, "agreement": {}, "files": {}},
    "no sha256": {"format": 2, "progress": {}, "agreement": {}, "files": {}},
}


@pytest.mark.parametrize("form", OTHER_FORMS)
def test_a_manifest_of_another_form_is_damage(tmp_path: Path, form: str) -> None:
    (tmp_path / MANIFEST).write_text(json.dumps(OTHER_FORMS[form]))
    assert damage(tmp_path) is not None
    with pytest.raises(DamagedError):
        find_checkpoint(tmp_path)


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"[" * 100_000, b'{"format": ' + b"9" * 5000 + b"}", b"{} {}"])
def test_what_is_no_json_is_damage(tmp_path: Path, content: bytes) -> None:
    (tmp_path / MANIFEST).write_bytes(content)
    assert damage(tmp_path) is not None


def test_a_later_format_is_told_as_such_and_not_as_damage(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied = shutil.copytree(saved, tmp_path / "copied")
    monkeypatch.setattr("panda.engine.checkpoints.folders.FORMAT", 3)
    write_manifest(copied, read_manifest(saved))
    monkeypatch.undo()
    with pytest.raises(UserError, match="written by a later version of panda, in format 3") as caught:
        damage(copied)
    assert not isinstance(caught.value, DamagedError)
