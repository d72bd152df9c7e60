"""What is gathered of a run for its page."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from panda.data.token_dataset import SampleBlock
from panda.data.token_dataset import TokenDataset
from panda.report.gathering import chosen_samples


@pytest.mark.parametrize(
    ("held_out", "said"),
    [
        ([[1, 2], [2, 1]], "Held-out samples of chat, of which 1 of 2 are also in the training data."),
        ([[2, 1]], "Held-out samples of chat, which the run did not train on."),
    ],
)
def test_held_out_samples_that_are_trained_on_are_not_called_new(held_out: list[list[int]], said: str) -> None:
    def made(of: list[list[int]]) -> TokenDataset:
        block = SampleBlock()
        for token_ids in of:
            block.add(token_ids, b"\0\1")
        return TokenDataset.of(block)

    prepared: Any = SimpleNamespace(held_out={"chat": made(held_out)}, dataset=made([[1, 2], [3, 4]]))
    assert chosen_samples(prepared, 0) == ([], said)
