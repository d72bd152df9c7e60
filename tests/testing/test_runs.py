"""``panda.testing.train`` and what it returns, and what importing the package costs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import panda.testing
from panda.testing import fake_distributions
from panda.testing import train

TINY = {
    "arch": "llama-tiny",
    "num_layers": 1,
    "hidden_size": 32,
    "instruction_tuning_data_dir": "panda:data/sample/instruct",
    "max_seq_length": 32,
    "max_samples": 8,
    "max_steps": 2,
    "per_gpu_train_batch_size": 4,
    "gradient_accumulation_steps": 1,
    "num_workers": 0,
    "save_final": False,
}


def test_importing_it_imports_no_torch_and_its_names_are_there() -> None:
    code = "import sys, panda.testing; print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "numpy", "transformers"} & set(modules)
    for name in panda.testing._EXPORTED:
        assert getattr(panda.testing, name).__doc__, name
    with pytest.raises(AttributeError, match=r"it has: .*fake_distributions"):
        _ = panda.testing.chek_model


def test_a_run_says_what_it_did(tmp_path: Path) -> None:
    run = train(tmp_path / "runs" / "two", ranks=2, prompts=["a, b", "c"], **TINY)
    assert len(run.losses) == 2 and run.records[0]["step"] == 1 and run.evaluations == []
    assert (run.export / "model.safetensors").exists() and "exporting" in run.printed
    assert (run.directory / "answers.json").read_text().count('"answer"') == 2


def test_a_failure_is_an_assertion_with_what_was_printed(tmp_path: Path) -> None:
    refused = train(tmp_path / "run", **TINY | {"arch": "lama-tiny"}, fails=True)
    assert "unknown arch 'lama-tiny'" in refused.printed
    with pytest.raises(AssertionError, match=r"--arch lama-tiny(?s:.*)unknown arch 'lama-tiny'"):
        train(tmp_path / "run", **TINY | {"arch": "lama-tiny"})


def test_a_run_sees_a_fake_distribution_until_its_end(tmp_path: Path) -> None:
    source = """
    from panda import register_arch

    @register_arch("acme-tiny", model="panda-train:llama")
    def acme_tiny():
        '''Tiny.'''
        return {"num_layers": 1, "hidden_size": 32, "num_heads": 2}
    """
    with fake_distributions(tmp_path / "site") as made:
        made.install("acme-panda", {"archs": {"acme-tiny": "acme.tiny"}}, {"acme.tiny": source})
        options = {key: value for key, value in TINY.items() if key not in ("num_layers", "hidden_size")}
        run = train(tmp_path / "run", **options | {"arch": "acme-tiny"})
    assert len(run.losses) == 2
    assert "unknown arch 'acme-tiny'" in train(tmp_path / "b", fails=True, **options | {"arch": "acme-tiny"}).printed


LAB = """
import os
import sys

from panda import register_arch

assert os.getcwd() not in sys.path  # as of `panda-train`: a folder there may have the name of an installed package

@register_arch("lab-tiny", model="llama")
def tiny():
    "Tiny."
    return {"num_layers": 1, "hidden_size": 32, "num_heads": 2}
"""


def test_relative_paths_mean_the_folder_of_the_caller(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.json").write_text('[{"input": "a", "target": "b"}, {"input": "c", "target": "d"}]')
    (tmp_path / "lab").mkdir()
    (tmp_path / "lab" / "lab_arch.py").write_text(LAB)
    named = {"arch": "lab/lab_arch.py:lab-tiny", "instruction_tuning_data_dir": "rows.json", "max_steps": 1}
    options = {key: value for key, value in TINY.items() if key not in ("num_layers", "hidden_size")}
    run = train(Path("runs/deep/run"), **options | named)
    assert len(run.losses) == 1 and (tmp_path / "runs" / "deep" / "run" / "metrics.jsonl").exists()
