"""Record the losses and metrics of TRL's trainers for the tiny model, for test_trl.py.

In an environment with trl 1.16.0 (pip install trl==1.16.0), torch, transformers, accelerate and datasets:

    python tests/record_trl.py tests/trl.json

Each case is ten optimizer steps over all rows in one batch, in float32 on a CPU.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"

import datasets
import torch
import transformers
import trl
from tiny import LABELLED
from tiny import PAIRS
from tiny import save

STEPS = 10
OPTIMIZER = {"learning_rate": 1e-3, "weight_decay": 0.0, "adam_beta1": 0.9, "adam_beta2": 0.999, "adam_epsilon": 1e-4}
"""A large epsilon: Adam's first steps have the size of the learning rate for any gradient, which would make the last
bits of gradients that are almost zero count."""

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "dpo-sigmoid": ("DPO", {"beta": 0.5, "loss_type": "sigmoid"}),
    "dpo-ipo": ("DPO", {"beta": 0.2, "loss_type": "ipo"}),
    "kto": ("KTO", {"beta": 0.5, "desirable_weight": 3.0, "undesirable_weight": 1.0}),
    "orpo": ("ORPO", {"beta": 0.3}),
    "simpo": ("CPO", {"beta": 2.0, "loss_type": "simpo", "simpo_gamma": 0.8, "cpo_alpha": 0.0}),
    "reward": ("Reward", {}),
    "reward-centred": ("Reward", {"center_rewards_coefficient": 0.1}),
}
KEPT = (
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "rewards/accuracies",
    "logps/chosen",
    "logps/rejected",
    "kl",
    "nll_loss",
    "log_odds_ratio",
    "log_odds_chosen",
    "accuracy",
    "margin",
    "mean_reward",
    "min_reward",
    "max_reward",
)


def trainer_of(name: str) -> tuple[type, type]:
    if name == "ORPO":
        from trl.experimental.orpo import ORPOConfig
        from trl.experimental.orpo import ORPOTrainer

        return ORPOTrainer, ORPOConfig
    if name == "CPO":
        from trl.experimental.cpo import CPOConfig
        from trl.experimental.cpo import CPOTrainer

        return CPOTrainer, CPOConfig
    return getattr(trl, f"{name}Trainer"), getattr(trl, f"{name}Config")


def record(name: str, folder: Path) -> dict[str, Any]:
    """Losses and metrics of each step of a case."""
    kind, options = CASES[name]
    trainer_class, config_class = trainer_of(kind)
    is_reward = kind == "Reward"
    model_folder = save(folder / "model", reward=is_reward)
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_folder)
    model_class = transformers.AutoModelForSequenceClassification if is_reward else transformers.AutoModelForCausalLM
    model = model_class.from_pretrained(model_folder, dtype=torch.float32)
    rows = LABELLED if kind == "KTO" else PAIRS
    steps: list[dict[str, Any]] = []

    class Recording(trainer_class):  # type: ignore[misc, valid-type]
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().compute_loss(*args, **kwargs)
            steps.append({"loss": loss.item()})
            return loss

        def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
            super().log(logs, *args, **kwargs)
            if "train_runtime" not in logs:
                steps[-1] |= {key: logs[key] for key in KEPT if key in logs}

    settings = {
        "output_dir": str(folder / "output"),
        "per_device_train_batch_size": len(rows),
        "max_steps": STEPS,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "max_length": 64,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        **OPTIMIZER,
        **options,
    }
    config = config_class(**settings)
    more = (
        {"ref_model": model_class.from_pretrained(model_folder, dtype=torch.float32)} if kind in ("DPO", "KTO") else {}
    )
    Recording(
        model=model, args=config, train_dataset=datasets.Dataset.from_list(rows), processing_class=tokenizer, **more
    ).train()
    assert len(steps) == STEPS
    return {"trainer": trainer_class.__name__, "options": options, "steps": steps}


def main(target: Path) -> None:
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    recorded: dict[str, Any] = {
        "command": "python tests/record_trl.py tests/trl.json",
        "versions": {"trl": trl.__version__, "transformers": transformers.__version__, "torch": torch.__version__},
        "optimizer": OPTIMIZER,
        "cases": {},
    }
    for name in CASES:
        with tempfile.TemporaryDirectory() as folder:
            recorded["cases"][name] = record(name, Path(folder))
    target.write_text(json.dumps(recorded, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
