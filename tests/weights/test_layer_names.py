"""A layer is all of a name up to its first number."""

from __future__ import annotations

import pytest

from panda.weights.layer_names import layer_of


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("model.layers.3.mlp.up_proj.weight", "model.layers.3"),
        ("model.layers.12", "model.layers.12"),
        ("layers.0.experts.5.weight", "layers.0"),
        ("0.weight", "0"),
        ("lm_head.weight", None),
        ("block2.fc1.weight", None),
        ("2fc.weight", None),
        ("", None),
    ],
)
def test_a_layer_ends_with_the_first_number(name: str, layer: str | None) -> None:
    assert layer_of(name) == layer
