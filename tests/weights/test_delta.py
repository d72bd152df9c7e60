"""``panda delta``: by PandaLLM's rule, and back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_files import llama
from checkpoint_files import save_delta
from checkpoint_files import save_hf
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from transformers import AutoTokenizer

from panda.cli.main import main

Captured = pytest.CaptureFixture[str]


def test_a_delta_is_made_as_pandallm_makes_it(tmp_path: Path, capsys: Captured) -> None:
    base, target = llama(1, vocab_size=258), llama(2)
    save_hf(base, tmp_path / "base")
    save_hf(target, tmp_path / "target")
    save_delta(target, base, tmp_path / "expected")
    argv = ["delta", "make", "--target", tmp_path / "target", "--base", tmp_path / "base"]
    assert main([*map(str, argv), "--output", str(tmp_path / "new-delta")]) == 0
    assert "it restores each weight to within" in capsys.readouterr().out
    expected, got = (load_file(tmp_path / name / "model.safetensors") for name in ("expected", "new-delta"))
    assert expected.keys() == got.keys()
    assert all(torch.equal(got[name], expected[name]) for name in expected)
    assert AutoTokenizer.from_pretrained(tmp_path / "new-delta").vocab_size == 259


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_applied_delta_is_the_fine_tune_as_far_as_it_says(
    tmp_path: Path, capsys: Captured, dtype: torch.dtype
) -> None:
    base, target = llama(1, vocab_size=258).to(dtype), llama(2).to(dtype)
    save_hf(base, tmp_path / "base")
    save_hf(target, tmp_path / "target")
    flags = ["--base_model", str(tmp_path / "base")]
    make = ["--target_model", str(tmp_path / "target"), "--output", str(tmp_path / "a-delta")]
    assert main(["delta", "make", *flags, *make]) == 0
    stated = float(capsys.readouterr().out.split()[-1].rstrip("."))
    apply = ["--delta_model", str(tmp_path / "a-delta"), "--output", str(tmp_path / "back")]
    assert main(["delta", "apply", *flags, *apply]) == 0
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    assert back.dtype == dtype and back.config.vocab_size == 259
    differences = [
        float((a - b).detach().abs().max()) for a, b in zip(back.parameters(), target.parameters(), strict=True)
    ]
    assert max(differences) == pytest.approx(stated, rel=1e-2)
    assert 0 < stated < (1e-6 if dtype == torch.float32 else 2e-2)


def test_nothing_is_written_over_and_the_wrong_base_is_told(tmp_path: Path, capsys: Captured) -> None:
    save_hf(llama(1), tmp_path / "target")
    save_hf(llama(2, hidden_size=64), tmp_path / "base")
    argv = ["delta", "make", "--target", str(tmp_path / "target"), "--base", str(tmp_path / "base")]
    assert main([*argv, "--output", str(tmp_path / "out")]) == 2
    assert "not the base of" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    argv[-1] = str(tmp_path / "target")
    assert main([*argv, "--output", str(tmp_path / "base")]) == 2
    assert "is not empty" in capsys.readouterr().err


def test_a_full_disk_leaves_nothing_and_is_told(tmp_path: Path, full_disk: Any, capsys: Captured) -> None:
    save_hf(llama(1), tmp_path / "base")
    save_hf(llama(2), tmp_path / "target")
    argv = ["delta", "make", "--target", str(tmp_path / "target"), "--base", str(tmp_path / "base")]
    with full_disk(20_000):
        assert main([*argv, "--output", str(tmp_path / "new-delta")]) == 2
    assert f"{tmp_path}/new-delta cannot be written: the disk is full" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"base", "target"}


def test_a_whole_model_is_not_applied(tmp_path: Path, capsys: Captured) -> None:
    save_hf(llama(1), tmp_path / "base")
    save_hf(llama(2), tmp_path / "plain")
    argv = ["delta", "apply", "--delta", tmp_path / "plain", "--base", tmp_path / "base", "--output", tmp_path / "out"]
    assert main([*map(str, argv)]) == 2
    assert "plain' is not a delta" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_delta_is_applied_to_its_own_base_alone_wherever_that_is(tmp_path: Path, capsys: Captured) -> None:
    save_hf(llama(1), tmp_path / "base")
    save_hf(llama(2), tmp_path / "target")
    save_hf(llama(3), tmp_path / "other")
    words = ["delta", "make", "--target", tmp_path / "target", "--base", tmp_path / "base"]
    assert main([*map(str, words), "--output", str(tmp_path / "made")]) == 0
    (tmp_path / "base").rename(tmp_path / "moved")

    def apply(base: str, output: str) -> int:
        capsys.readouterr()
        argv = ["delta", "apply", "--delta", tmp_path / "made", "--base", tmp_path / base, "--output"]
        return main([*map(str, argv), str(tmp_path / output)])

    assert apply("other", "out") == 2
    error = capsys.readouterr().err
    assert f"a delta to another base: {tmp_path}/base, tensors-sha256:" in error
    assert f", and not {tmp_path}/other, tensors-sha256:" in error
    assert not (tmp_path / "out").exists()
    generate = ["generate", tmp_path / "made", "--prompt", "x", "--base_path", tmp_path / "other"]
    assert main([*map(str, generate)]) == 2
    assert "a delta to another base" in capsys.readouterr().err
    assert apply("made", "out") == 2
    assert "--base: " in (error := capsys.readouterr().err) and "is a delta itself" in error
    assert apply("moved", "out") == 0


@pytest.mark.parametrize("mark", [None, '{"base": "elsewhere", "whole": []}'])
def test_a_delta_that_does_not_record_its_base_is_accepted(tmp_path: Path, mark: str | None) -> None:
    base, target = llama(1), llama(2)
    save_hf(base, tmp_path / "base")
    save_delta(target, base, tmp_path / "their-delta")
    if mark is not None:
        (tmp_path / "their-delta" / "delta.json").write_text(mark)
    argv = ["delta", "apply", "--delta", tmp_path / "their-delta", "--base", tmp_path / "base"]
    assert main([*map(str, argv), "--output", str(tmp_path / "out")]) == 0
