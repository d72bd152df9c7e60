"""Ten training steps of adapters on a tiny LLaMA: as flags for panda, and as a plain loop with plain peft."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - the customary name
from initial_model import initial_model
from peft import PeftModel
from safetensors.torch import load_file
from transformers import LlamaConfig

from panda.data.order import SampleOrder
from panda.data.order import Source

STEPS, STEP_SAMPLES, SEED, RATE, EPSILON, RANK = 10, 8, 7, 1e-2, 1e-4, 4
SAMPLES = STEPS * STEP_SAMPLES
ORDER = SampleOrder([Source(SAMPLES, SAMPLES)], SEED)
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def rows() -> list[dict[str, str]]:
    generator = random.Random(1)
    letters = "abcdefghij "
    return [
        {key: "".join(generator.choices(letters, k=generator.randint(1, 20))) for key in ("input", "target")}
        for _ in range(SAMPLES)
    ]


def arguments(
    shape: dict[str, int], data: Path, output: Path, micro: int, accumulation: int, *more: object
) -> list[object]:
    """Flags of a run over ``data``, which contains ``rows()``, for a LLaMA of ``shape`` (transformers' names)."""
    width, inner = shape["hidden_size"], shape["intermediate_size"]
    layers, heads = shape["num_hidden_layers"], shape["num_attention_heads"]
    return [
        *("--arch", "llama-tiny", "--num_layers", layers, "--hidden_size", width, "--intermediate_size", inner),
        *("--num_heads", heads, "--instruction_tuning_data_dir", data, "--output_dir", output, "--seed", SEED),
        *("--per_gpu_train_batch_size", micro, "--gradient_accumulation_steps", accumulation, "--num_workers", 0),
        *("--learning_rate", RATE, "--max_grad_norm", 0, "--adam_betas", "0.9,0.99", "--adam_epsilon", EPSILON),
        *("--lr_scheduler", "constant", "--warmup_steps", 0, "-p", "no:tensorboard", "-p", "no:plot"),
        *("--lora_r", RANK, "--lora_alpha", 8, *more),
    ]


def plain_base(shape: dict[str, int]) -> Any:
    """The model with which such a run starts."""
    config = LlamaConfig(vocab_size=259, rms_norm_eps=1e-6, pad_token_id=0, use_cache=False, **shape)  # type: ignore[arg-type]
    return initial_model(config, SEED)


def of_bytes(text: str) -> list[int]:
    """``text`` as the packaged byte tokenizer writes it."""
    return [byte + 3 for byte in text.encode()]


def train_plainly(
    model: PeftModel, dtype: torch.dtype, encode: Callable[[str], list[int]] = of_bytes, steps: int = STEPS
) -> list[float]:
    """The losses of the same training, computed in ``dtype``, with nothing from panda but the order of samples.

    ``encode`` is the tokenizer, without special tokens.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, betas=(0.9, 0.99), eps=EPSILON, weight_decay=0.0)
    torch.manual_seed(SEED)
    data, history = rows(), []
    for start in range(0, steps * STEP_SAMPLES, STEP_SAMPLES):
        ids, labels = [], []
        for sample in ORDER.samples(range(start, start + STEP_SAMPLES)):
            prompt = [1, *encode(data[sample]["input"] + "\n")]
            answer = [*encode(data[sample]["target"]), 2]
            ids.append(torch.tensor(prompt + answer))
            labels.append(torch.tensor([-100] * len(prompt) + answer))
        padded = [
            torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=value)
            for tensors, value in ((ids, 0), (labels, -100))
        ]
        logits = model(padded[0]).logits[:, :-1].flatten(0, 1)
        loss = F.cross_entropy(logits.to(dtype), padded[1][:, 1:].flatten(), ignore_index=-100)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(loss.item())
    return history


def exported(run: Path) -> dict[str, torch.Tensor]:
    """The adapters that a run exported, by name."""
    return load_file(run / "export" / "adapter_model.safetensors")
