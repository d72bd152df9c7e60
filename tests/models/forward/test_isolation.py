"""Packed samples do not see each other: logits and loss are those of rows of their own, or the model is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
from token_batches import collate
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaForCausalLM

from panda.models.forward.isolation import refuse_leaking
from panda.models.forward.isolation import refuse_without_positions
from panda.models.llama import LlamaOptions
from panda.models.llama import build_llama
from panda.registry import UserError
from panda.registry.contexts import ModelContext
from panda.tasks.scores import next_token_loss

VOCABULARY = 50
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def llama() -> torch.nn.Module:
    torch.manual_seed(0)
    options = LlamaOptions(hidden_size=32, intermediate_size=48, num_layers=2, num_heads=4, initializer_range=0.3)
    context = ModelContext(VOCABULARY, max_seq_length=64, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    return build_llama(options, context).eval()


def sample(draw_ids: list[int]) -> tuple[Any, Any]:
    ids = np.array(draw_ids, dtype=np.int32)
    supervised = ids % 3 > 0
    supervised[0] = False
    return ids, supervised


samples = st.lists(st.integers(0, VOCABULARY - 1), min_size=2, max_size=9).map(sample)
rows = st.lists(st.lists(samples, min_size=1, max_size=4), min_size=1, max_size=3)


@settings(max_examples=15)
@given(rows)
def test_packed_and_unpacked_give_the_same_logits_and_the_same_loss(llama: Any, rows: Any) -> None:
    """The attention, the positions and the labels at once; alone, a sample has no neighbours to be told from."""
    packed = collate(rows, pad_token_id=0, packed=True)
    with torch.no_grad():
        logits = llama(packed.input_ids, **packed.positions).logits
        alone_loss = 0.0
        for number, row in enumerate(rows):
            start = 0
            for each in row:
                batch = collate([[each]], pad_token_id=0)
                alone = llama(batch.input_ids).logits[0]
                torch.testing.assert_close(logits[number, start : start + len(alone)], alone, rtol=1e-4, atol=1e-4)
                alone_loss += float(next_token_loss(llama, batch))
                start += len(alone)
        loss = float(next_token_loss(llama, packed))
    assert loss == pytest.approx(alone_loss, rel=1e-5, abs=1e-5)


class Reads(TorchDispatchMode):
    """What torch runs that needs values on the host: on a GPU, it waits for all that is queued."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        if function.name() in ("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select"):
            self.found.append(function.name())
        return function(*arguments, **(keywords or {}))


@pytest.mark.parametrize("packed", [True, False])
def test_nothing_waits_for_the_device(llama: Any, packed: bool) -> None:
    row = [sample([5, 6, 7, 8]), sample([9, 10, 11])]
    batch = collate([row, row] if packed else [[each] for each in row], 0, packed=packed)
    with Reads() as reads:
        next_token_loss(llama, batch).backward()
    assert reads.found == []
    plain = LlamaForCausalLM(llama.config)
    with Reads() as reads:
        plain(batch.input_ids, **batch.positions)
    assert reads.found, "transformers alone asks: else this test sees nothing, or panda need not tell it"


def test_without_position_ids_they_would_not(llama: Any) -> None:
    """The test above can fail."""
    rows = [[sample([5, 6, 7, 8]), sample([9, 10, 11, 12])]]
    with torch.no_grad():
        packed = llama(collate(rows, 0).input_ids).logits[0, 4:]
        alone = llama(collate([rows[0][1:]], 0).input_ids).logits[0]
    assert (packed - alone).abs().max() > 1e-2


def test_the_first_label_of_each_sample_is_masked() -> None:
    batch = collate([[sample([5, 7, 8]), sample([10, 11]), sample([13, 14])]], 0, packed=True)
    assert batch.labels.tolist() == [[-100, 7, 8, -100, 11, -100, 14]]


def test_a_model_with_block_attention_passes(llama: torch.nn.Module) -> None:
    refuse_without_positions(llama, "llama")
    refuse_leaking(llama, "llama", VOCABULARY, CPU)
    refuse_leaking(llama.bfloat16(), "llama", VOCABULARY, CPU)
    llama.float()


class Recurrent(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = torch.nn.Embedding(VOCABULARY, 8)
        self.layer = torch.nn.GRU(8, 8, batch_first=True)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.layer(self.embedding(input_ids))[0]


class Careless(Recurrent):
    """Takes position_ids and does not heed them."""

    def forward(self, input_ids: torch.Tensor, **more: Any) -> torch.Tensor:
        return super().forward(input_ids)


def test_a_model_without_position_ids_is_refused_with_what_to_use() -> None:
    with pytest.raises(UserError, match="model 'gru' cannot keep the samples of a row apart") as error:
        refuse_without_positions(Recurrent(), "gru")
    assert "`batching: grouped`" in str(error.value)


def test_a_model_that_takes_position_ids_and_leaks_is_refused() -> None:
    refuse_without_positions(Careless(), "careless")
    with pytest.raises(UserError, match="sees the one before it in its row"):
        refuse_leaking(Careless(), "careless", VOCABULARY, CPU)


def test_attention_that_heeds_positions_in_the_rotary_embedding_alone_is_refused(llama: Any) -> None:
    class Unmasked(torch.nn.Module):
        def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor) -> Any:
            mask = torch.ones(input_ids.shape, dtype=torch.int64)  # given one, transformers looks for no packed samples
            return llama(input_ids, attention_mask=mask, position_ids=position_ids)

    with pytest.raises(UserError, match="sees the one before it in its row"):
        refuse_leaking(Unmasked(), "llama", VOCABULARY, CPU)


def test_a_model_without_memory_has_nothing_to_leak() -> None:
    table = torch.nn.Embedding(VOCABULARY, VOCABULARY)
    refuse_leaking(lambda input_ids, position_ids: table(input_ids), "bigram", VOCABULARY, CPU)
