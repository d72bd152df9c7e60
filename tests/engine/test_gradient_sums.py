"""Sums of bf16 gradients beside those of DeepSpeed's own methods, to the bit; and the kernel that adds them.

Triton reads TRITON_INTERPRET when it is imported, so without a GPU its test runs in a process of its own.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from interpreted import DEVICE
from interpreted import INTERPRETED
from interpreted import anywhere
from interpreted import passed_in_interpreter
from launching import run_script

from panda.configuration.options import RunOptions
from panda.engine import casting
from panda.engine import engine as engines
from panda.engine.deepspeed_config import deepspeed_config
from panda.engine.engine import Engine
from panda.engine.processes import Processes
from panda.files.compilers import can_compile


class Chosen(torch.nn.Module):
    """Two layers, of which a batch uses some: as with experts, a parameter can have no gradient in a micro batch."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(5, 3) for _ in range(2))

    def forward(self, inputs: torch.Tensor, used: list[int]) -> torch.Tensor:
        return sum((self.layers[number](inputs).square().sum() for number in used), inputs.sum() * 0)


class Batch:
    tokens = units = 1
    idle = False

    def __init__(self, number: int, used: list[int]) -> None:
        self.inputs, self.used = torch.full((1, 5), 1.0 + number / 7, dtype=torch.bfloat16), used

    def to(self, device: torch.device) -> Batch:
        self.inputs = self.inputs.to(device)
        return self


CLIP = 0.3
STEPS = [
    [Batch(1, [0, 1]), Batch(2, [0]), Batch(3, [0, 1])],
    [Batch(4, [1]), Batch(5, [1]), Batch(6, [1])],  # the first layer has no gradient in this step
    [Batch(7, [1]), Batch(8, [0]), Batch(9, [0, 1])],
    [Batch(10, [0]), Batch(11, [0]), Batch(12, [0])],
]


def trained(processes: Processes, **more: Any) -> tuple[list[Any], dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    model = Chosen()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    options = RunOptions(precision="bf16", gradient_accumulation_steps=3, max_grad_norm=CLIP)
    engine = Engine(model, optimizer, deepspeed_config(options, world_size=1, on_gpu=False) | more, processes)
    assert type(engine.optimizer).__name__ == "BF16_Optimizer"
    results = [
        engine.step(batches, lambda module, batch: module(batch.inputs, batch.used).float()) for batches in STEPS
    ]
    weights = {name: stored.read() for name, stored in engine.weights().items()}
    weights["masters"] = torch.cat([master.detach() for master in engine.optimizer.fp32_groups_flat_partition])
    return [(float(result.loss), float(result.grad_norm)) for result in results], weights


def test_they_are_those_of_deepspeed(processes: Processes, monkeypatch: pytest.MonkeyPatch) -> None:
    found, weights = trained(processes)
    monkeypatch.setattr(engines, "sum_in_one_pass", lambda optimizer: None)
    # By default it rounds the sums to bf16 before the step, on one rank too.
    expected, expected_weights = trained(processes, communication_data_type="fp32")
    assert found == expected
    for name, tensor in expected_weights.items():
        assert torch.equal(weights[name], tensor), name


def test_the_optimizer_steps_by_fp32_sums(processes: Processes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the micro batches' bf16 gradients, one rounding each; here computed by autograd alone."""
    seen: list[torch.Tensor] = []

    def step(optimizer: Any, closure: Any = None) -> None:
        seen.extend(group["params"][0].grad.clone() for group in optimizer.param_groups)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    monkeypatch.setattr(sys.modules[__name__], "STEPS", STEPS[:1])
    monkeypatch.setattr(sys.modules[__name__], "CLIP", 0.0)
    trained(processes)
    torch.manual_seed(0)
    plain = Chosen().bfloat16().to(STEPS[0][0].inputs.device)  # where that run has taken it
    sums = [torch.zeros_like(parameter, dtype=torch.float32) for parameter in plain.parameters()]
    for batch in STEPS[0]:
        plain.zero_grad()
        (plain(batch.inputs, batch.used).float() / len(STEPS[0])).backward()
        for total, parameter in zip(sums, plain.parameters(), strict=True):
            if parameter.grad is not None:
                total += parameter.grad.float()
    expected = torch.cat([total.flatten() for total in sums])
    (found,) = seen
    assert torch.equal(found[: len(expected)], expected) and not found[len(expected) :].any()
    assert not torch.equal(expected, expected.bfloat16().float()), "a sum that were rounded again would be another"


@pytest.mark.parametrize("stage", [2, 3])
def test_one_micro_batch_is_not_summed_and_gives_the_bits_of_a_sum(processes: Processes, stage: int) -> None:
    """The gradients were reduced in bf16, so that a sum of one in fp32 has the same values in twice the memory."""
    options = RunOptions(precision="bf16", zero_stage=stage, gradient_accumulation_steps=1, max_grad_norm=CLIP)
    config = deepspeed_config(options, world_size=1, on_gpu=False)
    assert "data_types" not in config
    results = []
    for more in ({}, {"data_types": {"grad_accum_dtype": "fp32"}}):
        torch.manual_seed(0)
        model = Chosen()
        engine = Engine(model, torch.optim.AdamW(model.parameters(), lr=0.1), config | more, processes)
        assert engine.optimizer.gradient_accumulation_dtype is (torch.float32 if more else torch.bfloat16)
        steps = [
            engine.step([batch], lambda module, batch: module(batch.inputs, batch.used).float())
            for batches in STEPS
            for batch in batches
        ]
        weights = {name: stored.read().tolist() for name, stored in engine.weights().items()}
        results.append(([(float(step.loss), float(step.grad_norm)) for step in steps], weights))
    assert results[0] == results[1]


def test_gradients_are_clipped_in_one_piece_a_group(processes: Processes) -> None:
    model = Chosen()
    optimizer = torch.optim.AdamW([{"params": [weight]} for weight in model.parameters()], lr=0.1)
    config = deepspeed_config(RunOptions(precision="bf16"), world_size=1, on_gpu=False)
    wrapper = Engine(model, optimizer, config, processes).optimizer
    clipped, (steps,) = wrapper.get_grads_for_norm(for_clipping=True), [wrapper.fp32_groups_gradient_flat_partition]
    assert list(map(id, clipped)) == list(map(id, steps)) and len(clipped) == 4


PARTLY_USED = """
import torch
from panda.engine import gradient_sums
from panda.configuration.options import RunOptions
from panda.engine.deepspeed_config import deepspeed_config
from panda.engine.engine import Engine
from panda.engine.processes import join_processes, leave_processes

processes = join_processes()
gradient_sums.REDUCED_AT_ONCE = PIECE

class Batch:
    tokens = units = 1
    idle = False

    def to(self, device):
        return self

torch.manual_seed(0)
model = torch.nn.ModuleList(torch.nn.Linear(5, 3) for _ in range(2))
optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
options = RunOptions(precision="bf16", gradient_accumulation_steps=1, max_grad_norm=0.5)
engine = Engine(model, optimizer, deepspeed_config(options, world_size=processes.world_size, on_gpu=False), processes)
used = range(2) if processes.world_size == 1 else [processes.rank]
x = torch.ones(1, 5, dtype=torch.bfloat16, device=processes.device)
result = engine.step([Batch()], lambda _, batch: sum(model[each](x).square().sum() for each in used).float())
weights = torch.cat([part.detach() for part in engine.optimizer.bf16_groups_flat])[:36].tolist()
# In one piece, since both ranks write to one pipe.
print(f"{float(result.grad_norm) * processes.world_size} {weights}\\n", end="", flush=True)
leave_processes()
"""


@pytest.mark.skipif(INTERPRETED, reason="nothing is compiled")
@pytest.mark.parametrize("piece", [7, 1 << 29])
def test_a_gradient_of_one_rank_counts_on_all(tmp_path: Path, piece: int) -> None:
    """Each of two ranks has the gradient of one layer; one process has both, of a loss of half the units."""
    script = tmp_path / "partly_used.py"
    script.write_text(PARTLY_USED.replace("PIECE", str(piece)))
    (expected,), found = (run_script(script, ranks=ranks, cwd=tmp_path).splitlines() for ranks in (1, 2))
    assert found == [expected] * 2


def test_a_machine_that_cannot_compile_does_without_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU, here the CPU, whose machine has Triton and no compiler."""
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    monkeypatch.setenv("CXX", "no-such-compiler")
    can_compile.cache_clear()
    target = torch.ones(3)
    casting.cast_into(target, torch.full((3,), 2.0, dtype=torch.bfloat16), factor=0.5)
    casting.cast_into(target, torch.full((3,), 3.0, dtype=torch.bfloat16), add=True)
    casting.cast_into(target, torch.full((3,), 4.0, dtype=torch.bfloat16), add=True, factor=0.25)
    can_compile.cache_clear()
    assert target.tolist() == [5.0] * 3


@pytest.mark.skipif(INTERPRETED or torch.cuda.is_available(), reason="the kernel itself runs")
def test_the_kernel_in_tritons_interpreter() -> None:
    pytest.importorskip("triton")
    assert " 3 passed" in passed_in_interpreter(__file__, "kernel_adds")


@pytest.mark.skipif(INTERPRETED, reason="nothing is compiled in the interpreter")
@pytest.mark.parametrize(("add", "factor"), [(False, 1.0), (True, 1 / 3)])
def test_the_kernel_compiles_for_a_gpu(add: bool, factor: float) -> None:
    """The interpreter takes what the compiler refuses, as an annotation that it does not know."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from panda.engine.casting_triton import _cast

    constants = {"factor": factor, "add": add, "block": 4096}
    given = {"target": "*fp32", "source": "*bf16", "size": "i64"}
    source = ASTSource(fn=_cast, signature=given | dict.fromkeys(constants, "constexpr"), constexprs=constants)
    assert "st.global" in triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"]


@anywhere
@pytest.mark.parametrize(
    ("to", "of", "add"),
    [
        (torch.float32, torch.bfloat16, False),
        (torch.float32, torch.bfloat16, True),
        (torch.bfloat16, torch.float32, False),
    ],
)
def test_the_kernel_adds_and_copies_between_types(to: torch.dtype, of: torch.dtype, add: bool) -> None:
    from panda.engine.casting_triton import BLOCK
    from panda.engine.casting_triton import cast_into

    torch.manual_seed(0)
    sizes = (1, 7, BLOCK, BLOCK + 3) if INTERPRETED else (1, 7, BLOCK, BLOCK + 3, 2**31 + 5)
    for size in sizes:
        target, source = torch.randn(size, device=DEVICE).to(to), torch.randn(size, device=DEVICE).to(of)
        if INTERPRETED:
            source = source.bfloat16().to(of)  # the interpreter (Triton 3.7) cuts to bf16, where a GPU rounds
        for factor in (1.0, 0.25):
            expected = target + factor * source.to(to) if add else factor * source.to(to)
            cast_into(target, source, add=add, factor=factor)
            assert torch.equal(target, expected), (size, factor)
