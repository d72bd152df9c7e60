"""`compile: auto`: compiled where the seconds saved are worth those that compiling takes, decided once, and kept."""

from __future__ import annotations

import json
import shutil
import sysconfig
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from panda.cli.check import main as check
from panda.configuration.arguments import parse_arguments
from panda.configuration.configure import configure
from panda.configuration.refusals import REFUSALS
from panda.files import compilers
from panda.files.compilers import what_compiling_lacks
from panda.registry.contexts import ModelContext
from panda.registry.resolve import Resolved
from panda.run import compiling
from panda.run.cards import CARDS
from panda.run.cards import Card
from panda.run.compiling import Choice
from panda.run.compiling import Work
from panda.run.compiling import choice
from panda.run.compiling import long_run
from panda.run.estimate import MARGIN
from panda.run.fitting import Estimates
from panda.run.fitting import cheapest_change
from panda.run.fitting import on_card
from panda.run.preparation import Preparation
from panda.runner import train

H200 = CARDS["h200"]
LLAMA_7B = "--arch llama-7b --vocab_size 32000 --precision bf16"
MEASURED = {
    f"{LLAMA_7B} --use_lora --lora_dropout 0 --per_gpu_train_batch_size 4 --gradient_accumulation_steps 1": 0.67,
    "--arch llama-7b --vocab_size 32000 --hidden_size 2048 --intermediate_size 5504 --num_layers 24 --num_heads 16"
    " --precision bf16 --per_gpu_train_batch_size 8 --gradient_accumulation_steps 4": 8 * 4 * 2048 / 45_000,
}
"""Seconds of a step on one H200 that is not compiled, with rows of 2048 (bench/LOG.md)."""
LORA_7B, FULL_1B3 = MEASURED
TINY = "--arch llama-tiny --num_layers 2 --hidden_size 32 --intermediate_size 48 --num_heads 2"


def resolved(flags: str) -> Resolved:
    return configure(parse_arguments(flags.split())).resolved


@cache
def estimates_of(shape: str) -> Estimates:
    """Of the runs whose flags begin with ``shape``."""
    return Estimates(ModelContext(32000, 2048, 0, 1, 2))


def chosen(flags: str, card: Card = H200, **work: Any) -> Choice:
    run = resolved(flags)
    model = estimates_of(flags.partition(" --precision")[0]).model(run)
    return choice(run, model, card, replace(long_run(run.core), **work))


@pytest.mark.parametrize("flags", MEASURED, ids=["lora-7b", "full-1.3b"])
def test_the_seconds_of_a_step_are_estimated_as_measured(flags: str) -> None:
    begins = chosen(flags).begins
    assert begins is not None
    assert 60 / 0.3 / begins == pytest.approx(MEASURED[flags], rel=0.1)


@pytest.mark.parametrize(
    ("flags", "card", "steps", "compiled"),
    [
        (LORA_7B, H200, 20, False),
        (LORA_7B, H200, 250, False),  # saves more than it costs, but less than twice as much
        (LORA_7B, H200, 350, True),
        (LORA_7B, H200, 10_000, True),
        (LORA_7B, CARDS["a100"], 20, False),
        (LORA_7B, CARDS["a100"], 120, True),  # a third of the speed
        (LORA_7B, Card("unknown", H200.memory), 350, False),  # it may be the fastest
        (LORA_7B, Card("unknown", H200.memory), 800, True),
        (f"{LORA_7B} --compile true", H200, 1, True),
        (f"{LORA_7B} --compile false", H200, 10_000, False),
        (FULL_1B3, H200, 100, False),
        (FULL_1B3, H200, 150, True),
        (TINY, H200, 100, False),
    ],
)
def test_a_run_is_compiled_where_it_saves_twice_what_that_costs(
    flags: str, card: Card, steps: int, compiled: bool
) -> None:
    assert chosen(flags, card, steps=steps).compile is compiled


def test_the_threshold_is_exact_and_said() -> None:
    begins = chosen(LORA_7B).begins
    assert begins is not None
    less = begins - 1
    before, at = (chosen(LORA_7B, steps=steps) for steps in (less, begins))
    assert (before.compile, at.compile) == (False, True)
    assert at.why == f"it takes about 30 s, and saves about 60 of 200 s in {begins} steps"
    assert before.why == (
        f"it takes about 30 s, and would save about 60 of 199 s in {less} steps; it is done from {begins} steps on"
    )
    assert chosen(LORA_7B).why == f"it pays from {begins} steps on", "the number of steps is not known"
    half = chosen(LORA_7B, positions=2 * 2048).begins
    assert half == pytest.approx(2 * begins, abs=2)


def test_a_long_run_is_compiled_in_every_zero_stage() -> None:
    """In stage 3 that saved 20 to 30 % of a step on two H200s (bench/LOG.md)."""
    for stage in range(4):
        assert chosen(f"{LLAMA_7B} --zero_stage {stage}", steps=10**9).compile


def test_the_ranks_of_one_copy_share_the_work_of_a_step() -> None:
    whole, half = (chosen(f"{LLAMA_7B} --tensor_parallel_size {size}").begins for size in (1, 2))
    assert whole is not None and half == pytest.approx(2 * whole, abs=2)


@pytest.mark.parametrize(
    ("flags", "why"),
    [
        (f"{LLAMA_7B} --use_quant --quant_bits 8", "8 bits are not known to work compiled"),
        (
            "--arch qwen3-30b-a3b --hf_config num_hidden_layers=2 hidden_size=64 moe_intermediate_size=16 num_experts=4"
            " num_attention_heads=2 num_key_value_heads=1 head_dim=8 --precision bf16",
            "the model is not known to work compiled",
        ),
    ],
    ids=["8-bits", "experts"],
)
def test_what_cannot_be_compiled_is_not_however_long_it_runs(flags: str, why: str) -> None:
    assert chosen(flags, steps=10**9) == Choice(False, why)


@pytest.mark.parametrize(
    "more",
    [
        "--activation_checkpointing full",
        "--use_quant",
        "--use_quant --activation_checkpointing full",
        "--zero_stage 2",
        "--use_lora",
    ],
)
def test_other_ways_to_save_memory_are_compiled(more: str) -> None:
    assert chosen(f"{LLAMA_7B} {more}", steps=10**9).compile is True


def test_models_of_plugins_and_models_without_layers_are_not_compiled() -> None:
    run = resolved(LORA_7B)
    model = estimates_of(LLAMA_7B).model(run)
    assert model is not None
    whole = replace(model, footprint=replace(model.footprint, layers=()))
    for without in (whole, None):  # None: it can only be built with weights
        found = choice(run, without, H200, Work(10**9, 8192, 2048))
        assert found == Choice(False, "the model has no layers that could be compiled each by itself")
    theirs = replace(run.components["model"].offer, distribution="acme-panda")
    of_plugin = replace(run, components=run.components | {"model": replace(run.components["model"], offer=theirs)})
    found = choice(of_plugin, model, H200, Work(10**9, 8192, 2048))
    assert found == Choice(False, "the model is of acme-panda, and not known to work compiled")


def test_auto_is_no_combination_that_is_refused() -> None:
    run = resolved(f"{LLAMA_7B} --zero_stage 3")
    assert run.core.compile == "auto" and not run.core.compiled
    assert not any(refusal.refuses(run) for refusal in REFUSALS)


def test_activations_are_kept_by_whether_the_run_is_compiled() -> None:
    """Compiled layers keep less, so a long run fits a card on which a short one has to recompute."""
    run = resolved(f"{LLAMA_7B} --per_gpu_train_batch_size 2")
    sizes = {}
    for compiled in (True, False):
        found = estimates_of(LLAMA_7B).of(run.with_values({"compile": compiled}, "test"), 1)
        assert found is not None
        sizes[compiled] = found.parts.total
    assert sizes[True] < sizes[False]
    card = Card("card", round((sizes[True] + sizes[False]) / 2 / (1 - MARGIN)), H200.peak)
    work = long_run(run.core)
    how, found = on_card(estimates_of(LLAMA_7B), run, 1, card, replace(work, steps=10_000))
    assert (how, found and found.parts.total) == ("none", sizes[True])
    assert on_card(estimates_of(LLAMA_7B), run, 1, card, replace(work, steps=1))[0] == "selective"


ON_NVME = {"zero_optimization": {"offload_param": {"device": "nvme"}}}
"""DeepSpeed's options for a run that is not compiled with ZeRO-3."""


def test_a_change_that_compiling_refuses_is_advised_to_a_run_that_decided_to_compile(tmp_path: Path) -> None:
    (tmp_path / "nvme.json").write_text(json.dumps(ON_NVME))
    flags = f"{LLAMA_7B} --per_gpu_train_batch_size 1 --activation_checkpointing full --bit_training"
    run = resolved(f"{flags} --deepspeed_config {tmp_path / 'nvme.json'}")
    stage_3 = estimates_of(LLAMA_7B).of(run.with_values({"zero_stage": 3}, "test"), 8)
    assert stage_3 is not None
    card = Card("card", round(stage_3.parts.total / (1 - MARGIN)) + 1, H200.peak)
    for origin, expected in (("decided: it pays", {"zero_stage": 3}), ("run.yaml:3", None)):
        found = cheapest_change(estimates_of(LLAMA_7B), run.with_values({"compile": True}, origin), 8, card)
        assert (found and found[0].values) == expected or (expected is None and "zero_stage" not in found[0].values)


@pytest.mark.parametrize(
    ("variable", "device", "missing"),
    [("CXX", "cpu", "a compiler for C++, and 'no-such-compiler'"), ("CC", "cuda", "a compiler for C, and 'no-such")],
)
def test_a_compiler_that_is_missing_is_named(
    variable: str, device: str, missing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, "no-such-compiler")
    assert missing in what_compiling_lacks(torch.device(device))


def test_a_gpu_needs_triton_and_headers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    device = torch.device("cuda", 0)
    compiler = tmp_path / "cc"
    compiler.write_text("#!/bin/sh\ngrep -q Python.h\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CC", str(compiler))
    monkeypatch.setattr("panda.files.compilers.find_spec", lambda name: None)
    assert "Triton, which is not installed" in what_compiling_lacks(device)
    monkeypatch.setattr("panda.files.compilers.find_spec", lambda name: name)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (6, 1))
    assert "capability 7.0" in what_compiling_lacks(device)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    assert "headers of Python" in what_compiling_lacks(device)
    (tmp_path / "Python.h").touch()
    assert what_compiling_lacks(device) == ""
    broken = tmp_path / "gcc"
    broken.write_text("#!/bin/sh\necho '<stdin>:1: fatal error: stdlib.h: No such file or directory' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CC", str(broken))
    assert f"{broken} does not (<stdin>:1: fatal error: stdlib.h: No such" in what_compiling_lacks(device)


@pytest.mark.skipif(not shutil.which("gcc"), reason="no gcc")
def test_a_compiler_that_works_is_not_refused() -> None:
    headers = sysconfig.get_path("include")
    if not Path(headers, "Python.h").exists():
        pytest.skip("no headers of Python")
    assert compilers._problem_of("gcc", headers) == ""
    assert "No such file" in compilers._problem_of("gcc", "/nowhere")


# -- in a run

SHORT = (
    "--gradient_accumulation_steps 1 --max_seq_length 64 --per_gpu_train_batch_size 4 --save_steps 1 --num_workers 0"
)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.json").write_text(json.dumps([{"input": letter, "target": letter} for letter in "abcdefgh"]))
    return tmp_path


@pytest.fixture
def on_a_card(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """``on_a_card(cost)``: runs think that they train on a GPU, where it takes ``cost`` seconds to compile."""

    def put(cost: float) -> None:
        card = Card("NVIDIA H100 80GB HBM3", 80 * 2**30, CARDS["h100"].peak)
        monkeypatch.setattr(Preparation, "card", property(lambda self: card))
        monkeypatch.setattr(compiling, "COST", cost)

    return put


@pytest.fixture
def compiled_layers(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The forwards given to torch to compile, for one shape or for any; they are run as they are."""
    given: list[Any] = []
    monkeypatch.setattr(torch, "compile", lambda forward, **_: given.append(forward) or forward)
    return given


def flags(*more: str) -> list[str]:
    data = ["--instruction_tuning_data_dir", "rows.json", "--output_dir", "run", "--prompts", "a"]
    return [*TINY.split(), *SHORT.split(), *data, *more]


def written() -> Any:
    return yaml.safe_load(Path("run/config.yaml").read_text())["compile"]


def test_the_choice_is_said_written_down_and_kept_on_resume(
    processes: Any,
    folder: Path,
    on_a_card: Callable[[float], None],
    compiled_layers: list[Any],
    capsys: pytest.CaptureFixture[str],
) -> None:
    on_a_card(0.0)
    assert check(flags("--max_steps", "1")) == 0
    assert "            compile: true (auto), it takes about 0 s, and saves about 0 of 0 s in 1 step\n" in (
        capsys.readouterr().out
    )
    assert train(configure(parse_arguments(flags("--max_steps", "1")))) is not None
    out = capsys.readouterr().out
    assert "fp32, ZeRO stage 0, compiled (auto); 1 rank on " in out and "\n            compile: true (auto), it" in out
    assert written() is True and len(compiled_layers) == 2 * 2
    on_a_card(1e9)
    again = flags("--max_steps", "2", "--resume", "auto")
    assert train(configure(parse_arguments(again))) is not None
    assert written() is True and len(compiled_layers) == 4 * 2, "a resumed run keeps it"
    assert "compile: true (auto), decided when the run began" in capsys.readouterr().out
    given = flags("--max_steps", "3", "--resume", "auto", "--compile", "false")
    assert train(configure(parse_arguments(given))) is not None
    assert written() is False and len(compiled_layers) == 4 * 2, "a value that is given is not replaced"
    on_a_card(0.0)
    assert train(configure(parse_arguments(flags("--max_steps", "4", "--resume", "auto")))) is not None
    assert written() is False and len(compiled_layers) == 4 * 2
    assert "compile: auto" not in capsys.readouterr().out


def test_code_is_chosen_by_the_shapes_of_the_runs_rows(
    processes: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[str] = []

    def compile_(forward: Callable[..., Any], dynamic: bool, **_: Any) -> Callable[..., Any]:
        def run(given: torch.Tensor, *more: Any, **keywords: Any) -> Any:
            if torch.is_grad_enabled():
                ran.append(f"{'any' if dynamic else 'usual'} {given.shape[1]}")
            return forward(given, *more, **keywords)

        return run

    monkeypatch.setattr(torch, "compile", compile_)
    rows = [{"input": "a" * (1 if number == 3 else 9), "target": "b"} for number in range(8)]
    (folder / "rows.json").write_text(json.dumps(rows))
    words = flags("--compile", "--num_train_epochs", "1")
    words[words.index("--per_gpu_train_batch_size") + 1] = "1"
    assert train(configure(parse_arguments(words))) is not None
    long, short = sorted({int(each.split()[1]) for each in ran}, reverse=True)
    assert Counter(ran) == {f"usual {long}": 7 * 2, f"any {long}": 2, f"any {short}": 2}, "each layer tries once"


def test_a_choice_that_is_refused_beside_new_values_is_made_again(
    processes: Any, folder: Path, on_a_card: Callable[[float], None], compiled_layers: list[Any]
) -> None:
    on_a_card(0.0)
    assert train(configure(parse_arguments(flags("--max_steps", "1")))) is not None
    assert written() is True
    (folder / "nvme.json").write_text(json.dumps(ON_NVME))
    again = flags("--max_steps", "2", "--resume", "auto", "--zero_stage", "3", "--deepspeed_config", "nvme.json")
    prepared = Preparation(configure(parse_arguments(again)))
    prepared.decide()
    setting = prepared.resolved.settings["compile"]
    assert (setting.value, setting.origin) == (
        False,
        "decided: compile with zero_stage: 3 and offload_param on NVMe is refused",
    )


def test_a_machine_that_cannot_compile_says_what_it_lacks(
    folder: Path, on_a_card: Callable[[float], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    on_a_card(0.0)
    monkeypatch.setenv("CXX", "no-such-compiler")
    prepared = Preparation(configure(parse_arguments(flags())))
    prepared.decide()
    setting = prepared.resolved.settings["compile"]
    assert setting.value is False and "'no-such-compiler' was not found" in setting.origin


def test_on_a_cpu_nothing_is_compiled(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("a GPU")
    prepared = Preparation(configure(parse_arguments(flags())))
    prepared.decide()
    setting = prepared.resolved.settings["compile"]
    assert (setting.value, setting.origin) == (False, "decided: on a CPU it takes longer than it saves")


def test_padding_is_work_too(folder: Path, on_a_card: Callable[[float], None]) -> None:
    on_a_card(30.0)
    rows = [{"input": "a" * length, "target": "b"} for length in (2, 50)]
    (folder / "rows.json").write_text(json.dumps(rows * 4))
    words = flags("--max_steps", "1")
    words[words.index("--per_gpu_train_batch_size") + 1] = "8"
    prepared = Preparation(configure(parse_arguments(words)))
    work, lengths = prepared._work, prepared.dataset.lengths(np.arange(8))
    assert (work.steps, work.length) == (1, lengths.mean())
    assert work.positions == pytest.approx(8 * lengths.max()), "all rows are as long as the longest"
