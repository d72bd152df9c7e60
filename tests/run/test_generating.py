"""Generation in the loop, without a run: which prompts are continued at once."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from checkpoint_files import llama

from panda.answers.sampling import Sampled
from panda.run import generating
from panda.run.generating import Generation
from panda.run.generating import bytes_of_row

PROMPTS = [[5], [6, 7, 8, 9], [10, 11], [12, 13, 14], [5, 6], [7]]
KEYS = [(1, number) for number in range(len(PROMPTS))]


def generation(module: Any, counts: list[int] | None = None) -> Generation:
    """Of ``module``, on a rank beside others that have ``counts`` turns."""
    processes = SimpleNamespace(
        device=torch.device("cpu"),
        world_size=1 + len(counts or []),
        from_all=lambda here: [here, *(counts or [])],
        all_=lambda here: here,
    )
    engine: Any = SimpleNamespace(evaluating=lambda: module, processes=processes)
    options: Any = SimpleNamespace(zero=3 if counts else 0, compiled=False, seed=3)
    return Generation(engine, options, pad_token_id=0, end_tokens=[1])


@pytest.fixture(scope="module")
def module() -> Any:
    torch.manual_seed(0)
    return llama().eval()


def test_prompts_in_turns_are_continued_as_at_once(module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """In their order, whatever turns they had, and with random numbers of their keys."""
    whole = generation(module)(PROMPTS, keys=KEYS, max_new_tokens=6)
    monkeypatch.setattr(generating, "ROWS_WITHOUT_GPU", 2)
    turns = generation(module)._turns(module, PROMPTS, 6, together=False)
    assert turns == [[0, 5], [2, 4], [3, 1]], "of like lengths"
    assert generation(module)(PROMPTS, keys=KEYS, max_new_tokens=6).token_ids == whole.token_ids
    assert len({tuple(ids) for ids in whole.token_ids}) > 3


def test_ranks_that_work_together_have_equally_many_turns(module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generating, "ROWS_WITHOUT_GPU", 4)
    assert generation(module, [3])._turns(module, PROMPTS, 6, together=True) == [[0, 5, 2, 4], [3, 1], []]
    calls: list[int] = []

    def counted(_: Any, prompts: Any, *others: Any, **named: Any) -> list[Sampled]:
        calls.append(len(prompts))
        return [Sampled([1], [0.0], True) for _ in prompts]

    monkeypatch.setattr(generating, "sampled", counted)
    made = generation(module, [3])(PROMPTS, keys=KEYS, max_new_tokens=2)
    assert calls == [4, 2, 1] and len(made.token_ids) == len(PROMPTS)
    calls.clear()
    assert generation(module, [2])([], keys=[], max_new_tokens=2).token_ids == []
    assert calls == [1, 1], "a rank without prompts runs the model as often"
    calls.clear()
    assert generation(module)([], keys=[], max_new_tokens=2).token_ids == [] and calls == []


def test_a_row_takes_its_keys_and_values(module: Any) -> None:
    ids = torch.ones(1, 10, dtype=torch.int64)
    cache = module(ids, use_cache=True).past_key_values
    kept = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    scores = generating.BYTES_OF_SCORE * module.config.vocab_size
    assert bytes_of_row(module, 10) - scores == kept


def test_rows_at_once_follow_free_memory_but_not_where_runs_repeat_to_the_bit(
    module: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other rows together have other shapes, whose products may round otherwise."""
    gib, gpu = 2**30, torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 0)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=80 * gib))
    found = []
    for deterministic in (False, True):
        monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda value=deterministic: value)
        for free in (50 * gib, 42 * gib):
            monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, 80 * gib))
            found.append(generating.rows_at_once(module, 100, gpu))
    free, less, repeated, again = found
    assert free > less and repeated == again == 8 * gib // bytes_of_row(module, 100)
