"""What other tools and older documents call panda's keys."""

from __future__ import annotations

ACCEPTED_SPELLINGS = {"conf_path": "config", "learing_rate": "learning_rate"}
"""Misspelt or older keys of PandaLLM's documentation, and the keys they stand for; accepted with a warning."""

RENAMED = {
    "lr": "write `learning_rate`.",
    "batch_size": "write `per_gpu_train_batch_size`.",
    "micro_batch_size": "write `per_gpu_train_batch_size`.",
    "per_device_train_batch_size": "write `per_gpu_train_batch_size`.",
    "per_device_eval_batch_size": "write `per_gpu_eval_batch_size`.",
    "train_micro_batch_size_per_gpu": "write `per_gpu_train_batch_size`; panda derives DeepSpeed's configuration.",
    "lr_scheduler_type": "write `lr_scheduler`.",
    "warmup_ratio": "write `warmup_proportion`.",
    "adam_beta1": "write `adam_betas: 0.9, 0.99`.",
    "adam_beta2": "write `adam_betas: 0.9, 0.99`.",
    "num_epochs": "write `num_train_epochs`.",
    "epochs": "write `num_train_epochs`.",
    "max_length": "write `max_seq_length`.",
    "cutoff_len": "write `max_seq_length`.",
    "gradient_clipping": "write `max_grad_norm`.",
    "packing": "write `batching: packed`.",
    "sample_packing": "write `batching: packed`.",
    "group_by_length": "write `batching: grouped`.",
    "bf16": "write `precision: bf16`.",
    "fp16": "write `precision: fp16`.",
    "deepspeed": "write `zero_stage`, or `deepspeed_config: FILE` for keys that panda does not own.",
    "resume_from_checkpoint": "write `resume`.",
    "model_name_or_path": "write `ckpt_path`, with `model: hf` or the `arch` of that checkpoint.",
    "dataloader_num_workers": "write `num_workers`.",
    "use_nvlamb": "write `optimizer: nvlamb`.",
    "dev_file": "write `eval_data_dir`.",
    "eval_dataset": "write `eval_data_dir`.",
    "do_eval": "write `eval_data_dir`: where there is data to evaluate on, it is evaluated on.",
    "evaluate_during_training": "write `eval_steps`, with `eval_data_dir`.",
    "eval_strategy": "write `eval_steps`, with `eval_data_dir`.",
    "evaluation_strategy": "write `eval_steps`, with `eval_data_dir`.",
}
"""Keys of other tools and older documents, with what to write instead. Refused: a value may mean something else."""
