"""An average beside the trained weights, and frozen weights, are the same under every sharding."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from lamb_steps import groups_of
from lamb_steps import make_network
from lamb_steps import micro_batches
from launching import EVERY_WAY
from launching import run_script
from other_weights import FROZEN
from other_weights import SHARE
from other_weights import STEPS
from other_weights import UNFROZEN_AT
from other_weights import USED
from test_sharded_lamb import CONFIGURATIONS

SOME = (
    *("zero-0", "zero-1-round-robin", "zero-2-not-contiguous", "zero-2-aligned-round-robin", "zero-3-sub-groups"),
    *("zero-3-offload", "bf16-zero-1", "bf16-zero-2", "bf16-zero-3-offload"),
)
"""Of each wrapper of DeepSpeed's one, and what else lays tensors out in its own way."""
TRIED = {1: ["zero-2", "bf16-zero-0"], 2: list(CONFIGURATIONS if EVERY_WAY else SOME)}
CLIP = 2.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("other-weights")
    for ranks, names in TRIED.items():
        out = folder / str(ranks)
        out.mkdir()
        (out / "configurations.json").write_text(json.dumps({name: CONFIGURATIONS[name] for name in names}))
        run_script(Path(__file__).with_name("other_weights.py"), out / "configurations.json", out, cwd=out, ranks=ranks)
    return folder


def cases() -> list[tuple[int, str]]:
    return [(ranks, name) for ranks, names in TRIED.items() for name in names]


def result(folder: Path, ranks: int, name: str) -> Any:
    return torch.load(folder / str(ranks) / f"{name}.pt", weights_only=True)


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    """To the bit, also in the sign of zeros."""
    kinds = {4: torch.int32, 2: torch.int16}
    return found.keys() == expected.keys() and all(
        found[name].view(kinds[each.itemsize]).equal(each.view(kinds[each.itemsize])) for name, each in expected.items()
    )


@pytest.mark.parametrize(("ranks", "name"), cases())
def test_an_average_is_that_of_float64_and_changes_no_bit_of_the_training(folder: Path, ranks: int, name: str) -> None:
    found = result(folder, ranks, name)
    assert found["losses"] == found["plain"]["losses"]
    assert same(found["masters"][-1], found["plain"]["weights"])
    expected = {key: each.double() for key, each in found["masters"][0].items()}
    for masters in found["masters"][1:]:
        expected = {key: each + SHARE * (masters[key].double() - each) for key, each in expected.items()}
    for key, each in found["average"].items():
        assert (each.double() - expected[key]).abs().max() <= 1e-6 * max(1.0, expected[key].abs().max()), key
        assert not torch.equal(each, found["masters"][-1][key]) or key.startswith("frozen"), key


@pytest.mark.parametrize(("ranks", "name"), cases())
def test_a_model_is_used_with_an_average_and_has_its_own_weights_again_to_the_bit(
    folder: Path, ranks: int, name: str
) -> None:
    found = result(folder, ranks, name)
    assert same(found["used"], {key: each.to(found["used"][key]) for key, each in found["at use"].items()})
    assert same(found["before"], found["after"]) and same(found["first"], found["first after"])
    assert any(each.eq(0).logical_and(each.signbit()).any() for each in found["first"].values())
    assert same(found["before"], {key: found["masters"][USED][key].to(each) for key, each in found["before"].items()})
    assert not same(found["before"], found["used"])
    assert same(found["average after"], found["at use"])


@pytest.mark.parametrize(("ranks", "name"), cases())
def test_an_average_is_saved_and_loaded_to_the_bit_also_in_another_stage(folder: Path, ranks: int, name: str) -> None:
    found = result(folder, ranks, name)
    assert same(found["read here"], found["saved"])
    assert same(found["read elsewhere"], found["saved"])


@cache
def reference() -> list[dict[str, torch.Tensor]]:
    """Weights after each step of one process in float64, of which the frozen ones are put back after each step."""
    module = make_network("network").double()
    with torch.no_grad():
        next(module.parameters()).view(-1)[:3] = -0.0
    optimizer = torch.optim.AdamW(groups_of(module), eps=1e-4)
    weights = dict(module.named_parameters())
    held = {name: each.detach().clone() for name, each in weights.items() if is_frozen(name)}
    found = []
    for number in range(STEPS):
        optimizer.zero_grad()
        batches = micro_batches(number, 0, 1)
        (sum(module(batch.numbers) for batch in batches) / sum(batch.units for batch in batches)).backward()
        for name in held if number < UNFROZEN_AT else ():
            weights[name].grad.zero_()  # type: ignore[union-attr]
        torch.nn.utils.clip_grad_norm_(module.parameters(), CLIP)
        optimizer.step()
        with torch.no_grad():
            for name in held if number < UNFROZEN_AT else ():
                weights[name].copy_(held[name])
        found.append({name: each.detach().clone() for name, each in weights.items()})
    return found


def is_frozen(name: str) -> bool:
    return name.startswith(tuple(pattern.removesuffix("*") for pattern in FROZEN))


@pytest.mark.parametrize(("ranks", "name"), cases())
def test_frozen_weights_stay_to_the_bit_and_are_trained_again(folder: Path, ranks: int, name: str) -> None:
    found = result(folder, ranks, name)["frozen"]
    for number in range(1, STEPS + 1):
        for before, after in zip(found[number - 1], found[number], strict=True):
            kept = {key for key in after if same({key: before[key]}, {key: after[key]}) and is_frozen(key)}
            all_frozen = {key for key in after if is_frozen(key)}
            assert kept == (all_frozen if number <= UNFROZEN_AT else set()), (number, kept)
    if name.startswith("zero"):
        for (masters, _), expected in zip(found[1:], reference(), strict=True):
            for key, each in masters.items():
                moved = (each.double() - expected[key]).norm()
                assert moved <= 1e-5 * max(1e-2, expected[key].norm()), key
