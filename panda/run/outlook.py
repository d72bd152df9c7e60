"""The outlook: what a run is going to do, in the lines with which it and ``panda check`` begin."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING
from typing import Any
from typing import cast

import torch

from panda.configuration.options import RunOptions
from panda.data.packing import Layout
from panda.data.token_dataset import SampleSet
from panda.engine.deepspeed_config import deepspeed_config
from panda.engine.memory_parts import gib
from panda.engine.processes import Processes
from panda.files.terminal import fitted
from panda.files.terminal import number_of
from panda.models.adapters.experts import ends_of_experts
from panda.models.adapters.experts import expert_parameters
from panda.models.adapters.experts import written_names
from panda.models.adapters.lora import left_bare
from panda.models.adapters.targets import ALL_LINEAR
from panda.models.forward.router_loss import has_router_loss
from panda.models.forward.router_loss import own_weight
from panda.models.forward.varlen_attention import KERNELS
from panda.registry.contexts import StepLoss
from panda.registry.settings import CORE
from panda.run.assembly import evaluation_sets
from panda.run.cards import why_unused
from panda.run.description import changes
from panda.run.description import read_provenance
from panda.run.directory import find_directory
from panda.run.directory import recorded_configuration
from panda.run.directory import run_name
from panda.run.disk_needs import check_disk
from panda.run.disk_needs import disk_needs
from panda.run.fitting import advice
from panda.run.notes import has_own_tokenizer
from panda.run.notes import notes
from panda.run.preparation import Preparation
from panda.run.reference import describe_reference

if TYPE_CHECKING:
    from peft import LoraConfig
    from peft import PeftModel

    from panda.run.continuation import Continuation

LABEL_WIDTH = 12
"""Columns of the labels before what is said."""


def outlook(prepared: Preparation, layout: Layout, directory: Path, checkpoint: Path | None) -> list[str]:
    """What the run of ``prepared`` is going to do in ``directory``, continuing from ``checkpoint``, line by line.

    ``layout``: the rows that it trains on. Raises UserError if the model has no layers for the adapters.
    """
    adapted = prepared.adapted
    parts = {
        "model": [
            *(_model(prepared, adapted), *_parts(prepared)),
            *(*_router_loss(prepared), *_adapters(prepared, adapted)),
        ],
        "weights": [_weights(prepared)],
        "reference": [describe_reference(prepared.reference, prepared.options)] if prepared.reference else [],
        "tokenizer": [_tokenizer(prepared)],
        "text": [prepared.task.text_format()],
        "data": [*_data(prepared, prepared.dataset), *_epoch(prepared.dataset)],
        "evaluation": list(_evaluation(prepared)),
        "steps": [*_steps(layout), *_attention(prepared, layout)],
        "optimizer": [_optimizer(prepared)],
        "engine": [_engine(prepared), *_unused_gpu(), *_compiled(prepared)],
        "memory": list(_memory(prepared)),
        "changed": [
            f"{key} was {each['before']!r} and is {each['now']!r}"
            for key, each in (_changed(prepared) if checkpoint else {}).items()
        ],
        "saves": list(_saves(prepared.options)),
        "output": [_output(prepared, layout, directory, checkpoint)],
    }
    lines = [
        f"{'' if number else label:{LABEL_WIDTH}}{line}"
        for label, part in parts.items()
        for number, line in enumerate(part)
    ]
    before = read_provenance(checkpoint.absolute().parent.parent) if checkpoint else None
    return [*lines, *(f"note: {note}" for note in notes(prepared, layout, before))]


def announce(prepared: Preparation, continuation: Continuation, layout: Layout, processes: Processes) -> Path | None:
    """Print the outlook of the run on rank 0, and return the directory that it names; on other ranks, return None.

    Every rank has to call it. All raise if it cannot be made, and UserError if a new directory has no room for what
    the run writes.
    """

    def tell() -> Path | None:
        if processes.rank != 0:
            return None
        directory = continuation.directory or find_directory(prepared.resolved)[0]
        lines = outlook(prepared, layout, directory, continuation.checkpoint)
        print("\n".join(fitted(lines, LABEL_WIDTH)), flush=True)
        if not directory.exists():  # what is in it may be removed first
            _refuse_without_room(prepared, layout, directory)
        return directory

    return processes.together(tell)


def _refuse_without_room(prepared: Preparation, layout: Layout, directory: Path) -> None:
    """As the beginning of the run does, before there are weights, where their number is known."""
    outline = prepared.outline
    if outline is None:
        return
    parts = prepared.parts_of(outline).values()
    parameters = sum(each.numel() for model in (outline, *parts) for each in model.parameters())
    trained = [each for model in (prepared.adapted or outline, *parts) for each in model.parameters()]
    count = sum(each.numel() for each in trained if each.requires_grad)
    check_disk(directory, disk_needs(prepared.resolved, parameters, count, layout.plan, prepared.task.tokenizer))


# -- the model ----------------------------------------------------------------------------------


def _model(prepared: Preparation, adapted: PeftModel | None) -> str:
    components, outline = prepared.resolved.components, prepared.outline
    name = components["model"].component.name
    of_checkpoint = (prepared.context.config or {}).get("model_type", name)
    kind = components["arch"].component.name if "arch" in components else of_checkpoint
    called = name if kind == name else f"{name} ({kind})"
    if outline is None:
        return f"{called}, which can only be built with weights, so its size is not known before"
    parameters = sum(parameter.numel() for parameter in outline.parameters())
    trained = sum(parameter.numel() for parameter in (adapted or outline).parameters() if parameter.requires_grad)
    if adapted is not None:
        return f"{called}, {parameters:,} parameters; {trained:,} of adapters are trained"
    return f"{called}, {parameters:,} parameters, {'all' if trained == parameters else f'{trained:,}'} trained"


def _parts(prepared: Preparation) -> Iterator[str]:
    """The parts that the task gives the model."""
    for name, part in (prepared.parts_of(prepared.outline) if prepared.outline is not None else {}).items():
        size = sum(parameter.numel() for parameter in part.parameters())
        origin = "from the checkpoint" if name in prepared.parts_from_checkpoint else "drawn from the seed"
        yield f"and {name}, {number_of(size, 'parameter')}, {origin}: trained with it"


def _router_loss(prepared: Preparation) -> Iterator[str]:
    """Whether a mixture of experts is trained with its router loss, with which weight, and who says so."""
    outline: Any = prepared.outline
    setting = prepared.resolved.settings.get("router_aux_loss_coef")
    if outline is None or setting is None or not (expert_parameters(outline) or has_router_loss(outline)):
        return
    config = "the checkpoint's config.json" if prepared.pretrained else "its config"
    added: StepLoss | None = getattr(outline, "step_loss", None)
    if added is not None:
        origin = setting.origin if setting.value is not None else f"output_router_logits in {config}"
        yield f"router loss on, weight {added.weight:g} ({origin})"
    elif not has_router_loss(outline):
        yield f"router loss: {type(outline).__name__} has none that panda knows"
    elif setting.value is not None:
        yield f"router loss off ({setting.origin})"
    else:
        weight = own_weight(outline)
        yield f"router loss off (no output_router_logits in {config})"
        yield f"`router_aux_loss_coef: {weight or 0.001:g}`{', the weight there,' if weight else ''} turns it on"


def _adapters(prepared: Preparation, adapted: PeftModel | None) -> Iterator[str]:
    options = prepared.options
    if not options.use_lora:
        return
    kind = "DoRA" if options.use_dora else "rsLoRA" if options.use_rslora else "LoRA"
    config = cast("LoraConfig", adapted.peft_config["default"]) if adapted is not None else None
    dropout = f"{options.lora_dropout:g}"
    if config and config.lora_dropout != options.lora_dropout:
        dropout = "0, since peft has none on experts and routers"
    yield f"{kind} adapters of rank {options.lora_r}, alpha {options.lora_alpha:g}, dropout {dropout}"
    if config is not None:
        names = sorted({name.rpartition(".")[2] for name in config.target_modules or ()})
        if names:
            yield f"on {', '.join(names)}"
        experts = ends_of_experts(prepared.outline) if prepared.outline is not None else []
        if config.target_parameters:
            written = written_names(prepared.outline, config.target_parameters) if prepared.outline else []
            yield f"{'and ' * bool(names)}on the parameters {', '.join(written)}"
        elif experts:
            yield f"not on the experts: `lora_target_modules` can name {', '.join(experts)}"
        is_on_all = not options.lora_target_modules or ALL_LINEAR in options.lora_target_modules
        if adapted is not None and is_on_all and (bare := left_bare(adapted, ALL_LINEAR)):
            ends = sorted({".".join(name.split(".")[-2:]) for name in bare})
            left = number_of(len(bare), "linear layer")
            yield f"not on {left}, which peft cannot adapt beside experts: {', '.join(ends)}"
        rows = cast("dict[str, list[int]]", config.trainable_token_indices or {})
        if rows:
            yield f"and the {number_of(len(next(iter(rows.values()))), 'row')} of new tokens in {' and '.join(rows)}"


def _weights(prepared: Preparation) -> str:
    options, pretrained = prepared.options, prepared.pretrained
    source = pretrained.describe() if pretrained else f"random, drawn from seed {options.seed}"
    if options.use_quant:
        return f"{source}; frozen, in {options.quant_bits} bits ({'NF4' if options.quant_bits == 4 else 'LLM.int8'})"
    return source + "; frozen" * options.use_lora


def _tokenizer(prepared: Preparation) -> str:
    location, pretrained = prepared.options.tokenizer, prepared.pretrained
    whose = ""
    if has_own_tokenizer(prepared):
        whose = ", the checkpoint's own"
    elif pretrained:
        whose = ", not the checkpoint's"
    elif prepared.resolved.settings["tokenizer"].origin == "default":
        whose = " (the default, which reads bytes)"
    return f"{location}{whose}, {len(prepared.tokenizer):,} entries"


# -- the data -----------------------------------------------------------------------------------


def _data(prepared: Preparation, dataset: SampleSet, location: str | None = None) -> Iterator[str]:
    """What ``dataset`` holds, and what was left out of it."""
    settings = prepared.resolved.settings.values()
    named = [s.value for s in settings if s.location and s.location.holds_data and s.owner != CORE and s.value]
    where = location or ", ".join(value if isinstance(value, str) else ", ".join(value) for value in named)
    report = dataset.report
    read = f" of {number_of(report.rows, 'row')} in {number_of(report.files, 'file')}" if report.files else ""
    yield f"{where}{': ' * bool(where)}{number_of(len(dataset), 'sample')}{read}"
    with_loss = f", {dataset.supervised_tokens:,} of them with loss" * bool(dataset.supervised_tokens)
    yield f"{number_of(dataset.tokens, 'token')}{with_loss}"
    yield report.cut(len(dataset), prepared.options.max_seq_length)
    yield from report.lines()


def _epoch(dataset: SampleSet) -> Iterator[str]:
    if len(dataset.sources) > 1:
        drawn = (f"{s.per_epoch:,} of {s.samples:,} samples of {s.name}" for s in dataset.sources)
        yield f"an epoch is {' and '.join(drawn)}"


def _evaluation(prepared: Preparation) -> Iterator[str]:
    options = prepared.options
    if not prepared.held_out:
        return
    often = number_of(options.eval_steps, "step").removeprefix("1 ")
    yield f"every {often} and at the end" if options.eval_steps else "only at the end"
    if options.eval_data_dir is not None:
        for name, paths in evaluation_sets(options).items():
            yield from _data(prepared, prepared.held_out[name], f"{name}: " * bool(name) + ", ".join(paths))
        return
    held_out = prepared.held_out[""]
    count = number_of(len(held_out), "held-out sample")
    yield f"{count} of the data above (eval_fraction), {number_of(held_out.tokens, 'token')}"
    yield from held_out.report.lines()


def _steps(layout: Layout) -> Iterator[str]:
    plan, rows = layout.plan, layout.filling()
    split = f"{plan.micro_batch} x {plan.accumulation} x {plan.ranks}, micro batch x accumulation x ranks"
    samples = plan.first_samples or plan.step_samples
    steps = f"{number_of(plan.total_steps, 'step')} of {number_of(samples, 'sample')}"
    yield f"{steps} ({split}): {_epochs(layout)}"
    if rows.steps:
        tokens = samples * rows.tokens / rows.samples
        long = f" of up to {layout.max_seq_length:,}" * layout.packed
        shared = f", {rows.samples:,.1f} samples a row" * layout.packed
        yield f"about {tokens:,.0f} tokens a step, in {layout.batching} rows{long}: {rows.share:.1%} data{shared}"


def _attention(prepared: Preparation, layout: Layout) -> Iterator[str]:
    if layout.packed:
        masked = f"with a mask, since {prepared.why_masked}"
        by_kernel = f"by {KERNELS[prepared.kernel]}, without a mask"
        yield f"attention of packed rows: {masked if prepared.why_masked else by_kernel}"


def _epochs(layout: Layout) -> str:
    epochs = layout.plan.end_position / layout.plan.samples
    written = f"{epochs:,.2f}".rstrip("0").rstrip(".")
    return f"{written} epoch{'s' * (written != '1')}" if epochs >= 0.01 else "less than 0.01 epochs"


# -- how it is trained --------------------------------------------------------------------------


def _optimizer(prepared: Preparation) -> str:
    components, rate = prepared.resolved.components, prepared.resolved.settings["learning_rate"]
    name, schedule = components["optimizer"].component.name, components["lr_scheduler"].component.name
    return f"{name}, learning_rate {rate.value:g} ({rate.origin}), schedule {schedule}"


def _engine(prepared: Preparation) -> str:
    options, on_gpu = prepared.options, torch.cuda.is_available()
    config: dict[str, Any] = deepspeed_config(options, world_size=prepared.world_size, on_gpu=on_gpu)
    said = [options.precision, f"ZeRO stage {options.zero}"]
    for key, what in {"offload_optimizer": "optimizer state", "offload_param": "weights"}.items():
        device = (config["zero_optimization"].get(key) or {}).get("device", "none")
        if device != "none":
            said.append(f"{what} offloaded to {device}")
    if options.tensor_parallel_size > 1:
        said.append(f"tensor parallel over {options.tensor_parallel_size}")
    how = prepared.resolved.settings["activation_checkpointing"]
    if how.value != "none":
        said.append(f"{how.value} activation checkpointing{' (auto)' * how.origin.startswith('decided')}")
    compiled = prepared.resolved.settings["compile"]
    if compiled.value is True:
        said.append(f"compiled{' (auto)' * compiled.origin.startswith('decided')}")
    where = f"{number_of(prepared.world_size, 'rank')} on {torch.cuda.get_device_name() if on_gpu else 'CPU'}"
    return f"{', '.join(said)}; {where}"


def _unused_gpu() -> Iterator[str]:
    if why := why_unused():
        yield f"this machine has a GPU, which torch {torch.__version__} cannot use: {why}"


def _compiled(prepared: Preparation) -> Iterator[str]:
    """What `compile: auto` was decided to be, and why; nothing on a CPU."""
    setting = prepared.resolved.settings["compile"]
    if prepared.card and setting.origin.startswith("decided"):
        why = setting.origin.removeprefix("decided:").strip()
        yield f"compile: {str(setting.value).lower()} (auto), {why}"


def _memory(prepared: Preparation) -> Iterator[str]:
    """The memory of each GPU, estimated; nothing on a CPU."""
    card = prepared.card
    model = prepared.estimates.model(prepared.resolved) if card else None
    found = prepared.estimates.of(prepared.resolved, prepared.world_size, prepared.staying) if card else None
    if card is None or model is None or found is None:
        return
    rows = f"with rows of {prepared.options.max_seq_length:,}"
    others = f" (other processes hold {gib(card.held_by_others)})" if card.held_by_others else ""
    needed = f"about {gib(found.parts.total)} of {gib(card.memory)} GiB on each GPU{others}"
    yield f"{needed}, {rows}: {found.parts.describe()}"
    if prepared.staying:
        yield f"in the room that is left, {prepared.staying} of {model.layers} layers stay gathered through a step"
    if not found.fits(card):
        yield advice(prepared.estimates, prepared.resolved, prepared.world_size, card)


def _changed(prepared: Preparation) -> dict[str, dict[str, Any]]:
    """What a run that goes on changes, against the configuration that the run recorded when it last began."""
    return changes(prepared.resolved, recorded_configuration(prepared.resolved))


def _saves(options: RunOptions) -> Iterator[str]:
    """When checkpoints are saved, and what is lost where a run is killed between them."""
    steps = number_of(options.save_steps, "step")
    minutes = f"{options.save_minutes:g} minute{'s' * (options.save_minutes != 1)}"
    often = [*([steps] if options.save_steps else []), *([minutes] if options.save_minutes else [])]
    when = [f"every {text.removeprefix('1 ')}" for text in often] + ["at the end"] * options.save_final
    kept = f"; the newest {options.save_total_limit:,} are kept" if options.save_total_limit else ""
    yield f"{', '.join([*when, 'on Ctrl-C and SIGTERM'])}{kept}"
    lost = f"at most {' or '.join(often)}{', the shorter of them,' * (len(often) > 1)} are" if often else "all of it is"
    yield f"{lost} lost if the run is killed or the machine fails"


def _output(prepared: Preparation, layout: Layout, directory: Path, checkpoint: Path | None) -> str:
    if checkpoint:
        done, total = layout.plan.start_step, layout.plan.total_steps
        left = "" if done < total else "; nothing is left to train"
        return f"{directory}, resumed from {checkpoint}, step {done:,} of {total:,}{left}"
    if prepared.options.resume == "auto":
        return f"{directory}, where there is no checkpoint yet: the run starts from the beginning"
    default = Path("runs") / run_name(prepared.resolved)
    has_number = not prepared.options.output_dir and directory != default and default.exists()
    taken = f" (there is a {default} already)" if has_number else ""
    return f"{directory}{taken}"
