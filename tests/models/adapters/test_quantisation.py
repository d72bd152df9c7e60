"""A quantised base under adapters: bitsandbytes' and peft's own, on whatever engine."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import adapter_training
import bitsandbytes
import pytest
import torch
from adapter_training import LINEAR
from adapter_training import RANK
from adapter_training import SEED
from adapter_training import exported
from adapter_training import plain_base
from adapter_training import rows
from adapter_training import train_plainly
from launching import assert_same_end
from launching import losses
from launching import train_many
from launching import zero3_at_once
from peft import LoraConfig
from peft import PeftModel
from peft import get_peft_model
from transformers import BitsAndBytesConfig
from transformers import LlamaForCausalLM

from panda.answers.generation import greedy
from panda.cli.main import main
from panda.configuration.options import RunOptions
from panda.models.adapters.lora import add_adapters
from panda.models.adapters.quantisation import quantise
from panda.registry import UserError

SHAPE = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
ALONE = {
    "nf4": ("--precision", "fp32"),
    "int8": ("--precision", "fp32", "--quant_bits", 8),
    "nf4-recomputed": ("--precision", "fp32", "--activation_checkpointing", "selective"),
    "bf16": (),
}
TOGETHER = {
    **{f"nf4-zero{stage}": ("--precision", "fp32", "--zero_stage", stage) for stage in (1, 2)},
    "nf4-zero3": ("--precision", "fp32"),
    "nf4-zero3-recomputed": ("--precision", "fp32", "--activation_checkpointing", "full"),
    "int8-zero2": ("--precision", "fp32", "--quant_bits", 8, "--zero_stage", 2),
    "bf16-zero3": (),
}
"""Runs on two ranks; under ZeRO-3 where they are called so."""
CPU = {"": "cpu"}
"""Where all that is compared runs, beside a GPU, too: its kernels round in another order."""
RESUMED = {"nf4-zero2": ("--zero_stage", 2), "nf4-zero3": ()}


def arguments(data: Path, output: Path, micro: int, accumulation: int, *more: object) -> list[object]:
    flags = (*more, *(() if "--lora_dropout" in more else ("--lora_dropout", 0)))
    return adapter_training.arguments(SHAPE, data, output, micro, accumulation, "--use_quant", *flags)


@functools.cache
def plain_loop(folder: Path, bits: int) -> tuple[list[float], PeftModel]:
    """The same training by transformers, bitsandbytes and peft: losses, and the trained model.

    The base goes through a folder: transformers quantises what it loads.
    """
    plain_base(SHAPE).save_pretrained(folder)
    config = BitsAndBytesConfig(
        load_in_4bit=bits == 4,
        load_in_8bit=bits == 8,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    base = LlamaForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.float32, device_map=CPU)
    torch.manual_seed(SEED)
    lora = LoraConfig(r=RANK, lora_alpha=8, lora_dropout=0.0, target_modules=LINEAR, task_type="CAUSAL_LM")
    model = get_peft_model(base, lora).train()
    return train_plainly(model, torch.float32), model


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quantisation")
    data = folder / "rows.json"
    data.write_text(json.dumps(rows()))
    spread = zero3_at_once(folder)

    def zero(name: str) -> list[object]:
        return spread if "zero3" in name else []

    alone = [arguments(data, folder / name, 8, 1, *more) for name, more in ALONE.items()]
    together = [arguments(data, folder / name, 2, 2, *more, *zero(name)) for name, more in TOGETHER.items()]
    for name, more in RESUMED.items():
        flags = (*more, *zero(name), "--precision", "fp32", "--lora_dropout", 0.3, "--max_steps", 4, "--save_steps", 2)
        whole, resumed = folder / f"whole-{name}", folder / f"resumed-{name}"
        together.append(arguments(data, whole, 2, 2, *flags))
        together.append(arguments(data, resumed, 2, 2, *flags, "--resume", whole / "checkpoints" / "step-00000002"))
    train_many(alone, cwd=folder, CUDA_VISIBLE_DEVICES="")
    train_many(together, ranks=2, cwd=folder, CUDA_VISIBLE_DEVICES="")
    return folder


@pytest.mark.parametrize("name", [name for name in ALONE | TOGETHER if not name.startswith("bf16")])
def test_ten_steps_follow_plain_peft_and_bitsandbytes(runs: Path, name: str) -> None:
    bits = 8 if name.startswith("int8") else 4
    expected, model = plain_loop(runs / f"base{bits}", bits)
    assert losses(runs / name) == pytest.approx(expected, rel=1e-6)
    found = exported(runs / name)
    for key, parameter in model.named_parameters():
        if parameter.requires_grad:
            # Both in float32: where a gradient is nearly zero, Adam makes a larger step of its rounding.
            assert (found[key.replace(".default", "")] - parameter).abs().max() < 3e-6, key


@pytest.mark.parametrize("name", ["bf16", "bf16-zero3"])
def test_without_a_word_about_it_the_run_is_in_bf16_and_learns_as_much(runs: Path, name: str) -> None:
    expected, _ = plain_loop(runs / "base4", 4)
    found = losses(runs / name)
    assert found == pytest.approx(expected, rel=1e-3) and found != pytest.approx(expected, rel=1e-6)
    assert found[-1] < found[0] - 0.1
    config = (runs / name / "config.yaml").read_text()
    assert "\nprecision: bf16\n" in config and "\nuse_lora: true\n" in config
    origins = json.loads((runs / name / "provenance.json").read_text())["origins"]
    assert origins["use_lora"] == origins["precision"] == "implied by use_quant"


@pytest.mark.parametrize("name", RESUMED)
def test_a_resumed_run_ends_with_the_same_bits(runs: Path, name: str) -> None:
    assert_same_end(runs / f"resumed-{name}", runs / f"whole-{name}", after=2)


def test_a_checkpoint_holds_nothing_of_the_base(runs: Path) -> None:
    state = torch.load(runs / "nf4" / "checkpoints" / "step-00000010" / "mp_rank_00_model_states.pt")
    assert all("lora_" in name for name in state["module"])


def options(bits: int, **more: Any) -> RunOptions:
    return RunOptions(use_quant=True, use_lora=True, quant_bits=bits, lora_dropout=0.0, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize("bits", [4, 8])
def test_all_linear_layers_but_the_head_are_quantised_and_frozen(bits: int) -> None:
    model = plain_base(SHAPE)
    quantise(model, options(bits), torch.device("cpu"))
    kind = bitsandbytes.nn.Linear4bit if bits == 4 else bitsandbytes.nn.Linear8bitLt
    quantised = [name for name, module in model.named_modules() if isinstance(module, kind)]
    assert len(quantised) == 7 * SHAPE["num_hidden_layers"] and type(model.lm_head) is torch.nn.Linear
    for name in quantised:
        weight = model.get_submodule(name).weight
        assert not weight.requires_grad and weight.element_size() == 1
        assert (
            weight.numel() == model.get_submodule(name).in_features * model.get_submodule(name).out_features * bits // 8
        )


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_gradients_are_the_same_after_an_evaluation(precision: str) -> None:
    """On a CPU with AVX512-BF16, bitsandbytes repacks weights in evaluation, and their product loses its gradient."""
    ids = torch.arange(1, 13).reshape(1, 12)
    gradients = []
    for evaluated in (False, True):
        model = plain_base(SHAPE)
        quantise(model, options(4, precision=precision), torch.device("cpu"))
        torch.manual_seed(0)
        adapted = add_adapters(model, options(4))
        if precision == "bf16":
            adapted = adapted.bfloat16()
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        if evaluated:
            adapted.eval()
            greedy(adapted, [[1, 2, 3]], max_new_tokens=3, pad_token_id=0, end_tokens=[2], device=torch.device("cpu"))
            adapted.train()
        adapted(ids).logits.float().logsumexp(-1).sum().backward()
        gradients.append({n: p.grad for n, p in adapted.named_parameters() if p.requires_grad})
    for name, expected in gradients[0].items():
        assert expected is not None and torch.equal(expected, gradients[1][name]), name


def test_a_model_without_weights_is_filled_one_layer_at_a_time() -> None:
    reference = plain_base(SHAPE)
    with torch.device("meta"):
        model = plain_base(SHAPE)
    weights, filled = reference.state_dict(), []

    def fill(name: str, layer: torch.nn.Module) -> None:
        filled.append(name)
        assert sum(not p.is_meta and p.is_floating_point() for p in model.parameters()) == 0
        layer.weight = torch.nn.Parameter(weights[f"{name}.weight"])

    quantise(model, options(4), torch.device("cpu"), fill)
    quantise(reference, options(4), torch.device("cpu"))
    assert len(filled) == 7 * SHAPE["num_hidden_layers"] and "lm_head" not in filled
    for name in filled:
        assert torch.equal(model.get_submodule(name).weight, reference.get_submodule(name).weight)


def test_a_model_whose_head_is_not_known_is_refused() -> None:
    with pytest.raises(
        UserError, match="use_quant: it is not known which linear layer of Sequential is the output head"
    ):
        quantise(torch.nn.Sequential(torch.nn.Linear(1, 1)), options(4), torch.device("cpu"))


def test_what_is_implied_is_reported_and_65b_has_the_published_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("panda.engine.memory._host_memory", lambda: 2**40)
    flags = ("--arch", "llama-65b", "--instruction_tuning_data_dir", "panda:data/sample/instruct", "--use_quant")
    assert main(["check", *flags]) == 0
    done = capsys.readouterr()
    assert done.err.startswith("note: use_quant implies use_lora True and precision bf16: quantised weights cannot")
    assert "implied by use_quant" in done.out and " 65,285,660,672 parameters; 799,539,200 of adapters" in done.out
