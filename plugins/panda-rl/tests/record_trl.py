"""Record the losses of TRL's GRPOTrainer, for tests/test_trl.py: 10 optimizer steps of each case in tests/tiny.py.

In an environment with torch, transformers, datasets and trl (pip install trl), which the package itself does not need:

    python tests/record_trl.py tests/trl.json

The tiny model, the completions and the rewards are fixed; TRL computes log probabilities, advantages, the KL and the
loss. Two optimizer steps are on the same completions, so that the ratio of probabilities is not always 1.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import tiny
import torch
import transformers
import trl
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers import models
from transformers import AutoModelForCausalLM
from transformers import PreTrainedTokenizerFast
from trl import GRPOConfig
from trl import GRPOTrainer

MEANS = (
    "kl",
    "clip_ratio/low_mean",
    "clip_ratio/high_mean",
    "clip_ratio/region_mean",
    "reward",
    "frac_reward_zero_std",
    "rewards/first/mean",
    "rewards/second/mean",
    "completions/mean_length",
    "completions/clipped_ratio",
)
"""Metrics of which TRL's means over the steps are recorded, those of rewards over the generations."""


def tokenizer() -> PreTrainedTokenizerFast:
    """Of words that are numbers; only its special tokens matter."""
    words = {f"t{number}": number for number in range(tiny.VOCABULARY)}
    made = Tokenizer(models.WordLevel(words, unk_token="t2"))
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="t0", eos_token="t1")


class Recorded(GRPOTrainer):
    """Keeps the exact loss of each step."""

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        loss: torch.Tensor = super()._compute_loss(model, inputs)
        self.losses.append(loss.item())
        return loss


def record(options: dict[str, Any], folder: str) -> dict[str, Any]:
    """The losses of a case, and the means of metrics."""
    level = {"loss_type": "grpo", "importance_sampling_level": "sequence"} if options["loss_type"] == "gspo" else {}
    rows = tiny.PROMPTS * tiny.GENERATIONS
    config = GRPOConfig(
        output_dir=folder,
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=1,
        num_generations=tiny.GENERATIONS,
        num_iterations=tiny.ITERATIONS,
        max_completion_length=tiny.MAX_COMPLETION_LENGTH,
        max_steps=tiny.STEPS,
        learning_rate=tiny.LEARNING_RATE,
        lr_scheduler_type="constant",
        optim="adamw_torch",
        max_grad_norm=1e9,
        temperature=tiny.TEMPERATURE,
        reward_weights=list(tiny.REWARD_WEIGHTS),
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        **options | level,
    )
    rollouts = tiny.fixed_rollouts()
    calls: list[dict[str, Any]] = []

    def rollout(prompts: list[Any], trainer: Any) -> dict[str, Any]:
        calls.append(rollouts[len(calls)])
        ids = [prompt for prompt in calls[-1]["prompts"] for _ in range(tiny.GENERATIONS)]
        return {"prompt_ids": ids, "completion_ids": calls[-1]["completions"], "logprobs": None}

    def first(completions: list[Any], **_: Any) -> list[float]:
        return calls[-1]["rewards"][0]

    def second(completions: list[Any], **_: Any) -> list[float]:
        return calls[-1]["rewards"][1]

    tiny.tiny_llama().save_pretrained(f"{folder}/model")  # TRL loads the reference by the name of the model
    trainer = Recorded(
        AutoModelForCausalLM.from_pretrained(f"{folder}/model", dtype=torch.float32),
        [first, second],
        args=config,
        train_dataset=Dataset.from_list([{"prompt": "t3 t4"}] * 8),
        processing_class=tokenizer(),
        rollout_func=rollout,
    )
    trainer.losses = []
    # TRL shuffles the rows of a step, which changes nothing in the loss but its rounding.
    trainer.train()
    means = trainer.state.log_history[-1]
    return {"options": options, "losses": trainer.losses, "means": {key: means[key] for key in MEANS if key in means}}


def main() -> None:
    """Write the file that the first argument names."""
    with tempfile.TemporaryDirectory() as folder:
        cases = {name: record(options, folder) for name, options in tiny.CASES.items()}
    versions = {"trl": trl.__version__, "transformers": transformers.__version__, "torch": torch.__version__}
    text = {"command": "python tests/record_trl.py tests/trl.json", "versions": versions, "cases": cases}
    Path(sys.argv[1]).write_text(json.dumps(text, indent=1) + "\n")


if __name__ == "__main__":
    main()
