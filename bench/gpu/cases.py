"""What is measured: the shapes of models, the named cases, and variants of them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from dataclasses import field
from dataclasses import replace
from typing import Any


@dataclass(frozen=True)
class Shape:
    """The sizes of a LLaMA."""

    hidden: int
    inner: int
    layers: int
    heads: int
    key_value_heads: int
    vocabulary: int = 32_000
    positions: int = 2048
    rope_theta: float = 10_000.0

    @property
    def parameters(self) -> int:
        """N of the formula of MFU: all parameters with the output head and without the embedding."""
        attention = 2 * self.hidden**2 + 2 * self.hidden * (self.hidden // self.heads * self.key_value_heads)
        layer = attention + 3 * self.hidden * self.inner + 2 * self.hidden
        return self.layers * layer + self.hidden + self.vocabulary * self.hidden

    def config(self) -> dict[str, Any]:
        """The config.json of a checkpoint of this shape."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "dtype": "bfloat16",
            "hidden_size": self.hidden,
            "intermediate_size": self.inner,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.key_value_heads,
            "vocab_size": self.vocabulary,
            "max_position_embeddings": self.positions,
            "rope_theta": self.rope_theta,
            "rms_norm_eps": 1e-6,
            "hidden_act": "silu",
            "tie_word_embeddings": False,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        }


SHAPES = {
    "tiny": Shape(64, 176, 2, 4, 2, vocabulary=512),
    "llama-tiny": Shape(128, 256, 4, 4, 4, vocabulary=259),
    "1.3b": Shape(2048, 5504, 24, 16, 16),
    "7b": Shape(4096, 11008, 32, 32, 32),
    "7b-4096": Shape(4096, 11008, 32, 32, 32, positions=4096),
    "llama-3-8b": Shape(4096, 14336, 32, 32, 8, vocabulary=128_256, positions=8192, rope_theta=500_000.0),
    "65b": Shape(8192, 22016, 80, 64, 64),
}

TASKS = {
    "windows": ("pretrain", "pretraining_data_dir"),
    "answers": ("instruct", "instruction_tuning_data_dir"),
    "chats": ("instruct", "instruction_tuning_data_dir"),
}
"""Of each kind of data, panda's task and the key that names its data. What the kinds are: text.py."""

DEFAULTS = {
    "per_gpu_train_batch_size": 1,
    "gradient_accumulation_steps": 64,
    "max_seq_length": 2048,
    "learning_rate": 1e-3,
    "lora_r": 64,
    "lora_alpha": 16.0,
    "max_grad_norm": 0.3,
}
"""panda's own, of the keys by which the peer is given the same."""


@dataclass(frozen=True)
class Case:
    """One training run, with panda's command line and with its peer."""

    shape: str
    data: str
    """A key of TASKS."""
    flags: Mapping[str, Any]
    """panda-train's, besides those that say where things are."""
    arch: str | None = None
    """Random weights of this arch, which panda draws, in place of a checkpoint of ``shape``."""
    ranks: int = 1
    peer: Mapping[str, Any] | None = field(default_factory=dict)
    """Values of the peer that differ from panda's flags: rows, accumulation, grouped, checkpointing; None: no peer."""

    def flag(self, key: str) -> Any:
        return self.flags.get(key, DEFAULTS.get(key))

    @property
    def rows(self) -> int:
        return int(self.flag("per_gpu_train_batch_size"))

    @property
    def accumulation(self) -> int:
        return int(self.flag("gradient_accumulation_steps"))

    @property
    def length(self) -> int:
        return int(self.flag("max_seq_length"))

    @property
    def needs_gpu(self) -> bool:
        return "tiny" not in self.shape

    @property
    def data_ranks(self) -> int:
        return self.ranks // int(self.flags.get("tensor_parallel_size", 1))

    @property
    def uses_adapters(self) -> bool:
        return is_on(self.flags.get("use_lora")) or is_on(self.flags.get("use_quant"))


def is_on(value: Any) -> bool:
    return str(value).lower() in ("true", "yes", "on", "1")


def _flags(rows: int, accumulation: int, length: int = 2048, rate: float = 1e-5, **more: Any) -> dict[str, Any]:
    return {
        "per_gpu_train_batch_size": rows,
        "gradient_accumulation_steps": accumulation,
        "max_seq_length": length,
        "learning_rate": rate,
        "precision": "bf16",
    } | more


def _lora(rows: int, accumulation: int = 1, length: int = 2048, r: int = 64, **more: Any) -> dict[str, Any]:
    return _flags(rows, accumulation, length, 1e-4, use_lora=True, lora_r=r, lora_dropout=0) | more


_UNSAVED = {"save_final": False, "save_minutes": 0}
"""No checkpoint, for which the disk of a lent machine has no room: only the export."""
_FULL_7B = Case("7b", "windows", _flags(2, 8, **_UNSAVED))
_FULL_1_3B = Case("1.3b", "windows", _flags(8, 4))
_FULL_1_3B_X2 = Case("1.3b", "windows", _flags(4, 8), ranks=2)
_LORA_7B = Case("7b", "windows", _lora(4))
_TINY = Case("tiny", "windows", _flags(2, 2, 64, 1e-3))
# A rate at which adapters hardly move: each program draws its own, and the losses are then those of the samples.
_TINY_LORA = Case("tiny", "windows", {**_lora(2, 1, 64, 4), "learning_rate": 1e-6})


def _with(case: Case, **flags: Any) -> Case:
    return replace(case, flags={**case.flags, **flags})


CASES: dict[str, Case] = {
    "full-7b": _FULL_7B,
    "full-7b-nvlamb": replace(_with(_FULL_7B, optimizer="nvlamb"), peer=None),
    "full-1.3b": _FULL_1_3B,
    "full-1.3b-nvlamb": replace(_with(_FULL_1_3B, optimizer="nvlamb"), peer=None),
    "full-1.3b-muon": replace(_with(_FULL_1_3B, optimizer="muon"), peer=None),
    "lora-7b": _LORA_7B,
    "lora-8b": Case("llama-3-8b", "windows", _lora(1, 4, 4096, 16)),
    "qlora-7b": _with(_LORA_7B, use_quant=True),
    "chats-7b": Case("7b", "chats", _lora(4, 16, batching="packed"), peer={"rows": 8, "accumulation": 8}),
    "qlora-65b": Case(
        "65b",
        "answers",
        _lora(4, use_quant=True, optimizer="lamb"),
        arch="llama-65b",
        peer={"checkpointing": True},
    ),
    # Two GPUs. What they are compared with on one: full-1.3b-x1 and lora-7b.
    "full-1.3b-x1": replace(_FULL_1_3B_X2, ranks=1),
    "full-1.3b-x2-zero1": _with(_FULL_1_3B_X2, zero_stage=1),
    "full-1.3b-x2-zero2": _with(_FULL_1_3B_X2, zero_stage=2),
    "full-1.3b-x2-zero3": _with(_FULL_1_3B_X2, zero_stage=3),
    "full-1.3b-x2-muon": replace(_with(_FULL_1_3B_X2, zero_stage=1, optimizer="muon"), peer=None),
    "full-1.3b-x2-tensor": replace(_with(_FULL_1_3B_X2, tensor_parallel_size=2), peer=None),
    "full-7b-x2-zero3": Case("7b", "windows", _flags(1, 4, zero_stage=3, **_UNSAVED), ranks=2),
    "lora-7b-x2-zero1": replace(_with(_LORA_7B, zero_stage=1), ranks=2),
    "lora-7b-x2-zero3": replace(_with(_LORA_7B, zero_stage=3), ranks=2),
    "qlora-7b-x2-zero3": replace(_with(_LORA_7B, zero_stage=3, use_quant=True), ranks=2),
    # Small enough for a CPU. See also `_on`.
    "tiny": _TINY,
    "tiny-nvlamb": replace(_with(_TINY, optimizer="nvlamb"), peer=None),
    "tiny-lora": _TINY_LORA,
    "tiny-chats": Case("tiny", "chats", _lora(1, 8, 1024, 4, batching="packed"), peer={"rows": 4, "accumulation": 2}),
    "tiny-x2": replace(_TINY, ranks=2),
    "tiny-qlora": Case(
        "llama-tiny", "answers", _lora(1, 1, 64, 4, use_quant=True, optimizer="lamb"), arch="llama-tiny"
    ),
}


def _on(cards: int) -> dict[str, Case]:
    """What is measured on ``cards`` GPUs of one host: models at full size, in the published settings of others."""
    full_7b = Case("7b-4096", "windows", _flags(1, 8, 4096, **_UNSAVED), ranks=cards)
    full_8b = Case("llama-3-8b", "windows", _flags(1, 4, 8192, **_UNSAVED), ranks=cards)
    qlora_65b = replace(CASES["qlora-65b"], ranks=cards)
    # DeepSpeed, as transformers drives it, holds all that ZeRO-3 does not divide on each card: too much for 80 GiB.
    full_65b = Case(
        "65b",
        "windows",
        _flags(1, 1, optimizer="lamb", zero_stage=3, **_UNSAVED),
        arch="llama-65b",
        ranks=cards,
        peer=None,
    )
    return {
        **{f"full-7b-4096-x{cards}-zero{stage}": _with(full_7b, zero_stage=stage) for stage in (1, 2, 3)},
        **{
            f"full-7b-4096-x{cards}-tensor{size}": replace(_with(full_7b, tensor_parallel_size=size), peer=None)
            for size in (2, 4)
        },
        **{f"full-8b-8192-x{cards}-zero{stage}": _with(full_8b, zero_stage=stage) for stage in (2, 3)},
        f"lora-7b-x{cards}-zero3": replace(CASES["lora-7b-x2-zero3"], ranks=cards),
        f"qlora-65b-x{cards}": qlora_65b,
        f"full-65b-lamb-x{cards}-zero3": full_65b,
    }


CASES |= {
    "full-7b-4096": Case("7b-4096", "windows", _flags(1, 8, 4096, **_UNSAVED)),
    **_on(4),
    **_on(8),
}
CASES |= {"tiny-x8-zero3": replace(_with(_TINY, zero_stage=3), ranks=8, peer=None)}
OF_ONE_CARD = ("full-1.3b-x1", "lora-7b", "full-7b-4096", "qlora-65b")
"""With which cases of several GPUs are compared."""


def of_cards(cards: int) -> list[str]:
    """Names of the cases of ``cards`` GPUs, after those of one with which they are compared."""
    found = [name for name, case in CASES.items() if case.ranks == cards and case.needs_gpu]
    return found if cards == 1 else [*OF_ONE_CARD, *found]


def variant(text: str) -> Case:
    """The case of ``NAME+KEY=VALUE+...``: each KEY is a flag of panda-train, or ``ranks``. Raises ValueError."""
    name, *changes = re.split(r"\+(?=[A-Za-z_]\w*=)", text)
    if name not in CASES:
        raise ValueError(f"there is no case {name!r}; there are: {', '.join(CASES)}")
    case = CASES[name]
    for change in changes:
        key, _, value = change.partition("=")
        case = replace(case, ranks=int(value)) if key == "ranks" else _with(case, **{key: value})
    return case
