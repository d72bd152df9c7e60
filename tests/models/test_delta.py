"""``panda delta``: by PandaLLM's rule, and back."""

from __future__ import annotations

from pathlib import Path

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
    assert "no weight differs by more than" in capsys.readouterr().out
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
