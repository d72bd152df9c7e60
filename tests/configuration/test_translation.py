"""Files of other tools mean the same in panda's keys.

The examples in other_tools/ are written for these tests, with keys as the tools' repositories show them. Tried by hand
on 2026-11-26: of the 373 YAML files in the repositories below (examples and recipes), 282 are translated, and the
others refused: preferences, rewards, other adapters, launchers, chat and export. With a tiny LLaMA and local data in
the place of model and data, `panda check` passed for all but those that name layers a LLaMA lacks, more positions than
it has, fp16 (there was no GPU), or what panda refuses: 8 bits, compilation or tensor parallelism with ZeRO-3, and
tensor parallelism of `model: hf`.
Read line by line, among others:
LLaMA-Factory (ff6d4d12e) train_lora/qwen3_lora_{sft,sft_ds3,pretrain}, train_full/qwen3_full_sft,
train_qlora/qwen3_lora_sft_{bnb_npu,otfq}; axolotl (067b021c8) llama-3/{qlora-1b,lora-8b,instruct-lora-8b,fft-8b},
qwen3/32b-qlora, phi/phi-ft, archived/tiny-llama/pretrain, gemma3/gemma-3-270m-qlora; TRL (f2cd57710)
cli_configs/example_config, and the alignment handbook's (925acdf) zephyr-7b-beta/sft/config_{qlora,full},
smollm2/sft/config.
"""

from __future__ import annotations

import itertools
import json
import math
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml
from chat_templates import LLAMA2
from checkpoint_files import llama
from checkpoint_files import save_hf

from panda.cli.main import main as panda
from panda.configuration.arguments import parse_arguments
from panda.configuration.configure import configure
from panda.configuration.options import RunOptions
from panda.configuration.translation.rules import Sets
from panda.configuration.translation.rules import To
from panda.configuration.translation.rules import Tool
from panda.configuration.translation.rules import Translation
from panda.configuration.translation.rules import whole
from panda.configuration.translation.translate import TOOLS
from panda.configuration.translation.translate import is_of_another_tool
from panda.configuration.translation.translate import looks_like
from panda.configuration.translation.translate import translate
from panda.configuration.translation.translate import translated as in_pandas_keys
from panda.configuration.translation.translate import written
from panda.registry import Catalog
from panda.registry import UserError
from panda.registry.flat_yaml import load_flat_yaml
from panda.registry.kinds import KINDS
from panda.registry.resolve import resolve

EXAMPLES = Path(__file__).parent / "other_tools"
CONFIGS = Path(__file__).parents[2] / "configs"
ADAM = {"adam_betas": [0.9, 0.999], "adam_epsilon": 1e-8, "max_grad_norm": 1.0}
"""What all of them take by default, and panda does not."""

EXPECTED: dict[str, dict[str, Any]] = {
    "llama_factory_lora.yaml": ADAM
    | {
        "task": "instruct",
        "model": "hf",
        "ckpt_path": "some-org/Base-4B-Instruct",
        "instruction_tuning_data_dir": "alpha",
        "template": "chat",
        "max_seq_length": 1536,
        "max_samples": 1000,
        "eval_fraction": 0.1,
        "eval_steps": 500,
        "output_dir": "saves/base-4b/lora",
        "per_gpu_train_batch_size": 2,
        "per_gpu_eval_batch_size": 1,
        "gradient_accumulation_steps": 8,
        "num_train_epochs": 2.0,
        "learning_rate": 1e-4,
        "lr_scheduler": "cosine",
        "warmup_proportion": 0.1,
        "precision": "bf16",
        "zero_stage": 3,
        "activation_checkpointing": "full",
        "use_lora": True,
        "lora_r": 8,
        "lora_alpha": 16,
        "lora_dropout": 0.0,
        "lora_target_modules": ["q_proj", "v_proj"],
        "num_workers": 4,
        "logging_steps": 10,
        "save_steps": 250,
    },
    "axolotl_qlora.yml": ADAM
    | {
        "task": "instruct",
        "model": "hf",
        "ckpt_path": "some-org/Base-1B",
        "instruction_tuning_data_dir": ["some-org/chats", "some-org/more-chats"],
        "template": "chat",
        "max_seq_length": 4096,
        "batching": "packed",
        "output_dir": "./outputs/out",
        "eval_fraction": 0.05,
        "per_gpu_train_batch_size": 2,
        "per_gpu_eval_batch_size": 2,
        "gradient_accumulation_steps": 4,
        "num_train_epochs": 3,
        "optimizer": "paged_adamw8bit",
        "learning_rate": 2e-4,
        "lr_scheduler": "cosine",
        "warmup_steps": 10,
        "precision": "bf16",
        "activation_checkpointing": "full",
        "use_lora": True,
        "use_quant": True,
        "quant_bits": 4,
        "lora_r": 32,
        "lora_alpha": 16,
        "lora_dropout": 0.05,
        "logging_steps": 1,
    },
    "axolotl_pretrain.yaml": ADAM
    | {
        "task": "pretrain",
        "model": "hf",
        "ckpt_path": "some-org/Base-1B",
        "pretraining_data_dir": "some-org/texts",
        "content_field": "body",
        "max_steps": 200,
        "max_seq_length": 2048,
        "batching": "packed",
        "output_dir": "./outputs/pretrained",
        "per_gpu_train_batch_size": 2,
        "gradient_accumulation_steps": 4,
        "num_train_epochs": 1,
        "optimizer": "adamw",
        "learning_rate": 0.0002,
        "lr_scheduler": "cosine",
        "warmup_proportion": 0.1,
        "weight_decay": 0.1,
        "weight_decay_on": "matrices",
        "precision": "bf16",
        "zero_stage": 3,
    },
    "trl_sft.yaml": ADAM
    | {
        "task": "instruct",
        "model": "hf",
        "ckpt_path": "some-org/Base-7B",
        "instruction_tuning_data_dir": "some-org/chats",
        "template": "chat",
        "max_seq_length": 2048,
        "per_gpu_train_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "num_train_epochs": 3,
        "optimizer": "adamw8bit",
        "learning_rate": 2e-4,
        "lr_scheduler": "cosine",
        "min_lr_ratio": 0.1,
        "warmup_proportion": 0.03,
        "precision": "bf16",
        "activation_checkpointing": "full",
        "use_lora": True,
        "use_quant": True,
        "quant_bits": 4,
        "lora_r": 16,
        "lora_alpha": 32,
        "lora_dropout": 0.05,
        "lora_target_modules": ["q_proj", "v_proj"],
        "seed": 7,
    },
    "training_arguments.json": ADAM
    | {
        "task": "instruct",
        "model": "hf",
        "output_dir": "out",
        "per_gpu_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "num_train_epochs": 1.0,
        "learning_rate": 5e-05,
        "lr_scheduler": "linear",
        "warmup_steps": 100,
        "precision": "fp16",
        "logging_steps": 50,
    },
}
LOST = {
    "llama_factory_lora.yaml": [],
    "axolotl_qlora.yml": [
        "datasets[]: some-org/chats: split train[:20%]",
        "wandb_project: herons",
        "evals_per_epoch: 4",
        "saves_per_epoch: 1",
    ],
    "axolotl_pretrain.yaml": [],
    "trl_sft.yaml": ["push_to_hub: true", "report_to: wandb"],
    "training_arguments.json": ["model and data", "optim: lion_8bit", "save_strategy: epoch"],
}
TOOL_OF = {"llama": "LLaMA-Factory", "axolotl": "axolotl", "trl": "TRL", "training": "transformers"}


def values(found: Translation) -> dict[str, Any]:
    return {key: line.value for key, line in found.lines.items()}


@pytest.fixture
def translated(tmp_path: Path) -> Any:
    """The translation of a file with a text."""

    def of(text: str, tool: str | None = None) -> Translation:
        file = tmp_path / "theirs.yaml"
        file.write_text(text)
        return translate(file, tool)

    return of


@pytest.mark.parametrize("name", EXPECTED)
def test_a_whole_file_is_translated_and_what_has_no_counterpart_is_listed(name: str) -> None:
    found = translate(EXAMPLES / name)
    assert found.tool == TOOL_OF[name.partition("_")[0]]
    assert values(found) == EXPECTED[name]
    assert sorted(found.lost) == sorted(LOST[name])


QUIET = {
    # left out, or off in both
    *("resume_from_checkpoint", "load_in_8bit", "wandb_entity", "wandb_name", "neftune_noise_alpha", "bf16", "packing"),
    *("push_to_hub", "report_to", "label_smoothing_factor", "gradient_checkpointing", "weight_decay", "strict", "tf32"),
    # with what panda does anyway: every linear layer, the whole of the data, saving by steps or not at all
    *("lora_target_linear", "dataset_train_split", "eval_strategy", "save_strategy"),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_no_key_of_a_file_is_dropped_in_silence(name: str) -> None:
    """Each is the origin of a line, or listed, or off."""
    found = translate(EXAMPLES / name)
    said = {word for line in found.lines.values() for word in re.findall(r"\w+", line.because)}
    said |= {word for what in (*found.lost, *found.ignored, *found.different) for word in re.findall(r"\w+", what)}
    keys = yaml.safe_load((EXAMPLES / name).read_text()).keys()
    assert [key for key in keys if key not in said | QUIET] == []


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Flags that put a tiny checkpoint and data in the place of those that a file names."""
    folder = tmp_path_factory.mktemp("local")
    checkpoint = save_hf(llama(max_position_embeddings=4096), folder / "checkpoint")
    (checkpoint / "chat_template.jinja").write_text(LLAMA2)
    return ["--ckpt_path", str(checkpoint), "--instruction_tuning_data_dir", "panda:data/sample/instruct"]


@pytest.mark.parametrize("name", EXPECTED)
def test_what_is_written_is_flat_yaml_that_panda_takes(name: str, local: list[str], tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(written(translate(EXAMPLES / name), EXAMPLES / name))
    assert set(load_flat_yaml(file)) == set(EXPECTED[name])
    pretrain = EXPECTED[name]["task"] == "pretrain"
    flags = local[:2] + (["--pretraining_data_dir", "panda:data/sample/pretrain"] if pretrain else local[2:])
    resolved = configure(parse_arguments(["--config", str(file), *flags])).resolved
    found = {key: resolved.settings[key].value for key in EXPECTED[name]}
    replaced = {flag.removeprefix("--") for flag in flags}
    for key, value in EXPECTED[name].items():
        assert key in replaced or found[key] == (tuple(value) if isinstance(value, list) else value), key


@pytest.mark.parametrize("name", ["llama_factory_lora.yaml", "axolotl_qlora.yml", "trl_sft.yaml"])
def test_panda_check_passes_with_model_and_data_replaced(
    name: str, local: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert panda(["translate", str(EXAMPLES / name), "--output", "run.yaml"]) == 0
    code = panda(["check", "run.yaml", *local])
    printed = capsys.readouterr()
    assert code == 0, printed.err
    assert "text        chat: the tokenizer's chat template" in printed.out


AXOLOTL = "base_model: b\nmicro_batch_size: 2\nsequence_len: 64\n"
TRL = "model_name_or_path: b\ndataset_name: d\n"
FACTORY = "model_name_or_path: b\nstage: sft\ndataset: d\n"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (AXOLOTL + "adapter: lora\nload_in_8bit: true\n", {"use_lora": True, "use_quant": True, "quant_bits": 8}),
        (AXOLOTL + "adapter: lora\nlora_target_modules: [a, b]\n", {"lora_target_modules": ["a", "b"]}),
        (AXOLOTL + "batch_size: 8\n", {"gradient_accumulation_steps": 4, "per_gpu_train_batch_size": 2}),
        (
            AXOLOTL,
            {
                "precision": "bf16",
                "warmup_proportion": 0.03,
                "lr_scheduler": "cosine",
                "gradient_accumulation_steps": 1,
            },
        ),
        (AXOLOTL + "warmup_steps: 0\n", {"warmup_steps": 0, "warmup_proportion": None}),
        (AXOLOTL + "lr_scheduler: constant\n", {"warmup_steps": 0, "warmup_proportion": None}),
        (
            AXOLOTL + "datasets: [{path: parquet, data_files: {train: x.parquet}}]\n",
            {"instruction_tuning_data_dir": "x.parquet"},
        ),
        (AXOLOTL + "lr_scheduler: cosine\ncosine_min_lr_ratio: 0.1\n", {"min_lr_ratio": 0.1}),
        (AXOLOTL + "lora_r: 8\n", {"lora_r": None, "use_lora": None}),
        (AXOLOTL + "tokenizer_config: t\ngroup_by_length: true\n", {"tokenizer": "t", "batching": "grouped"}),
        (AXOLOTL + "auto_resume_from_checkpoints: true\n", {"resume": "auto"}),
        (
            AXOLOTL + "datasets:\n- {path: a, type: completion}\n- {path: b, type: alpaca}\n",
            {
                "task": "mix",
                "pretraining_data_dir": "a",
                "instruction_tuning_data_dir": "b",
                "template": "plain",
                "content_field": None,
            },
        ),
        (
            AXOLOTL + "datasets:\n- {path: a, type: {field_instruction: ask, field_output: say}}\n",
            {"input_field": "ask", "target_field": "say"},
        ),
        (
            AXOLOTL
            + "datasets: [{path: json, data_files: x.jsonl}]\ntest_datasets: [{path: t.jsonl}]\neval_steps: 9\n",
            {"instruction_tuning_data_dir": "x.jsonl", "eval_data_dir": "t.jsonl", "eval_steps": 9},
        ),
        (TRL, {"bf16": None, "precision": "bf16", "max_seq_length": 1024, "learning_rate": 2e-5, "use_lora": None}),
        (TRL + "fp16: true\n", {"precision": "fp16"}),
        (TRL + "bf16: false\n", {"precision": None}),
        (TRL + "gradient_checkpointing: false\n", {"activation_checkpointing": None}),
        (TRL + "max_length: null\n", {"max_seq_length": None}),
        (TRL + "warmup_ratio: 0.1\nwarmup_steps: 5\n", {"warmup_steps": 5, "warmup_proportion": None}),
        (TRL + "warmup_ratio: 0.1\nwarmup_steps: 0\n", {"warmup_proportion": 0.1}),
        (TRL + "use_peft: true\nlora_target_modules: all-linear\n", {"lora_target_modules": None, "use_lora": True}),
        (TRL + "packing: true\nresume_from_checkpoint: true\n", {"batching": "packed", "resume": "auto"}),
        (
            TRL + "dataset_text_field: body\n",
            {"task": "pretrain", "content_field": "body", "pretraining_data_dir": "d"},
        ),
        (TRL + "optim: adamw_torch\nlr_scheduler_type: polynomial\n", {"optimizer": "adamw", "lr_scheduler": "poly"}),
        (FACTORY, {"use_lora": True, "lora_r": 8, "lora_alpha": 16, "lora_target_modules": None, "save_steps": 500}),
        (FACTORY + "finetuning_type: full\n", {"use_lora": None, "lora_r": None, "lora_alpha": None}),
        (FACTORY + "quantization_bit: 8\n", {"use_quant": True, "quant_bits": 8}),
        (FACTORY + "disable_gradient_checkpointing: true\n", {"activation_checkpointing": None}),
        (FACTORY + "neat_packing: true\nresize_vocab: true\n", {"batching": "packed", "extend_vocab": True}),
        (FACTORY + "eval_dataset: e\neval_steps: 5\n", {"eval_data_dir": "e", "eval_steps": 5}),
        (FACTORY + "val_size: 0.2\neval_steps: 5\n", {"eval_fraction": 0.2, "eval_steps": 5, "eval_data_dir": None}),
        (FACTORY + "val_size: 50\neval_steps: 5\n", {"eval_fraction": None, "eval_steps": None}),
        (TRL + "test_split_size: 0.1\n", {"eval_fraction": 0.1}),
        (TRL + "dataset_mixture: {test_split_size: 0.1, datasets: [{id: d}]}\n", {"eval_fraction": 0.1}),
        (AXOLOTL + "fp16: true\n", {"precision": "fp16"}),
        (AXOLOTL + "bf16: false\n", {"precision": None}),
        (AXOLOTL + "datasets: [{path: a, type: chat_template, chat_template: chatml}]\n", {"template": "chat"}),
        (
            AXOLOTL + "datasets: [{path: json, data_files: [x.json, y.json]}]\n",
            {"instruction_tuning_data_dir": ["x.json", "y.json"]},
        ),
        (
            AXOLOTL + "adapter: lora\nlora_r: 8\nlora_dropout: 0.1\nlora_target_modules: [a]\nlora_model_dir: out/a\n",
            {"ckpt_path": "out/a", "base_path": "b", "lora_r": None, "lora_target_modules": None, "lora_dropout": 0.1},
        ),
        (
            FACTORY + "adapter_name_or_path: saves/a\n",
            {"ckpt_path": "saves/a", "base_path": "b", "use_lora": True, "lora_r": None, "lora_alpha": None},
        ),
        (AXOLOTL + "fsdp: [full_shard, auto_wrap]\n", {"zero_stage": 3}),
        (AXOLOTL + "fsdp_config: {fsdp_sharding_strategy: SHARD_GRAD_OP}\n", {"zero_stage": 2}),
        (AXOLOTL + "fsdp_config: {fsdp_version: 2, reshard_after_forward: false}\n", {"zero_stage": 2}),
        (FACTORY + "fsdp: no_shard\n", {"zero_stage": 1}),
        (
            AXOLOTL + "adapter: lora\nlora_target_modules: [a]\nlora_target_parameters: [experts.b]\n",
            {"lora_target_modules": ["a", "experts.b"]},
        ),
        (TRL + "use_peft: true\nlora_target_parameters: [experts.b]\n", {"lora_target_modules": ["experts.b"]}),
        (FACTORY + "moe_aux_loss_coef: 0.01\n", {"router_aux_loss_coef": 0.01}),
        (AXOLOTL + "model_config: {router_aux_loss_coef: 0.02}\n", {"router_aux_loss_coef": 0.02}),
        (FACTORY + "tensor_model_parallel_size: 2\n", {"tensor_parallel_size": 2}),
        (
            FACTORY.replace("dataset: d", "dataset: d, e") + "max_samples: 9\n",
            {"max_samples": 9, "data_weights": [1, 1]},
        ),
        (
            TRL + "dataset_mixture: {datasets: [{id: d, weight: 0.5}, {id: e}]}\n",
            {"instruction_tuning_data_dir": ["d", "e"], "data_weights": [0.5, 1]},
        ),
        (
            TRL
            + "dataset_mixture: {datasets: [{path: json, data_files: x.json}, {path: csv, data_files: {t: y.csv}}]}\n",
            {"instruction_tuning_data_dir": ["x.json", "y.csv"]},
        ),
        (TRL + "lora_task_type: CAUSAL_LM\nuse_peft: true\n", {"use_lora": True}),
        (FACTORY.replace("sft", "pt"), {"task": "pretrain", "pretraining_data_dir": "d", "batching": "packed"}),
    ],
)
def test_values_are_translated(translated: Any, text: str, expected: dict[str, Any]) -> None:
    found = values(translated(text))
    assert {key: found.get(key) for key in expected} == expected


HUB = "model_name_or_path: b\ndataset_name: o/d\n"


@pytest.mark.parametrize(
    ("text", "data", "held_out"),
    [
        (HUB, "o/d", None),
        (HUB + "dataset_config: main\ndataset_train_split: train\n", "o/d:main", None),
        (HUB + "dataset_train_split: train_sft\ndataset_test_split: test_sft\n", "o/d:train_sft", "o/d:test_sft"),
        (HUB + "dataset_config: main\neval_strategy: steps\n", "o/d:main", "o/d:main:test"),
        (
            "model_name_or_path: b\ndataset_mixture: {datasets: [{id: o/d, config: c, split: s}, {path: o/e}]}\n",
            ["o/d:c:s", "o/e"],
            None,
        ),
        ("base_model: b\ndatasets: [{path: o/d, name: c, split: s, revision: r}]\n", "o/d:c:s@r", None),
        (
            "base_model: b\ndatasets: [{path: o/d}]\ntest_datasets: [{path: o/d, split: test}]\n",
            "o/d",
            "o/d:test",
        ),
        (
            "model_name_or_path: b\ndataset_mixture: {datasets: [{id: o/d, split: s, weight: 0.5}, {id: o/d}]}\n",
            ["o/d:s", "o/d"],
            None,
        ),
    ],
)
def test_data_sets_on_the_hub_with_configuration_split_and_revision(
    translated: Any, text: str, data: Any, held_out: str | None
) -> None:
    found = translated(text)
    assert values(found)["instruction_tuning_data_dir"] == data and values(found).get("eval_data_dir") == held_out
    assert not found.lost


def test_a_data_set_that_llama_factory_takes_from_the_hub(translated: Any, tmp_path: Path) -> None:
    listed = {"d": {"hf_hub_url": "o/d", "subset": "c", "split": "s"}}
    (tmp_path / "dataset_info.json").write_text(json.dumps(listed))
    found = translated(FACTORY + f"dataset_dir: {tmp_path}\n")
    assert values(found)["instruction_tuning_data_dir"] == "o/d:c:s" and not found.lost
    listed = {"d": {"file_name": "rows", "subset": "c"}}
    (tmp_path / "dataset_info.json").write_text(json.dumps(listed))
    found = translated(FACTORY + f"dataset_dir: {tmp_path}\n")
    assert values(found)["instruction_tuning_data_dir"] == str(tmp_path / "rows")
    assert set(found.lost) == {"dataset_info.json: d.subset: c"}


def test_only_a_place_that_panda_cannot_read_is_asked_for(
    translated: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "here").mkdir()
    asked = {}
    for place in ("o/d", "rows/here", "d", "rows/missing.jsonl"):
        found = translated(f"base_model: b\ndatasets: [{{path: {place}, split: s}}]\n")
        line = found.lines["instruction_tuning_data_dir"]
        asked[line.value] = line.because, len(found.lost)
    here, missing = "datasets[].path", "datasets[].path; name a file or folder of rows here in place of "
    assert asked == {
        "o/d:s": (here, 0),
        "rows/here": (here, 1),
        "d": (f"{missing}d", 1),
        "rows/missing.jsonl": (f"{missing}rows/missing.jsonl", 1),
    }
    found = translated("base_model: b\ndatasets: [{path: o/d}, {path: rows/here}, {path: e}, {path: f.jsonl}]\n")
    assert found.lines["instruction_tuning_data_dir"].because == f"{missing}e, f.jsonl"


@pytest.mark.parametrize(
    ("text", "lost"),
    [
        (HUB + "dataset_train_split: 'train[:10%]'\n", "o/d: split train[:10%]"),
        (TRL + "dataset_config: c\ndataset_test_split: t\n", "d: config c"),
        (TRL + "dataset_config: c\ndataset_test_split: t\n", "dataset_test_split: t"),
        (TRL + "dataset_mixture: {datasets: [{id: o/d}]}\ndataset_test_split: t\n", "dataset_test_split: t"),
        (AXOLOTL + "datasets: [{path: o/d, split: s, skip: 9}]\n", "datasets[]: o/d:s: skip 9"),
        (AXOLOTL + "optimizer: lion_8bit\n", "optimizer: lion_8bit"),
        (AXOLOTL + "lora_modules_to_save: [embed_tokens]\n", 'lora_modules_to_save: ["embed_tokens"]'),
        (AXOLOTL + "some_new_key: 3\n", "some_new_key: 3"),
        (AXOLOTL + "special_tokens: {eos_token: </s>}\n", "special_tokens.eos_token: </s>"),
        (
            AXOLOTL + "datasets: [{path: a, type: chat_template, field_messages: talk}]\n",
            "datasets[].field_messages: talk",
        ),
        (AXOLOTL + "datasets: [{path: a, type: {format: 'Q {x}'}}]\n", "datasets[].type.format: Q {x}"),
        (AXOLOTL + "fsdp_config: {offload_params: true}\n", "fsdp_config.offload_params"),
        (TRL + "resume_from_checkpoint: out/checkpoint-5\n", "resume_from_checkpoint: out/checkpoint-5"),
        (TRL + "save_steps: 0.5\n", "save_steps: 0.5"),
        (TRL + "lr_scheduler_type: inverse_sqrt\n", "lr_scheduler_type: inverse_sqrt"),
        (TRL + "max_length: null\n", "max_length: null"),
        (FACTORY + "adapter_name_or_path: a, b\n", "adapter_name_or_path: a, b"),
        (FACTORY + "adapter_name_or_path: a\ncreate_new_adapter: true\n", "create_new_adapter: true"),
        (FACTORY + "disable_shuffling: true\n", "disable_shuffling: true"),
        (FACTORY + "pipeline_model_parallel_size: 4\n", "pipeline_model_parallel_size: 4"),
        (AXOLOTL + "dataset_shard_num: 4\n", "dataset_shard_num: 4"),
        (AXOLOTL + "curriculum_sampling: true\n", "curriculum_sampling: true"),
        (AXOLOTL + "excess_length_strategy: raise\ndatasets: [{path: a}]\n", "excess_length_strategy: raise"),
        (AXOLOTL + "model_config: {output_router_logits: true}\n", "model_config.output_router_logits: true"),
        (AXOLOTL + "datasets: [{path: a, type: input_output}]\n", "datasets[].type: input_output"),
        (AXOLOTL + "datasets: [{path: a, drop_system_message: true}]\n", "datasets[].drop_system_message: true"),
        (AXOLOTL + "datasets: [{path: a, herons: 3}]\n", "datasets[].herons: 3"),
        (AXOLOTL + "datasets: [{path: a, roles: {assistant: [heron]}}]\n", "datasets[].roles.assistant: heron"),
        (AXOLOTL + "datasets: [{path: a, roles_to_train: [human, gpt]}]\n", "datasets[].roles_to_train: human, gpt"),
        (
            AXOLOTL + "datasets: [{path: a, type: chat_template, message_property_mappings: {content: said}}]\n",
            "datasets[].message_property_mappings.content: said",
        ),
        (AXOLOTL + "processor_type: AutoProcessor\n", "processor_type: AutoProcessor"),
        (TRL + "truncation_mode: keep_end\n", "truncation_mode: keep_end"),
        (TRL + "dataset_mixture: {datasets: [{id: d, herons: 3}]}\n", "dataset_mixture.datasets[].herons: 3"),
        (
            TRL + "dataset_mixture: {datasets: [{path: d, fraction: 0.3}, {path: e, fraction: 0.7}]}\n",
            "dataset_mixture: fractions 0.3, 0.7",
        ),
        (FACTORY + "double_quantization: false\nquantization_method: hqq\n", "quantization_method: hqq"),
        (FACTORY + "val_size: 50\n", "val_size: 50"),
        (FACTORY + "mix_strategy: interleave_under\n", "mix_strategy: interleave_under"),
        (FACTORY + "eval_steps: 5\n", "eval_steps: 5"),
        (AXOLOTL + "evals_per_epoch: 4\n", "evals_per_epoch: 4"),
        (FACTORY + "use_galore: true\n", "use_galore: true"),
        (FACTORY + "deepspeed: mine.json\n", "deepspeed: mine.json"),
    ],
)
def test_what_has_no_counterpart_is_listed(translated: Any, text: str, lost: str) -> None:
    assert lost in translated(text).lost


def test_data_sets_of_one_name_in_a_mixture_are_all_listed(translated: Any) -> None:
    mixture = "dataset_mixture: {datasets: [{id: d, split: a}, {id: d, split: b, weight: 0.5}]}\n"
    found = translated("model_name_or_path: b\n" + mixture)
    assert values(found)["instruction_tuning_data_dir"] == "d"
    assert {"d: split a", "d: split b", "dataset_mixture: weights None, 0.5"} <= set(found.lost)
    assert "data_weights" not in found.lines


@pytest.mark.parametrize(
    "text",
    [
        FACTORY.replace("dataset: d\n", "dataset: a.json, b.json\n"),
        AXOLOTL + "datasets:\n  - {path: a.json, type: chat_template}\n  - {path: b.json, type: chat_template}\n",
        TRL.replace("dataset_name: d\n", "dataset_mixture: {datasets: [{id: a.json}, {id: b.json}]}\n"),
    ],
)
def test_several_data_sets_are_a_list_of_paths(translated: Any, text: str) -> None:
    found = translated(text)
    assert values(found)["instruction_tuning_data_dir"] == ["a.json", "b.json"]
    assert not any("a.json" in lost for lost in found.lost)
    assert not translated(FACTORY + "mix_strategy: concat\n").lost


def test_packed_rows_are_counted_otherwise_and_that_is_said(translated: Any) -> None:
    assert any(
        "multiply `gradient_accumulation_steps`" in text for text in translated(TRL + "packing: true\n").different
    )
    assert not any("multiply" in text for text in translated(TRL).different)


def test_what_the_other_tool_does_without_being_told_is_said(translated: Any) -> None:
    differs = {
        "excess_length_strategy: axolotl drops": (
            AXOLOTL + "datasets: [{path: a}]\n",
            "excess_length_strategy: truncate\n",
        ),
        "warm-up: axolotl's default is 3%": (AXOLOTL, "warmup_ratio: 0.1\n"),
        "router_aux_loss_coef: TRL's default": (TRL, "router_aux_loss_coef: 0\n"),
        "multiply `gradient_accumulation_steps`": (FACTORY.replace("sft", "pt"), "packing: false\n"),
    }
    for said, (text, told) in differs.items():
        assert sum(said in line for line in translated(text).different) == 1, said
        assert not any(said in line for line in translated(text + told).different), said


def test_one_rank_of_another_parallelism_is_none(translated: Any) -> None:
    assert not translated(AXOLOTL + "context_parallel_size: 1\ndp_shard_size: 1\n").lost
    assert "dp_shard_size: 2" in translated(AXOLOTL + "dp_shard_size: 2\n").lost


def test_what_is_said_of_several_data_sets_is_said_once(translated: Any, tmp_path: Path) -> None:
    found = translated(AXOLOTL + "datasets: [{path: a, type: alpaca}, {path: b, type: alpaca}]\n")
    assert written(found, tmp_path / "theirs.yaml").count("datasets[].type: alpaca: axolotl puts prompts") == 1


def test_keys_of_adapters_that_are_off_are_listed(translated: Any) -> None:
    found = translated(FACTORY + "finetuning_type: full\nlora_rank: 4\n")
    assert found.ignored["lora_rank"] == "adapters are off"
    assert not any("default" in key for key in found.ignored)


def test_the_stage_is_read_from_deepspeeds_file(translated: Any, tmp_path: Path) -> None:
    file = tmp_path / "z3.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}))
    found = translated(f"{FACTORY}deepspeed: {file}\n")
    assert values(found)["zero_stage"] == 2
    assert "offload_optimizer" in found.lost
    nested = translated(AXOLOTL + "deepspeed: {zero_optimization: {stage: 1}}\n")
    assert values(nested)["zero_stage"] == 1
    offload = "{stage: 2, offload_optimizer: {device: DEVICE}}"
    for device, listed in (("none", False), ("cpu", True)):
        found = translated(AXOLOTL + f"deepspeed: {{zero_optimization: {offload.replace('DEVICE', device)}}}\n")
        assert ("offload_optimizer" in found.lost) == listed


def test_llama_factorys_names_of_data_are_looked_up(translated: Any, tmp_path: Path) -> None:
    (tmp_path / "dataset_info.json").write_text(json.dumps({"d": {"file_name": "d.json"}}))
    found = translated(f"{FACTORY}dataset_dir: {tmp_path}\n")
    assert values(found)["instruction_tuning_data_dir"] == str(tmp_path / "d.json")
    assert not found.lost
    entry = {"hf_hub_url": "org/d", "columns": {"prompt": "question", "response": "said"}, "split": "train[:9]"}
    (tmp_path / "dataset_info.json").write_text(json.dumps({"d": entry}))
    found = translated(f"{FACTORY}dataset_dir: {tmp_path}\n")
    assert values(found)["instruction_tuning_data_dir"] == "org/d"
    assert set(found.lost) == {"dataset_info.json: d.columns.response: said", "dataset_info.json: d.split: train[:9]"}
    entry = {"file_name": "d.json", "columns": {"prompt": "text"}}
    (tmp_path / "dataset_info.json").write_text(json.dumps({"d": entry}))
    assert len(translated(f"{FACTORY}dataset_dir: {tmp_path}\n").lost) == 1
    assert not translated(f"{FACTORY}dataset_dir: {tmp_path}\n".replace("sft", "pt")).lost


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (FACTORY.replace("sft", "dpo"), "stage: dpo: panda learns from documents (pt) and from answers (sft)"),
        (FACTORY + "finetuning_type: oft\n", "finetuning_type: oft"),
        (AXOLOTL + "rl: kto\n", "rl: kto"),
        (AXOLOTL + "adapter: ia3\n", "adapter: ia3"),
        (TRL + "beta: 0.1\n", "beta: a file of TRL's preference or reinforcement learning"),
        ("compute_environment: LOCAL_MACHINE\ndistributed_type: FSDP\n", "a file of accelerate"),
        ("model: b\ntrain_dataset: d\n", "experimental engine (v1)"),
        ("herons: 3\n", "not of a tool that is known"),
        (
            "model_name_or_path: b\ntemplate: t\ninfer_backend: vllm\n",
            "infer_backend, and no dataset: a file of LLaMA-F",
        ),
        (FACTORY.replace("dataset: d", "eval_dataset: d\ndo_predict: true"), "do_predict, and no dataset"),
        ("- a\n", "expected keys with values"),
        ("a: [\n", "neither YAML nor JSON"),
        (AXOLOTL + "x: &a [*a]\n", "neither YAML nor JSON: Circular reference"),
    ],
)
def test_a_file_that_cannot_be_followed_is_refused(translated: Any, text: str, said: str) -> None:
    with pytest.raises(UserError, match=r"theirs\.yaml: ") as caught:
        translated(text)
    assert said in str(caught.value)


def keys_of_panda() -> set[str]:
    """Of every run and of every component that panda has."""
    catalog = Catalog()
    keys = {field.name for field in fields(RunOptions)}
    for kind in KINDS:
        for offer in catalog.offers(kind):
            component = catalog.load(offer)
            if kind != "arch" and component is not None:
                keys |= {field.name for field in fields(component.options)}
    return keys


ODD = (5, -3, 0.5, math.inf, 10**30, True, "a=1", "9" * 5000, [], [1], [None], [["x"]], {1: 2}, [{"a": 1}], "x, y")


@pytest.mark.parametrize("tool", TOOLS.values(), ids=list(TOOLS))
def test_a_value_of_any_form_is_translated_or_an_error_that_names_its_key(tool: Tool) -> None:
    """Each key of each tool with each of ODD, beside what a file of it needs."""
    base = {"stage": "sft", "finetuning_type": "lora", "dataset": "d", "dataset_name": "d", "micro_batch_size": 2}
    known = {key.replace("*", "x") for key in tool.keys} | {*tool.defaults, *tool.own}
    refused = set()
    for key, value in itertools.product(sorted(known), ODD):
        try:
            in_pandas_keys(base | {key: value}, tool)
        except UserError as problem:
            assert key in str(problem)
            refused.add(key)
    assert "report_to" in refused


def test_a_number_without_end_is_no_whole_one() -> None:
    assert [whole(value) for value in (3.0, 2.5, math.inf)] == [3, 2.5, math.inf]


def test_every_rule_leads_to_a_key_of_panda_that_takes_its_value() -> None:
    known = keys_of_panda()
    rules = [rule for tool in TOOLS.values() for rule in tool.keys.values()]
    assert {rule.key for rule in rules if isinstance(rule, To)} <= known
    for rule in rules:
        for sets in rule.values.values() if isinstance(rule, Sets) else ():
            flags = [word for key, value in sets.items() for word in (f"--{key}", str(value))]
            resolve(Catalog(), RunOptions, parse_arguments(["--arch", "llama-tiny", *flags]).given)


def test_the_advice_of_every_rule_is_a_sentence() -> None:
    rules = [rule for tool in TOOLS.values() for rule in tool.keys.values()]
    advised = {rule.advice(value) for rule in rules for value in (True, False, "x", 1.0, ("a", "b"))}
    advised |= {rule.advice(value) for rule in rules if isinstance(rule, Sets) for value in rule.values}
    assert [text for text in advised if not re.fullmatch(r"\S.*[\w`)]\.", text)] == []


def test_no_key_that_panda_has_is_said_to_be_another_tools() -> None:
    assert not [key for key in keys_of_panda() if is_of_another_tool(key)]


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("load_in_4bit", "true", "write `use_quant: true` and `quant_bits: 4`."),
        ("load_in_8bit", "false", "leave it out: it is off in panda, too."),
        ("quantization_bit", "8", "write `use_quant: true` and `quant_bits: 8`."),
        ("gradient_checkpointing", "true", "write `activation_checkpointing: full`."),
        ("gradient_checkpointing", "no", "no has no counterpart: `activation_checkpointing` takes"),
        ("packing", "false", "leave it out"),
        ("optim", "paged_adamw_8bit", "write `optimizer: paged_adamw8bit`."),
        ("optim", "lion_8bit", "lion_8bit has no counterpart: panda has AdamW"),
        ("lr_scheduler_type", "cosine", "write `lr_scheduler: cosine`."),
        ("lora_rank", "8", "write `lora_r`."),
        ("loraRank", "8", "write `lora_r`."),
        ("dataset", "x", "write `instruction_tuning_data_dir`"),
        ("base_model", "x", "write `ckpt_path`."),
        ("sequence_len", "8", "write `max_seq_length`."),
        ("finetuning_type", "lora", "write `use_lora`"),
        ("report_to", "wandb", "leave it out"),
        ("mix_strategy", "concat", "leave it out: panda does so without being told."),
        ("mix_strategy", "interleave_under", "interleave_under has no counterpart: panda passes over whole data sets"),
        ("overwrite_output_dir", "true", "leave it out"),
        ("lora_modules_to_save", "lm_head", "it has no counterpart"),
        ("wandb_project", "x", "it has no counterpart"),
        ("use_flash_attention_2", "true", "leave it out"),
        ("nproc_per_node", "8", "it is for torchrun or deepspeed, and stands before `panda-train`"),
    ],
)
def test_an_unknown_key_of_another_tool_is_answered_by_its_meaning(key: str, value: str, said: str) -> None:
    with pytest.raises(UserError) as caught:
        configure(parse_arguments(["--arch", "llama-tiny", f"--{key}", value, "--micro_batch_size", "2"]))
    first, second = str(caught.value).splitlines()
    assert first.startswith(f"--{key}: {key!r} is not one of panda's keys: {said}")
    assert "write `per_gpu_train_batch_size`" in second


def test_the_key_of_the_model_is_answered_where_no_model_is_named() -> None:
    with pytest.raises(UserError) as caught:
        configure(parse_arguments(["--base_model", "x"]))
    first, last = str(caught.value).splitlines()
    assert first == "--base_model: 'base_model' is not one of panda's keys: write `ckpt_path`."
    assert last.startswith("no model: ")


def test_a_name_of_another_tool_and_its_other_keys_are_answered_at_once() -> None:
    flags = "--optimizer adamw_torch_fused --lr_scheduler constant_with_warmup --micro_batch_size 2 --herons 3"
    with pytest.raises(UserError) as caught:
        configure(parse_arguments(["--arch", "llama-tiny", *flags.split()]))
    assert str(caught.value).splitlines()[2:] == [
        "--optimizer: 'adamw_torch_fused' is another tool's name: write `optimizer: adamw`.",
        "--lr_scheduler: 'constant_with_warmup' is another tool's name: write `lr_scheduler: constant`.",
        "--micro_batch_size: 'micro_batch_size' is not one of panda's keys: write `per_gpu_train_batch_size`.",
    ]


def test_names_that_panda_has_are_not_answered_for_another_tool() -> None:
    flags = "--optimizer adamw --lr_scheduler cosine --plugins herons"
    with pytest.raises(UserError) as caught:
        configure(parse_arguments(["--arch", "llama-tiny", *flags.split()]))
    assert str(caught.value) == ("--plugins: unknown plugin 'herons'. `panda list plugins` shows what is installed.")


def test_names_with_commas_are_answered_by_how_a_list_is_written() -> None:
    with pytest.raises(UserError) as caught:
        configure(parse_arguments(["--arch", "llama-tiny", "--plugins", "ema,freeze"]))
    assert "These are several names: write `[ema, freeze]` in a file, `ema freeze` after a flag." in str(caught.value)


def test_nested_keys_of_another_tool_in_a_file_of_pandas_are_answered_with_the_rest(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(
        "arch: llama-tiny\ndatasets:\n  - path: a\nlr_scheduler_kwargs: {min_lr: 0}\nmicro_batch_size: 2\n"
        "special_tokens:\n"
    )
    with pytest.raises(UserError) as caught:
        configure(parse_arguments(["--config", str(file)]))
    data, schedule, batch, tokens = str(caught.value).splitlines()
    assert data.startswith(f"{file}:2: 'datasets' is not one of panda's keys: write `instruction_tuning_data_dir`")
    assert "min_lr_ratio" in schedule and "per_gpu_train_batch_size" in batch
    assert tokens.endswith("leave it out: it is off in panda, too.")
    file.write_text("arch: llama-tiny\nprompts: {a: b}\n")
    with pytest.raises(UserError, match="the value of 'prompts' is nested"):
        configure(parse_arguments(["--config", str(file)]))


@pytest.mark.parametrize("optimizer", ["adamw", "{name: adamw}"])
def test_nested_keys_hide_no_other_answer(tmp_path: Path, optimizer: str) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(
        "arch: llama-tiny\nlora_rank: 8\nquantization_config:\n  load_in_4bit: true\n  llm_int8_threshold: 6\n"
        "prompts: {a: &a {b: *a}}\nmodel_init_kwargs: {use_cache: false}\n"
        f"optimizer: {optimizer}\nmax_seq_length: [[8]]\n"
    )
    with pytest.raises(UserError) as caught:
        configure(parse_arguments(["--config", str(file)]))
    lines = str(caught.value).splitlines()
    nested = {"max_seq_length": 9, "quantization_config": 3, "prompts": 6} | (
        {"optimizer": 8} if "{" in optimizer else {}
    )
    assert {int(line.split(":")[1]) for line in lines if "is nested" in line} == set(nested.values())
    answers = {line.split("'")[1]: line for line in lines if "is not one of panda's keys" in line}
    assert answers.keys() == {"lora_rank", "quantization_config.load_in_4bit", "model_init_kwargs.use_cache"}
    assert answers["quantization_config.load_in_4bit"] == (
        f"{file}:4: 'quantization_config.load_in_4bit' is not one of panda's keys:"
        " write `use_quant: true` and `quant_bits: 4`."
    )
    assert len(lines) == len(nested) + len(answers)


def test_a_nested_value_of_plugins_is_an_error_beside_profile_too(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("arch: llama-tiny\nplugins: {a: b}\n")
    with pytest.raises(UserError, match="the value of 'plugins' is nested"):
        configure(parse_arguments(["--config", str(file), "--profile"]))


@pytest.mark.parametrize("name", EXPECTED)
def test_a_file_of_another_tool_is_answered_in_one_error(name: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_arguments(["--config", str(EXAMPLES / name)])
    (line,) = str(caught.value).splitlines()
    assert f"looks like a file of {TOOL_OF[name.partition('_')[0]]}" in line
    assert f"`panda translate {EXAMPLES / name}" in line


def test_a_configuration_of_panda_is_no_file_of_another_tool(tmp_path: Path) -> None:
    assert {looks_like(config) for config in CONFIGS.glob("*.yaml")} == {None}
    mixed = tmp_path / "run.yaml"
    mixed.write_text(
        "arch: llama-tiny\nbf16: true\ngradient_checkpointing: true\nlora_rank: 8\noptim: x\nbase_model: y\n"
    )
    assert looks_like(mixed) is None
    mixed.write_text("base_model: x\nlora_r: 8\nlearning_rate: 1\n")
    assert looks_like(mixed) is None
    mixed.write_text("base_model: x\nadapter: lora\nnum_epochs: 1\nsequence_len: 5\n")
    assert looks_like(mixed) == "axolotl"
