"""A mixture of experts in the layout of Qwen3-30B-A3B, with its router loss: one trajectory, however a step is split.

The reference is a plain loop over plain transformers, in which a step is one batch: there its router loss is exact.
"""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_files import add_tokenizer
from launching import metrics
from launching import run_panda
from launching import train_many
from launching import zero3_at_once
from peft import LoraConfig
from peft import PeftModel
from peft import get_peft_model
from safetensors.torch import load_file
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
from transformers import Qwen3MoeConfig

from panda.configuration.options import RunOptions
from panda.data.order import SampleOrder
from panda.data.order import Source
from panda.models.adapters.lora import add_adapters
from panda.models.adapters.lora import load_adapters
from panda.models.adapters.quantisation import quantise
from panda.registry import UserError

SAMPLES, STEP_SAMPLES, SEED, COEFFICIENT, RATE = 16, 8, 7, 0.2, 3e-3
LAYERS, EXPERTS, WIDTH, EXPERT_WIDTH, ENTRIES = 2, 12, 32, 16, 259
CONFIG = {
    "vocab_size": ENTRIES,
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "moe_intermediate_size": EXPERT_WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_experts": EXPERTS,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    "router_aux_loss_coef": COEFFICIENT,
}
SPLITS = {
    "8x1": ("--per_gpu_train_batch_size", 8, "--gradient_accumulation_steps", 1),
    "2x4": ("--per_gpu_train_batch_size", 2, "--gradient_accumulation_steps", 4),
    "packed": (
        *("--per_gpu_train_batch_size", 4, "--gradient_accumulation_steps", 2, "--batching", "packed"),
        *("--activation_checkpointing", "full"),
    ),
}
ADAPTED = ["q_proj", "v_proj", "experts.gate_up_proj", "experts.down_proj"]
ADAPTERS = ("--use_lora", "--lora_r", 4, "--lora_alpha", 8, "--lora_target_modules", *ADAPTED)
History = list[tuple[float, float]]
ON_TWO_RANKS = {
    "one each": ("--per_gpu_train_batch_size", 4, "--gradient_accumulation_steps", 1),
    "several each": ("--per_gpu_train_batch_size", 2, "--gradient_accumulation_steps", 2),
}


def published() -> dict[str, torch.Tensor]:
    """Random weights under the names, and in the shapes, of the published checkpoint: a tensor for each expert."""
    torch.manual_seed(0)
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (ENTRIES, WIDTH),
        "lm_head.weight": (ENTRIES, WIDTH),
        "model.norm.weight": (WIDTH,),
    }
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}"
        attention = {"q_proj": (32, WIDTH), "k_proj": (16, WIDTH), "v_proj": (16, WIDTH), "o_proj": (WIDTH, 32)}
        shapes |= {f"{prefix}.self_attn.{name}.weight": shape for name, shape in attention.items()}
        shapes |= {f"{prefix}.self_attn.{name}.weight": (8,) for name in ("q_norm", "k_norm")}
        shapes |= {f"{prefix}.{name}.weight": (WIDTH,) for name in ("input_layernorm", "post_attention_layernorm")}
        shapes[f"{prefix}.mlp.gate.weight"] = (EXPERTS, WIDTH)
        for expert in range(EXPERTS):
            for name, shape in {
                "gate_proj": (EXPERT_WIDTH, WIDTH),
                "up_proj": (EXPERT_WIDTH, WIDTH),
                "down_proj": (WIDTH, EXPERT_WIDTH),
            }.items():
                shapes[f"{prefix}.mlp.experts.{expert}.{name}.weight"] = shape
    return {name: torch.ones(s) if len(s) == 1 else torch.randn(s) * 0.2 for name, s in shapes.items()}


def rows() -> list[dict[str, str]]:
    generator = random.Random(1)
    return [
        {
            "input": "".join(generator.choices("abcdefghij ", k=generator.randint(1, 20))),
            "target": "".join(generator.choices("abcdefghij ", k=generator.choice([1, 3, 25]))),
        }
        for _ in range(SAMPLES)
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("experts")


@pytest.fixture(scope="module")
def checkpoint(folder: Path) -> Path:
    path = folder / "qwen3-a3b"
    Qwen3MoeConfig(**CONFIG, dtype="float32").save_pretrained(path)
    weights = list(published().items())
    half = len(weights) // 2  # the experts of a layer are in two files, as in large checkpoints
    files = {"model-00001-of-00002.safetensors": weights[:half], "model-00002-of-00002.safetensors": weights[half:]}
    for file, some in files.items():
        save_file(dict(some), path / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: file for file, some in files.items() for name, _ in some}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return add_tokenizer(path)


@pytest.fixture(scope="module")
def runs(folder: Path, checkpoint: Path) -> Path:
    (folder / "rows.json").write_text(json.dumps(rows()))
    common = [
        *("--model", "hf", "--ckpt_path", checkpoint, "--instruction_tuning_data_dir", folder / "rows.json"),
        *("--max_seq_length", 96, "--num_workers", 0, "--seed", SEED, "--num_train_epochs", 2, "--learning_rate", RATE),
        *("--max_grad_norm", 0, "--adam_betas", "0.9,0.99", "--adam_epsilon", 1e-4, "--weight_decay", 0),
        *(
            "--lr_scheduler",
            "constant",
            "--warmup_steps",
            0,
            "--logging_steps",
            1,
            "--router_aux_loss_coef",
            COEFFICIENT,
            "--prompts",
            "a",
        ),
    ]
    alone = [[*common, *flags, "--output_dir", folder / name] for name, flags in SPLITS.items()]
    alone.append([*common, *SPLITS["2x4"], *ADAPTERS, "--output_dir", folder / "adapters"])
    alone.append([*common, *SPLITS["2x4"], "--use_lora", "--lora_r", 4, "--output_dir", folder / "adapters, default"])
    said = train_many(alone, cwd=folder)
    assert "dropout 0, since peft has none on experts" in said
    zero3 = zero3_at_once(folder)
    together = [[*common, *flags, *zero3, "--output_dir", folder / name] for name, flags in ON_TWO_RANKS.items()]
    flags = ON_TWO_RANKS["several each"]
    together.append([*common, *flags, *zero3, *ADAPTERS, "--output_dir", folder / "adapters, zero3"])
    train_many(together, ranks=2, cwd=folder)
    return folder


@pytest.fixture(scope="module")
def reference(checkpoint: Path) -> tuple[History, dict[str, torch.Tensor]]:
    """A plain loop, and the weights at its end as transformers saves them."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    history = plain_loop(model)
    model.save_pretrained(checkpoint.parent / "reference")
    return history, load_file(checkpoint.parent / "reference" / "model.safetensors")


def plain_loop(model: Any) -> History:
    """Cross-entropy and router loss of each step."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, betas=(0.9, 0.99), eps=1e-4, weight_decay=0)
    data, history = rows(), []
    order = SampleOrder([Source(SAMPLES, SAMPLES)], SEED)
    for start in range(0, 2 * SAMPLES, STEP_SAMPLES):
        batch = [data[number] for number in order.samples(range(start, start + STEP_SAMPLES))]
        prompts = [[1, *(byte + 3 for byte in (row["input"] + "\n").encode())] for row in batch]
        answers = [[*(byte + 3 for byte in row["target"].encode()), 2] for row in batch]
        length = max(len(p + a) for p, a in zip(prompts, answers, strict=True))
        ids, labels, mask = [], [], []
        for prompt, answer in zip(prompts, answers, strict=True):
            padding = length - len(prompt + answer)
            ids.append(prompt + answer + [0] * padding)
            labels.append([-100] * len(prompt) + answer + [-100] * padding)
            mask.append([1] * (length - padding) + [0] * padding)
        output = model(
            input_ids=torch.tensor(ids),
            attention_mask=torch.tensor(mask),
            labels=torch.tensor(labels),
            output_router_logits=True,
        )
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        history.append((float(output.loss - COEFFICIENT * output.aux_loss), float(output.aux_loss)))
    return history


@pytest.mark.parametrize("name", [*SPLITS, *ON_TWO_RANKS])
def test_every_split_follows_plain_transformers_with_the_step_as_one_batch(
    runs: Path, name: str, reference: tuple[History, dict[str, torch.Tensor]]
) -> None:
    history, weights = reference
    records = metrics(runs / name)
    assert [record["loss"] for record in records] == pytest.approx([loss for loss, _ in history], rel=1e-5)
    assert [record["router_loss"] for record in records] == pytest.approx([router for _, router in history], rel=1e-5)
    exported = load_file(runs / name / "export" / "model.safetensors")
    assert exported.keys() == weights.keys() == published().keys()
    assert max(float((exported[key] - weights[key]).abs().max()) for key in weights) < 2e-5
    assert max(float((exported[key] - published()[key]).abs().max()) for key in weights) > 1e-3


@pytest.mark.parametrize("name", ["8x1", "one each"])
def test_the_export_is_what_plain_transformers_loads(runs: Path, name: str) -> None:
    model: Any
    model, info = AutoModelForCausalLM.from_pretrained(runs / name / "export", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    exported = load_file(runs / name / "export" / "model.safetensors")
    joined = torch.cat([exported[f"model.layers.1.mlp.experts.5.{part}_proj.weight"] for part in ("gate", "up")])
    assert torch.equal(model.model.layers[1].mlp.experts.gate_up_proj[5], joined)


@pytest.mark.parametrize("name", ["adapters", "adapters, zero3", "adapters, default"])
def test_adapters_on_experts_follow_plain_peft_and_load_in_it(runs: Path, checkpoint: Path, name: str) -> None:
    base = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    torch.manual_seed(SEED)
    targets: dict[str, Any] = {"target_modules": ADAPTED[:2], "target_parameters": ADAPTED[2:], "lora_alpha": 8}
    if "default" in name:
        targets = {"target_modules": "all-linear", "lora_alpha": RunOptions().lora_alpha}
    adapted: Any = get_peft_model(base, LoraConfig(r=4, task_type="CAUSAL_LM", **targets))
    history, records = plain_loop(adapted), metrics(runs / name)
    assert [record["loss"] for record in records] == pytest.approx([loss for loss, _ in history], rel=1e-5)
    assert [record["router_loss"] for record in records] == pytest.approx([router for _, router in history], rel=1e-5)
    ids = torch.arange(20).view(1, 20) * 7 % ENTRIES
    plain = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    with torch.no_grad():
        expected, before = adapted.eval()(ids).logits, plain(ids).logits
        assert not torch.allclose(before, expected, atol=1e-2)
        loaded = PeftModel.from_pretrained(copy.deepcopy(plain), str(runs / name / "export")).eval()
        assert torch.allclose(loaded(ids).logits, expected, atol=1e-4)
        assert torch.allclose(load_adapters(plain, runs / name / "export").eval()(ids).logits, expected, atol=1e-4)
        done = run_panda("panda", "export", name, "--merge", cwd=runs)
        assert done.returncode == 0 and "adapters of rank 4 merged into the base" in done.stdout, done.stderr
        model, info = AutoModelForCausalLM.from_pretrained(runs / name / "merged", output_loading_info=True)
        assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        assert torch.allclose(model.eval()(ids).logits, expected, atol=1e-4)
    assert load_file(runs / name / "merged" / "model.safetensors").keys() == published().keys()


def test_what_adapters_and_quantisation_cannot_do_with_experts_is_refused(checkpoint: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    with pytest.raises(UserError, match=r"use_quant: \d\d% of the weights of Qwen3MoeForCausalLM are those of experts"):
        quantise(model, RunOptions(use_lora=True, use_quant=True), torch.device("cpu"))
    dora = RunOptions(use_lora=True, use_dora=True, lora_target_modules=("experts.down_proj",))
    with pytest.raises(UserError, match="does not work with use_dora=True"):
        add_adapters(model, dora)
    with pytest.raises(UserError, match=r"has no 'gate_proj'; it has .*, experts.down_proj, experts.gate_up_proj"):
        add_adapters(model, RunOptions(use_lora=True, lora_target_modules=("gate_proj",)))
