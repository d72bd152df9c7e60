"""A certificate is given to optimizers that are right, and to no other."""

from __future__ import annotations

from pathlib import Path

import pytest
from distributions import IMPORTS
from distributions import fake_distributions
from launching import EVERY_WAY

from panda.testing import optimizers
from panda.testing.optimizers import ALONE
from panda.testing.optimizers import CASES
from panda.testing.optimizers import SHORT
from panda.testing.optimizers import Asked
from panda.testing.optimizers import Case
from panda.testing.optimizers import Certificate
from panda.testing.optimizers import _judged
from panda.testing.optimizers import _last_of_each
from panda.testing.optimizers import certificates

NAIVE = """
from dataclasses import replace
from panda.optim.adam_options import AdamOptions
from panda.optim.muon import MuonOptions, build_muon
from panda.optim.nvlamb import NVLambOptions, build_nvlamb

@register_optimizer("naive-lamb", options=NVLambOptions, needs="norms")
def naive_lamb(options, context):
    "A ratio for the part of a parameter that a rank has."
    optimizer = build_nvlamb(options, context)
    bind = optimizer.bind
    optimizer.bind = lambda layout: bind(replace(layout, sum_over_shards=lambda sums: sums))
    return optimizer

@register_optimizer("naive-muon", options=MuonOptions, needs="parameters")
def naive_muon(options, context):
    "The rows that a rank has of a matrix, made orthogonal."
    optimizer = build_muon(options, context)
    bind = optimizer.bind
    optimizer.bind = lambda layout: bind(replace(layout, exchange=Parts(layout.described)))
    return optimizer

class Parts:
    def __init__(self, described):
        self.described = described

    def stretches(self, layouts):
        for number, layout in enumerate(layouts):
            for place, segment in enumerate(layout.segments):
                columns = self.described[layout.parameters[segment.parameter]].shape[-1]
                whole_rows = segment.length // columns * columns
                if whole_rows:
                    yield (number, place), slice(segment.start, segment.start + whole_rows), columns

    def gather(self, layouts, values, names):
        flat = [value.reshape(-1) for value in values]
        return {key: flat[key[0]][at].view(-1, columns) for key, at, columns in self.stretches(layouts)}

    def scatter(self, layouts, wholes, names, dtype):
        import torch
        out = [torch.zeros(layout.tensor.numel(), dtype=dtype) for layout in layouts]
        for key, at, _ in self.stretches(layouts):
            out[key[0]][at] = wholes[key].reshape(-1)
        return [part.view(layout.tensor.shape) for part, layout in zip(out, layouts)]

@register_optimizer("forgetful", options=AdamOptions)
def forgetful(options, context):
    "Its state is not in checkpoints."
    import torch

    class Momentum(torch.optim.Optimizer):
        held = {}

        @torch.no_grad()
        def step(self, closure=None):
            for group in self.param_groups:
                for tensor in group["params"]:
                    if tensor.grad is not None:
                        mean = self.held.setdefault(id(tensor), torch.zeros_like(tensor))
                        tensor.sub_(mean.mul_(0.9).add_(tensor.grad), alpha=group["lr"])

    return Momentum(context.param_groups, {})

@register_optimizer("falls", options=AdamOptions)
def falls(options, context):
    "It fails where there are two ranks."
    import os, torch
    if os.environ["WORLD_SIZE"] == "2":
        raise ZeroDivisionError("two ranks")
    return torch.optim.SGD(context.param_groups)
"""
TWO = Case(2, 1, 1)
RIGHT = {
    "muon": Asked("muon", ("--learning_rate", "0.003"), (Case(2, 1, 3),)),
    "muon of tensor-parallel ranks": Asked("muon", ("--learning_rate", "0.003"), (Case(1, 2, 1),), resuming=EVERY_WAY),
}
if EVERY_WAY:
    RIGHT |= {name: Asked(name, (), SHORT) for name in ("adamw", "schedule_free_adamw")}
WRONG = {
    "naive-lamb": Asked("naive-lamb", ("--learning_rate", "0.01"), (TWO,), resuming=False),
    "naive-muon": Asked("naive-muon", (), (TWO,), resuming=False),
    "forgetful": Asked("forgetful", (), (ALONE,)),
    "falls": Asked("falls", (), (TWO,), resuming=False),
}
ORDERS = RIGHT | WRONG


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Certificate]:
    folder = tmp_path_factory.mktemp("certificates")
    with fake_distributions(folder / "site", IMPORTS) as made:
        made.install("lab", {"optimizers": dict.fromkeys(WRONG, "lab_optimizers")}, {"lab_optimizers": NAIVE})
        return dict(zip(ORDERS, certificates(list(ORDERS.values()), folder), strict=True))


@pytest.mark.parametrize("name", RIGHT)
def test_an_optimizer_that_is_right_has_no_problems(found: dict[str, Certificate], name: str) -> None:
    certificate, asked = found[name], RIGHT[name]
    assert _judged(certificate) is certificate
    assert [row.case for row in certificate.rows] == list(dict.fromkeys((ALONE, *asked.cases)))
    for row in certificate.rows:
        assert row.error is not None and row.error < 3e-5
        if asked.resuming:
            assert row.resumed == "same bits"
            assert bool(row.elsewhere_refused) == (row.case.tensor_ranks > 1)
            assert row.elsewhere_refused or (row.error_elsewhere or 1) < 3e-5


def test_what_an_optimizer_needs_and_cannot_have_is_refused(found: dict[str, Certificate]) -> None:
    assert list(found["muon"].refusals) == list(optimizers.NEEDED)
    assert all("muon, which needs whole parameters" in message for message in found["muon"].refusals.values())
    assert found["forgetful"].refusals == {}
    assert "NOT REFUSED" in Certificate("x", (), 1e-4, [], {"NVMe": ""}).table()
    assert Certificate("x", (), 1e-4, [], {"NVMe": ""}).problems == ["NVMe: not refused"]


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("naive-lamb", "2x1-zero1: error"),
        ("naive-muon", "2x1-zero1: error"),
        ("forgetful", "1x1-zero0: a resumed run ends with other bits"),
        ("falls", "2x1-zero1: failed: .*ZeroDivisionError\\W+two ranks"),
    ],
)
def test_one_that_is_wrong_gets_none(found: dict[str, Certificate], name: str, error: str) -> None:
    with pytest.raises(AssertionError, match=rf"(?s)optimizer '{name}': .*{error}"):
        _judged(found[name])


def test_a_naive_one_is_far_off_where_parameters_are_split_and_right_where_they_are_not(
    found: dict[str, Certificate],
) -> None:
    for name in ("naive-lamb", "naive-muon"):
        alone, spread = found[name].rows
        assert alone.error == 0 and alone.case == ALONE
        assert spread.error is not None and spread.error > 1e-2


def test_every_way_is_tried() -> None:
    ways = {(case.data_ranks, case.tensor_ranks, case.stage, case.offload) for case in CASES}
    assert {(data, 1, stage, False) for data in (1, 2, 3) for stage in range(4)} <= ways
    assert {(data, 1, stage, True) for data in (1, 2, 3) for stage in (1, 2, 3)} <= ways
    assert {(data, 2, stage, False) for data in (1, 2, 3) for stage in range(3)} <= ways
    assert set(SHORT) <= set(CASES) and SHORT[0] == ALONE
    assert {case.elsewhere().data_ranks - case.data_ranks for case in CASES} == {1, -2}


def test_flags_are_given_once() -> None:
    words = ["--rate", "1", "-p", "no:plot", "--many", "a", "b", "--rate=2", "--switch", "-p", "x"]
    assert _last_of_each(words) == ("--rate", "2", "--many", "a", "b", "--switch", "-p", "no:plot", "-p", "x")


def test_a_name_that_is_unknown_is_said(capfd: pytest.CaptureFixture[str]) -> None:
    """From a shell: in a process of its own."""
    assert optimizers.main(["no-such-optimizer", "--short"]) == 1
    assert "unknown optimizer 'no-such-optimizer'" in capfd.readouterr().err


@pytest.mark.parametrize("name", ["muon", "nvlamb", "adamw", "schedule_free_adamw"])
def test_the_docs_have_a_certificate_of_all_ways(name: str) -> None:
    page = (Path(__file__).parents[2] / "docs" / "certificates.md").read_text(encoding="utf-8")
    section = page.partition(f"\n## `{name}`\n")[2].partition("\n## ")[0]
    assert f"{optimizers.STEPS} steps in {len(CASES) - 1} ways" in section
    assert "WRONG" not in section and "NOT REFUSED" not in section
