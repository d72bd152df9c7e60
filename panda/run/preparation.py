"""The parts of a run before there are process groups and an engine: the same for training and for inspection."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from functools import cached_property
from functools import partial
from typing import TYPE_CHECKING
from typing import Any

import torch

from panda.configuration.configure import Configuration
from panda.configuration.options import RunOptions
from panda.data.held_out import note_shared_samples
from panda.data.selection import trained_and_held_out
from panda.data.token_dataset import SampleSet
from panda.engine.deepspeed_config import live_parameters
from panda.engine.memory_parts import gib
from panda.engine.processes import Processes
from panda.engine.processes import own_device
from panda.files.compilers import what_compiling_lacks
from panda.models.adapters.lora import add_adapters
from panda.models.adapters.quantisation import refuse_quantising
from panda.models.forward.trial import refuse_encoder
from panda.models.forward.varlen_attention import FLASH_4
from panda.models.forward.varlen_attention import VARLEN
from panda.models.forward.varlen_attention import why_masked
from panda.models.forward.varlen_attention import why_not_flash_4
from panda.registry import UserError
from panda.registry.contexts import ModelContext
from panda.registry.contexts import PluginContext
from panda.registry.contexts import Reference
from panda.registry.resolve import Resolved
from panda.run.adapter_run import refuse_another_base
from panda.run.assembly import build_evaluation_tasks
from panda.run.assembly import build_task
from panda.run.assembly import dataset_of
from panda.run.assembly import lay_out
from panda.run.assembly import load_tokenizer
from panda.run.cards import Card
from panda.run.cards import has_bf16
from panda.run.cards import this_card
from panda.run.compiling import Work
from panda.run.compiling import choice
from panda.run.decided import with_decided
from panda.run.decided import with_template_date
from panda.run.estimate import ModelMemory
from panda.run.estimate import layers_that_stay
from panda.run.evaluation_entries import Entries
from panda.run.evaluation_entries import entries_of
from panda.run.evaluation_entries import refuse_unknown
from panda.run.first_look import NO_FP16
from panda.run.fitting import Estimates
from panda.run.fitting import explanation
from panda.run.fitting import on_card
from panda.run.fitting import refuse_too_large
from panda.run.model import build_outline
from panda.run.model import build_with_weights
from panda.run.model import model_context
from panda.run.model import random_weights
from panda.run.model import refuse_splitting
from panda.run.parts import fill_parts
from panda.run.parts import new_parts
from panda.run.records import refuse_metrics
from panda.run.records import refuse_sets
from panda.run.records import refuse_unit
from panda.run.reference import reference_of
from panda.run.reference import refuse_adapted
from panda.run.reference import refuse_unusable
from panda.tasks.task import Task
from panda.tasks.task import stated_metrics
from panda.weights.generation_config import generation_values
from panda.weights.parts import divided
from panda.weights.pretrained import Pretrained
from panda.weights.pretrained import fitted
from panda.weights.stored_tensor import Weights

if TYPE_CHECKING:
    from peft import PeftModel

DECIDED = ("activation_checkpointing", "compile")
"""Keys whose value `auto` a run decides, in this order: it is compiled or not by how it keeps activations."""


class Preparation:
    """The parts of a run that need no other process, each built on first use."""

    def __init__(self, configuration: Configuration, world_size: int = 1) -> None:
        """``world_size``: how many processes the run has, or will have."""
        self.configuration = with_template_date(configuration)
        self.world_size = world_size
        self._parts: dict[str, torch.nn.Module] | None = None
        self.parts_from_checkpoint: frozenset[str] = frozenset()
        """Those of the parts that the task gives the model whose weights are the checkpoint's."""

    @property
    def resolved(self) -> Resolved:
        return self.configuration.resolved

    @property
    def options(self) -> RunOptions:
        return self.configuration.options

    @property
    def pretrained(self) -> Pretrained | None:
        """The checkpoint that the weights come from; None for random ones."""
        return self.configuration.pretrained

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer, from transformers."""
        return load_tokenizer(self.options.tokenizer)

    @property
    def task(self) -> Task:
        """The task over the data to train on."""
        return self._tasks[0]

    @cached_property
    def _tasks(self) -> tuple[Task, dict[str, Task]]:
        """The task, and the task over each set of held-out data. Raises UserError if data of one is missing."""
        task = build_task(self.resolved, self.tokenizer)
        refuse_unit(task.unit, self.resolved.components["task"].offer.describe())
        with self.resolved.components["task"].attributed("`metrics`"):
            refuse_metrics(stated_metrics(task) or (), task.unit)
        refuse_sets(self.options.eval_names, task.unit)
        return task, build_evaluation_tasks(self.resolved, task)

    @cached_property
    def evaluation_entries(self) -> Entries:
        """What is known of the numbers of evaluations, which may be none.

        Raises UserError where an option names one that they will not have.
        """
        if self.options.eval_data_dir is None and not self.options.eval_fraction:
            return Entries()
        found = entries_of(self.resolved, self.task, self.configuration.hooks)
        refuse_unknown(self.resolved, found)
        return found

    @cached_property
    def context(self) -> ModelContext:
        """What the model's factory is given besides its options."""
        return model_context(self.resolved, self.tokenizer, self.pretrained)

    @property
    def outline(self) -> torch.nn.Module | None:
        """The model without weights; None if it can only be built with weights.

        Raises UserError if it is an encoder, cannot be split over the tensor-parallel ranks, cannot be quantised, or
        exceeds the memory here.
        """
        return self._outline_and_random_weights[0]

    @cached_property
    def why_masked(self) -> str:
        """Why attention of packed rows needs a mask, and no kernel for samples of any length serves; empty if one does.

        A model that can only be built with weights is not tried.
        """
        if self.outline is None:
            return "the model can only be built with weights"
        return why_masked(self.outline, own_device(), getattr(torch, self.options.dtype_name))

    @cached_property
    def kernel(self) -> str:
        """Of ``varlen_attention.KERNELS``, that of packed rows which have no mask.

        Raises UserError where the run asks for FlashAttention 4 and cannot have it.
        """
        if not self.options.flash_attention_4:
            return VARLEN
        why = self.why_masked or why_not_flash_4(self.outline, own_device(), getattr(torch, self.options.dtype_name))
        if why:
            raise UserError(f"flash_attention_4: {why}. To train without it, leave `flash_attention_4` out.")
        return FLASH_4

    @cached_property
    def weights(self) -> Weights | None:
        """The tensors of the model, by name: the checkpoint's, or random ones; each is read or drawn when it is needed.

        None if the model can only be built with its weights. Raises UserError if the checkpoint does not fit the model.
        """
        outline, drawn = self._outline_and_random_weights
        if self.pretrained is None:
            return drawn
        if outline is None:
            name = self.resolved.components["model"].component.name
            raise UserError(
                f"ckpt_path: {self.pretrained.folder}: model {name!r} cannot be built without weights, so a run cannot"
                " start from its export. Continue the run with `resume`."
            )
        refuse_another_base(self.pretrained)
        return fitted(outline, self.pretrained, tuple(self.parts_of(outline)))

    @cached_property
    def adapted(self) -> PeftModel | None:
        """A copy of the model without weights, with the run's adapters; None for a run without, or no such model."""
        if self.outline is None or not self.options.use_lora:
            return None
        with torch.device("meta"):
            return add_adapters(deepcopy(self.outline), self.options)

    def parts_of(self, base: torch.nn.Module) -> dict[str, torch.nn.Module]:
        """The parts that the task gives ``base``, the model: on the CPU, with the weights that the checkpoint has of
        them, or else drawn from the seed."""
        if self._parts is None:
            task = self.resolved.components["task"]
            with task.attributed("`extend`"):
                self._parts = new_parts(partial(self.task.extend, base), base, self.options.seed)
            if self.pretrained and self._parts:
                stored = divided(self.pretrained.weights(), self._parts)[1]
                self.parts_from_checkpoint = fill_parts(self._parts, stored, str(self.pretrained.folder))
        return self._parts

    @cached_property
    def _outline_and_random_weights(self) -> tuple[torch.nn.Module | None, Weights | None]:
        outline = build_outline(self.resolved, self.context)
        drawn = random_weights(outline, self.options.seed) if self.pretrained is None else None
        if outline is not None:
            refuse_splitting(outline, self.resolved)
            refuse_encoder(outline, self.resolved.components["model"].component.name)
            if self.options.use_quant:
                refuse_quantising(outline)
            drawn_whole = self.pretrained is None and drawn is None
            refuse_too_large(outline, self.resolved, self.context, self.world_size, drawn=drawn_whole)
        return outline, drawn

    @cached_property
    def reference(self) -> Reference | None:
        """The frozen model that the task asks for; None for none. Raises UserError where that cannot be had."""
        found = reference_of(self.resolved)
        if found is not None:
            refuse_unusable(found, self.resolved, self.tokenizer)
            refuse_adapted(found, self.pretrained)
        return found

    @cached_property
    def card(self) -> Card | None:
        """The GPU by which a run is decided: this process's, and after ``decide`` the smallest; None on a CPU."""
        return this_card(own_device()) if torch.cuda.is_available() else None

    @cached_property
    def compiling_lacks(self) -> str:
        """Why layers are not compiled here; after ``decide`` on any rank. Empty where they can be."""
        return what_compiling_lacks(own_device()) if self.card else "on a CPU it takes longer than it saves"

    @cached_property
    def estimates(self) -> Estimates:
        """Estimates of the memory of this run, and of variants of it, on GPUs."""
        return Estimates(self.context)

    @property
    def staying(self) -> int:
        """How many layers ZeRO-3 keeps gathered through a step on this GPU; 0 on a CPU."""
        if self.options.zero != 3:  # so that not every rank of every run makes an outline for that
            return 0
        model, card = self._memory_on_card()
        return layers_that_stay(model, self.options, self.world_size, card) if model and card else 0

    @property
    def live_parameters(self) -> int:
        """The `stage3_max_live_parameters` for that; 0 where no layer stays."""
        staying = self.staying
        model, _ = self._memory_on_card() if staying else (None, None)
        return live_parameters(model.sizes.layer, model.sizes.outside, staying) if model else 0

    def _memory_on_card(self) -> tuple[ModelMemory | None, Card | None]:
        return (self.estimates.model(self.resolved), self.card) if self.card else (None, None)

    @property
    def flops_per_token(self) -> float | None:
        """Operations of a forward and backward pass for a token of a sample of mean length; None on a CPU."""
        model, _ = self._memory_on_card()
        return model.flops(self.dataset.tokens / max(1, len(self.dataset))) if model else None

    def decide(self, processes: Processes | None = None) -> None:
        """Decide what the configuration leaves to the run, by `auto` for the keys in ``DECIDED``.

        ``processes``: those of the run, each of which calls this. Of unlike GPUs the smallest counts, and compilers
        have to be on all machines. Without them, what is here counts.
        """
        if processes is not None and processes.world_size > 1:
            cards, lacks = zip(*processes.from_all((self.card, self.compiling_lacks)), strict=True)
            self.card = None if None in cards else min(cards, key=lambda card: card.memory)
            self.compiling_lacks = next(filter(None, lacks), "")
        open_keys = [key for key in DECIDED if self.resolved.settings[key].value == "auto"]
        if not open_keys:
            return
        resolved = self.resolved
        once = processes.from_rank_0 if processes else lambda decide: decide()
        for setting in once(lambda: [self._decided().settings[key] for key in open_keys]):
            resolved = resolved.with_values({setting.key: setting.value}, setting.origin)
        self.configuration = replace(self.configuration, resolved=resolved)

    def _decided(self) -> Resolved:
        """The configuration with values for all of ``DECIDED``."""
        found = self.configuration
        if self.compiling_lacks:  # known before memory is estimated, which depends on it
            found = with_decided(found, "compile", "auto", lambda: (False, f"decided: {self.compiling_lacks}"))
        undecided = found.resolved
        found = with_decided(found, DECIDED[0], "auto", lambda: self._checkpointing(undecided))
        half_decided = found.resolved
        return with_decided(found, DECIDED[1], "auto", lambda: self._compiling(half_decided)).resolved

    def _checkpointing(self, resolved: Resolved) -> tuple[str, str]:
        """How activations are kept, and why."""
        if self.card is None:
            return "none", "decided: on a CPU nothing is recomputed"
        how, found = on_card(self.estimates, resolved, self.world_size, self.card, self._work)
        if found is None:
            return how, "decided: how large its activations are is not known"
        needed = f"{gib(found.parts.total)} of {gib(self.card.memory)} GiB"
        return how, f"decided: the fastest that fits, {needed}" if found.fits(self.card) else f"decided: {needed}"

    def _compiling(self, resolved: Resolved) -> tuple[bool, str]:
        """Whether layers are compiled, and why."""
        assert self.card is not None, "on a CPU that was decided before"
        found = choice(resolved, self.estimates.model(resolved), self.card, self._work)
        return found.compile, f"decided: {found.why}"

    @cached_property
    def _work(self) -> Work:
        """What the run computes from its first step on."""
        layout = lay_out(self.options, self.dataset, self.world_size // self.options.tensor_parallel_size)
        length = self.dataset.tokens / max(1, len(self.dataset))
        samples = layout.plan.step_samples / layout.plan.ranks
        return Work(layout.plan.total_steps, samples * length / (layout.filling().share or 1.0), length)

    def explain_lack_of_memory(self) -> str:
        """What a step holds, and what would hold less, for a run whose GPU has no memory left."""
        assert self.card is not None, "only a GPU runs out of memory in this way"
        return explanation(self.estimates, self.resolved, self.world_size, self.card, self.staying)

    def take_base(self) -> tuple[torch.nn.Module, Weights]:
        """The model, and the weights to load into it. They are not kept here, since some are memory-mapped files."""
        outline, weights = self.outline, self.weights
        del self.weights
        if outline is None or weights is None:
            return build_with_weights(self.resolved, self.context)
        return outline, weights

    @cached_property
    def dataset(self) -> SampleSet:
        """The samples to train on, tokenised."""
        return self._samples[0]

    @cached_property
    def _samples(self) -> tuple[SampleSet, SampleSet | None]:
        """The samples to train on, and those of the same data that are held out; None where none are."""
        options = self.options
        return trained_and_held_out(
            dataset_of(self.resolved, self.task),
            max_samples=options.max_samples,
            eval_fraction=options.eval_fraction,
            seed=options.seed,
        )

    @cached_property
    def held_out(self) -> dict[str, SampleSet]:
        """The samples to evaluate on, tokenised, by the name of their set; that of the only one is empty."""
        found = {name: dataset_of(self.resolved, task) for name, task in self._tasks[1].items()}
        if self._samples[1] is not None:
            found[""] = self._samples[1]
        for held_out in found.values():
            note_shared_samples(self.dataset, held_out)
        return found


def add_plugins(configuration: Configuration) -> None:
    """Make the plugins of a run live. Raises UserError where one cannot be built."""
    for plugin in configuration.resolved.plugins:
        configuration.hooks.add(plugin.build(PluginContext(), object), plugin.offer)


def prepare(configuration: Configuration, world_size: int, *, evaluates: bool = False) -> Preparation:
    """All that a run of ``world_size`` processes needs before they join. Raises UserError for what cannot work.

    Missing data, or a missing frozen model, is reported before the model is built, and errors of the model before the
    data is read, which may take long. ``evaluates``: the plugins of the run are live, so that the names of metrics are
    checked, too.
    """
    prepared = Preparation(configuration, world_size)
    if prepared.options.precision == "fp16" and not torch.cuda.is_available():
        raise UserError(NO_FP16)
    if prepared.options.precision == "bf16" and not has_bf16(device := own_device()):
        name = torch.cuda.get_device_name(device)
        raise UserError(f"precision: bf16: {name} does not compute in it. Write `precision: fp16` or `fp32`.")
    if prepared.pretrained:
        generation_values(prepared.pretrained.folder)  # a file that cannot be read is found before the data is
    _ = prepared.task, evaluates and prepared.evaluation_entries, prepared.reference  # in this order
    _ = prepared.outline, prepared.kernel, prepared.weights, prepared.dataset, prepared.held_out
    return prepared
