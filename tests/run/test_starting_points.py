"""What a run can start from: a folder alone, a run, adapters, an export of a package's model, weights with new rows."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_files import llama
from checkpoint_files import qwen3_moe
from checkpoint_files import save_hf
from distributions import Distributions
from launching import metrics
from launching import run_panda
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from transformers import AutoTokenizer
from transformers import GPT2Config
from transformers import Qwen2Config

from panda.configuration.arguments import parse_arguments
from panda.configuration.configure import Configuration
from panda.configuration.configure import configure
from panda.registry import UserError
from panda.run.preparation import Preparation
from panda.weights.export import decoding_of
from panda.weights.export import describe_model
from panda.weights.files import write_weights

ROWS = [{"input": "ab", "target": "cd"}, {"input": "ef", "target": "gh"}]


def found(*argv: object) -> Configuration:
    return configure(parse_arguments([str(word) for word in argv]))


def model_of(folder: Path) -> str:
    return found("--ckpt_path", folder).resolved.components["model"].component.name


def train(cwd: Path, output: str, *argv: object, fails: bool = False) -> Any:
    """A short run in ``cwd``; its output, and its directory."""
    (cwd / "rows.json").write_text(json.dumps(ROWS))
    flags = [
        *("--instruction_tuning_data_dir", "rows.json", "--output_dir", output, "--max_seq_length", 32),
        *(
            "--per_gpu_train_batch_size",
            2,
            "--gradient_accumulation_steps",
            1,
            "--num_workers",
            0,
            *(() if "--num_train_epochs" in argv else ("--max_steps", 2)),
        ),
        *("--warmup_steps", 0, "-p", "no:tensorboard", "-p", "no:plot", *argv),
    ]
    done = run_panda("panda-train", *flags, cwd=cwd)
    assert (done.returncode != 0) == fails, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_the_model_of_a_folder_is_that_of_its_configuration(tmp_path: Path) -> None:
    assert model_of(save_hf(llama(), tmp_path / "llama")) == "llama"
    rope = {"rope_type": "yarn", "factor": 2.0, "rope_theta": 10000.0, "original_max_position_embeddings": 64}
    assert model_of(save_hf(llama(rope_parameters=rope), tmp_path / "yarn")) == "hf"
    config = Qwen2Config(
        vocab_size=259, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4
    )
    assert model_of(save_hf(AutoModelForCausalLM.from_config(config), tmp_path / "qwen", shards=False)) == "hf"
    assert found("--ckpt_path", tmp_path / "llama", "--model", "hf").resolved.settings["model"].origin == "--model"
    with pytest.raises(UserError, match=r"no model: name one with `arch` .*, a checkpoint with `ckpt_path`"):
        found("--task", "instruct")


def test_a_model_with_learned_positions_trains_and_answers_within_them(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=259, n_embd=16, n_layer=1, n_head=2, n_positions=32)
    save_hf(AutoModelForCausalLM.from_config(config), tmp_path / "gpt2", shards=False)
    train(tmp_path, "run", "--ckpt_path", "gpt2", "--prompts", "ab", "x" * 40)
    answers = json.loads((tmp_path / "run" / "answers.json").read_text())
    assert [answer["prompt"] for answer in answers] == ["ab", "x" * 40]


def test_a_run_can_start_from_a_run_and_go_on_from_its_adapters(tmp_path: Path) -> None:
    base = save_hf(llama(), tmp_path / "base")
    train(tmp_path, "first", "--ckpt_path", "base")
    said = train(tmp_path, "second", "--ckpt_path", "first", "--use_lora", "--lora_r", 2, "--lora_dropout", 0)
    assert "first/export (the export of a run): safetensors, llama" in said
    said = train(tmp_path, "third", "--ckpt_path", "second", "--lora_dropout", 0, "--learning_rate", 1e-9)
    assert "LoRA adapters of rank 2" in said
    assert "with the adapters in" in said
    config = json.loads((tmp_path / "third" / "export" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tmp_path / "first" / "export")
    second, third = (load_file(tmp_path / run / "export" / "adapter_model.safetensors") for run in ("second", "third"))
    assert second.keys() == third.keys()
    assert all(torch.allclose(second[name], third[name], atol=1e-6) for name in second)
    assert any(name.endswith("lora_B.weight") and tensor.abs().sum() > 0 for name, tensor in second.items())

    adapters = ("--ckpt_path", tmp_path / "second")
    said = train(tmp_path, "fourth", *adapters, "--base_path", base, fails=True)
    assert "were trained on" in said and f"but the base found is {base}" in said, "its shapes are the same"
    assert found(*adapters).options.use_lora
    assert found(*adapters, "--model", "llama", "--lora_dropout", 0.2).options.lora_dropout == 0.2
    assert found(*adapters, "--base_path", base).pretrained.folder == base  # type: ignore[union-attr]
    with pytest.raises(UserError, match=r"lora_r is 8 \(--lora_r\), but 2 in the adapters"):
        found(*adapters, "--use_lora", "--lora_r", 8)
    with pytest.raises(UserError, match=r"use_lora is False \(--use_lora\), but True in the adapters"):
        found(*adapters, "--use_lora", "false")
    file = tmp_path / "second" / "export" / "adapter_config.json"
    stated = json.loads(file.read_text())
    file.write_text(json.dumps(stated | {"rank_pattern": {"q_proj": 4}}))
    with pytest.raises(UserError, match=r"panda has no option for rank_pattern"):
        found(*adapters)
    file.write_text(json.dumps(stated | {"base_model_name_or_path": "nowhere"}))
    with pytest.raises(UserError, match=r"base was not found: they name 'nowhere'.*`base_path`"):
        found(*adapters)


MIXTURES = {"default": (), "named": ("--lora_target_modules", "q_proj, gate, experts.gate_up_proj")}


@pytest.mark.parametrize("chosen", MIXTURES)
def test_a_run_goes_on_from_adapters_on_experts(tmp_path: Path, chosen: str) -> None:
    """With nothing but their folder given; its first loss is that of the model at the end of the first run."""
    base = save_hf(qwen3_moe(), tmp_path / "base", shards=False)
    flags = ("--use_lora", "--lora_r", 2, "--logging_steps", 1, "--learning_rate", 0.03, *MIXTURES[chosen])
    said = train(tmp_path, "first", "--ckpt_path", base, *flags)
    experts = "experts.down_proj, " * (chosen == "default") + "experts.gate_up_proj, gate\n"
    assert f"and on the parameters {experts}" in said, "names that lora_target_modules takes"
    export = tmp_path / "first" / "export"
    steps = ("--logging_steps", 1, "--learning_rate", 1e-9)
    train(tmp_path, "second", "--ckpt_path", export, *steps)
    run_panda("panda", "export", "first", "--merge", cwd=tmp_path)
    train(tmp_path, "merged", "--ckpt_path", "first/merged", *steps)
    first, second, merged = (metrics(tmp_path / run)[0]["loss"] for run in ("first", "second", "merged"))
    assert second == pytest.approx(merged, abs=1e-5)
    assert abs(second - first) > 0.01, "the first step begins with the base"
    stated, again = (
        json.loads((tmp_path / run / "export" / "adapter_config.json").read_text()) for run in ("first", "second")
    )
    assert again == stated
    assert found("--ckpt_path", export, "--lora_dropout", 0).options.lora_dropout == 0
    for pattern in ({r".*\.gate_up_proj": 6}, {r".*\.gate_up_proj": 4, "q_proj": 4}):
        (export / "adapter_config.json").write_text(json.dumps(stated | {"rank_pattern": pattern}))
        with pytest.raises(UserError, match=r"no option for rank_pattern: .*`panda export RUN --merge`"):
            found("--ckpt_path", export)


@pytest.mark.parametrize(("tied", "stage"), [(False, 1), (True, 2)])
def test_rows_of_new_tokens_are_trained_under_adapters(tmp_path: Path, tied: bool, stage: int) -> None:
    base = save_hf(llama(tie_word_embeddings=tied), tmp_path / "base", shards=False)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens(["cd", "gh"])
    assert len(tokenizer) == 261
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    flags = ("--ckpt_path", "base", "--tokenizer", "tokenizer", "--extend_vocab", "--learning_rate", 1e-2)
    said = train(tmp_path, "run", *flags, "--use_lora", "--lora_r", 2, "--zero_stage", stage, "--num_train_epochs", 8)
    assert "and the 2 rows of new tokens in model.embed_tokens" in said
    run = tmp_path / "run"
    records = metrics(run)
    assert records[-1]["loss"] < records[0]["loss"]
    assert run_panda("panda", "export", "run", "--merge", cwd=tmp_path).returncode == 0
    ids = torch.tensor([[1, 100, 259, 101, 260, 102]])
    plain = AutoModelForCausalLM.from_pretrained(base)
    plain.resize_token_embeddings(261)
    adapted = PeftModel.from_pretrained(plain, run / "export").eval()
    with torch.no_grad():
        logits = adapted(ids).logits
        merged = AutoModelForCausalLM.from_pretrained(run / "merged")
        assert torch.allclose(merged(ids).logits, logits, atol=1e-4)
    rows = merged.get_input_embeddings().weight[259:]
    assert not torch.allclose(rows[0], rows[1], atol=1e-3)
    shutil.move(run / "export", tmp_path / "moved")
    assert run_panda("panda", "generate", "moved", "--prompt", "ab", cwd=tmp_path).returncode == 0


OWN = """
    @dataclass(frozen=True)
    class Options:
        width: int = 8

    @register_model("bag", options=Options)
    def build(options, context):
        import torch

        class Bag(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.embedding = torch.nn.Embedding(context.vocab_size, options.width)
                self.output = torch.nn.Linear(options.width, context.vocab_size, bias=False)
                self.output.weight = self.embedding.weight

            def forward(self, input_ids):
                return self.output(self.embedding(input_ids).cumsum(1))

        return Bag()
"""


def test_an_export_of_a_packages_model_is_a_start(tmp_path: Path, distributions: Distributions) -> None:
    distributions.install("acme", {"models": {"bag": "acme.bag"}}, {"acme.bag": OWN})
    data = ("--instruction_tuning_data_dir", "panda:data/sample/instruct", "--max_seq_length", 64)
    first = Preparation(found("--model", "bag", "--width", 24, *data))
    model, weights = first.take_base()
    chosen = first.resolved.components["model"]
    base = tmp_path / "model"
    parts = {"model": chosen, "context": first.context, "pretrained": None}
    parts["generation"] = decoding_of(model, first.tokenizer, None, [2])
    describe_model(base, model, torch.float32, first.tokenizer, **parts)  # type: ignore[arg-type]
    write_weights(weights, base)

    second = Preparation(found("--ckpt_path", base, *data))
    assert second.resolved.components["model"].offer.qualified == "acme:bag"
    assert second.resolved.components["model"].options.width == 24
    again, stored = second.take_base()
    assert torch.equal(stored["embedding.weight"].read(), weights["embedding.weight"].read())
    assert again.output.weight is again.embedding.weight  # type: ignore[union-attr]
    with pytest.raises(UserError, match=r"width is 8 \(--width\), but 24 in the checkpoint"):
        found("--ckpt_path", base, "--width", 8, *data)
    with pytest.raises(UserError, match=r"weights of the model 'acme:bag', and not of 'panda-train:llama'"):
        found("--ckpt_path", base, "--model", "llama", *data)
    with pytest.raises(UserError, match=r"extend_vocab: rows can only be added to models of transformers"):
        _ = Preparation(found("--ckpt_path", base, "--extend_vocab", *data)).context
