"""``panda translate`` writes to the terminal or to a new file."""

from __future__ import annotations

from pathlib import Path

import pytest

from panda.cli.main import main

EXAMPLE = Path(__file__).parents[1] / "configuration" / "other_tools" / "axolotl_qlora.yml"


def test_the_file_has_its_origins_and_its_lists_and_stderr_says_that_it_has(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["translate", str(EXAMPLE)]) == 0
    printed = capsys.readouterr()
    lines = printed.out.splitlines()
    assert lines[0].startswith("# axolotl_qlora.yml, a file of axolotl,")
    (micro,) = (line for line in lines if line.startswith("per_gpu_train_batch_size: 2 "))
    assert micro.endswith("# micro_batch_size")
    (clipped,) = (line for line in lines if line.startswith("max_grad_norm: 1.0 "))
    assert clipped.endswith("# axolotl's default of max_grad_norm")
    begins = [lines.index(f"# {title}:") for title in ("Without a counterpart", "Not quite the same")]
    assert begins[0] < lines.index("#   wandb_project: herons") < begins[1]
    assert "note: keys without a counterpart: 4." in printed.err


def test_a_file_is_written_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "run.yaml"
    assert main(["translate", str(EXAMPLE), "--output", str(output)]) == 0
    assert "Without a counterpart:" in capsys.readouterr().out
    before = output.read_text()
    assert main(["translate", str(EXAMPLE), "--output", str(output)]) == 2
    assert f"--output: {output} exists" in capsys.readouterr().err
    assert output.read_text() == before


def test_the_tool_can_be_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["translate", str(EXAMPLE), "--from", "axolotl"]) == 0
    assert main(["translate", str(EXAMPLE), "--from", "herons"]) == 2
    assert "expected one of llama-factory, axolotl, trl, transformers" in capsys.readouterr().err
