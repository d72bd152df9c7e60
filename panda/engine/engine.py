"""Optimizer steps: DeepSpeed's engine under panda's contract of the loss.

The loss of a step is the **sum over its units (supervised tokens, pairs) divided by their number**, over all micro
batches of all data-parallel ranks. DeepSpeed averages over micro batches (``scale_wrt_gas``) and over
ranks instead. So the units are counted before the first backward pass, the loss *sum* of every micro
batch is multiplied by ``ranks / count``, and DeepSpeed's average over ranks turns that into the sum over
ranks. How the step is split then matters only to rounding. Tensor-parallel ranks hold one copy of the
model together: they have the same batches, and count once.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from panda.engine.deciding import RandomState
from panda.engine.deciding import deciding
from panda.engine.freezing import Freezing
from panda.engine.gathering import gather_by_layers
from panda.engine.gathering import with_sizes
from panda.engine.gradient_sums import sum_in_one_pass
from panda.engine.metrics import MetricSums
from panda.engine.metrics import loss_of
from panda.engine.metrics import refuse_other_statistics
from panda.engine.parameter_layouts import layout_of
from panda.engine.partitioned_step import step_with_few_calls
from panda.engine.processes import Processes
from panda.engine.starting import without_effect
from panda.engine.starting import without_reports_of_memory
from panda.engine.steps import BatchType
from panda.engine.steps import CountedBatch
from panda.engine.steps import Evaluated
from panda.engine.steps import Judge
from panda.engine.steps import LossSum
from panda.engine.steps import Statistics
from panda.engine.steps import StepResult
from panda.engine.tensor_parallel import counts_here
from panda.engine.tensor_parallel import joined
from panda.engine.trained_state import trained_state
from panda.registry import UserError
from panda.registry.contexts import StepLoss
from panda.registry.contexts import TensorLayout
from panda.weights.stored_tensor import StoredTensor
from panda.weights.stored_tensor import Weights
from panda.weights.stored_tensor import whole_shape


def with_statistics(loss_sum: Callable[..., Any], statistics: Statistics) -> Callable[..., Any]:
    """``loss_sum`` with ``statistics`` as its third argument."""
    return lambda module, batch: loss_sum(module, batch, statistics)


def _counts(numbers: Iterable[tuple[float, float]]) -> torch.Tensor:
    """float64 [2]: the sums of both of the ``numbers``."""
    tokens = units = 0.0
    for of_tokens, of_units in numbers:
        tokens, units = tokens + of_tokens, units + of_units
    return torch.tensor([tokens, units], dtype=torch.float64)


def _at_least_one(units: torch.Tensor) -> torch.Tensor:
    """``units``, or 1 where there are none: then the loss is 0, too."""
    return torch.where(units > 0, units, torch.ones_like(units))


def _with_gradients_of_nan(objective: torch.Tensor) -> torch.Tensor:
    """``objective``; where it is not finite, with gradients that are NaN, so that all ranks find that out.

    A loss can be infinite and have finite gradients. The device computes it, and the host does not wait; a finite loss
    is multiplied by 1.
    """
    here = objective.detach()
    return objective * (here - here + 1)


def _real(batch: CountedBatch) -> torch.Tensor:
    real = batch.real
    if real is None:
        raise UserError(
            "router_aux_loss_coef: the batches of this task are no rows of tokens (TokenBatch), over which the router"
            " loss is computed. Write `router_aux_loss_coef: 0`."
        )
    return real


class Engine:
    """A module and its optimizer, trained by data-parallel copies of one or more tensor-parallel processes each."""

    def __init__(
        self, module: torch.nn.Module, optimizer: torch.optim.Optimizer, config: dict[str, Any], processes: Processes
    ) -> None:
        import deepspeed
        from deepspeed.utils import groups
        from deepspeed.utils import nvtx

        self.processes = processes
        nvtx.enable_nvtx = False  # ranges for Nsight around a thousand calls a micro batch: 6 % of the host's time
        # DeepSpeed 0.19.8 keeps the mpu of the previous engine in this process where none is given, and tests
        # make several. Can go when `initialize(mpu=None)` resets it.
        groups.mpu = processes.mpu
        self.config = with_sizes(config, module)
        with without_effect(optimizer), without_reports_of_memory():
            self.deepspeed, self.optimizer, _, _ = deepspeed.initialize(
                model=module, optimizer=optimizer, config=self.config, mpu=processes.mpu, dist_init_required=False
            )
        live = self.config.get("zero_optimization", {}).get("stage3_max_live_parameters", 0)
        gather_by_layers(module, self.optimizer, processes.device, live)
        # What DeepSpeed writes of the module. `exclude_frozen_parameters` of 0.19.8 leaves out frozen parameters
        # only, and not the scales of quantised ones, which bitsandbytes adds to the state dict; loading then fails.
        # Can go when DeepSpeed lets the caller choose what is written.
        self.deepspeed.module_state_dict = lambda **_: {
            name: tensor.detach() for name, tensor in trained_state(self.module).items()
        }
        sum_in_one_pass(self.optimizer)
        step_with_few_calls(self.optimizer)
        if hasattr(optimizer, "bind"):
            optimizer.bind(layout_of(module, self.optimizer, processes))
        self._module_parts = tuple(module.modules())
        self.own_optimizer = optimizer  # ``self.optimizer`` may be a wrapper around it
        self.freezing = Freezing(module, self.optimizer, optimizer)
        self.on_part: Callable[[str], None] | None = None
        """Called at the beginning of each part of a step, by its name, and of what comes between steps."""
        self.stated_metrics: tuple[str, ...] | None = None
        """The metrics that the task states for its loss; None where it does not."""
        self._agreed: dict[str, tuple[str, ...]] = {}
        """The names of metrics and statistics that all ranks were found to have, by when they have them."""
        self.peak_rates = [group["lr"] for group in self.optimizer.param_groups]
        # In fp32 without ZeRO DeepSpeed does not wrap the optimizer, and then it does not keep the norm.
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

    def step(
        self,
        micro_batches: list[BatchType],
        loss_sum: LossSum,
        statistics: Callable[[Any, BatchType], Statistics] | None = None,
        judge: Judge | None = None,
    ) -> StepResult:
        """One optimizer step over the ``micro_batches`` of this rank; every rank has the same number.

        ``loss_sum(module, batch)`` returns the loss of a micro batch, summed over its units. With ``statistics`` it is
        given, third, the sums of what ``statistics(module, batch)`` returns for each micro batch of the step. A step
        whose loss or gradients are not finite on any rank changes nothing, in every precision and ZeRO stage; the host
        waits for the device once a step, to find that out. Where they are finite, ``judge`` is asked whether the step
        is taken. A ``StepLoss`` of the module is added.
        """
        device, random = self.processes.device, RandomState(self.processes.device)
        self._part("counts")
        counts = _counts((batch.tokens, batch.units) for batch in micro_batches).to(device, non_blocking=True)
        self.processes.sum_(counts)
        units = _at_least_one(counts[1]).float()
        scale = self.processes.data_ranks / units
        totals, metrics = torch.zeros(2, device=device), self._metric_sums(torch.float32, "training")
        # Asked first: to tell the 2,665 parts of a 7B with adapters takes 6 ms, in which the device may have nothing to
        # do, and to ask them 0.2 (2026-11-26).
        if not all(part.training for part in self._module_parts):
            self.deepspeed.train()
        if statistics is not None:
            loss_sum = with_statistics(loss_sum, self._gathered(micro_batches, statistics, self.deepspeed))
        added: StepLoss | None = getattr(self.module, "step_loss", None)
        routed = self._routed(added, micro_batches, loss_sum) if added and len(micro_batches) > 1 else None
        for number, batch in enumerate(micro_batches, 1):
            self._part("forward")
            here = batch.to(device)
            forward = partial(loss_sum, self.deepspeed, here)
            if added is None:
                loss = loss_of(forward(), idle=here.idle)
                objective = loss.sum * scale
            else:
                returned, term = added.term(_real(here), routed, self.processes.sum_, forward)
                loss = loss_of(returned, idle=here.idle)
                totals[1] += term.detach()
                objective = loss.sum * scale + term * (added.weight * self.processes.data_ranks)
            totals[0] += loss.sum.detach()
            metrics.add(loss.metrics)
            self._part("backward")
            self.deepspeed.set_gradient_accumulation_boundary(number == len(micro_batches))
            self.deepspeed.backward(_with_gradients_of_nan(objective), scale_wrt_gas=False)
            if number < len(micro_batches):
                self.deepspeed.step()
        self._part("optimizer")
        summed, sums = self._over_ranks(totals, metrics, "training")
        mean = summed[0] / units
        grad_norm, applied = self._apply(None if judge is None else partial(judge, mean))
        if not applied:
            random.restore()
        self._part("between steps")
        return StepResult(mean, grad_norm, counts, applied, summed[1] if added else None, metrics.divided(sums))

    def _metric_sums(self, dtype: torch.dtype, when: str) -> MetricSums:
        """Sums of the metrics that the task states, or that all ranks have had before."""
        return MetricSums(dtype, self.processes.device, self._agreed.get(when, self.stated_metrics))

    def _over_ranks(self, totals: torch.Tensor, metrics: MetricSums, when: str) -> tuple[torch.Tensor, torch.Tensor]:
        """``totals`` and the sums of ``metrics`` over all ranks, in one collective."""
        if when not in self._agreed:  # the first time, since the host waits for all ranks
            metrics.agree(self.processes)
            self._agreed[when] = metrics.names or ()
        summed = self.processes.sum_(torch.cat([totals, metrics.sums()]))
        return summed[: len(totals)], summed[len(totals) :]

    def _gathered(
        self,
        micro_batches: Iterable[BatchType],
        statistics: Callable[[Any, BatchType], Statistics],
        module: Any,
    ) -> Statistics:
        """The sums of ``statistics`` over ``micro_batches`` and ranks, by name, in float64."""
        device = self.processes.device
        sums: dict[str, torch.Tensor] = {}
        # The passes that are trained draw the same random numbers again: then dropout is the same in both.
        with torch.no_grad(), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            for batch in micro_batches:
                here = batch.to(device)
                for name, value in statistics(module, here).items():
                    counted = value.detach().to(device, torch.float64)
                    counted = torch.zeros_like(counted) if here.idle else counted
                    sums[name] = sums[name] + counted if name in sums else counted
        names = tuple(sorted(sums))
        # Otherwise ranks would wait for each other, or add up numbers of different statistics.
        if "statistics" not in self._agreed:
            refuse_other_statistics({name: sums[name].shape for name in names}, self.processes)
            self._agreed["statistics"] = names
        elif names != (before := self._agreed["statistics"]):
            raise UserError(
                f"task: its statistics were {', '.join(before)}, and of another step they are {', '.join(names)}."
                " Return the same names for every batch."
            )
        return {name: self.processes.sum_(sums[name].clone()) for name in names}

    def _routed(self, added: StepLoss, micro_batches: list[BatchType], loss_sum: LossSum) -> torch.Tensor:
        """The statistics of the step that ``added`` needs, from a forward pass of each micro batch on every rank."""
        device = self.processes.device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):  # as in _gathered
            counted = [
                added.count(_real(batch), partial(loss_sum, self.deepspeed, batch))
                for batch in (batch.to(device) for batch in micro_batches)
            ]
        return self.processes.sum_(torch.stack(counted).sum(0))

    @torch.no_grad()
    def evaluate(
        self,
        micro_batches: Iterable[BatchType],
        loss_sum: LossSum,
        statistics: Callable[[Any, BatchType], Statistics] | None = None,
    ) -> Evaluated:
        """The loss per unit over the ``micro_batches`` of all ranks, which are read twice where there are statistics.

        Every rank must give the same number of micro batches, some of them idle if need be: under
        ZeRO-3 the ranks gather weights together. Sums are float64. The host does not wait for the device.
        """
        module, device = self.evaluating(), self.processes.device
        if statistics is not None:
            loss_sum = with_statistics(loss_sum, self._gathered(micro_batches, statistics, module))
        total = torch.zeros(1, dtype=torch.float64, device=device)
        metrics = self._metric_sums(torch.float64, "evaluation")
        numbers = []
        for batch in micro_batches:
            here = batch.to(device)
            loss = loss_of(loss_sum(module, here), idle=here.idle)
            total += loss.sum
            metrics.add(loss.metrics)
            numbers.append((batch.tokens, batch.units))
        counts = self.processes.sum_(_counts(numbers).to(device))
        summed, sums = self._over_ranks(total, metrics, "evaluation")
        return Evaluated(summed[0], counts, metrics.pairs(sums))

    @property
    def optimizer_observes(self) -> bool:
        """Whether the optimizer reports quantities of each parameter."""
        return hasattr(self.own_optimizer, "observe")

    def observations(self) -> dict[str, dict[str, float]]:
        """Quantities of each parameter at the last step: by quantity, then by name. Waits for the device."""
        observe = getattr(self.own_optimizer, "observe", dict)
        return {
            quantity: dict(zip(names, values.tolist(), strict=True)) for quantity, (names, values) in observe().items()
        }

    def evaluating(self) -> torch.nn.Module:
        """The module in evaluation mode. Under ZeRO-3 all ranks must run it together."""
        self.deepspeed.eval()
        # ZeRO-3 of DeepSpeed 0.19.8 gathers weights in the order of the pass before, and fails where a module has read
        # another's weight for the first time since, as with a head in a loss without logits. Can go when it then
        # records the order again, as it does where modules run in another order.
        if hasattr(self.optimizer, "parameter_offload"):
            coordinator = self.optimizer.parameter_offload.get_param_coordinator()
            if not coordinator.is_invalid_trace():
                coordinator._invalidate_trace()
        return self.module

    def weights(self, *, trained_only: bool = False) -> Weights:
        """The module's state, each tensor once, under its first name and in the type of the forward pass.

        Under ZeRO-3, and where it is split, a tensor is gathered when it is read: every rank must read
        all of them, in order. Rank 0 gets them, on the CPU; the other ranks get empty ones. ``trained_only``
        leaves out frozen parameters.
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

    def give_weights(self, use: Callable[[Weights], None], *, trained_only: bool = False) -> None:
        """Call ``use`` with the module's weights, as from ``weights``, on rank 0; the other ranks help to gather them.

        Every rank has to call it. ``use`` reads tensors in their order, each at most once, since the other ranks
        gather them in that order. What it left unread is gathered after it, so that no rank waits. Where it fails,
        every rank raises.
        """

        def gather() -> None:
            unread = dict(self.weights(trained_only=trained_only))

            def read(name: str) -> torch.Tensor:
                return unread.pop(name).read()

            try:
                if self.processes.rank == 0:
                    use({name: replace(stored, read=partial(read, name)) for name, stored in unread.items()})
            finally:
                for stored in list(unread.values()):  # on the other ranks, and on rank 0 where ``use`` failed
                    stored.read()

        self.processes.together(gather)

    def _whole(self, tensor: torch.Tensor) -> torch.Tensor:
        from deepspeed.runtime.zero import GatheredParameters

        with GatheredParameters([tensor], enabled=hasattr(tensor, "ds_id")):
            whole = joined(tensor, self.processes)
            return whole.to("cpu", copy=True) if self.processes.rank == 0 else torch.empty(0)

    @torch.no_grad()
    def take_partitions_from(self, masters: list[TensorLayout]) -> None:
        """Under ZeRO-3, set each rank's part of each weight from its ``masters``. Every rank must call this."""
        if not hasattr(self.optimizer, "fp32_partitioned_groups_flat"):
            return
        parameters: dict[str, Any] = dict(self.module.named_parameters())
        self.optimizer.checkpoint_event_prologue()  # small weights are whole on each rank: this partitions them for now
        for layout in masters:
            for segment in layout.segments:
                part = parameters[layout.parameters[segment.parameter]].ds_tensor
                part[: segment.length] = layout.tensor[segment.start : segment.start + segment.length].to(part)
        self.optimizer.checkpoint_event_epilogue()

    def close(self) -> None:
        """Drop DeepSpeed's hooks and buffers."""
        self.deepspeed.destroy()

    def _part(self, name: str) -> None:
        if self.on_part is not None:
            self.on_part(name)

    def _forget_gradients(self) -> None:
        """Drop the gradients of a step that was skipped.

        Under ZeRO-1 and 2 with `offload_optimizer` DeepSpeed 0.19.8 keeps the sums of 16-bit gradients, and adds those
        of the next step to them: after one NaN every later step is skipped. Can go when its overflow path sets
        `averaged_gradients` to None there too.
        """
        if getattr(self.optimizer, "cpu_offload", False):
            for kept in (self.optimizer.averaged_gradients, self.optimizer.all_grad_tensors):
                kept.update(dict.fromkeys(kept))

    @property
    def judges(self) -> bool:
        """Whether it can ask if a step is taken: not under ZenFlow, which steps weights outside of the optimizer."""
        return not getattr(self.optimizer, "zenflow", False)

    def _apply(self, judge: Callable[[Any], bool] | None) -> tuple[torch.Tensor | float, bool]:
        """Step the optimizer if ``judge``, which is given the norm, agrees. Returns the norm of all gradients before
        clipping, and whether the step was taken."""
        if self._keeps_grad_norm:
            stepped = [self.own_optimizer, getattr(self.optimizer, "backup_optimizer", None)]
            asked = None if judge is None else lambda: judge(self.optimizer._global_grad_norm)
            with deciding([each for each in stepped if each is not None], asked) as decision:
                self.deepspeed.step()
            applied = self.deepspeed.was_step_applied()
            if not applied:
                self._forget_gradients()
            return self.deepspeed.get_global_grad_norm(), applied and decision.taken
        # DeepSpeed's wrappers skip a step whose gradients are not finite. In fp32 without ZeRO, 0.19.8 has no
        # wrapper, and one bad batch would make every weight NaN. Can go when it checks there too.
        parameters = [p for p in self.module.parameters() if counts_here(p, self.processes)]
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if self.processes.tensor_ranks > 1:
            norm = self.processes.sum_(norm.square(), "tensor").sqrt()
        taken = bool(torch.isfinite(norm)) and (judge is None or judge(norm))
        with nullcontext() if taken else without_effect(self.optimizer):
            self.deepspeed.step()
        return norm, taken
