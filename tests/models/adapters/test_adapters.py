"""Adapters are peft's, on whatever engine: one trajectory, and files that plain peft loads."""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import adapter_training
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
from launching import run_code
from launching import run_panda
from launching import train_many
from launching import zero3_at_once
from peft import LoraConfig
from peft import PeftModel
from peft import get_peft_model
from safetensors.torch import load_file
from safetensors.torch import save_file
from transformers import LlamaConfig
from transformers import LlamaForCausalLM

from panda.configuration.options import RunOptions
from panda.models.adapters.lora import add_adapters
from panda.models.adapters.lora import load_adapters
from panda.registry import UserError

SHAPE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
KINDS: dict[str, tuple[dict[str, Any], tuple[object, ...]]] = {
    "lora": ({}, ()),
    "dora": ({"use_dora": True}, ("--use_dora",)),
    "rslora": ({"use_rslora": True}, ("--use_rslora",)),
    "queries": ({"target_modules": ["q_proj"]}, ("--lora_target_modules", "q_proj")),
}
"""What plain peft is given, and the flags."""
ALONE: dict[str, tuple[str, tuple[object, ...]]] = {
    "dropout": ("lora", ("--lora_dropout", 0.3)),
    "dropout-recomputed": ("lora", ("--lora_dropout", 0.3, "--activation_checkpointing", "full")),
    **{kind: (kind, ("--lora_dropout", 0)) for kind in KINDS},
}
"""Runs on one rank: the kind of adapters, and more flags."""
TOGETHER: dict[str, tuple[str, tuple[object, ...]]] = {
    **{f"zero{stage}": ("lora", ("--lora_dropout", 0, "--zero_stage", stage)) for stage in range(3)},
    "zero3": ("lora", ("--lora_dropout", 0)),
    "zero3-dora": ("dora", ("--lora_dropout", 0)),
    "zero3-recomputed": ("lora", ("--lora_dropout", 0, "--activation_checkpointing", "full")),
}
"""Runs on two ranks; under ZeRO-3 where they are called so."""

RESUMED = (0, 2, 3)
"""ZeRO stages under which a run is resumed."""


def arguments(data: Path, output: Path, micro: int, accumulation: int, *more: object) -> list[object]:
    return adapter_training.arguments(SHAPE, data, output, micro, accumulation, "--use_lora", *more)


@functools.cache
def plain_loop(kind: str, *, dropout: float = 0.0) -> tuple[list[float], PeftModel]:
    """The same training with nothing of panda's but the order of samples: losses, and the trained model.

    In float64; with dropout in float32, since it draws other numbers in float64.
    """
    dtype = torch.float32 if dropout else torch.float64
    base = plain_base(SHAPE)
    torch.manual_seed(SEED)
    config = {"target_modules": LINEAR, "lora_dropout": dropout} | KINDS[kind][0]
    model = get_peft_model(base, LoraConfig(r=RANK, lora_alpha=8, task_type="CAUSAL_LM", **config)).to(dtype).train()
    return train_plainly(model, dtype), model


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters")
    data = folder / "rows.json"
    data.write_text(json.dumps(rows()))
    alone = [arguments(data, folder / name, 8, 1, *KINDS[kind][1], *more) for name, (kind, more) in ALONE.items()]
    spread = zero3_at_once(folder)
    together = [
        arguments(data, folder / name, 2, 2, *KINDS[kind][1], *more, *(spread if name.startswith("zero3") else ()))
        for name, (kind, more) in TOGETHER.items()
    ]
    for stage in RESUMED:
        zero = spread if stage == 3 else ["--zero_stage", stage]
        dropout = ("--lora_dropout", 0.3, "--max_steps", 4, "--save_steps", 2, *zero)
        whole, resumed = folder / f"whole{stage}", folder / f"resumed{stage}"
        together.append(arguments(data, whole, 2, 2, *dropout))
        together.append(arguments(data, resumed, 2, 2, *dropout, "--resume", whole / "checkpoints" / "step-00000002"))
    train_many(alone, cwd=folder)
    train_many(together, ranks=2, cwd=folder)
    return folder


def named_as_exported(model: PeftModel) -> dict[str, torch.Tensor]:
    return {
        name.replace(".default", ""): parameter.detach()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


@pytest.mark.parametrize("name", [*ALONE, *TOGETHER])
def test_ten_steps_follow_a_plain_peft_loop(runs: Path, name: str) -> None:
    kind, flags = (ALONE | TOGETHER)[name]
    expected, model = plain_loop(kind, dropout=0.3 if 0.3 in flags else 0.0)
    assert losses(runs / name) == pytest.approx(expected, rel=1e-6)
    weights, found = named_as_exported(model), exported(runs / name)
    # DoRA's magnitudes are a module's weight in peft and a tensor in its file.
    weights = {key.removesuffix(".weight") if "magnitude" in key else key: value for key, value in weights.items()}
    assert found.keys() == weights.keys()
    for key, weight in weights.items():
        assert (found[key] - weight).abs().max() < 1e-6, key


def test_the_adapters_learn_and_dropout_dora_and_rslora_do_something(runs: Path) -> None:
    curves = {name: losses(runs / name) for name in ALONE}
    assert len({curve[-1] for name, curve in curves.items() if name != "dropout-recomputed"}) == len(ALONE) - 1
    assert all(curve[-1] < curve[0] - 0.1 for name, curve in curves.items() if name != "queries")


PLAIN = """
import json, sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
base, *runs = sys.argv[1:]
logits = []
for run in runs:
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), run).eval()
    ids = AutoTokenizer.from_pretrained(run)("panda", return_tensors="pt", add_special_tokens=False)["input_ids"]
    logits.append(model(ids).logits.tolist())
assert not any(name.split(".")[0] == "panda" for name in sys.modules)
print(json.dumps({"ids": ids.tolist(), "logits": logits}))
"""


def test_plain_peft_loads_what_a_run_leaves_on_the_base(runs: Path, tmp_path: Path) -> None:
    plain_base(SHAPE).save_pretrained(tmp_path / "base")
    names = ("lora", "zero3", "dora", "rslora")
    found = json.loads(run_code(PLAIN, tmp_path / "base", *(runs / name / "export" for name in names), cwd=tmp_path))
    ids = torch.tensor(found["ids"])
    for name, logits in zip(names, found["logits"], strict=True):
        _, model = plain_loop((ALONE | TOGETHER)[name][0])
        expected = model.eval()(ids).logits
        assert torch.allclose(torch.tensor(logits, dtype=torch.float64), expected, atol=1e-5, rtol=0)
        assert (expected - plain_base(SHAPE).double()(ids).logits).abs().max() > 1e-2  # the adapters do something


@pytest.mark.parametrize("stage", RESUMED)
def test_a_resumed_run_ends_with_the_same_bits(runs: Path, stage: int) -> None:
    assert_same_end(runs / f"resumed{stage}", runs / f"whole{stage}", after=2)


def test_checkpoints_and_optimizer_hold_adapters_alone(runs: Path) -> None:
    facts = json.loads((runs / "lora" / "provenance.json").read_text())
    assert facts["trained_parameters"] == sum(tensor.numel() for tensor in exported(runs / "lora").values())
    assert facts["parameters"] == sum(parameter.numel() for parameter in plain_base(SHAPE).parameters())
    state = torch.load(runs / "lora" / "checkpoints" / "step-00000010" / "mp_rank_00_model_states.pt")
    assert all("lora_" in name for name in state["module"])
    assert len(state["optimizer"]["state"]) == len(state["module"]) == len(exported(runs / "lora"))


def test_other_adapters_do_not_continue_a_run(runs: Path, tmp_path: Path) -> None:
    flags = arguments(runs / "rows.json", tmp_path / "x", 8, 1, "--lora_dropout", 0, "--resume", runs / "lora")
    flags[flags.index("--lora_alpha") + 1] = 16
    done = run_panda("panda-train", *flags, cwd=tmp_path)
    assert done.returncode == 2
    assert "adapters was 'lora_r 4, lora_alpha 8.0" in done.stderr and "lora_alpha 16.0" in done.stderr


def test_adapters_of_another_base_are_an_error_that_says_so(runs: Path, tmp_path: Path) -> None:
    other = LlamaForCausalLM(LlamaConfig(vocab_size=259, hidden_size=16, num_hidden_layers=1, num_attention_heads=1))
    with pytest.raises(UserError, match="were trained on another base"):
        load_adapters(other, runs / "lora" / "export")
    with pytest.raises(UserError, match=r"no adapter_config\.json"):
        load_adapters(plain_base(SHAPE), tmp_path)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("warns", [True, False])
def test_no_layer_is_left_without_its_adapter_whatever_peft_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, warns: bool
) -> None:
    """peft warns of a layer that the file has nothing for: in words that may change, or not at all."""
    config = LoraConfig(r=RANK, task_type="CAUSAL_LM", **{"target_modules": LINEAR} | KINDS[kind][0])
    adapters, file = tmp_path / "adapters", tmp_path / "adapters" / "adapter_model.safetensors"
    get_peft_model(plain_base(SHAPE), config).save_pretrained(str(adapters))
    if not warns:
        monkeypatch.setattr("peft.peft_model.warnings", SimpleNamespace(warn=lambda *_, **__: None))
    load_adapters(plain_base(SHAPE), adapters)

    deeper = plain_base(SHAPE | {"num_hidden_layers": 3})
    with pytest.raises(UserError, match=r"another base\. They lack base_model\.model\.model\.layers\.2\."):
        load_adapters(deeper, adapters)

    stored = load_file(file)
    name = next(name for name in stored if "layers.1.self_attn.q_proj.lora_B" in name)
    save_file({key: tensor for key, tensor in stored.items() if key != name}, file)
    with pytest.raises(UserError, match=f"They lack {re.escape(name)}"):
        load_adapters(plain_base(SHAPE), adapters)


def test_no_adapter_is_left_out_because_its_layer_is_not_named(tmp_path: Path) -> None:
    config = LoraConfig(r=RANK, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    get_peft_model(plain_base(SHAPE), config).save_pretrained(str(tmp_path))
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"target_modules": ["q_proj"]}))
    with pytest.raises(
        UserError, match=r"adapter_config\.json does not name the layer of .*layers\.0\.self_attn\.v_proj"
    ):
        load_adapters(plain_base(SHAPE), tmp_path)


def test_a_layer_that_is_not_there_is_an_error_that_names_those_that_are() -> None:
    with pytest.raises(UserError, match="has no 'query_key_value'; it has down_proj, gate_proj, k_proj, lm_head"):
        add_adapters(plain_base(SHAPE), RunOptions(use_lora=True, lora_target_modules=("query_key_value",)))
    with pytest.raises(
        UserError, match=r"is not known which linear layer .* is the output head.*`lora_target_modules`: it has 0, 1\."
    ):
        add_adapters(torch.nn.Sequential(torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)), RunOptions(use_lora=True))


def test_check_counts_what_is_trained(tmp_path: Path) -> None:
    flags = ("--arch", "llama-tiny", "--instruction_tuning_data_dir", "panda:data/sample/instruct", "--use_lora")
    done = run_panda("panda", "check", *flags, "--lora_r", 2, cwd=tmp_path)
    assert done.returncode == 0 and "; 17,408 of adapters are trained" in done.stdout, done.stdout
