"""A start finds, reads and builds each thing once, and `check` refuses what training refuses."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import pytest
from checkpoint_files import llama
from checkpoint_files import save_hf

from panda.cli.check import main as check
from panda.configuration.arguments import parse_arguments
from panda.configuration.configure import configure
from panda.registry import UserError
from panda.runner import train

SMALL = "--gradient_accumulation_steps 1 --max_steps 1 --max_seq_length 64 --num_workers 0 -p no:tensorboard -p no:plot"
TINY = "--arch llama-tiny --num_layers 1 --hidden_size 16 --intermediate_size 16 --num_heads 1"
EXPERTS = (
    "--arch qwen3-30b-a3b --hf_config num_hidden_layers=1 hidden_size=16 intermediate_size=16 moe_intermediate_size=16"
    " num_experts=8 num_experts_per_tok=2 num_attention_heads=2 num_key_value_heads=1 head_dim=8 vocab_size=320"
)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    rows = [{"input": letter, "target": letter} for letter in "abcd"]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    return tmp_path


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each of these is called."""
    calls: Counter[str] = Counter()

    def count(target: str) -> None:
        original: Callable[..., Any] = resolve_name(target)
        name = target.rpartition(".")[2]

        def counting(*arguments: Any, **keywords: Any) -> Any:
            calls[name] += 1
            return original(*arguments, **keywords)

        monkeypatch.setattr(target, counting)

    count("panda.weights.finding.pretrained_at")
    count("panda.weights.files._opened")  # each opening of a file of safetensors reads its header
    count("panda.weights.pretrained.identity_of")
    count("transformers.LlamaForCausalLM.__init__")
    return calls


def test_a_start_finds_its_checkpoint_once_and_builds_its_model_once(
    processes: Any, folder: Path, counted: Counter[str]
) -> None:
    model = llama()
    save_hf(model, folder / "base")
    counted.clear()
    flags = f"{SMALL} --model llama --ckpt_path base --instruction_tuning_data_dir rows.json --use_lora --lora_r 2"
    run = train(configure(parse_arguments(flags.split())))
    assert run is not None
    files = len(list((folder / "base").glob("*.safetensors")))
    tensors = len(model.state_dict())
    assert files > 1
    assert counted["pretrained_at"] == 1
    assert counted["identity_of"] == 1
    assert counted["_opened"] == files + tensors, "the header of each file, and each tensor, are read once"
    assert counted["__init__"] == 1


def test_a_model_with_random_weights_is_built_once(processes: Any, folder: Path, counted: Counter[str]) -> None:
    flags = f"{SMALL} {TINY} --instruction_tuning_data_dir rows.json"
    assert train(configure(parse_arguments(flags.split()))) is not None
    assert counted["__init__"] == 2, "and once without weights, for the names in its export"


def test_check_refuses_a_model_that_does_not_fit_as_training_does(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("panda.engine.memory._host_memory", lambda: 1000)
    flags = f"{SMALL} {TINY} --instruction_tuning_data_dir rows.json"
    assert check(flags.split()) == 2
    assert "this machine has" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags", ["--precision fp16", "--tensor_parallel_size 3", "--flash_attention_4 true --batching packed"]
)
def test_check_refuses_what_training_refuses(folder: Path, flags: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert check(f"{SMALL} {TINY} --instruction_tuning_data_dir rows.json {flags}".split()) == 2
    assert flags.split()[0].removeprefix("--") in capsys.readouterr().err


def test_experts_are_not_quantised_and_check_says_so_as_training_does(
    processes: Any, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("panda.run.trained_model.make_trainable", lambda *_: pytest.fail("it read the weights"))
    flags = f"{SMALL} {EXPERTS} --instruction_tuning_data_dir rows.json --use_quant"
    assert check(flags.split()) == 2
    assert re.search(
        r"error: use_quant: \d\d% of the weights of Qwen3Moe\w* are those of experts", capsys.readouterr().err
    )
    with pytest.raises(UserError, match=r"use_quant: .* are those of experts"):
        train(configure(parse_arguments(flags.split())))


def test_memory_is_not_advised_to_be_saved_by_quantising_experts(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("panda.engine.memory._host_memory", lambda: 1000)
    for shape, advised in {TINY: True, EXPERTS: False}.items():
        assert check(f"{SMALL} {shape} --instruction_tuning_data_dir rows.json".split()) == 2
        said = capsys.readouterr().err
        assert "Take a smaller arch" in said and ("use_quant" in said) is advised


def test_a_schedule_that_is_refused_leaves_no_run_behind(
    processes: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("panda.run.trained_model.make_trainable", lambda *_: pytest.fail("it read the weights"))
    flags = f"{SMALL} {TINY} --instruction_tuning_data_dir rows.json --lr_scheduler poly --lr_end 1"
    with pytest.raises(UserError, match="lr_end"):
        train(configure(parse_arguments(flags.split())))
    assert not (folder / "runs").exists()


def test_check_refuses_to_continue_another_run_as_training_does(
    processes: Any, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = f"{SMALL} {TINY} --instruction_tuning_data_dir rows.json --output_dir run"
    assert train(configure(parse_arguments(flags.split()))) is not None
    assert check(f"{flags} --resume auto".split()) == 0
    assert check(f"{flags} --resume auto --seed 7".split()) == 2
    assert "seed was 42 and is 7" in capsys.readouterr().err


def test_a_generation_config_that_cannot_be_read_is_found_before_the_data(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_hf(llama(), folder / "base")
    (folder / "base" / "generation_config.json").write_text("{")
    flags = f"--model llama --ckpt_path base --instruction_tuning_data_dir rows.json {SMALL}"
    assert check(flags.split()) == 2
    assert "generation_config.json: not valid JSON" in capsys.readouterr().err
