"""A tiny LLaMA whose weights are the same wherever it is made, and the cases in which TRL's losses are recorded."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig
from transformers import LlamaForCausalLM

VOCABULARY, PROMPTS, GENERATIONS, MAX_COMPLETION_LENGTH = 41, 2, 3, 7
STEPS, ITERATIONS, LEARNING_RATE = 10, 2, 3e-3
TEMPERATURE = 0.9
REWARD_WEIGHTS = (1.0, 0.5)

CASES: dict[str, dict[str, Any]] = {
    "grpo": {"loss_type": "grpo", "beta": 0.1},
    "grpo-without-kl": {"loss_type": "grpo", "beta": 0.0, "scale_rewards": "none"},
    "grpo-with-plain-kl": {"loss_type": "grpo", "beta": 0.1, "use_bias_correction_kl": False},
    "bnpo": {"loss_type": "bnpo", "beta": 0.1},
    "dr_grpo": {"loss_type": "dr_grpo", "beta": 0.04, "scale_rewards": "none"},
    "dapo": {"loss_type": "dapo", "beta": 0.04, "epsilon_high": 0.28, "scale_rewards": "batch"},
    "gspo": {"loss_type": "gspo", "beta": 0.04, "epsilon": 0.02, "epsilon_high": 0.03},
}
"""Options as panda-rl has them; of TRL's, ``gspo`` is ``grpo`` with the importance ratio of a sequence."""


def tiny_llama() -> LlamaForCausalLM:
    """float32, two layers of 16; the weights are drawn by numpy's RandomState, which is the same in every version."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
    )
    model = LlamaForCausalLM(config).float()
    draws = np.random.RandomState(7)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            values = draws.standard_normal(parameter.shape) * 0.3
            parameter.copy_(torch.tensor(values + ("norm" in name), dtype=torch.float32))
    return model


def fixed_rollouts() -> list[dict[str, Any]]:
    """What each generation made: token ids of prompts (a list for each prompt) and completions, and two rewards of
    each."""
    draws = np.random.RandomState(11)
    made = []
    for _ in range(STEPS // ITERATIONS):
        prompts = [draws.randint(2, VOCABULARY, draws.randint(2, 6)).tolist() for _ in range(PROMPTS)]
        completions = []
        for _ in range(PROMPTS * GENERATIONS):
            length = draws.randint(1, MAX_COMPLETION_LENGTH + 1)
            ids = draws.randint(2, VOCABULARY, length).tolist()
            completions.append([*ids[:-1], 1] if length < MAX_COMPLETION_LENGTH else ids)
        rewards = [draws.uniform(-1, 2, PROMPTS * GENERATIONS).round(3).tolist() for _ in REWARD_WEIGHTS]
        made.append({"prompts": prompts, "completions": completions, "rewards": rewards})
    return made
