from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from distributions import Distributions

from panda.cli.train import main
from panda.configuration.arguments import parse_arguments
from panda.configuration.configure import Configuration
from panda.configuration.configure import configure
from panda.configuration.options import RunOptions
from panda.configuration.refusals import REFUSALS
from panda.configuration.refusals import WHOLE
from panda.configuration.refusals import refuse_undeclared
from panda.registry import UserError

ARCH = ["--arch", "llama-7b"]
TASK = """
from panda.tasks.text_task import TextTask

@register_task("of-its-own")
class OfItsOwn(TextTask):
    'It inherits from a task that is right packed, and has a loss of its own.'
    def loss(self, model, batch, statistics={}): ...
"""
REFUSED: dict[str, list[Any]] = {
    "batching: packed with a task that does not say that it is right packed": [
        *("--task", "of-its-own", "--batching", "packed")
    ],
    "flash_attention_4 without batching: packed": ["--flash_attention_4", "true"],
    "max_steps: 0": ["--max_steps", "0"],
    "eval_steps without eval_data_dir or eval_fraction": ["--eval_steps", "10"],
    "early_stopping, best_checkpoint or rate_on_plateau without evaluations": [
        *("--plugins", "panda-train:early_stopping", "--eval_fraction", "0.1")
    ],
    "eval_generate without eval_data_dir or eval_fraction": ["--plugins", "eval_generate"],
    "eval_fraction with eval_data_dir": ["--eval_fraction", "0.1", "--eval_data_dir", "data"],
    "base_path, allow_pickle or extend_vocab without ckpt_path": ["--base_path", "pretrain/llama-7b"],
    "lora_*, use_dora or use_rslora without use_lora": ["--use_rslora"],
    "use_quant with use_lora: false": ["--use_quant", "--use_lora", "false", "--precision", "bf16"],
    "use_quant without bitsandbytes": ["--use_quant", "--use_lora", "--precision", "bf16"],
    "quant_bits without use_quant": ["--quant_bits", "8"],
    "quant_bits: 8 with zero_stage: 3": [
        *("--use_quant", "--use_lora", "--precision", "bf16", "--quant_bits", "8", "--zero_stage", "3"),
    ],
    "8-bit optimizer state without bitsandbytes": ["--optimizer", "paged_adamw8bit"],
    "bit_training with an optimizer that is not AdamW": ["--optimizer", "NVLamb", "--bit_training"],
    "precision: fp16 with zero_stage: 0": ["--precision=fp16", "--zero_stage=0"],
    **{
        f"{WHOLE} with {what}": ["--optimizer", "NVLamb", deepspeed]
        for what, deepspeed in {
            "offload_optimizer on NVMe": {"zero_optimization": {"offload_optimizer": {"device": "nvme"}}},
            "offload_optimizer.ratio below 1": {"zero_optimization": {"offload_optimizer": {"ratio": 0.5}}},
            "ZenFlow or SuperOffload": {"zero_optimization": {"zenflow": {"topk_ratio": 0.1}}},
        }.items()
    },
    "offload_optimizer.ratio below 1 with adamw or another optimizer of panda's": [
        *("--zero_stage", "3"),
        {"zero_optimization": {"offload_optimizer": {"device": "cpu", "ratio": 0.5}}},
    ],
    "the plugins ema or freeze with offload_optimizer on NVMe": [
        *("--plugins", "ema", "--zero_stage", "3"),
        {"zero_optimization": {"offload_optimizer": {"device": "nvme", "nvme_path": "/tmp"}}},
    ],
    "compile with zero_stage: 3 and offload_param on NVMe": [
        *("--compile", "--zero_stage", "3"),
        {"zero_optimization": {"offload_param": {"device": "nvme"}}},
    ],
    "deterministic with compile": ["--deterministic", "--compile"],
    **{
        f"tensor_parallel_size with {what}": ["--tensor_parallel_size", "2", *flags]
        for what, flags in {
            "zero_stage: 3": ["--zero_stage", "3"],
            "use_lora or use_quant": ["--use_lora"],
            "zero_stage: 0 in 16 bits": ["--precision", "bf16", "--zero_stage", "0"],
        }.items()
    },
}
"""Flags; an object is what deepspeed_config holds."""


def arguments(words: list[Any], folder: Path) -> list[str]:
    """``words`` with all their objects together in a file."""
    held: dict[str, Any] = {}
    for word in words:
        if isinstance(word, dict):
            for key, value in word.items():
                inner = held.setdefault(key, {})
                for name, setting in value.items():
                    inner[name] = inner.get(name, {}) | setting if isinstance(setting, dict) else setting
    file = folder / "deepspeed.json"
    file.write_text(json.dumps(held))
    return [*dict.fromkeys(word for word in words if isinstance(word, str))] + (
        ["--deepspeed_config", str(file)] if held else []
    )


def test_every_refusal_is_tried_here() -> None:
    assert [refusal.what for refusal in REFUSALS] == list(REFUSED)


@pytest.mark.parametrize("what", REFUSED)
def test_a_refusal_gives_its_reason_and_what_to_use_instead(
    what: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    distributions: Distributions,
) -> None:
    distributions.install("of-its-own", {"tasks": {"of-its-own": "of_its_own"}}, {"of_its_own": TASK})
    found = None if "without bitsandbytes" in what else object()
    monkeypatch.setattr("panda.configuration.refusals.find_spec", lambda name: found)
    arch = [] if "--model" in REFUSED[what] else ARCH
    assert main([*arch, *arguments(REFUSED[what], tmp_path)]) == 2
    captured = capsys.readouterr()
    (refusal,) = (refusal for refusal in REFUSALS if refusal.what == what)
    what = what.replace(WHOLE, "optimizer: nvlamb, which needs norms of whole parameters,")
    assert captured.err == f"error: {what}: refused, since {refusal.reason}. Instead: {refusal.instead}.\n"
    assert captured.out == ""


def test_several_refusals_are_told_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--arch", "llama-7b", "--max_steps", "0", "--precision", "fp16", "--zero_stage", "0"]) == 2
    assert [line.count("refused") for line in capsys.readouterr().err.splitlines()] == [1, 1]


def test_defaults_and_neighbours_of_what_is_refused_are_not() -> None:
    for options in (
        RunOptions(),
        RunOptions(precision="fp16", zero_stage=1),
        RunOptions(precision="bf16"),
        RunOptions(bit_training=True),
        RunOptions(bit_training=True, optimizer="adamw8bit"),
        RunOptions(use_quant=True, use_lora=True, zero_stage=3),
        RunOptions(use_quant=True, use_lora=True, quant_bits=8, zero_stage=2),
        RunOptions(lora_r=64, lora_alpha=16.0, lora_dropout=0.05),
        RunOptions(tensor_parallel_size=2, zero_stage=0, activation_checkpointing="full"),
        RunOptions(tensor_parallel_size=2, zero_stage=2, precision="bf16"),
        RunOptions(zero_stage=3, compile=True, use_lora=True, activation_checkpointing="selective"),
        RunOptions(use_lora=True, lora_r=8, lora_target_modules=("q_proj",), use_dora=True),
    ):
        of_all_runs = [refusal for refusal in REFUSALS if not refusal.of_plugins]
        assert [refusal.what for refusal in of_all_runs if refusal.applies(options)] == []


@pytest.mark.parametrize(
    "flags",
    [
        ["--plugins", "early_stopping", "--eval_fraction", "0.1", "--eval_steps", "5"],
        ["--plugins", "early_stopping", "-p", "no:early_stopping"],
        ["--plugins", "lab:early_stopping"],
    ],
)
def test_a_run_without_that_plugin_of_pandas_own_or_with_evaluations_is_not_refused(
    flags: list[str], distributions: Distributions
) -> None:
    module = '@register_plugin("early_stopping")\ndef stops(options, context):\n    "Stops."'
    distributions.install("lab", {"plugins": {"early_stopping": "lab"}}, {"lab": module})
    configure(parse_arguments([*ARCH, *flags]))


OPTIMIZERS = """
@register_optimizer("whole", needs="parameters")
def whole(options, context):
    'It says what it needs.'

@register_optimizer("binds")
def binds(options, context):
    'It does not say what it needs.'
"""


def configured(optimizer: str, file: Path) -> Configuration:
    words = [*ARCH, "--optimizer", optimizer, "--deepspeed_config", str(file), "-p", "no:tensorboard"]
    return configure(parse_arguments(words))


def test_optimizers_are_refused_by_what_they_need(tmp_path: Path, distributions: Distributions) -> None:
    distributions.install("lab", {"optimizers": {"whole": "lab", "binds": "lab"}}, {"lab": OPTIMIZERS})
    nvme, cpu = tmp_path / "nvme.json", tmp_path / "cpu.json"
    for file in (nvme, cpu):
        file.write_text(json.dumps({"zero_optimization": {"offload_optimizer": {"device": file.stem}}}))
    needs = {
        "nvlamb": "norms of whole",
        "LAMB": "norms of whole",
        "panda-train:lamb": "norms of whole",
        "whole": "whole",
    }
    for optimizer, words in needs.items():
        name = "whole" if optimizer == "whole" else "nvlamb"
        with pytest.raises(UserError, match=f"optimizer: {name}, which needs {words} parameters, with .* on NVMe"):
            configured(optimizer, nvme)
        configured(optimizer, cpu)
    configured("adamw", nvme)


def test_an_optimizer_that_binds_without_a_word_is_refused_once_it_is_built(
    tmp_path: Path, distributions: Distributions
) -> None:
    distributions.install("lab", {"optimizers": {"binds": "lab"}}, {"lab": OPTIMIZERS})
    file = tmp_path / "nvme.json"
    file.write_text(json.dumps({"zero_optimization": {"offload_optimizer": {"device": "nvme"}}}))
    resolved = configured("binds", file).resolved
    with pytest.raises(UserError, match=r"optimizer: binds, which needs norms of whole parameters, with .* on NVMe"):
        refuse_undeclared(resolved)
    file.write_text("{}")
    refuse_undeclared(resolved)


def test_a_refusal_reads_as_a_sentence() -> None:
    for refusal in REFUSALS:
        for text in (refusal.reason, refusal.instead):
            assert text and text.strip() == text and not text.endswith(".")


def test_a_refusal_of_several_keys_says_where_each_stands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run.yaml").write_text("arch: llama-tiny\nlora_r: 4\n")
    assert main(["--config", str(tmp_path / "run.yaml")]) == 2
    assert f"{tmp_path / 'run.yaml'}:2: lora_*" in capsys.readouterr().err
