"""Exports in the configuration and the loader of vLLM and SGLang, where these are installed."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from checkpoint_files import llama
from checkpoint_files import save_hf
from launching import run_script
from launching import train_many

BENCH = Path(__file__).parents[2] / "bench"
RUN = (
    *("--instruction_tuning_data_dir", "panda:data/sample/instruct", "--max_seq_length", 48, "--num_workers", 0),
    *("--gradient_accumulation_steps", 1, "--max_steps", 1, "--prompts", "a", "-p", "no:plot", "--ckpt_path", "base"),
)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("servers")
    save_hf(llama(), folder / "base")
    train_many(
        [[*RUN, "--output_dir", "whole"], [*RUN, "--use_lora", "--lora_r", 8, "--output_dir", "lora"]], cwd=folder
    )
    return folder


def read(script: str, folder: Path, *arguments: object) -> list[dict[str, Any]]:
    printed = run_script(BENCH / script, *arguments, cwd=folder)
    return [json.loads(line) for line in printed.splitlines() if line.startswith("{")]


@pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed")
def test_vllm_fills_every_parameter_and_takes_the_adapters(runs: Path) -> None:
    model, adapters = read("read_vllm.py", runs, runs / "whole/export", "--adapters", runs / "lora/export")
    assert_read(model)
    assert (adapters["r"], adapters["layers"]) == (8, 14)


@pytest.mark.skipif(find_spec("sglang") is None, reason="SGLang is not installed")
def test_sglang_fills_every_parameter(runs: Path) -> None:
    (model,) = read("read_sglang.py", runs, runs / "whole/export")
    assert_read(model)


def assert_read(model: dict[str, Any]) -> None:
    assert model["architecture"] == "LlamaForCausalLM" and model["same_sum"] and model["positions"] == 128
    assert model["parameters"] < model["tensors"], "it keeps queries, keys and values in one"
