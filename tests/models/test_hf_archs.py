"""The named shapes of models of transformers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from panda.models.hf import build_hf
from panda.registry import Catalog
from panda.registry.contexts import ModelContext
from panda.registry.options import build

PUBLISHED = {
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "qwen3-14b": 14_768_307_200,
    "qwen3-32b": 32_762_123_264,
    "qwen3-30b-a3b": 30_532_122_624,
    "mistral-7b": 7_248_023_552,
    "gemma3-270m": 268_098_176,
    "gemma3-1b": 999_885_952,
    "gemma3-4b": 3_880_263_168,
}
"""Parameters of the published checkpoints, a tied head counted once; of Gemma 3 4B those of its language model."""


def test_every_arch_of_hf_is_counted_here() -> None:
    catalog = Catalog()
    ours = {offer.name for offer in catalog.offers("arch") if offer.module == "panda.models.hf_archs"}
    assert ours == PUBLISHED.keys()


@pytest.mark.parametrize("name", PUBLISHED)
def test_it_has_the_published_parameters(name: str) -> None:
    catalog = Catalog()
    arch, model = catalog.load(catalog.find("arch", name)), catalog.load(catalog.find("model", "hf"))
    assert arch is not None and model is not None
    whole = build(model.options, arch.factory())

    def counted(layers: int) -> int:
        """The parameters with that many layers; all are alike, and building all of them would take seconds."""
        options = replace(whole, hf_config=(f"num_hidden_layers={layers}",))
        with torch.device("meta"):
            built = build_hf(options, ModelContext(1000, 64, pad_token_id=0, bos_token_id=1, eos_token_id=2))
        return sum(parameter.numel() for parameter in built.parameters())

    one, two = counted(1), counted(2)
    assert one + (two - one) * (whole.written["num_hidden_layers"] - 1) == PUBLISHED[name]
