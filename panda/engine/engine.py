"""Optimizer steps: DeepSpeed's engine under panda's contract of the loss.

The loss of a step is the **sum over its supervised tokens, divided by how many there are**, in all
micro batches of all data-parallel ranks. DeepSpeed averages: over micro batches (``scale_wrt_gas``)
and over ranks. So the count is taken before the first backward, every micro batch's loss *sum* is
multiplied by ``ranks / count``, and the average over ranks makes of it the sum over ranks. How the
step is split no longer matters, beyond rounding. Tensor-parallel ranks hold one copy of the model
together: they have the same batches, and count once.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Iterator
from contextlib import contextmanager
from contextlib import nullcontext
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from typing import Protocol
from typing import TypeVar

import torch

from panda.engine.checkpoint_weights import SPLIT_DIMENSIONS
from panda.engine.parameter_layouts import layout_of
from panda.engine.processes import Processes
from panda.engine.tensor_parallel import counts_here
from panda.engine.tensor_parallel import joined
from panda.engine.tensor_parallel import split_dimensions
from panda.registry import UserError
from panda.registry.contexts import TensorLayout
from panda.stored_tensor import StoredTensor
from panda.stored_tensor import Weights
from panda.stored_tensor import whole_shape

BatchType = TypeVar("BatchType", bound="CountedBatch")


class CountedBatch(Protocol):
    """A micro batch that knows its tokens."""

    @property
    def tokens(self) -> int: ...

    @property
    def supervised_tokens(self) -> int: ...

    def to(self: BatchType, device: torch.device) -> BatchType: ...


@dataclass(frozen=True)
class StepResult:
    """What an optimizer step gave, still on the device: reading a value waits for it."""

    loss: torch.Tensor
    """Scalar: loss per supervised token, over the whole step and all ranks."""
    grad_norm: torch.Tensor | float
    """Norm of all gradients before clipping."""
    counts: torch.Tensor
    """float64 [2]: tokens, and supervised tokens, of the whole step on all ranks."""
    applied: bool
    """False where gradients were not finite: then weights and optimizer are as they were before."""


class Engine:
    """A module and its optimizer, trained in data-parallel processes, each of them one or more tensor-parallel."""

    def __init__(
        self, module: torch.nn.Module, optimizer: torch.optim.Optimizer, config: dict[str, Any], processes: Processes
    ) -> None:
        import deepspeed
        from deepspeed.utils import groups

        self.processes = processes
        groups.mpu = processes.mpu  # DeepSpeed would keep that of an engine before
        # DeepSpeed prints its memory at each group of parameters, whatever its logger is set to.
        with _without_effect(optimizer), redirect_stdout(io.StringIO()):
            self.deepspeed, self.optimizer, _, _ = deepspeed.initialize(
                model=module, optimizer=optimizer, config=config, mpu=processes.mpu, dist_init_required=False
            )
        # What DeepSpeed writes of the module. Left to itself it would keep the scales of frozen quantised weights.
        self.deepspeed.module_state_dict = lambda **_: {
            name: tensor.detach() for name, tensor in trained_state(self.module).items()
        }
        if hasattr(optimizer, "bind"):
            optimizer.bind(layout_of(module, self.optimizer, processes))
        self.own_optimizer = optimizer  # what ``self.optimizer`` may be wrapped around
        self.peak_rates = [group["lr"] for group in self.optimizer.param_groups]
        # In fp32 without ZeRO nothing wraps the optimizer, and nobody keeps the norm.
        self._keeps_grad_norm = self.optimizer is not optimizer

    @property
    def module(self) -> torch.nn.Module:
        """The module itself; under ZeRO-3 its weights are partitioned."""
        module: torch.nn.Module = self.deepspeed.module
        return module

    def scale_learning_rate(self, factor: float) -> None:
        """Set every group's learning rate to ``factor`` of its peak, for the next step."""
        for group, peak in zip(self.optimizer.param_groups, self.peak_rates, strict=True):
            group["lr"] = peak * factor

    def step(self, micro_batches: list[BatchType], loss_sum: Callable[[Any, BatchType], torch.Tensor]) -> StepResult:
        """One optimizer step over ``micro_batches`` of this rank; every rank has as many.

        ``loss_sum(module, batch)`` returns the loss of a micro batch, summed over its supervised
        tokens. A step whose gradients are not finite changes nothing, in every precision and ZeRO
        stage; finding that out is what the host waits for, once a step.
        """
        device = self.processes.device
        counts = torch.tensor(
            [sum(batch.tokens for batch in micro_batches), sum(batch.supervised_tokens for batch in micro_batches)],
            dtype=torch.float64,
        ).to(device, non_blocking=True)
        self.processes.sum_(counts)
        supervised = counts[1].clamp(min=1.0).float()
        scale = self.processes.data_ranks / supervised
        total = torch.zeros((), device=device)
        self.deepspeed.train()
        for number, batch in enumerate(micro_batches, 1):
            loss = loss_sum(self.deepspeed, batch.to(device))
            total += loss.detach()
            self.deepspeed.set_gradient_accumulation_boundary(number == len(micro_batches))
            self.deepspeed.backward(loss * scale, scale_wrt_gas=False)
            if number < len(micro_batches):
                self.deepspeed.step()
        grad_norm, applied = self._apply()
        return StepResult(self.processes.sum_(total) / supervised, grad_norm, counts, applied)

    @torch.no_grad()
    def evaluate(
        self, micro_batches: Iterable[BatchType], loss_sum: Callable[[Any, BatchType], torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The loss per supervised token over ``micro_batches`` of all ranks, and ``counts`` as in a step.

        Every rank has to give as many micro batches, if need be some without tokens: under ZeRO-3 they
        gather weights together. Sums are float64, and nothing is waited for.
        """
        module, device = self.evaluating(), self.processes.device
        loss = torch.zeros(1, dtype=torch.float64, device=device)
        tokens = supervised_tokens = 0
        for batch in micro_batches:
            loss += loss_sum(module, batch.to(device))
            tokens += batch.tokens
            supervised_tokens += batch.supervised_tokens
        counts = torch.tensor([tokens, supervised_tokens], dtype=torch.float64).to(device)
        self.processes.sum_(loss)
        self.processes.sum_(counts)
        return loss[0] / counts[1], counts

    @property
    def optimizer_observes(self) -> bool:
        """Whether the optimizer has something to tell of each parameter."""
        return hasattr(self.own_optimizer, "observe")

    def observations(self) -> dict[str, dict[str, float]]:
        """What the optimizer tells of each parameter at its last step: by quantity, by name. Waits for the device."""
        observe = getattr(self.own_optimizer, "observe", dict)
        return {
            quantity: dict(zip(names, values.tolist(), strict=True)) for quantity, (names, values) in observe().items()
        }

    def evaluating(self) -> torch.nn.Module:
        """The module in evaluation mode. Under ZeRO-3 every rank has to run it together."""
        self.deepspeed.eval()
        return self.module

    def weights(self, *, trained_only: bool = False) -> Weights:
        """The module's state, each tensor once and under its first name, in the type that it is computed with.

        Under ZeRO-3, and where it is split, a tensor is gathered when it is read: every rank has to read
        all of them, in order. Only rank 0 is given them, on the CPU; other ranks get empty ones. ``trained_only``
        leaves out what is frozen.
        """
        state: dict[str, torch.Tensor] = (
            trained_state(self.module) if trained_only else self.module.state_dict(keep_vars=True)
        )
        names: dict[int, str] = {}
        for name, tensor in state.items():
            names.setdefault(id(tensor), name)
        return {
            name: StoredTensor(
                whole_shape(state[name]),
                state[name].dtype,
                partial(self._whole, state[name]),
            )
            for name in names.values()
        }

    def _whole(self, tensor: torch.Tensor) -> torch.Tensor:
        from deepspeed.runtime.zero import GatheredParameters

        with GatheredParameters([tensor], enabled=hasattr(tensor, "ds_id")):
            whole = joined(tensor, self.processes)
            return whole.to("cpu", copy=True) if self.processes.rank == 0 else torch.empty(0)

    def save(self, folder: Path, tag: str) -> None:
        """Write what is trained, and the optimizer, to ``folder/tag``. Every rank has to call it.

        Raises what writing did on this rank, once DeepSpeed is through on all: in between, its ranks wait
        for each other.
        """
        problems: list[Exception] = []

        def going_on(write: Callable[..., Any]) -> Callable[..., Any]:
            def tried(*arguments: Any, **keywords: Any) -> Any:
                try:
                    return write(*arguments, **keywords)
                except Exception as problem:
                    problems.append(problem)

            return tried

        writers = (self.deepspeed.checkpoint_engine, "save"), (self.deepspeed, "_copy_recovery_script")
        for owner, name in writers:
            setattr(owner, name, going_on(getattr(owner, name)))
        try:
            self.deepspeed.save_checkpoint(
                str(folder),
                tag=tag,
                client_state={SPLIT_DIMENSIONS: split_dimensions(self.module)},
                save_latest=False,
                exclude_frozen_parameters=True,
            )
        finally:
            for owner, name in writers:
                delattr(owner, name)
        if problems:
            raise problems[0]

    def load(self, folder: Path, tag: str) -> bool:
        """Put back what ``save`` wrote; False where nothing was."""
        with redirect_stdout(io.StringIO()):  # DeepSpeed names its internal formats
            loaded, _ = self.deepspeed.load_checkpoint(str(folder), tag=tag, custom_load_fn=_load_trained_state)
        return loaded is not None

    @torch.no_grad()
    def take_partitions_from(self, masters: list[TensorLayout]) -> None:
        """Under ZeRO-3, make each rank's part of each weight again from its ``masters``. Every rank has to call it."""
        if not hasattr(self.optimizer, "fp32_partitioned_groups_flat"):
            return
        parameters: dict[str, Any] = dict(self.module.named_parameters())
        self.optimizer.checkpoint_event_prologue()  # small weights are whole on each rank: spread them for now
        for layout in masters:
            for segment in layout.segments:
                part = parameters[layout.parameters[segment.parameter]].ds_tensor
                part[: segment.length] = layout.tensor[segment.start : segment.start + segment.length].to(part)
        self.optimizer.checkpoint_event_epilogue()

    def close(self) -> None:
        """Drop DeepSpeed's hooks and buffers."""
        self.deepspeed.destroy()

    def _apply(self) -> tuple[torch.Tensor | float, bool]:
        """Step the optimizer; the norm of all gradients before clipping, and whether the step was taken."""
        if self._keeps_grad_norm:
            self.deepspeed.step()
            return self.deepspeed.get_global_grad_norm(), self.deepspeed.was_step_applied()
        # DeepSpeed's wrappers leave a step out that is not finite. In fp32 without ZeRO there is none,
        # and one bad batch would make every weight NaN.
        parameters = [p for p in self.module.parameters() if counts_here(p, self.processes)]
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if self.processes.tensor_ranks > 1:
            norm = self.processes.sum_(norm.square(), "tensor").sqrt()
        finite = bool(torch.isfinite(norm))
        with nullcontext() if finite else _without_effect(self.optimizer):
            self.deepspeed.step()
        return norm, finite


def trained_state(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """What of the state dict of ``module`` training changes: parameters that are not frozen, and buffers."""
    state: dict[str, torch.Tensor] = {
        name: p for name, p in module.named_parameters(remove_duplicate=False) if p.requires_grad
    }
    for prefix, owner in module.named_modules():
        for name, buffer in owner.named_buffers(recurse=False):
            if name not in owner._non_persistent_buffers_set:
                state[f"{prefix}.{name}" if prefix else name] = buffer
    return state


@torch.no_grad()
def _load_trained_state(src: dict[str, torch.Tensor], dst: torch.nn.Module) -> None:
    """Copy ``src`` to the tensors of ``dst`` that it came from. The parameter names are those DeepSpeed calls with."""
    state = trained_state(dst)
    if src.keys() != state.keys():
        differing = ", ".join(sorted(src.keys() ^ state.keys())[:5])
        raise UserError(f"the checkpoint is of another model: one of them has not {differing}.")
    for name, tensor in state.items():
        tensor.copy_(src[name])


@contextmanager
def _without_effect(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Makes ``optimizer.step()`` do nothing meanwhile.

    DeepSpeed's 16-bit wrappers without ZeRO take a step with zero gradients when they are made, to
    allocate its state. That step counts for bias correction, and decays weights.
    """
    optimizer.step = lambda closure=None: None  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        del optimizer.step
