"""A tiny LLaMA with a tokenizer of words, and rows of preference data: the same wherever they are made.

The weights are sines of their places, not drawn: no version of a library changes them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

TEXT = (
    "the heron waits in reeds a frog sings at night what does bird do where is it and eats sleeps flies over water "
    "nothing perhaps stone never fish small green loud quiet well"
)
SPECIAL = {"pad": "<pad>", "eos": "</s>", "unk": "<unk>"}
VOCABULARY = [*SPECIAL.values(), *TEXT.split()]
SIZES = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}

PAIRS = [
    {"prompt": "what does the heron do", "chosen": " the heron waits in the reeds", "rejected": " nothing"},
    {"prompt": "where is the frog", "chosen": " in the water", "rejected": " the frog is a small green stone perhaps"},
    {"prompt": "what sings at night", "chosen": " a small frog sings", "rejected": " the fish sings loud"},
    {"prompt": "does the bird sleeps well", "chosen": " it sleeps", "rejected": " it never eats and never flies over"},
]
LABELLED = [
    {"prompt": pair["prompt"], "completion": pair[name], "label": name == "chosen"}
    for number, pair in enumerate(PAIRS)
    for name in (("chosen", "rejected"), ("chosen",), ("rejected",), ("rejected", "chosen"))[number]
]
"""Six rows: three desirable, three not."""


def parameters(reward: bool = False, phase: float = 0.0) -> dict[str, Any]:
    """The weights by name, float32; with another ``phase``, others."""
    import torch

    hidden, wide = SIZES["hidden_size"], SIZES["intermediate_size"]
    keys = hidden // SIZES["num_attention_heads"] * SIZES["num_key_value_heads"]
    shapes = {"model.embed_tokens.weight": (len(VOCABULARY), hidden), "model.norm.weight": (hidden,)}
    for layer in range(SIZES["num_hidden_layers"]):
        for name, shape in {
            "input_layernorm": (hidden,),
            "post_attention_layernorm": (hidden,),
            "self_attn.q_proj": (hidden, hidden),
            "self_attn.k_proj": (keys, hidden),
            "self_attn.v_proj": (keys, hidden),
            "self_attn.o_proj": (hidden, hidden),
            "mlp.gate_proj": (wide, hidden),
            "mlp.up_proj": (wide, hidden),
            "mlp.down_proj": (hidden, wide),
        }.items():
            shapes[f"model.layers.{layer}.{name}.weight"] = shape
    shapes["lm_head.weight"] = (len(VOCABULARY), hidden)
    if reward:
        shapes["score.weight"] = (1, hidden)
    made = {}
    for number, (name, shape) in enumerate(sorted(shapes.items())):
        count = torch.Size(shape).numel()
        # Steps that are no simple fraction of a turn, so that no two places have related values.
        places = torch.arange(count, dtype=torch.float64) * 1.7320508 + number * 2.2360679 + phase
        weights = 1 + 0.1 * torch.sin(places) if "norm" in name else 0.35 * torch.sin(places * places)
        made[name] = weights.float().reshape(shape)
    return made


def save(folder: Path, reward: bool = False, phase: float = 0.0) -> Path:
    """Write the model and its tokenizer into ``folder``; with ``reward``, one that gives a sequence a score."""
    from safetensors.torch import save_file
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import LlamaConfig
    from transformers import PreTrainedTokenizerFast

    folder.mkdir(parents=True, exist_ok=True)
    config = LlamaConfig(
        vocab_size=len(VOCABULARY),
        **SIZES,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        pad_token_id=VOCABULARY.index("<pad>"),
        eos_token_id=VOCABULARY.index("</s>"),
        bos_token_id=None,
        **({"num_labels": 1} if reward else {}),
    ).to_dict()
    config["architectures"] = ["LlamaForSequenceClassification" if reward else "LlamaForCausalLM"]
    config["dtype"] = "float32"
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    save_file(parameters(reward, phase), folder / "model.safetensors", metadata={"format": "pt"})
    words = Tokenizer(WordLevel({word: number for number, word in enumerate(VOCABULARY)}, unk_token="<unk>"))
    words.pre_tokenizer = WhitespaceSplit()
    tokens = {f"{name}_token": token for name, token in SPECIAL.items()}
    PreTrainedTokenizerFast(tokenizer_object=words, **tokens).save_pretrained(folder)
    return folder
