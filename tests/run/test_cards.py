"""GPUs: what they are called, what a run can have of them, and whether torch can use them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from panda.configuration.arguments import parse_arguments
from panda.configuration.configure import configure
from panda.registry import UserError
from panda.run import outlook as outlook_module
from panda.run.cards import has_bf16
from panda.run.cards import named_card
from panda.run.cards import peak_of
from panda.run.cards import this_card
from panda.run.cards import why_unused
from panda.run.preparation import prepare


def test_cards_have_names_and_sizes() -> None:
    assert named_card("H100") is named_card("h100")
    assert named_card("48").memory == named_card("48 GiB").memory == 48 * 2**30
    for text in ("h1000", "0", "-1", "nan", "inf"):
        with pytest.raises(UserError, match="is not a card that panda knows"):
            named_card(text)


@pytest.mark.parametrize(
    ("reported", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989.4e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A100-PCIE-40GB", 312e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L40", None),
        ("NVIDIA L4", 121e12),
        ("NVIDIA GeForce RTX 4090", 165.2e12),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("Tesla T4", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("GRID L40S-48Q", None),
    ],
)
def test_the_speed_of_a_card_follows_from_what_its_driver_calls_it(reported: str, peak: float | None) -> None:
    assert peak_of(reported) == peak


@pytest.mark.parametrize(("others", "held"), [(0.0, 0.0), (0.4, 0.0), (17.0, 16.6)])
def test_what_other_processes_hold_of_a_card_is_not_there(
    others: float, held: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Besides torch's own 5 GiB and 0.6 of CUDA's; up to 1 GiB of that is taken for this process's."""
    gib = 2**30
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA GeForce RTX 4090")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=24 * gib))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (round((24 - 5.6 - others) * gib), 24 * gib))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 5 * gib)
    found = this_card(torch.device("cuda", 0))
    assert found.held_by_others == pytest.approx(held * gib, abs=1e6)
    assert found.memory + found.held_by_others == 24 * gib


@pytest.mark.parametrize(
    ("capability", "hip", "computes"),
    [((7, 5), None, False), ((8, 0), None, True), ((9, 0), None, True), ((7, 5), "6.2", True)],
)
def test_bf16_needs_a_card_that_computes_in_it(
    capability: tuple[int, int], hip: str | None, computes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    assert has_bf16(torch.device("cuda", 0)) == computes and has_bf16(torch.device("cpu"))
    monkeypatch.setattr("panda.run.preparation.own_device", lambda: torch.device("cuda", 0))
    flags = "--arch llama-tiny --precision bf16 --instruction_tuning_data_dir missing.json"
    with pytest.raises(UserError, match="missing.json" if computes else "Tesla T4 does not compute in it. Write `prec"):
        prepare(configure(parse_arguments(flags.split())), 1)


def test_a_gpu_that_torch_cannot_use_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A run would be on the CPU, and torch's warning of an old driver in a file of the run."""

    def init() -> None:
        raise RuntimeError("The NVIDIA driver on your system is too old")

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "init", init)
    monkeypatch.setattr("panda.run.cards.GPUS", (str(tmp_path / "none"),))
    assert why_unused() == ""
    monkeypatch.setattr("panda.run.cards.GPUS", (str(tmp_path),))
    assert why_unused() == "The NVIDIA driver on your system is too old"
    [line] = outlook_module._unused_gpu()
    assert line.endswith(
        ", which torch " + torch.__version__ + " cannot use: The NVIDIA driver on your system is too old"
    )
    for hidden in ("", "-1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
        assert why_unused() == ""
