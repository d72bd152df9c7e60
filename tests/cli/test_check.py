from __future__ import annotations

from pathlib import Path

import pytest
from launching import run_panda

from panda.cli.main import main

CONFIGS = Path(__file__).parents[2] / "configs"


def test_each_value_is_printed_with_its_origin_and_the_data_is_counted(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(
        "arch: llama-tiny\ninstruction_tuning_data_dir: panda:data/sample/instruct\nmax_seq_length: 128\n"
        "per_gpu_train_batch_size: 32\ngradient_accumulation_steps: 1\nseed: 7\n"
    )
    done = run_panda("panda", "check", file, "--learning_rate", "2e-4", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert ["seed", "7", f"{file}:6"] in lines
    assert ["learning_rate", "0.0002", "--learning_rate"] in lines
    assert ["hidden_size", "128", "arch", "llama-tiny"] in lines
    assert ["save_steps", "0", "default"] in lines
    assert ["adam_betas", "0.9,", "0.99", "default"] in lines
    assert "\noptimizer adamw: panda-train " in done.stdout
    assert "\ndata        panda:data/sample/instruct: 5,400 samples of 5,400 rows in 1 file\n" in done.stdout
    assert "\nsteps       169 steps of 32 samples (32 x 1 x 1, " in done.stdout
    assert "\noutput      runs/instruct-llama-tiny\n" in done.stdout
    assert "\nmodel       llama (llama-tiny), 722,816 parameters, all trained\n" in done.stdout
    assert [entry.name for entry in tmp_path.iterdir()] == ["run.yaml"], "it writes nothing"


def test_without_a_configuration_it_has_checked_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: no configuration is given.\n  usage: panda check CONFIG")
    assert main(["check", "--help"]) == 0
    assert capsys.readouterr().out.startswith("usage: panda check CONFIG")


def test_a_mistake_in_the_file_is_told_with_its_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("arch: llama-tiny\nseeed: 3\n")
    assert main(["check", str(file)]) == 2
    assert capsys.readouterr().err == f"error: {file}:2: unknown key 'seeed'. Did you mean 'seed'?\n"
    assert main(["check", "missing.yaml"]) == 2
    assert "missing.yaml: no such configuration file" in capsys.readouterr().err


def test_what_cannot_work_is_refused_as_when_training(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "--arch", "llama-tiny", "--max_steps", "0"]) == 2
    assert capsys.readouterr().err.startswith("error: max_steps: 0: refused, since")


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (
            "--plugins freeze --freeze *norm*=1-5 *embde*",
            "error: freeze: '*embde*' matches no parameter that is trained",
        ),
        ("--lr_multipliers *nowhere*=2", "error: lr_multipliers: *nowhere* matches no parameter. The parameters are: "),
        ("--use_lora --plugins freeze --freeze *embed*", "error: freeze: '*embed*' matches no parameter that is train"),
    ],
)
def test_patterns_of_parameters_that_match_nothing_are_refused(
    flags: str, told: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["check", "panda:configs/instruct-tiny.yaml", *flags.split()]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(told)


def test_what_is_frozen_is_counted(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    argv = ["--plugins", "freeze", "--freeze", "*embed*", "*norm*=3-5", "*.0.*=9-", "--lr_multipliers", "*embed*=0.5"]
    assert main(["check", "panda:configs/instruct-tiny.yaml", *argv]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("frozen")]
    assert [line.partition("by")[2] for line in lines] == [
        " '*embed*', in all steps", " '*norm*', in steps 3 to 5", " '*.0.*', from step 9 on",
    ]  # fmt: skip
    assert lines[0].startswith("frozen      1 parameter by")
