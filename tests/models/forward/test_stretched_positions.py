"""RoPE stretched by the length: each sample is computed as plain transformers computes it in a batch of its own."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_files import SHAPE
from token_batches import collate
from transformers import LlamaConfig
from transformers import LlamaForCausalLM
from transformers import Phi3Config
from transformers import Phi3ForCausalLM

from panda.configuration.arguments import parse_arguments
from panda.configuration.configure import configure
from panda.models.forward.packed_rows import tell_packing
from panda.models.forward.stretched_positions import stretch_by_sample
from panda.registry.contexts import ModelContext
from panda.run.model import build_outline

RULES: dict[str, dict[str, Any]] = {
    "dynamic": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0},
    "longrope": {
        "rope_type": "longrope",
        "factor": 4.0,
        "short_factor": [1.0, 1.1, 1.2, 1.3],
        "long_factor": [2.0, 3.0, 4.0, 5.0],
        "original_max_position_embeddings": 16,
        "rope_theta": 10000.0,
    },
}


def stretched(rule: str) -> Any:
    torch.manual_seed(3)
    shape = SHAPE | {"max_position_embeddings": 16 if rule == "dynamic" else 64, "pad_token_id": 0}
    if rule == "longrope":
        shape |= {"original_max_position_embeddings": 16}
        model: Any = Phi3ForCausalLM(Phi3Config(**shape, rope_parameters=RULES[rule]))
    else:
        model = LlamaForCausalLM(LlamaConfig(**shape, rope_parameters=RULES[rule]))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)
    return model.eval()


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("layout", ["padded", "packed"])
@torch.no_grad()
def test_a_sample_does_not_depend_on_its_neighbours(rule: str, layout: str) -> None:
    plain = stretched(rule)
    model = copy.deepcopy(plain)
    model.config.use_cache = False  # as panda trains: with a cache, transformers looks for no samples in a row
    tell_packing(model)
    stretch_by_sample(model, 64)
    assert model.needs_positions
    samples = [torch.arange(length) * 7 % 250 + 3 for length in (50, 8, 16, 17, 30)]
    pairs = [(ids.numpy(), torch.ones(len(ids), dtype=torch.bool).numpy()) for ids in samples]
    rows = [[pair] for pair in pairs] if layout == "padded" else [pairs[:3], pairs[3:]]
    batch = collate(rows, 0, packed=True)
    logits = model(batch.input_ids, **batch.positions).logits
    places = [(row, 0) for row in range(5)] if layout == "padded" else [(0, 0), (0, 50), (0, 58), (1, 0), (1, 17)]
    for ids, (row, start) in zip(samples, places, strict=True):
        alone = copy.deepcopy(plain)(ids[None]).logits[0]  # of a copy, since a model keeps what it has seen
        assert torch.allclose(logits[row, start : start + len(ids)], alone, atol=2e-4), len(ids)


def test_nothing_is_done_where_no_sample_is_stretched() -> None:
    model = stretched("dynamic")
    stretch_by_sample(model, 16)
    assert not hasattr(model, "needs_positions")


@pytest.mark.parametrize(("rule", "positions"), [("linear", 64), ("dynamic", 64), ("llama3", 64)])
def test_the_positions_of_a_stretched_checkpoint_stay_those_that_the_rule_refers_to(
    rule: str, positions: int, tmp_path: Path
) -> None:
    from checkpoint_files import llama
    from checkpoint_files import save_hf

    rope: dict[str, Any] = {"rope_type": rule, "factor": 4.0, "rope_theta": 10000.0}
    if rule == "llama3":
        rope |= {"original_max_position_embeddings": 64, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    folder = save_hf(llama(max_position_embeddings=positions, rope_parameters=rope), tmp_path / "base")
    configuration = configure(
        parse_arguments(["--model", "llama", "--ckpt_path", str(folder), "--max_seq_length", "200"])
    )
    assert configuration.pretrained is not None
    context = ModelContext(259, 200, 0, 1, 2, configuration.pretrained.config)
    built: Any = build_outline(configuration.resolved, context)
    assert built.config.max_position_embeddings == positions
