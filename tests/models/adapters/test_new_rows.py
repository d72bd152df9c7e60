"""Rows of new tokens, trained beside adapters: the trajectory of plain peft under every ZeRO stage, on one rank or two.

ZeRO-3 partitions the embedding and the head, in whose place peft uses a copy with the new rows.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_training import EPSILON
from adapter_training import LINEAR
from adapter_training import RANK
from adapter_training import RATE
from adapter_training import SEED
from adapter_training import exported
from adapter_training import rows
from adapter_training import train_plainly
from checkpoint_files import SHAPE
from checkpoint_files import llama
from checkpoint_files import save_hf
from launching import assert_same_end
from launching import losses
from launching import run_code
from launching import run_panda
from launching import train_many
from launching import zero3_at_once
from peft import LoraConfig
from peft import PeftModel
from peft import get_peft_model
from transformers import AutoModelForCausalLM
from transformers import AutoTokenizer

STEPS, KNOWN, NEW = 4, SHAPE["vocab_size"], ["ab", "c d", "ji"]
TOGETHER = {"zero2": 2, "zero3": 3, "tied, zero3": 3}
"""Runs on two ranks, with their ZeRO stages."""
ALONE = {"zero3, alone": 3}
ROWS = ["embed_tokens", "lm_head"]


def base_of(run: str) -> str:
    return "tied" if "tied" in run else "untied"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("new-rows")
    for base in ("tied", "untied"):
        save_hf(llama(tie_word_embeddings=base == "tied"), folder / base, shards=False)
    tokenizer = AutoTokenizer.from_pretrained(folder / "tied")
    tokenizer.add_tokens(NEW)
    assert len(tokenizer) == KNOWN + len(NEW)
    tokenizer.save_pretrained(folder / "tokenizer")
    (folder / "rows.json").write_text(json.dumps(rows()))
    spread = zero3_at_once(folder)

    def arguments(run: str, stage: int, micro: int, *more: object) -> list[object]:
        return [
            *("--ckpt_path", folder / base_of(run), "--tokenizer", folder / "tokenizer", "--extend_vocab"),
            *("--instruction_tuning_data_dir", folder / "rows.json", "--output_dir", folder / run, "--seed", SEED),
            *("--per_gpu_train_batch_size", micro, "--gradient_accumulation_steps", 2, "--num_workers", 0),
            *("--learning_rate", RATE, "--max_grad_norm", 0, "--adam_betas", "0.9,0.99", "--adam_epsilon", EPSILON),
            *("--lr_scheduler", "constant", "--warmup_steps", 0, "--max_steps", STEPS, "--save_steps", STEPS // 2),
            *("--max_seq_length", 64, "--prompts", "ab"),
            *("--use_lora", "--lora_r", RANK, "--lora_alpha", 8, "--lora_dropout", 0),
            *(spread if stage == 3 else ("--zero_stage", stage)),
            *more,
        ]

    half = ("--resume", folder / "zero3" / "checkpoints" / f"step-{STEPS // 2:08}")
    together = [arguments(run, stage, 2) for run, stage in TOGETHER.items()]
    train_many([*together, arguments("resumed", 3, 2, *half)], ranks=2, cwd=folder)
    alone = [arguments(run, stage, 4) for run, stage in ALONE.items()]
    train_many([*alone, arguments("resumed, alone", 3, 4, *half)], cwd=folder)
    return folder


def grown(folder: Path) -> Any:
    """The base in ``folder`` with rows for the new tokens, each the mean of the others."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.resize_token_embeddings(KNOWN + len(NEW), mean_resizing=False)
    with torch.no_grad():
        for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
            layer.weight[KNOWN:] = layer.weight[:KNOWN].mean(0)
    return model


@functools.cache
def plain_loop(folder: Path, base: str) -> tuple[list[float], PeftModel]:
    """Losses of plain peft on ``base`` in float64, and the trained model."""
    model = grown(folder / base)
    new = {layer: list(range(KNOWN, KNOWN + len(NEW))) for layer in (ROWS if base == "untied" else ROWS[:1])}
    torch.manual_seed(SEED)
    config = {"target_modules": LINEAR, "trainable_token_indices": new, "task_type": "CAUSAL_LM"}
    adapted = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=8, **config)).double().train()
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    encode = functools.partial(tokenizer.encode, add_special_tokens=False)
    return train_plainly(adapted, torch.float64, encode, STEPS), adapted


@pytest.mark.parametrize("run", [*TOGETHER, *ALONE])
def test_new_rows_and_adapters_follow_a_plain_peft_loop(runs: Path, run: str) -> None:
    expected, model = plain_loop(runs, base_of(run))
    assert losses(runs / run) == pytest.approx(expected, rel=1e-6)
    trained = {name.replace(".default", ""): p.detach() for name, p in model.named_parameters() if p.requires_grad}
    found = exported(runs / run)
    assert found.keys() == trained.keys()
    for name, parameter in trained.items():
        # Adam divides a gradient near its epsilon by little: 1.8e-6 in float32 on one kind of CPU (2026-11-27).
        assert (found[name] - parameter).abs().max() < 5e-6, name
    new = [name for name in found if "trainable_tokens" in name]
    assert len(new) == (1 if base_of(run) == "tied" else 2)
    for name in new:
        assert (found[name][0] - found[name][1]).abs().max() > 1e-3, "the rows of two tokens learned the same"


def test_a_run_under_zero_3_resumes(runs: Path) -> None:
    assert_same_end(runs / "resumed", runs / "zero3", after=STEPS // 2)
    whole, alone = exported(runs / "zero3"), exported(runs / "resumed, alone")
    assert losses(runs / "resumed, alone") == pytest.approx(losses(runs / "zero3")[STEPS // 2 :], rel=1e-6)
    assert all((whole[name] - alone[name]).abs().max() < 1e-6 for name in whole)


PLAIN = """
import json, sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
logits = {}
for run, base in zip(sys.argv[1::2], sys.argv[2::2]):
    tokenizer = AutoTokenizer.from_pretrained(run)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model.resize_token_embeddings(len(tokenizer))
    model = PeftModel.from_pretrained(model, run).eval()
    ids = tokenizer("abc dxji", return_tensors="pt", add_special_tokens=False)["input_ids"]
    logits[run] = model(ids).logits.tolist()
assert not any(name.split(".")[0] == "panda" for name in sys.modules)
print(json.dumps({"ids": ids.tolist(), "logits": logits}))
"""


def test_plain_peft_loads_the_rows_on_the_base_and_merging_writes_them_into_it(runs: Path) -> None:
    names = ["zero3", "tied, zero3"]
    assert run_panda("panda", "export", "zero3", "--output", "again", cwd=runs).returncode == 0
    folders = [(runs / name / "export", runs / base_of(name)) for name in names] + [(runs / "again", runs / "untied")]
    found = json.loads(run_code(PLAIN, *(path for pair in folders for path in pair), cwd=runs))
    ids = torch.tensor(found["ids"])
    assert ids.tolist() == [[KNOWN, KNOWN + 1, ord("x") + 3, KNOWN + 2]]
    for folder, base in folders:
        expected = plain_loop(runs, base.name)[1].eval()(ids).logits
        logits = torch.tensor(found["logits"][str(folder)], dtype=torch.float64)
        assert torch.allclose(logits, expected, atol=1e-5, rtol=0)
    for name in names:
        assert run_panda("panda", "export", name, "--merge", cwd=runs).returncode == 0
        merged = AutoModelForCausalLM.from_pretrained(runs / name / "merged", dtype=torch.float32).eval()
        expected = plain_loop(runs, base_of(name))[1].eval()(ids).logits
        assert torch.allclose(merged(ids).logits.double(), expected, atol=1e-5, rtol=0)
