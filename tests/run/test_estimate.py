"""The estimate of a run's memory, by independent arithmetic; on a GPU, against what torch allocates."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from panda.configuration.arguments import parse_arguments
from panda.configuration.configure import configure
from panda.registry.contexts import ModelContext
from panda.registry.resolve import Resolved
from panda.run.estimate import COMMUNICATION
from panda.run.estimate import CONTEXT
from panda.run.estimate import UNUSABLE
from panda.run.estimate import Estimate
from panda.run.estimate import ModelMemory
from panda.run.estimate import estimate
from panda.run.estimate import model_memory

WIDTH, INNER, LAYERS, VOCABULARY, LENGTH = 256, 512, 4, 1000, 128
SHAPE = f"--arch llama-tiny --hidden_size {WIDTH} --intermediate_size {INNER} --num_layers {LAYERS} --num_heads 4"
SMALL = f"{SHAPE} --vocab_size {VOCABULARY} --max_seq_length {LENGTH}"
LINEAR = 4 * WIDTH**2 + 3 * WIDTH * INNER
"""Weights of the linear layers of a layer."""
WEIGHTS = LAYERS * (LINEAR + 2 * WIDTH) + 2 * VOCABULARY * WIDTH + WIDTH


def resolved(flags: str) -> Resolved:
    return configure(parse_arguments(f"{SMALL} {flags}".split())).resolved


def memory(flags: str) -> ModelMemory:
    found = model_memory(resolved(flags), ModelContext(VOCABULARY, LENGTH, 0, 1, 2))
    assert found is not None
    return found


def estimated(flags: str, world_size: int = 1) -> Estimate:
    return estimate(memory(flags), resolved(flags).core, world_size)


def test_all_weights_are_trained_or_adapters_only() -> None:
    whole = memory("--precision bf16")
    assert (whole.parameters, whole.sizes.trained, whole.sizes.frozen) == (WEIGHTS, WEIGHTS, 0)
    assert whole.sizes.largest == VOCABULARY * WIDTH
    assert whole.sizes.largest_group == max(LINEAR + 2 * WIDTH, 2 * VOCABULARY * WIDTH + WIDTH)
    assert whole.state_bytes == 8.0
    rank = 8
    adapters = LAYERS * rank * (4 * 2 * WIDTH + 3 * (WIDTH + INNER))
    adapted = memory(f"--precision bf16 --use_lora --lora_r {rank}")
    assert (adapted.parameters, adapted.sizes.trained) == (WEIGHTS, adapters)
    assert adapted.sizes.frozen == 2 * WEIGHTS
    assert adapted.sizes.elements == WEIGHTS + adapters


def test_a_quantised_base_has_its_scales() -> None:
    pytest.importorskip("bitsandbytes")
    rest = 2 * (WEIGHTS - LAYERS * LINEAR)
    four, eight = memory("--use_quant"), memory("--use_quant --quant_bits 8")
    blocks = [WIDTH**2 // 64] * 4 + [WIDTH * INNER // 64] * 3
    assert four.sizes.frozen == rest + LAYERS * (LINEAR // 2 + sum(b + 4 * -(-b // 256) for b in blocks))
    assert eight.sizes.frozen == rest + LAYERS * (LINEAR + 4 * (5 * WIDTH + 2 * INNER))
    assert four.sizes.dequantised == 2 * WIDTH * INNER
    assert four.sizes.dequantised_layer == 2 * LINEAR
    assert four.parameters == WEIGHTS


@pytest.mark.parametrize(("optimizer", "bytes_"), [("adamw", 8.0), ("nvlamb", 8.0)])
def test_states_are_found_out_by_a_step(optimizer: str, bytes_: float) -> None:
    before = torch.random.get_rng_state()
    assert memory(f"--optimizer {optimizer}").state_bytes == bytes_
    assert torch.equal(before, torch.random.get_rng_state())


def test_states_of_muon_are_those_of_its_kinds() -> None:
    matrices = LAYERS * LINEAR
    assert memory("--optimizer muon").state_bytes == pytest.approx((4 * matrices + 8 * (WEIGHTS - matrices)) / WEIGHTS)
    assert memory("--optimizer schedule_free_adamw").state_bytes == 8.0


@pytest.mark.parametrize(("optimizer", "bytes_"), [("adamw8bit", 2 + 2 * 4 / 256), ("paged_adamw8bit", 0.0)])
def test_states_in_8_bits(optimizer: str, bytes_: float) -> None:
    pytest.importorskip("bitsandbytes")
    assert memory(f"--optimizer {optimizer}").state_bytes == bytes_
    assert optimizer != "adamw8bit" or memory("--bit_training").state_bytes == bytes_


def test_tensor_parallel_ranks_hold_parts() -> None:
    whole, half = memory("--precision bf16"), memory("--precision bf16 --tensor_parallel_size 2")
    norms = LAYERS * 2 * WIDTH + WIDTH
    assert half.sizes.trained == (WEIGHTS - norms) // 2 + norms
    assert half.parameters == WEIGHTS
    full, part = whole.footprint.layers[0][0], half.footprint.layers[0][0]
    assert part.input == full.input, "between layers activations are whole"
    heads, element = 4, 2
    attention = 4 * WIDTH * element + 4 * heads  # queries, keys, values, the result and its sums
    assert full.stored - part.stored == LENGTH * (attention + 4 * INNER * element) // 2
    assert half.flops_per_token == pytest.approx(whole.flops_per_token, rel=0.01)
    assert half.attention_flops == whole.attention_flops


def test_operations_are_six_or_four_a_weight_and_twelve_in_attention() -> None:
    looked_up = VOCABULARY * WIDTH
    whole, adapted = memory("--precision bf16"), memory("--precision bf16 --use_lora --lora_r 8")
    assert whole.flops_per_token == 6 * (WEIGHTS - looked_up)
    assert adapted.flops_per_token == 4 * (WEIGHTS - looked_up) + 6 * adapted.sizes.trained
    assert whole.attention_flops == adapted.attention_flops == 12 * LAYERS * WIDTH
    assert whole.flops(100) == whole.flops_per_token + 12 * LAYERS * WIDTH * 100
    tied = memory("--precision bf16 --tie_word_embeddings")
    assert tied.flops_per_token == whole.flops_per_token, "the head of tied embeddings is a product, too"


def test_the_largest_moment_of_a_step_counts() -> None:
    flags = "--precision bf16 --per_gpu_train_batch_size 4"
    model, found = memory(flags), estimated(flags)
    kept = 4 * model.footprint.kept("none", compiled=False)
    loss = 4 * LENGTH * VOCABULARY * 8 + 6 * VOCABULARY * WIDTH
    backward = 4 * model.footprint.working("none", compiled=False) + 2 * VOCABULARY * WIDTH
    assert found.moment == ("loss" if loss > backward else "backward")
    passing = kept + max(loss, backward)
    assert found.parts.allocated == 18 * WEIGHTS + passing
    assert found.parts.context == CONTEXT + round(UNUSABLE * passing)
    assert found.parts.total == found.parts.allocated + found.parts.context


def test_micro_batches_and_recomputation_change_activations_only() -> None:
    one, four = (estimated(f"--precision bf16 --per_gpu_train_batch_size {rows}").parts for rows in (1, 4))
    assert four.activations == 4 * one.activations
    assert four.standing == one.standing
    full = estimated("--precision bf16 --per_gpu_train_batch_size 4 --activation_checkpointing full").parts
    assert full.activations < four.activations and full.standing == four.standing


def test_several_ranks_communicate() -> None:
    alone, together = (estimated("--precision bf16", world_size=ranks).parts for ranks in (1, 4))
    assert together.context - alone.context == COMMUNICATION
    assert alone.optimizer == 4 * together.optimizer == 8 * WEIGHTS
    assert alone.accumulators == together.accumulators == 4 * WEIGHTS


def test_the_copy_of_an_average_is_partitioned_like_the_master_weights(tmp_path: Path) -> None:
    offloaded = tmp_path / "offloaded.json"
    offloaded.write_text(json.dumps({"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}))
    for flags, ranks, expected in (
        ("--precision fp32 --zero_stage 0", 4, 4 * WEIGHTS),
        ("--precision bf16 --zero_stage 1", 4, WEIGHTS),
        ("--precision bf16 --zero_stage 3", 1, 4 * WEIGHTS),
        (f"--precision bf16 --zero_stage 2 --deepspeed_config {offloaded}", 1, 0),
    ):
        with_it, without = (estimated(f"{flags} {more}", ranks).parts for more in ("--plugins ema", ""))
        assert (with_it.copies, without.copies) == (expected, 0)
        assert with_it.standing - without.standing == with_it.total - without.total == expected


def test_packed_rows_need_a_mask_where_there_is_no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    plain, packed = (memory(f"--precision fp32 --batching {how}").footprint for how in ("padded", "packed"))
    assert packed.layers[0][0].stored - plain.layers[0][0].stored == 4 * LENGTH**2
    plain, packed = (memory(f"--precision bf16 --batching {how}").footprint for how in ("padded", "packed"))
    assert packed == plain


def test_a_model_that_is_built_with_its_weights_has_no_estimate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("panda.run.estimate.build_outline", lambda *_: None)
    assert model_memory(resolved(""), ModelContext(VOCABULARY, LENGTH, 0, 1, 2)) is None


# -- on a GPU

WAYS = [
    "--precision bf16",
    "--precision bf16 --zero_stage 0",
    "--precision bf16 --activation_checkpointing selective",
    "--precision bf16 --activation_checkpointing full",
    "--precision bf16 --compile",
    "--precision bf16 --use_lora --lora_dropout 0",
    "--precision bf16 --use_lora --lora_dropout 0.1",
    "--use_quant --lora_dropout 0",
    "--precision fp32",
    "--precision bf16 --batching packed",
    "--precision bf16 --zero_stage 2",
    "--precision bf16 --zero_stage 3",
]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("flags", WAYS)
def test_torch_allocates_as_much(flags: str, tmp_path: Path, processes: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model of 100 million weights, rows as long as can be: torch's peak of the last step, within 10 %."""
    from panda.runner import train

    monkeypatch.chdir(tmp_path)
    gc.collect()  # the model of the test before, which would count
    rows = [{"input": "x", "target": "y" * 2000}] * 32
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    shape = (
        "--arch llama-tiny --hidden_size 1024 --intermediate_size 2816 --num_layers 8 --num_heads 8 --vocab_size 8192"
    )
    run = "--max_seq_length 1024 --per_gpu_train_batch_size 8 --gradient_accumulation_steps 2 --max_steps 2"
    file = "--instruction_tuning_data_dir rows.json --save_final false -p no:plot -p no:tensorboard --prompts x"
    more = "" if "activation_checkpointing" in flags else "--activation_checkpointing none"
    configuration = configure(parse_arguments(f"{shape} {run} {file} {more} {flags}".split()))
    context = ModelContext(8192, 1024, 0, 1, 2)
    model = model_memory(configuration.resolved, context)
    assert model is not None
    expected = estimate(model, configuration.options, 1).parts.allocated / 2**30
    assert train(configuration) is not None
    (metrics,) = (tmp_path / "runs").glob("*/metrics.jsonl")
    last = json.loads(metrics.read_text().splitlines()[-1])
    assert last["memory_gib"] == pytest.approx(expected, rel=0.10)
