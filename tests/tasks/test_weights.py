"""Weights of tokens and of turns, label smoothing, and loss on prompts.

The reference is arithmetic written here, in float64.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from token_batches import collate
from transformers import LlamaConfig
from transformers import LlamaForCausalLM

from panda.data.batches import RowShape
from panda.data.token_cache import TokenCache
from panda.models.forward.cross_entropy import offer_loss_sum
from panda.tasks.scores import label_log_probs
from panda.tasks.scores import last_hidden
from panda.tasks.scores import next_token_loss

ROWS = [
    [([1, 5, 6, 7, 8], [False, True, True, False, True], [1, 0.5, 2.0, 9.0, 0.25])],
    [([1, 9, 4], [False, True, True], [1, 1, 3.0])],
]


@pytest.fixture
def llama() -> Any:
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=11, **shape)).double()


def expected(logits: torch.Tensor, smoothing: float, *, weighted: bool) -> torch.Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for number, [(ids, supervised, weights)] in enumerate(ROWS):
        for place in range(1, len(ids)):
            if supervised[place]:
                scores = logits[number, place - 1].log_softmax(-1)
                loss = -(1 - smoothing) * scores[ids[place]] - smoothing * scores.mean()
                total = total + loss * (weights[place] if weighted else 1)
    return total


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("summing", [False, True], ids=["logits", "without logits"])
def test_weights_and_smoothing_are_exact_and_so_are_gradients(
    llama: Any, smoothing: float, weighted: bool, summing: bool
) -> None:
    rows = ROWS if weighted else [[sequence[:2] for sequence in row] for row in ROWS]
    batch = collate(rows, 0)
    reference = expected(llama(batch.input_ids).logits, smoothing, weighted=weighted)
    parameters = list(llama.parameters())
    gradients = torch.autograd.grad(reference, parameters)
    if summing:
        offer_loss_sum(llama)
    found = next_token_loss(llama, batch, label_smoothing=smoothing)
    assert found.item() == pytest.approx(reference.item(), rel=1e-6)
    for one, other in zip(torch.autograd.grad(found, parameters), gradients, strict=True):
        assert torch.allclose(one.double(), other, rtol=1e-5, atol=1e-6)


def test_units_are_the_weights_of_the_tokens_with_loss() -> None:
    assert collate(ROWS, 0).units == 0.5 + 2 + 0.25 + 1 + 3
    assert collate([[sequence[:2] for sequence in row] for row in ROWS], 0).units == 5


def test_a_prompt_carries_loss_where_asked(instruct: Any) -> None:
    rows = [{"input": "ab", "target": "c"}]
    plain, all_of_it = (instruct(rows, train_on_prompt=asked).dataset()[0] for asked in (False, True))
    assert plain["token_ids"].tolist() == all_of_it["token_ids"].tolist()
    assert plain["supervised"].tolist() == [False] * 4 + [True] * 2
    assert all_of_it["supervised"].tolist() == [False] + [True] * 5


def test_a_turn_has_the_weight_that_it_states(instruct: Any) -> None:
    def conversation(*weights: Any) -> dict[str, Any]:
        answers = [{"role": "assistant", "content": "x", **({} if w is None else {"weight": w})} for w in weights]
        return {"messages": [turn for answer in answers for turn in ({"role": "user", "content": "q"}, answer)]}

    dataset = instruct([conversation(None, 1), conversation(0.5, None), conversation(0, 2.5)]).dataset()
    assert [sample["weights"].tolist() for sample in (dataset[n] for n in range(3))] == [
        [1.0] * 9,
        [0.5] * 5 + [1.0] * 4,
        [2.5] * 9,
    ]
    assert dataset[2]["supervised"].tolist() == [False] * 7 + [True] * 2
    assert "weights" not in instruct([conversation(None, 1)]).dataset()[0]
    batch = instruct([conversation(0.5, None)]).collate([[dataset[1]]], RowShape())
    assert batch.units == 0.5 * 2 + 2


def test_tokens_have_the_weights_of_their_row_and_come_back_from_the_cache(pretrain: Any, tmp_path: Path) -> None:
    rows = [{"input_ids": [7, 8]}, {"input_ids": [4, 5, 6, 7], "weights": [1, 0.5, 0, 2]}, {"text": "a"}]
    task = pretrain(rows)
    in_memory = task.dataset()
    cached = [TokenCache(tmp_path / "cache").samples(task.recipe()) for _ in range(2)]
    for dataset in (in_memory, *cached):
        assert [sample["weights"].tolist() for sample in (dataset[n] for n in range(3))] == [
            [1.0, 1.0],
            [1.0, 0.5, 0.0, 2.0],
            [1.0, 1.0, 1.0],
        ]
        assert dataset[1]["supervised"].tolist() == [False, True, False, True]
        assert dataset[1]["weights"].dtype == np.float32
        assert dataset.supervised_tokens == 1 + 2 + 2
    [bad] = pretrain([*rows, {"input_ids": [7, 8], "weights": [1, -1]}]).dataset().report.first_bad_rows
    assert "field 'weights' is not an array of numbers of at least 0" in str(bad)


def test_log_probabilities_and_hidden_states_are_those_of_the_model(llama: Any) -> None:
    batch = collate([[sequence[:2] for sequence in row] for row in ROWS], 0)
    logits = llama(batch.input_ids).logits
    found = label_log_probs(llama, batch, temperature=2.0)
    scores = (logits.float() / 2).log_softmax(-1)
    for number, [(ids, supervised, _)] in enumerate(ROWS):
        for place in range(1, len(ids)):
            wanted = float(scores[number, place - 1, ids[place]].detach()) if supervised[place] else 0.0
            assert float(found[number, place - 1].detach()) == pytest.approx(wanted, rel=1e-5)
    hidden = last_hidden(llama, batch)
    assert torch.allclose(llama.lm_head(hidden), logits)
