"""What other tools and older documents call panda's keys."""

from __future__ import annotations

ACCEPTED_SPELLINGS = {"conf_path": "config", "learing_rate": "learning_rate"}
"""Misspelt or older keys of PandaLLM's documentation, and the keys they stand for; accepted with a warning."""

RENAMED = {
    "lr": "write `learning_rate`.",
    "batch_size": "write `per_gpu_train_batch_size`.",
    "train_micro_batch_size_per_gpu": "write `per_gpu_train_batch_size`; panda derives DeepSpeed's configuration.",
    "lr_scheduler_type": "write `lr_scheduler`.",
    "epochs": "write `num_train_epochs`.",
    "gradient_clipping": "write `max_grad_norm`.",
    "resume_from_checkpoint": "write `resume`.",
    "use_nvlamb": "write `optimizer: nvlamb`.",
    "dev_file": "write `eval_data_dir`.",
    "do_eval": "write `eval_data_dir`: where there is data to evaluate on, it is evaluated on.",
    "evaluate_during_training": "write `eval_steps`, with `eval_data_dir`.",
}
"""Keys of other tools and older documents, with what to write instead. Refused: a value may mean something else.

Those that are here are in no table of ``translation/``, or it does not say all."""
