"""``panda completion``: what a shell completes, and that the shells can do it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from panda.cli.completion import SCRIPTS
from panda.cli.completion import candidates
from panda.cli.completion import main
from panda.cli.main import COMMANDS

ONE_MATCH = [
    ("panda gen", ["generate"]),
    ("panda-train --optimizer nv", ["nvlamb"]),
    ("panda-train --optimizer NV", ["nvlamb"]),
    ("panda train --lr_scheduler wa", ["warmup"]),
    ("panda check run.yaml --precision b", ["bf16"]),
    ("panda-train --use_lora t", ["true"]),
    ("panda-train --gradient-acc", ["--gradient_accumulation_steps"]),
    ("panda-train --plugins early", ["early_stopping"]),
    ("panda show optimizer mu", ["muon"]),
    ("panda list opt", ["optimizers"]),
    ("panda generate runs/a --max", ["--max_new_tokens"]),
    ("panda export --mer", ["--merge"]),
    ("panda completion f", ["fish"]),
]


@pytest.mark.parametrize(("line", "expected"), ONE_MATCH)
def test_candidates(line: str, expected: list[str]) -> None:
    assert candidates(line.split()) == expected


def test_all_commands_and_all_keys() -> None:
    assert candidates(["panda", ""]) == list(COMMANDS)
    flags = candidates(["panda-train", "--"])
    assert {"--task", "--learning_rate", "--zero_stage"} <= {*flags} and "--nvlamb_eps" not in flags


def test_keys_of_what_is_chosen_join() -> None:
    assert "--num_layers" in candidates(["panda-train", "--arch", "llama-tiny", "--num_"])
    assert "--num_layers" not in candidates(["panda-train", "--num_"])
    assert candidates(["panda-train", "--plugins", "early_stopping", "--early_stopping_pat"]) == [
        "--early_stopping_patience"
    ]


@pytest.mark.parametrize(
    "line", ["panda unknown x", "panda-train --arch nothing --", "panda-train --output_dir ", "panda show nothing x"]
)
def test_what_is_wrong_or_a_file_is_no_error(line: str) -> None:
    words = line.split(" ")
    assert isinstance(candidates(words), list)


def test_files_of_the_user_are_not_executed(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("raise RuntimeError('executed')\n")
    assert "--learning_rate" in candidates(["panda-train", "--plugins", f"{tmp_path}/mine.py:x", "--"])
    assert "--learning_rate" in candidates(["panda-train", "--user_dir", str(tmp_path), "--"])


def test_it_is_explained(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0 and "~/.bashrc" in capsys.readouterr().out
    assert main(["tcsh"]) == 2
    assert "expected the name of a shell: bash, zsh, fish." in capsys.readouterr().err


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
def test_bash_completes() -> None:
    script = SCRIPTS["bash"] + (
        "COMP_WORDS=(panda-train --optimizer nv); COMP_CWORD=2; _panda; printf '%s\\n' \"${COMPREPLY[@]}\"\n"
        "complete -p panda panda-train\n"
    )
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, env={**os.environ, "PATH": path})
    assert done.stderr == ""
    assert done.stdout.splitlines() == [
        "nvlamb",
        "complete -o default -F _panda panda",
        "complete -o default -F _panda panda-train",
    ]


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_parse_their_script(shell: str) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"no {shell}")
    done = subprocess.run([shell, "-n", "/dev/stdin"], input=SCRIPTS[shell], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
