"""Whole runs without a mask for packed rows: the losses of runs with one, and what they say."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import exported_weights
from launching import metrics
from launching import run_script
from launching import train_many
from launching import zero3_at_once
from model_types import ENTRIES
from model_types import tiny
from torch._dynamo.testing import CompileCounter
from transformers import AutoModelForCausalLM
from varlen_on_cpu import varlen_on_cpu

from panda.models.forward import varlen_attention
from panda.models.forward.layers import numbered_layers
from panda.models.forward.layers import without_compiling
from panda.models.forward.trial import refuse_unfit
from panda.models.forward.varlen_attention import FLASH_4
from panda.models.forward.varlen_attention import VARLEN
from panda.models.forward.varlen_attention import what_forbids_kernel
from panda.models.hf import HfOptions
from panda.models.hf import build_hf
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
    ("model_type", "changes", "kernel", "said"),
    [
        ("llama", {}, VARLEN, ""),
        ("llama", {"head_dim": 64}, FLASH_4, ""),
        (
            "llama",
            {},
            FLASH_4,
            "by the varlen kernel, since for FlashAttention 4 it was not tried with heads of 8 numbers",
        ),
        ("gemma2", {"attn_logit_softcapping": 0.1}, VARLEN, "with a mask, since the model's attention is eager"),
        ("gemma2", {"attn_logit_softcapping": 0.1}, FLASH_4, "with a mask, since the model's attention is eager"),
    ],
)
def test_a_frozen_model_attends_by_the_kernel_of_the_run_only_where_it_can(
    model_type: str, changes: dict[str, Any], kernel: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Told where samples begin, it gives each the logits that it has alone in plain transformers."""
    monkeypatch.setattr(reference, "why_masked", lambda model, device, dtype: what_forbids_kernel(model, dtype))
    monkeypatch.setattr(varlen_attention, "why_not_4", lambda device: "")
    config = tiny(model_type).config.to_dict() | {"use_cache": False} | changes
    torch.manual_seed(0)
    model: Any = build_hf(HfOptions(), ModelContext(ENTRIES, 64, 0, 1, 2, config=config)).eval()
    plain = AutoModelForCausalLM.from_config(type(model.config)(**config), attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    plain.load_state_dict(model.state_dict())

    assert reference._attend(model, kernel, torch.device("cpu"), torch.bfloat16) == said
    samples = [torch.arange(3, 3 + length)[None] for length in (9, 7)]
    positions = torch.cat([torch.arange(each.shape[1])[None] for each in samples], dim=1)
    told = {"sample_bounds": torch.tensor([0, 9, 16], dtype=torch.int32), "longest_sample": 9}
    with torch.no_grad(), varlen_on_cpu() as calls:
        found = model(torch.cat(samples, dim=1), position_ids=positions, **told).logits
        expected = torch.cat([plain(each).logits for each in samples], dim=1)
    assert bool(calls) == ("mask" not in said)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


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
