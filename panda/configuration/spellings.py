"""What other tools and older documents call panda's keys."""

from __future__ import annotations

ACCEPTED_SPELLINGS = {"conf_path": "config", "learing_rate": "learning_rate"}
"""Misspelt or older keys of PandaLLM's documentation, and the keys they stand for; accepted with a warning."""

RENAMED = {
    "lr": "write `learning_rate`.",
    "batch_size": "write `per_gpu_train_batch_size`.",
    "train_micro_batch_size_per_gpu": "write `per_gpu_train_batch_size`; panda derives DeepSpeed's configuration.",
    "epochs": "write `num_train_epochs`.",
    "gradient_clipping": "write `max_grad_norm`.",
    "resume_from_checkpoint": "write `resume`.",
    "use_nvlamb": "write `optimizer: nvlamb`.",
    **dict.fromkeys(("max_seq_len", "seq_length", "seq_len", "block_size"), "write `max_seq_length`."),
    **dict.fromkeys(("train_file", "data_path"), "write `instruction_tuning_data_dir`, or `pretraining_data_dir`."),
    "tokenizer_name": "write `tokenizer`.",
    "max_train_samples": "write `max_samples`.",
    "validation_file": "write `eval_data_dir`.",
    "validation_split_percentage": "write `eval_fraction`, a share between 0 and 1.",
    "mixed_precision": "write `precision`.",
    "deepspeed_stage": "write `zero_stage`.",
    "dev_file": "write `eval_data_dir`.",
    "do_eval": "write `eval_data_dir`: where there is data to evaluate on, it is evaluated on.",
    "evaluate_during_training": "write `eval_steps`, with `eval_data_dir`.",
}
"""Keys of other tools and older documents, with what to write instead. Refused: a value may mean something else.

Those that are here are in no table of ``translation/``, or it does not say all."""

LAUNCHERS = dict.fromkeys(
    (
        *("nproc_per_node", "nnodes", "node_rank", "master_addr", "master_port", "rdzv_backend", "rdzv_endpoint"),
        *("num_gpus", "num_nodes", "hostfile", "num_processes", "num_machines", "machine_rank", "main_process_ip"),
        *("main_process_port", "multi_gpu", "use_deepspeed", "use_fsdp", "config_file"),
    ),
    "it is for torchrun or deepspeed, and stands before `panda-train` (docs/machines.md).",
)
"""Flags of what starts the processes, also of accelerate."""
