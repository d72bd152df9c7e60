"""What fits a card, and the single change that makes it fit: with cards of any size."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from typing import cast

import pytest
import torch
import yaml

from panda.configuration.arguments import parse_arguments
from panda.configuration.configure import configure
from panda.engine.deepspeed_config import layers_staying
from panda.engine.deepspeed_config import live_parameters
from panda.registry import UserError
from panda.registry.contexts import ModelContext
from panda.registry.resolve import Resolved
from panda.run.assembly import lay_out
from panda.run.cards import Card
from panda.run.cards import named_card
from panda.run.estimate import MARGIN
from panda.run.estimate import layers_that_stay
from panda.run.fitting import Estimates
from panda.run.fitting import advice
from panda.run.fitting import changes
from panda.run.fitting import cheapest_change
from panda.run.fitting import explanation
from panda.run.fitting import on_card
from panda.run.outlook import _memory
from panda.run.outlook import outlook
from panda.run.preparation import Preparation
from panda.run.preparation import prepare
from panda.runner import train

SHAPE = "--arch llama-tiny --hidden_size 512 --intermediate_size 1024 --num_layers 8 --num_heads 8 --precision bf16"
SMALL = f"{SHAPE} --vocab_size 1024 --max_seq_length 2048 --per_gpu_train_batch_size 8 --compile false"


def resolved(flags: str = "") -> Resolved:
    return configure(parse_arguments(f"{SMALL} {flags}".split())).resolved


@pytest.fixture(scope="module")
def estimates() -> Estimates:
    return Estimates(ModelContext(1024, 2048, 0, 1, 2))


def needed(estimates: Estimates, flags: str, world_size: int = 1) -> int:
    found = estimates.of(resolved(flags), world_size)
    assert found is not None
    return found.parts.total


def just_fits(size: int) -> Card:
    """A card that a run of ``size`` bytes fits, and a larger one does not."""
    return Card("card", round(size / (1 - MARGIN)) + 1)


def test_auto_recomputes_as_little_as_fits(estimates: Estimates) -> None:
    sizes = {how: needed(estimates, f"--activation_checkpointing {how}") for how in ("none", "selective", "full")}
    assert sizes["none"] > sizes["selective"] > sizes["full"]
    for how, size in sizes.items():
        chosen, found = on_card(estimates, resolved(), 1, just_fits(size))
        assert (chosen, found and found.parts.total) == (how, size)
        smaller = Card("card", just_fits(size).memory - 3)
        assert on_card(estimates, resolved(), 1, smaller)[0] != how or how == "full"
    assert on_card(estimates, resolved("--activation_checkpointing none"), 1, Card("tiny", 1))[0] == "none"


LAYERS, LAYER, OUTSIDE = 8, 4 * 512**2 + 3 * 512 * 1024 + 2 * 512, 2 * 1024 * 512 + 512
"""Of the model above."""


@pytest.mark.parametrize(
    ("room", "expected"),
    [(-1, 0), (0, 0), (1, 1), (4, 4), (LAYERS - 3, LAYERS), (LAYERS, LAYERS), (2 * LAYERS, LAYERS)],
)
def test_zero_3_keeps_layers_gathered_in_the_room_that_is_left(estimates: Estimates, room: int, expected: int) -> None:
    flags = "--zero_stage 3 --activation_checkpointing none"
    card = just_fits(needed(estimates, flags, 2) + room * 2 * LAYER)
    model = estimates.model(resolved(flags))
    assert model is not None and (model.layers, model.sizes.layer, model.sizes.outside) == (LAYERS, LAYER, OUTSIDE)
    assert layers_that_stay(model, resolved(flags).core, 2, card) == expected
    assert live_parameters(LAYER, OUTSIDE, expected) == OUTSIDE + (3 + expected) * LAYER
    with_them = estimates.of(resolved(flags), 2, expected)
    assert with_them is not None and with_them.fits(card) == (room >= 0)
    live = min(OUTSIDE + (3 + expected) * LAYER, OUTSIDE + LAYERS * LAYER)
    assert with_them.parts.total == needed(estimates, flags, 2) + 2 * (live - OUTSIDE - 3 * LAYER)


def test_no_layer_stays_where_it_is_not_gathered_or_a_file_says_what_does(estimates: Estimates, tmp_path: Path) -> None:
    def stay(flags: str, ranks: int, zero: str = "") -> int:
        file = tmp_path / "ds.json"
        file.write_text(f'{{"zero_optimization": {{{zero}}}}}')
        run = resolved(f"{flags} --activation_checkpointing none --deepspeed_config {file}")
        model = estimates.model(run)
        assert model is not None
        return layers_that_stay(model, run.core, ranks, Card("large", 2**40))

    assert stay("--zero_stage 3", 2) == LAYERS
    assert stay("--zero_stage 3", 1) == stay("--zero_stage 2", 2) == 0
    assert stay("--zero_stage 3", 2, '"stage3_max_live_parameters": 7') == 0
    assert stay("--zero_stage 3", 2, '"offload_param": {"device": "cpu"}') == 0
    assert stay("--zero_stage 3", 2, '"offload_param": {"device": "none"}') == LAYERS


def test_a_model_may_have_a_little_more_than_was_estimated() -> None:
    """As parts that a task adds; otherwise a layer less would stay than the run says."""
    for live, stay in ((5 * LAYER, 2), (5 * LAYER - LAYER // 50, 2), (5 * LAYER - LAYER // 10, 1), (0, 0)):
        assert layers_staying(OUTSIDE + live, LAYER, OUTSIDE) == stay


def with_values(**values: Any) -> Resolved:
    return resolved().with_values(values, "test")


def test_the_cheapest_change_is_found_in_order(estimates: Estimates) -> None:
    base = with_values(activation_checkpointing="none")

    def size(**values: Any) -> int:
        found = estimates.of(base.with_values(values, "test"), 1)
        assert found is not None
        return found.parts.total

    def chosen(room: int) -> dict[str, Any]:
        found = cheapest_change(estimates, base, 1, just_fits(room))
        assert found is not None and found[1].fits(just_fits(room))
        return found[0].values

    half = size(per_gpu_train_batch_size=4)
    assert chosen(half) == {"per_gpu_train_batch_size": 4, "gradient_accumulation_steps": 128}
    assert chosen(size(per_gpu_train_batch_size=1))["per_gpu_train_batch_size"] == 1
    one_row = {"per_gpu_train_batch_size": 1, "gradient_accumulation_steps": 512}
    base = base.with_values(one_row, "test")
    assert chosen(size(activation_checkpointing="selective")) == {"activation_checkpointing": "selective"}
    base = base.with_values({"activation_checkpointing": "full"}, "test")
    assert chosen(size(use_lora=True)) == {"use_lora": True}


def test_changes_are_worth_their_names() -> None:
    options = with_values(activation_checkpointing="selective", precision="fp32").core
    values = [change.values for change in changes(options, 4)]
    assert values[0] == {"per_gpu_train_batch_size": 4, "gradient_accumulation_steps": 128}
    assert {"activation_checkpointing": "full"} in values and {"activation_checkpointing": "none"} not in values
    assert [each["zero_stage"] for each in values if "zero_stage" in each][:3] == [1, 2, 3]
    assert {"use_quant": True, "use_lora": True, "precision": "bf16"} in values
    auto = [change.values for change in changes(resolved().core, 1)]
    assert not any("activation_checkpointing" in each for each in auto), "auto has tried them"
    last = list(changes(options, 4))[-1]
    assert (last.values, last.world_size) == ({"zero_stage": 3}, 64)
    assert last.describe(4) == "`zero_stage: 3` with 64 GPUs"
    assert next(changes(options, 4)).describe(4) == (
        "`per_gpu_train_batch_size: 4` with `gradient_accumulation_steps: 128` (the same trajectory)"
    )


def test_quantising_is_not_advised_for_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = "num_hidden_layers=4 hidden_size=512 moe_intermediate_size=64 num_experts=4 num_attention_heads=8"
    flags = f"--arch qwen3-30b-a3b --hf_config {shape} vocab_size=300 --max_seq_length 128 --use_lora --precision bf16"
    flags += " --per_gpu_train_batch_size 1 --activation_checkpointing full --bit_training"
    base, context = configure(parse_arguments(flags.split())).resolved, ModelContext(300, 128, 0, 1, 2)
    with monkeypatch.context() as patched:
        patched.setattr("panda.run.estimate.refuse_quantising", lambda model: None)
        estimates = Estimates(context)
        quantised = estimates.of(base.with_values({"use_quant": True}, "test"), 1)
        assert quantised is not None
        card = just_fits(quantised.parts.total)
        assert "use_quant" in advice(estimates, base, 1, card), "it would fit"
    assert "use_quant" not in advice(Estimates(context), base, 1, card)


def test_advice_names_the_change_and_what_is_left(estimates: Estimates) -> None:
    base = with_values(activation_checkpointing="none")
    half = estimates.of(base.with_values({"per_gpu_train_batch_size": 4}, "test"), 1)
    assert half is not None
    text = advice(estimates, base, 1, just_fits(half.parts.total))
    assert text == (
        "The cheapest single change that makes it fit card: `per_gpu_train_batch_size: 4` with"
        f" `gradient_accumulation_steps: 128` (the same trajectory), about {half.parts.total / 2**30:.1f} GiB."
    )
    nothing = advice(estimates, base, 1, Card("tiny", 2**20))
    assert nothing.startswith("No single change makes it fit tiny: take a smaller model")


def test_a_run_out_of_memory_is_told_what_it_holds(estimates: Estimates) -> None:
    base = with_values(activation_checkpointing="none")
    found = estimates.of(base, 1)
    assert found is not None
    text = explanation(estimates, base, 1, Card("H100", 2 * found.parts.total))
    assert text.startswith("The GPU is out of memory. A step with the longest rows is estimated to hold")
    assert f"activations {found.parts.activations / 2**30:.1f}" in text
    assert "`per_gpu_train_batch_size: 4`" in text
    # It had more room than it was estimated to need, so a change has to save something: stage 2 has a bucket of 1 GB.
    least = {"activation_checkpointing": "full", "per_gpu_train_batch_size": 1}
    text = explanation(estimates, base.with_values(least, "test"), 2, Card("H100", 80 * 2**30))
    assert "The cheapest single change" in text and "`zero_stage: 2`" not in text
    # Layers that stayed are given up first: that changes no numbers.
    sharded = resolved("--zero_stage 3 --activation_checkpointing none")
    text = explanation(estimates, sharded, 2, Card("H100", 80 * 2**30), staying=4)
    assert re.search(r"0\.0 of them are 4 layers that stay gathered.*max_live_parameters\": 0.*same numbers\.$", text)
    assert "The cheapest single change" not in text


# -- in a run

TINY = "--arch llama-tiny --num_layers 2 --hidden_size 32 --intermediate_size 48 --num_heads 2 --num_workers 0"
SHORT = "--gradient_accumulation_steps 1 --max_seq_length 64 --per_gpu_train_batch_size 4 --save_steps 1 --prompts a"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.json").write_text(json.dumps([{"input": letter, "target": letter} for letter in "abcdefgh"]))
    return tmp_path


@pytest.fixture
def on_a_card(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """``on_a_card(gib)``: runs think that they train on a GPU with as much memory."""

    def put(gib: float) -> None:
        card = Card("NVIDIA H100 80GB HBM3", round(gib * 2**30))
        monkeypatch.setattr(Preparation, "card", property(lambda self: card))

    return put


def arguments(*more: str) -> list[str]:
    data = ["--instruction_tuning_data_dir", "rows.json", "--output_dir", "run"]
    return [*TINY.split(), *SHORT.split(), *data, *more]


def written(run: str = "run") -> str:
    how = yaml.safe_load(Path(run, "config.yaml").read_text())["activation_checkpointing"]
    assert isinstance(how, str)
    return how


def test_a_decision_is_written_down_and_kept_on_resume(
    processes: Any, folder: Path, on_a_card: Callable[[float], None], capsys: pytest.CaptureFixture[str]
) -> None:
    on_a_card(0.1)  # less than CUDA itself takes
    assert train(configure(parse_arguments(arguments("--max_steps", "1")))) is not None
    out = capsys.readouterr().out
    assert written() == "full"
    assert "engine      fp32, ZeRO stage 0, full activation checkpointing (auto); 1 rank on " in out
    assert "\nmemory      about 0.6 of 0.1 GiB on each GPU, with rows of 64: CUDA and unused memory 0.6" in out
    assert "No single change makes it fit" in out
    origins = json.loads(Path("run/provenance.json").read_text())["origins"]
    assert origins["activation_checkpointing"] == "decided: 0.6 of 0.1 GiB"
    on_a_card(80)
    resumed = train(configure(parse_arguments(arguments("--max_steps", "2", "--resume", "auto"))))
    assert resumed is not None and resumed.step == 2
    assert resumed.options.activation_checkpointing == written() == "full"
    origins = json.loads(Path("run/provenance.json").read_text())["origins"]
    assert origins["activation_checkpointing"] == "decided when the run began"
    other = ["other" if word == "run" else word for word in arguments("--max_steps", "1")]
    assert train(configure(parse_arguments(other))) is not None
    assert written("other") == "none"
    given = arguments("--max_steps", "3", "--resume", "auto", "--activation_checkpointing", "none")
    assert train(configure(parse_arguments(given))) is not None
    assert written() == "none", "a value that is given is not replaced"


def test_the_engine_is_given_what_stays(
    processes: Any, folder: Path, on_a_card: Callable[[float], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    on_a_card(80)
    configuration = configure(parse_arguments(arguments("--zero_stage", "3")))
    prepared = Preparation(configuration, world_size=2)
    prepared.decide()
    layout = lay_out(prepared.options, prepared.dataset, 2)
    lines = outlook(prepared, layout, Path("run"), None)
    assert not any("other processes" in line for line in lines)
    assert "            in the room that is left, 2 of 2 layers stay gathered through a step" in lines
    live = prepared.live_parameters
    assert live is not None
    monkeypatch.setattr(Preparation, "live_parameters", property(lambda self: live))  # of two ranks; here is one
    assert train(configuration) is not None
    written = json.loads(Path("run/deepspeed.json").read_text())["zero_optimization"]
    assert written["stage3_max_live_parameters"] == live


def test_on_a_cpu_nothing_is_recomputed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Preparation, "card", property(lambda self: None))
    prepared = Preparation(configure(parse_arguments(arguments())))
    prepared.decide()
    setting = prepared.resolved.settings["activation_checkpointing"]
    assert (setting.value, setting.origin) == ("none", "decided: on a CPU nothing is recomputed")
    assert "estimates" not in vars(prepared), "and nothing is estimated"


def test_all_ranks_take_the_decision_of_one(folder: Path, on_a_card: Callable[[float], None]) -> None:
    on_a_card(80)
    prepared = Preparation(configure(parse_arguments(arguments())))
    of_rank_0 = [("activation_checkpointing", "selective"), ("compile", True)]
    found = [SimpleNamespace(key=key, value=value, origin="decided: there") for key, value in of_rank_0]
    prepared.decide(cast(Any, SimpleNamespace(world_size=1, from_rank_0=lambda _: found)))
    for key, value in of_rank_0:
        setting = prepared.resolved.settings[key]
        assert (setting.value, setting.origin) == (value, "decided: there")
        assert getattr(prepared.options, key) == value


def test_the_smallest_card_counts_and_compilers_on_all_machines(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 0 is on the larger card, and on the machine with a compiler."""
    monkeypatch.setattr("panda.run.preparation.this_card", lambda device: named_card("h200"))
    monkeypatch.setattr("panda.run.preparation.what_compiling_lacks", lambda device: "")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("panda.run.preparation.own_device", lambda: torch.device("cuda", 0))
    ranks = SimpleNamespace(
        world_size=2,
        from_all=lambda here: [here, (Card("small", 24 * 2**30, held_by_others=3 * 2**30), "it needs gcc")],
        from_rank_0=lambda decide: decide(),
    )
    prepared = Preparation(configure(parse_arguments(arguments())), 2)
    prepared.decide(cast(Any, ranks))
    assert prepared.card is not None and prepared.card.name == "small"
    settings = prepared.resolved.settings
    assert (settings["compile"].value, settings["compile"].origin) == (False, "decided: it needs gcc")
    assert " of 24.0 GiB on each GPU (other processes hold 3.0), with rows of 64: " in next(_memory(prepared))
    assert settings["activation_checkpointing"].origin.endswith("of 24.0 GiB")


def test_what_cannot_fit_is_refused_with_a_change(
    folder: Path, monkeypatch: pytest.MonkeyPatch, on_a_card: Callable[[float], None]
) -> None:
    monkeypatch.setattr("panda.run.fitting.own_device", lambda: torch.device("cuda", 0))
    monkeypatch.setattr("panda.run.fitting.this_card", lambda device: Card("H100", 80 * 2**30))
    properties = SimpleNamespace(total_memory=80 * 2**30, major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    flags = f"--arch llama-7b --precision bf16 {SHORT} --instruction_tuning_data_dir rows.json"
    with pytest.raises(UserError) as caught:
        prepare(configure(parse_arguments(flags.split())), 1)
    said = str(caught.value)
    assert "for which each GPU would hold 113.0 GiB" in said and "cuda:0 has 80.0 GiB in all" in said
    assert "The cheapest single change that makes it fit H100: `use_lora: true` (trains adapters only)" in said
