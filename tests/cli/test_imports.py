"""What answers without training imports nothing heavy, so that a mistake is explained in under a second."""

from __future__ import annotations

import subprocess
import sys
from functools import cache

import pytest

HEAVY = ("torch", "transformers", "numpy", "deepspeed", "tokenizers", "matplotlib", "tensorboard", "fairscale", "rich")
ROOMS = (
    "panda.data",
    "panda.engine",
    "panda.hooks",
    "panda.models",
    "panda.optim",
    "panda.tasks",
    "panda.run.assembly",
    "panda.runner",
)

PROGRAM = """
import sys
from panda.cli.{module} import main
code = main({argv!r})
print("code", code)
print("modules", *sys.modules)
"""


@cache
def outcome(module: str, *argv: str) -> tuple[int, set[str]]:
    """The exit code of a command, and the modules that it imported."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(module=module, argv=list(argv))],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    code, modules = done.stdout.splitlines()[-2:]
    assert "Traceback" not in done.stderr
    return int(code.split()[1]), set(modules.split()[1:])


SAMPLE = ("--arch", "llama-tiny", "--instruction_tuning_data_dir", "panda:data/sample/instruct")

COMMANDS: dict[str, tuple[str, list[str], int]] = {
    "help": ("train", ["--help"], 0),
    "help of an arch": ("train", ["--arch", "llama-65b", "--help"], 0),
    "list": ("main", ["list"], 0),
    "show": ("main", ["show", "model", "llama"], 0),
    "misspelt key": ("train", ["--arch", "llama-65b", "--learning_rat", "1"], 2),
    "misspelt name": ("train", ["--arch", "lama"], 2),
    "lora_r alone": ("train", ["--arch", "llama-65b", "--lora_r", "8"], 2),
    "use_quant without LoRA": ("train", ["--arch", "llama-65b", "--use_quant", "--use_lora", "false"], 2),
    "bit_training": ("train", ["--arch", "llama-65b", "--optimizer", "lamb", "--bit_training"], 2),
    "ckpt_path": ("train", ["--arch", "llama-65b", "--ckpt_path", "x"], 2),
    "tokenizer": ("train", ["--arch", "llama-tiny", "--tokenizer", "nowhere"], 2),
    "resume": ("train", ["--arch", "llama-tiny", "--resume", "nowhere"], 2),
    "deepspeed": ("train", ["--arch", "llama-tiny", "--deepspeed_config", "nowhere.json"], 2),
    "data": ("train", ["--arch", "llama-tiny", "--instruction_tuning_data_dir", "nowhere"], 2),
    "evaluation data": ("main", ["check", *SAMPLE, "--eval_data_dir", "nowhere"], 2),
    "data of panda eval": ("main", ["eval", ".", "--data", "nowhere"], 2),
    "data to prepare": ("main", ["prepare", *SAMPLE, "--eval_data_dir", "nowhere"], 2),
    "output folder": ("train", [*SAMPLE, "--output_dir", "/dev/null/run"], 2),
    "generate": ("main", ["generate", "/dev", "--prompt", "x"], 2),
    "chat": ("main", ["chat", "nowhere"], 2),
    "export": ("main", ["export", "/dev"], 2),
    "translate": ("main", ["translate", "tests/configuration/other_tools/trl_sft.yaml"], 0),
    "a file of another tool": ("train", ["--config", "tests/configuration/other_tools/trl_sft.yaml"], 2),
    "fp16 without ZeRO": ("train", ["--arch", "llama-65b", "--precision", "fp16", "--zero_stage", "0"], 2),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_what_needs_no_torch_imports_none(name: str) -> None:
    module, argv, expected = COMMANDS[name]
    code, modules = outcome(module, *argv)
    assert code == expected
    assert not modules & set(HEAVY)


def test_list_imports_no_component_of_panda() -> None:
    _, modules = outcome("main", "list")
    assert [name for name in modules if name.startswith(ROOMS)] == []


def test_show_imports_the_one_component_that_is_shown() -> None:
    _, modules = outcome("main", "show", "model", "llama")
    assert sorted(name for name in modules if name.startswith(ROOMS)) == ["panda.models", "panda.models.llama"]


def test_a_misspelt_name_imports_no_component_of_panda() -> None:
    _, modules = outcome("train", "--arch", "lama")
    assert [name for name in modules if name.startswith(ROOMS)] == []
