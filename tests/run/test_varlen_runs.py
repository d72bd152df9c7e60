"""Whole runs without a mask for packed rows: the losses of runs with one, and what they say."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from launching import exported_weights
from launching import metrics
from launching import run_script
from launching import train_many
from launching import zero3_at_once
from torch._dynamo.testing import CompileCounter

from panda.configuration.options import RunOptions
from panda.models.forward.layers import numbered_layers
from panda.models.forward.layers import without_compiling
from panda.models.forward.trial import refuse_unfit
from panda.models.forward.varlen_attention import FLASH_4
from panda.models.forward.varlen_attention import VARLEN
from panda.models.llama import LlamaOptions
from panda.models.llama import build_llama
from panda.registry.contexts import ModelContext
from panda.run import reference

SHAPE = "--arch llama-tiny --num_layers 2 --hidden_size 32 --intermediate_size 48 --num_heads 4 --num_key_value_heads 2"
RUN = f"{SHAPE} --task instruct --max_seq_length 100 --batching packed --max_steps 3 --per_gpu_train_batch_size 2"
ROWS = [{"input": "x" * (index * 37 % 60 + 1), "target": "yes" * (index % 5 + 1)} for index in range(80)]


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_without_a_mask_has_the_losses_of_one_with_it(ranks: int, tmp_path: Path) -> None:
    """Full training by both kernels, adapters with recomputed layers, and ZeRO-3; evaluation, too."""
    (tmp_path / "rows.json").write_text(json.dumps(ROWS))
    data = ["--instruction_tuning_data_dir", "rows.json", "--eval_fraction", 0.2, "--gradient_accumulation_steps", 8]
    common = [*RUN.split(), *data, "--token_cache", "cache", "--learning_rate", 1e-2]
    lora = ["--use_lora", "--lora_r", 4, "--lora_dropout", 0, "--activation_checkpointing", "selective"]
    variants: list[list[object]] = [[], lora, []] if ranks == 1 else [[*zero3_at_once(tmp_path)]]
    said = {}
    for how in ("mask", "kernel"):
        runs: list[list[object]] = [
            [*common, *more, "--output_dir", f"{how}-{number}"] for number, more in enumerate(variants)
        ]
        if how == "mask":
            said[how] = train_many(runs, ranks=ranks, cwd=tmp_path)
        else:
            runs[-1] = [*runs[-1], "--flash_attention_4", "true"]
            argv = json.dumps([list(map(str, run)) for run in runs])
            said[how] = run_script(Path(__file__).parent / "train_by_kernel.py", argv, cwd=tmp_path, ranks=ranks)
    assert "attention of packed rows: with a mask, since there is no kernel for a CPU" in said["mask"]
    used = re.findall(r"attention of packed rows: by (.*), without a mask", said["kernel"])
    assert used == ["the varlen kernel"] * (len(variants) - 1) + ["FlashAttention 4"]
    provenance = json.loads((tmp_path / f"kernel-{len(variants) - 1}" / "provenance.json").read_text())
    assert provenance["attention"] == FLASH_4 and "flash-attn-4" in provenance["packages"]
    [calls, *_] = re.findall(r"calls of the kernel: (\d+)", said["kernel"])
    assert int(calls) > 3 * 2 * len(variants)
    for number in range(len(variants)):
        masked, kernel = (metrics(tmp_path / f"{how}-{number}") for how in ("mask", "kernel"))
        assert len(masked) == len(kernel)
        for before, after in zip(masked, kernel, strict=True):
            for key in {"loss", "eval_loss", "grad_norm", "tokens"} & before.keys():
                assert after[key] == pytest.approx(before[key], rel=1e-5), key
    config = json.loads((tmp_path / "kernel-0" / "export" / "config.json").read_text())
    assert config == json.loads((tmp_path / "mask-0" / "export" / "config.json").read_text())
    assert exported_weights(tmp_path / "kernel-0").keys() == exported_weights(tmp_path / "mask-0").keys()


@pytest.mark.parametrize(
    ("asked", "why", "kernel"), [(True, "", FLASH_4), (True, "its heads have 8 numbers", VARLEN), (False, "", VARLEN)]
)
def test_a_frozen_model_has_the_kernel_of_the_run_where_it_can(
    asked: bool, why: str, kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference, "why_not_flash_4", lambda model, device, dtype: why)
    options = RunOptions(batching="packed", precision="bf16", flash_attention_4=asked)
    assert reference._kernel(torch.nn.Module(), options, torch.device("cpu")) == kernel


def test_the_trials_before_training_compile_nothing() -> None:
    """Code for their short rows would be of no use, and make torch compile for rows of any length."""
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_layers": 1, "num_heads": 2}
    context = ModelContext(50, max_seq_length=16, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    model, counter = build_llama(LlamaOptions(**shape), context).eval(), CompileCounter()
    torch._dynamo.reset()
    numbered_layers(model, "compile")[0].compile(backend=counter)
    with without_compiling(True):
        refuse_unfit(model, "llama", 50, torch.device("cpu"))
    assert counter.frame_count == 0
    with without_compiling(False):
        refuse_unfit(model, "llama", 50, torch.device("cpu"))
    assert counter.frame_count == 1
