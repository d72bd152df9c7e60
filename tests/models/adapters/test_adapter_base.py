"""Adapters and the base they were trained on: merged, answering, and told from any other base."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_files import llama
from checkpoint_files import save_hf
from initial_model import initial_model
from launching import ENVIRONMENT
from launching import losses
from launching import run_panda
from launching import train_many
from launching import zero3_at_once
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from transformers import AutoTokenizer
from transformers import BitsAndBytesConfig

from panda.cli.main import main
from panda.configuration.arguments import parse_arguments
from panda.configuration.configure import configure
from panda.models.adapters import quantisation
from panda.run.description import write_description
from panda.run.description import write_end

Captured = pytest.CaptureFixture[str]
QUANTISED = ("--use_quant", "--precision", "fp32")
ALONE: dict[str, tuple[object, ...]] = {
    "lora": (),
    "dora": ("--use_dora",),
    "rslora": ("--use_rslora",),
    "bf16": ("--precision", "bf16"),
    "nf4": QUANTISED,
    "int8": (*QUANTISED, "--quant_bits", 8),
    "random": (),
    "random-nf4": QUANTISED,
    "whole": (),
}
"""Runs on one rank, from a checkpoint unless they are called random; adapters but for one."""
TOGETHER: dict[str, tuple[object, ...]] = {
    "lora-zero2": ("--zero_stage", 2),
    "dora-zero3": ("--use_dora",),
    "nf4-zero3": QUANTISED,
}
PLAIN = """
import json, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
found = {}
for folder in sys.argv[1:]:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    ids = torch.tensor([[1, 83, 100, 124, 35]])
    found[folder] = {"logits": model(ids).logits.tolist(), "dtype": str(model.dtype), "chat": tokenizer.chat_template}
assert not any(name.split(".")[0] in ("panda", "peft") for name in sys.modules)
print(json.dumps(found))
"""
IDS = torch.tensor([[1, 83, 100, 124, 35]])


def flags(folder: Path, name: str, more: tuple[object, ...], accumulation: int) -> list[object]:
    start = ["--arch", "llama-tiny", "--num_layers", 2] if "random" in name else ["--ckpt_path", folder / "base"]
    return [
        *(start if "random" in name else ["--model", "llama", *start]),
        *("--instruction_tuning_data_dir", "panda:data/sample/instruct", "--max_seq_length", 64, "--num_workers", 0),
        *("--max_steps", 4, "--save_steps", 2, "--per_gpu_train_batch_size", 2, "--separator", " =>\n", "--seed", 3),
        *("--gradient_accumulation_steps", accumulation, "--learning_rate", 2e-2, "--warmup_steps", 0),
        *("--adam_epsilon", 1e-4),  # or rounding in gradients that are nearly zero becomes whole steps
        *("-p", "no:tensorboard", "-p", "no:plot", "--output_dir", folder / name),
        *(() if name == "whole" else ("--use_lora", "--lora_r", 4, "--lora_alpha", 8, "--lora_dropout", 0)),
        *more,
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter_base")
    save_hf(llama(4, hidden_size=64, intermediate_size=128), folder / "base")
    train_many([flags(folder, name, more, 2) for name, more in ALONE.items()], cwd=folder)
    spread = zero3_at_once(folder)
    train_many(
        [flags(folder, name, (*more, *(spread if "zero3" in name else ())), 1) for name, more in TOGETHER.items()],
        ranks=2,
        cwd=folder,
    )
    return folder


def plain_base(folder: Path, name: str, dtype: torch.dtype = torch.float32) -> Any:
    """The base of a run, without panda: from its folder, quantised by transformers where the run quantised it."""
    if "random" in name:
        config = AutoModelForCausalLM.from_pretrained(folder / "merged" / name).config
        initial_model(config, 3).save_pretrained(folder / f"drawn-{name}")
        source = folder / f"drawn-{name}"
    else:
        source = folder / "base"
    quantised = {}
    if "nf4" in name or "int8" in name:
        config = BitsAndBytesConfig(
            load_in_4bit="nf4" in name,
            load_in_8bit="int8" in name,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
        )
        quantised = {"quantization_config": config}
    model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, **quantised).eval()
    for module in model.modules():  # or bitsandbytes computes in bf16 in evaluation, on CPUs that have it
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


@pytest.mark.parametrize("name", TOGETHER)
def test_two_ranks_learn_on_a_checkpoint_what_one_does(folder: Path, name: str) -> None:
    alone = folder / name.partition("-")[0]
    assert losses(folder / name) == pytest.approx(losses(alone), rel=1e-6)
    expected, found = (load_file(run / "export" / "adapter_model.safetensors") for run in (alone, folder / name))
    assert found.keys() == expected.keys()
    for key, weight in expected.items():
        assert (found[key] - weight).abs().max() < 1e-6, key


@pytest.fixture(scope="module")
def merged(folder: Path) -> dict[str, dict[str, Any]]:
    """What plain transformers finds in the merged models: logits, type, chat template."""
    names = [name for name in ALONE | TOGETHER if name != "whole"]
    for name in names:
        assert main(["export", str(folder / name), "--merge", "--output", str(folder / "merged" / name)]) == 0
    # A process of its own, and no fork of one that has imported peft.
    command = [sys.executable, "-c", PLAIN, *(f"merged/{name}" for name in names)]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr
    return {name.removeprefix("merged/"): found for name, found in json.loads(done.stdout).items()}


@pytest.mark.parametrize("name", [name for name in ALONE | TOGETHER if name != "whole"])
def test_merged_weights_give_the_logits_of_base_and_adapters(
    folder: Path, merged: dict[str, dict[str, Any]], name: str
) -> None:
    found = torch.tensor(merged[name]["logits"])
    base = plain_base(folder, name)
    without = base(IDS).logits
    adapted = PeftModel.from_pretrained(base, folder / name / "export").eval()
    expected = adapted(IDS).logits
    # In training LLM.int8 rounds activations to 8 bits too, and bf16 all; merged weights do not.
    tolerance = {"int8": 5e-2, "bf16": 5e-2}.get(name, 1e-5) * float(expected.abs().max())
    assert (found - expected).abs().max() <= tolerance
    assert (expected - without).abs().max() > 4 * tolerance
    assert merged[name]["dtype"] == ("torch.bfloat16" if name == "bf16" else "torch.float32")
    assert " =>" in merged[name]["chat"]


@pytest.mark.parametrize("name", ["lora", "dora", "bf16", "dora-zero3", "random"])
def test_merged_weights_are_those_of_plain_peft(folder: Path, merged: dict[str, Any], name: str) -> None:
    base = plain_base(folder, name, torch.bfloat16 if name == "bf16" else torch.float32)
    expected = PeftModel.from_pretrained(base, folder / name / "export").merge_and_unload().state_dict()
    found = AutoModelForCausalLM.from_pretrained(folder / "merged" / name).state_dict()
    assert found.keys() == expected.keys()
    for key, weight in expected.items():
        # peft adds to a base in bf16 what was rounded to bf16 itself; here the sum alone is rounded.
        tolerance = 2**-7 * float(weight.abs().max()) if name == "bf16" else 1e-6
        assert (found[key].float() - weight.float()).abs().max() <= tolerance, key


@pytest.mark.parametrize("name", ["nf4", "int8", "random-nf4"])
def test_a_quantised_base_is_dequantised_and_the_adapters_added(
    folder: Path, merged: dict[str, Any], name: str, capsys: Captured
) -> None:
    import bitsandbytes as bnb

    base = plain_base(folder, name)
    found = load_file(folder / "merged" / name / "model.safetensors")
    adapters = load_file(folder / name / "export" / "adapter_model.safetensors")
    for key, module in base.named_modules():
        if not isinstance(module, (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt)):
            continue
        a, b = (adapters[f"base_model.model.{key}.lora_{letter}.weight"] for letter in "AB")
        weight: Any = module.weight
        whole = (
            bnb.functional.dequantize_4bit(weight.data, weight.quant_state)
            if "nf4" in name
            else weight.data.float() * (weight.SCB if weight.SCB is not None else module.state.SCB)[:, None] / 127
        )
        assert (found[f"{key}.weight"] - (whole + 2 * b @ a)).abs().max() < 1e-6, key
    assert main(["export", str(folder / name), "--merge"]) == 0
    bits = 8 if name == "int8" else 4
    assert f"dequantised from {bits} bits to float32, and differs from the original" in capsys.readouterr().out
    assert (folder / name / "merged" / "model.safetensors").exists()


def test_a_checkpoint_on_the_way_is_exported_and_merged_too(folder: Path, tmp_path: Path) -> None:
    checkpoint = folder / "lora" / "checkpoints" / "step-00000002"
    assert main(["export", str(checkpoint), "--output", str(tmp_path / "adapters")]) == 0
    assert main(["export", str(checkpoint), "--merge", "--output", str(tmp_path / "merged")]) == 0
    adapted = PeftModel.from_pretrained(plain_base(folder, "lora"), tmp_path / "adapters")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert torch.allclose(model(IDS).logits, adapted.eval()(IDS).logits, atol=1e-4, rtol=0)
    last = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").state_dict()
    final = load_file(folder / "lora" / "export" / "adapter_model.safetensors")
    there = load_file(tmp_path / "adapters" / "adapter_model.safetensors")
    assert there.keys() == final.keys() and last
    assert not all(torch.equal(there[key], final[key]) for key in final)
    for what in ("adapter_config.json", "tokenizer.json", "chat_template.jinja"):
        assert (tmp_path / "adapters" / what).read_text() == (folder / "lora" / "export" / what).read_text()


@pytest.mark.parametrize("what", ["lora", "dora-zero3", "bf16", "nf4", "lora/export", "nf4/export"])
def test_adapters_answer_as_plain_peft(folder: Path, merged: dict[str, Any], what: str, capsys: Captured) -> None:
    name = what.partition("/")[0]
    capsys.readouterr()
    assert main(["generate", str(folder / what), "--prompt", "Say tomato.", "--max_new_tokens", "12"]) == 0
    dtype = torch.bfloat16 if name == "bf16" else torch.float32
    model = PeftModel.from_pretrained(
        plain_base(folder, name, dtype), folder / name / "export", autocast_adapter_dtype=False
    )
    ids = torch.tensor([[1, *(byte + 3 for byte in b"Say tomato. =>\n")]])
    answer = model.eval().generate(input_ids=ids, max_new_tokens=12, do_sample=False, pad_token_id=0)
    text = AutoTokenizer.from_pretrained(folder / name / "export").decode(
        answer[0, ids.shape[1] :], skip_special_tokens=True
    )
    assert capsys.readouterr().out == text + "\n" and len(text) > 2


def test_a_run_of_adapters_is_talked_with(folder: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    import io

    answers = []
    for what in (folder / "nf4", folder / "merged" / "nf4"):
        if not what.exists():
            assert main(["export", str(folder / "nf4"), "--merge", "--output", str(what)]) == 0
        capsys.readouterr()
        monkeypatch.setattr("sys.stdin", io.StringIO("abc\nde\n"))
        assert main(["chat", str(what), "--max_new_tokens", "6"]) == 0
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1] and len(answers[0]) > 6


# -- another base -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def other(folder: Path) -> Path:
    """A fine-tune of the base: the same names and shapes, one weight another."""
    model = llama(4, hidden_size=64, intermediate_size=128)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.mul_(1.01)
    return save_hf(model, folder / "other")


@pytest.mark.parametrize("command", [["export", "--merge"], ["generate", "--prompt", "x"], ["chat"]])
def test_another_base_is_an_error_with_both_named(
    folder: Path, other: Path, command: list[str], capsys: Captured
) -> None:
    assert main([command[0], str(folder / "lora"), *command[1:], "--ckpt_path", str(other)]) == 2
    error = capsys.readouterr().err
    assert f"trained on {folder}/base (" in error and f"the base found is {other}" in error


def test_a_base_that_was_replaced_where_it_was_is_told_and_one_that_was_moved_is_taken(
    folder: Path, other: Path, tmp_path: Path, capsys: Captured
) -> None:
    shutil.copytree(folder / "base", tmp_path / "moved")
    (folder / "base").rename(folder / "aside")
    try:
        shutil.copytree(other, folder / "base")
        assert main(["export", str(folder / "lora"), "--merge", "--output", str(tmp_path / "a")]) == 2
        assert "but the base found is" in capsys.readouterr().err
        flags_ = ["--merge", "--ckpt_path", str(tmp_path / "moved"), "--output", str(tmp_path / "b")]
        assert main(["export", str(folder / "lora"), *flags_]) == 0
        shutil.rmtree(folder / "base")
        assert main(["export", str(folder / "lora"), "--merge", "--output", str(tmp_path / "c")]) == 2
        told = capsys.readouterr().err
        assert "was not found" in told and "give its new location with `--ckpt_path`" in told
        moved = ["--config", str(folder / "lora" / "config.yaml"), "--ckpt_path", str(tmp_path / "moved")]
        resolved = configure(parse_arguments(moved)).resolved
        assert resolved.core.tokenizer == str(tmp_path / "moved"), "which goes with the base"
    finally:
        shutil.rmtree(folder / "base", ignore_errors=True)
        (folder / "aside").rename(folder / "base")
    assert (tmp_path / "b" / "model.safetensors").exists()


def test_a_run_of_adapters_does_not_continue_on_another_base(folder: Path, other: Path, tmp_path: Path) -> None:
    words = [word for word in flags(folder, "lora", (), 2) if word != folder / "lora"]
    words[words.index(folder / "base")] = other
    words.remove("--output_dir")
    done = run_panda("panda-train", *words, "--resume", folder / "lora", cwd=tmp_path)
    assert done.returncode == 2
    assert "this run cannot continue that one: the base was " in done.stderr
    words[words.index(other)] = folder / "base"
    again = ("--resume", folder / "lora" / "checkpoints" / "step-00000002", "--output_dir", tmp_path / "again")
    train_many([[*words, *again]], cwd=tmp_path)
    assert losses(tmp_path / "again") == losses(folder / "lora")[2:]


def test_what_cannot_be_merged_or_answered_is_told(folder: Path, tmp_path: Path, capsys: Captured) -> None:
    assert main(["export", str(folder / "whole"), "--merge"]) == 2
    assert "trained a whole model, so there is nothing to merge" in capsys.readouterr().err
    assert main(["generate", str(folder / "whole"), "--prompt", "x", "--ckpt_path", "base"]) == 2
    assert "did not train adapters" in capsys.readouterr().err
    assert main(["generate", str(folder / "random"), "--prompt", "x", "--ckpt_path", str(folder / "base")]) == 2
    assert "trained on random weights" in capsys.readouterr().err
    # `--allow_pickle` would not help: `panda export` has no such flag, and other weights they are anyhow.
    shutil.copytree(folder / "base", pickled := tmp_path / "pickled")
    for file in pickled.glob("*.safetensors*"):
        file.unlink()
    torch.save({"a": torch.zeros(1)}, pickled / "pytorch_model.bin")
    assert main(["export", str(folder / "lora"), "--merge", "--ckpt_path", str(pickled)]) == 2
    told = capsys.readouterr().err
    assert "but the base found is" in told and "allow_pickle" not in told


@pytest.mark.parametrize("name", ["lora", "dora-zero3"])
def test_adapters_away_from_their_run_answer_on_the_base_that_they_name_or_on_the_one_that_is_given(
    folder: Path, tmp_path: Path, capsys: Captured, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    shutil.copytree(folder / name / "export", tmp_path / "adapters")
    question = ["--prompt", "Say tomato.", "--max_new_tokens", "12"]
    assert main(["generate", str(folder / name), *question]) == 0
    expected = capsys.readouterr().out
    assert main(["generate", str(tmp_path / "adapters"), *question]) == 0
    assert capsys.readouterr().out == expected
    config = tmp_path / "adapters" / "adapter_config.json"
    config.write_text(config.read_text().replace(str(folder / "base"), "org/elsewhere"))
    assert main(["generate", str(tmp_path / "adapters"), *question]) == 2
    error = capsys.readouterr().err
    assert "'org/elsewhere' was not found" in error and "HF_HUB_OFFLINE" in error and "`--ckpt_path`" in error
    config.write_text(config.read_text().replace("org/elsewhere", "/else/where"))
    assert main(["generate", str(tmp_path / "adapters"), *question]) == 2
    error = capsys.readouterr().err
    assert "names '/else/where', which is not a folder here" in error and "`--ckpt_path`" in error
    assert main(["generate", str(tmp_path / "adapters"), *question, "--ckpt_path", str(folder / "base")]) == 0
    assert capsys.readouterr().out == expected


@pytest.mark.parametrize("changed", [{"num_hidden_layers": 1}, {"hidden_size": 32}])
def test_adapters_away_from_their_run_are_not_put_on_a_base_of_another_shape(
    folder: Path, tmp_path: Path, capsys: Captured, changed: dict[str, int]
) -> None:
    shutil.copytree(folder / "lora" / "export", tmp_path / "adapters")
    save_hf(llama(4, **{"hidden_size": 64, "intermediate_size": 128} | changed), tmp_path / "base")
    argv = ["generate", str(tmp_path / "adapters"), "--prompt", "x", "--ckpt_path", str(tmp_path / "base")]
    assert main(argv) == 2
    assert "these adapters do not fit this LlamaForCausalLM" in capsys.readouterr().err


def test_adapters_that_are_damaged_or_unknown_are_told_before_their_base_is_loaded(
    folder: Path, tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("panda.answers.loading.pretrained_module", None)
    adapters = shutil.copytree(folder / "lora" / "export", tmp_path / "adapters")
    config, weights = adapters / "adapter_config.json", adapters / "adapter_model.safetensors"

    def told() -> str:
        assert main(["generate", str(adapters), "--prompt", "x"]) == 2
        return capsys.readouterr().err

    known = json.loads(config.read_text())
    config.write_text(json.dumps(known | {"peft_type": "NEWER"}))
    assert "peft cannot read it: KeyError: 'NEWER'" in told()
    config.write_text(json.dumps({key: value for key, value in known.items() if key != "peft_type"}))
    assert "peft cannot read it: " in (error := told()) and "'peft_type'" in error
    config.write_text(json.dumps(known))
    weights.write_bytes(weights.read_bytes()[:-9])
    assert "adapter_model.safetensors: damaged, or not safetensors" in told()
    weights.unlink()
    assert "no safetensors with adapters" in told()


def test_adapters_of_a_weight_that_another_layer_has_too_are_not_merged(tmp_path: Path, capsys: Captured) -> None:
    save_hf(llama(4, tie_word_embeddings=True), tmp_path / "base")
    layers = {"embed_tokens": "model.embed_tokens", "lm_head": "lm_head"}
    train_many([flags(tmp_path, name, ("--lora_target_modules", name), 1) for name in layers], cwd=tmp_path)
    for name, layer in layers.items():
        assert main(["export", str(tmp_path / name), "--merge"]) == 2
        assert f"{layer} shares its weight with another layer" in capsys.readouterr().err
        assert not list((tmp_path / name).glob("*merged"))


def test_a_merged_layer_is_made_when_it_is_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What memory merging takes is one layer at a time beside the file that is being written."""
    from panda.engine.checkpoints.weights import checkpoint_weights
    from panda.models.adapters.merging import merged_weights
    from panda.run.adapter_run import adapter_run

    run = adapter_run(folder / "nf4")
    assert run is not None
    rounded: list[Any] = []
    plain = quantisation.rounded
    monkeypatch.setattr("panda.models.adapters.merging.rounded", lambda *a, **k: rounded.append(1) or plain(*a, **k))
    model, base = run.base()
    adapters = checkpoint_weights(folder / "nf4" / "checkpoints" / "step-00000004")
    weights, _ = merged_weights(model, base, adapters, run.configuration.options, torch.device("cpu"))
    assert rounded == []
    weights["model.layers.0.self_attn.q_proj.weight"].read()
    assert len(rounded) == 1 and all(p.is_meta for p in model.parameters() if p.dim() > 1)


def test_a_run_that_does_not_say_what_it_trained_is_damaged_and_not_a_whole_model(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Or adapters would be exported as the model that they are not."""
    run = tmp_path / "run"
    shutil.copytree(folder / "lora", run)
    whole = (run / "provenance.json").read_text()
    (run / "provenance.json").write_text(whole[:3000])
    for command in (["export", str(run), "--output", str(tmp_path / "out")], ["generate", str(run), "--prompt", "x"]):
        assert main(command) == 2
        assert f"{run}/provenance.json is damaged" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_what_a_run_says_of_itself_is_there_whole_whatever_happens(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(folder / "lora", tmp_path / "run")
    files = {file: file.read_text() for file in (tmp_path / "run").iterdir() if file.suffix in (".json", ".yaml")}
    resolved = configure(parse_arguments(["--config", str(tmp_path / "run" / "config.yaml")])).resolved
    write = Path.write_text

    def cut_off(file: Path, text: str, **keywords: Any) -> int:
        write(file, text[: len(text) // 2], **keywords)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", cut_off)
    with pytest.raises(OSError, match="No space"):
        write_description(tmp_path / "run", resolved, {}, {})
    with pytest.raises(OSError, match="No space"):
        write_end(tmp_path / "run", 1, {})
    assert {file: file.read_text() for file in files} == files
    assert not list((tmp_path / "run").glob(".tmp-*"))
