"""Exports in vLLM's own configuration and loader, where vLLM is installed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from checkpoint_files import llama
from checkpoint_files import save_hf
from launching import run_script
from launching import train_many

pytest.importorskip("vllm", reason="vLLM is not installed")

BENCH = Path(__file__).parents[2] / "bench"
RUN = (
    *("--instruction_tuning_data_dir", "panda:data/sample/instruct", "--max_seq_length", 48, "--num_workers", 0),
    *("--gradient_accumulation_steps", 1, "--max_steps", 1, "--prompts", "a", "-p", "no:plot"),
)


def test_its_loader_fills_every_parameter_and_it_takes_the_adapters(tmp_path: Path) -> None:
    save_hf(llama(), tmp_path / "base")
    started = ("--ckpt_path", "base", *RUN)
    whole = [*started, "--output_dir", "whole"]
    train_many([whole, [*started, "--use_lora", "--lora_r", 8, "--output_dir", "lora"]], cwd=tmp_path)
    printed = run_script(
        BENCH / "read_vllm.py", tmp_path / "whole/export", "--adapters", tmp_path / "lora/export", cwd=tmp_path
    )
    read, adapters = (json.loads(line) for line in printed.splitlines() if line.startswith("{"))
    assert read["architecture"] == "LlamaForCausalLM" and read["same_sum"] and read["positions"] == 128
    assert read["parameters"] < read["tensors"], "it keeps queries, keys and values in one"
    assert (adapters["r"], adapters["layers"]) == (8, 14)
