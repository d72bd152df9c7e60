"""The GRU model on its own."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from panda import UserError
from panda.registry.contexts import ModelContext
from panda.registry.options import build

from panda_example.gru import GruOptions
from panda_example.gru import build_gru
from panda_example.gru import gru_small
from panda_example.gru import gru_tiny

CONTEXT = ModelContext(vocab_size=50, max_seq_length=32, pad_token_id=0, bos_token_id=None, eos_token_id=1)


@pytest.mark.parametrize("num_layers", [1, 3])
def test_a_later_token_does_not_change_earlier_logits(num_layers: int) -> None:
    torch.manual_seed(0)
    model = build_gru(GruOptions(hidden_size=16, num_layers=num_layers), CONTEXT)
    ids = torch.randint(50, (2, 12))
    logits = model(ids)
    for position in range(12):
        changed = ids.clone()
        changed[:, position] = (changed[:, position] + 1) % 50
        difference = (model(changed) - logits).abs().amax(dim=(0, 2))
        assert difference[:position].eq(0).all()
        assert difference[position:].gt(0).all(), "and every later one sees it"


def test_rows_do_not_see_each_other() -> None:
    torch.manual_seed(0)
    model = build_gru(GruOptions(hidden_size=16), CONTEXT)
    ids = torch.randint(50, (3, 8))
    torch.testing.assert_close(model(ids)[1:2], model(ids[1:2]), rtol=0, atol=1e-6)


def test_dropout_is_on_only_in_training() -> None:
    torch.manual_seed(0)
    model = build_gru(GruOptions(hidden_size=16, dropout=0.5), CONTEXT)
    ids = torch.randint(50, (1, 8))
    assert not torch.equal(model(ids), model(ids))
    model.eval()
    assert torch.equal(model(ids), model(ids))


def test_the_vocabulary_is_the_tokenizers_unless_it_is_given() -> None:
    assert build_gru(GruOptions(hidden_size=4), CONTEXT)(torch.zeros(1, 3, dtype=torch.int64)).shape == (1, 3, 50)
    larger = build_gru(GruOptions(hidden_size=4, vocab_size=64), CONTEXT)
    assert larger(torch.zeros(1, 3, dtype=torch.int64)).shape == (1, 3, 64)
    with pytest.raises(UserError, match="vocab_size 49 is less than the tokenizer's 50"):
        build_gru(GruOptions(vocab_size=49), CONTEXT)


@pytest.mark.parametrize(
    ("key", "value"), [("hidden_size", 0), ("num_layers", 0), ("vocab_size", 0), ("dropout", 1.0), ("dropout", -0.1)]
)
def test_options_have_bounds(key: str, value: float) -> None:
    with pytest.raises(UserError, match=key):
        build(GruOptions, {key: value})


def test_archs_set_options_that_the_model_has() -> None:
    small, tiny = build(GruOptions, gru_small()), build(GruOptions, gru_tiny())
    parameters = sum(p.numel() for p in build_gru(small, CONTEXT).parameters())
    assert parameters == 2 * 50 * 512 + 50 + 2 * (6 * 512 * 512 + 6 * 512)
    assert tiny.hidden_size < small.hidden_size


def test_declaring_imports_no_torch() -> None:
    code = "import sys, panda_example.gru, panda_example.lion, panda_example.report; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
