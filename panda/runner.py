"""The central runner: names -> objects -> engine -> loop. Read it from ``train`` down."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from dataclasses import asdict
from dataclasses import dataclass
from dataclasses import field
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING
from typing import Any
from typing import cast

import torch

from panda.answers.generation import greedy
from panda.configuration.options import LORA_KEYS
from panda.configuration.options import RunOptions
from panda.data.batches import Batch
from panda.data.batches import step_batches
from panda.data.layouts import Layout
from panda.data.order import BatchPlan
from panda.data.token_dataset import SampleSet
from panda.engine.checkpoints.folders import START
from panda.engine.checkpoints.folders import Progress
from panda.engine.checkpoints.folders import damage
from panda.engine.checkpoints.folders import read_progress
from panda.engine.checkpoints.folders import read_shape
from panda.engine.checkpoints.folders import set_aside_later
from panda.engine.checkpoints.writing import load_checkpoint
from panda.engine.checkpoints.writing import save_checkpoint
from panda.engine.deepspeed_config import deepspeed_config
from panda.engine.engine import Engine
from panda.engine.memory import explaining_lack_of_memory
from panda.engine.processes import Processes
from panda.engine.processes import join_processes
from panda.models.adapters.lora import export_adapters
from panda.models.forward.isolation import refuse_leaking
from panda.models.forward.isolation import refuse_without_positions
from panda.optim.schedules import Schedule
from panda.registry import Catalog
from panda.registry import UserError
from panda.registry.contexts import ModelContext
from panda.registry.contexts import PluginContext
from panda.registry.errors import writing
from panda.registry.options import options_of
from panda.registry.resolve import Resolved
from panda.run.assembly import build_evaluation_task
from panda.run.assembly import build_optimizer
from panda.run.assembly import build_outline
from panda.run.assembly import build_schedule
from panda.run.assembly import build_task
from panda.run.assembly import build_weights
from panda.run.assembly import lay_out
from panda.run.assembly import lay_out_evaluation
from panda.run.assembly import load_tokenizer
from panda.run.assembly import make_trainable
from panda.run.assembly import model_context
from panda.run.assembly import refuse_splitting
from panda.run.assembly import refuse_too_large
from panda.run.assembly import seed_random
from panda.run.directory import EXPORT
from panda.run.directory import hold_continued
from panda.run.directory import is_at_end
from panda.run.directory import make_directory
from panda.run.directory import write_description
from panda.run.directory import write_end
from panda.run.lock import RunLock
from panda.run.records import Clock
from panda.run.records import evaluation_record
from panda.run.records import log_record
from panda.tasks.language_modelling import LanguageModelling
from panda.weights.export import DESCRIPTION
from panda.weights.export import describe_model
from panda.weights.export import export
from panda.weights.finding import find_pretrained
from panda.weights.pretrained import Pretrained
from panda.weights.pretrained import base_weights
from panda.weights.pretrained import fitted
from panda.weights.stored_tensor import whole_shape

if TYPE_CHECKING:
    from peft import PeftModel

ANSWERED_PROMPTS = 2
ANSWER_TOKENS = 64
NO_ROOM_LEFT = (
    "Checkpoints that were complete are untouched: make room, and go on from the newest with `--resume auto`."
)
HOPELESS = 50
"""Steps in a row that change nothing before the run is given up; fp16 may need some twenty to find its scale."""


@dataclass
class Run:
    """A run in progress. Hooks are given it; what they may rely on is what is documented here."""

    resolved: Resolved
    """The configuration."""
    directory: Path
    """The run directory."""
    processes: Processes
    """This rank, how many there are, and the device."""
    task: LanguageModelling
    dataset: SampleSet
    layout: Layout
    """The rows of each step."""
    evaluation: Layout | None
    """The rows of the data that the run is evaluated on; None where there is none."""
    schedule: Schedule
    """Completed optimizer steps to a factor of the peak learning rate."""
    engine: Engine
    hook: Any
    """pluggy's caller: ``run.hook.panda_log(run=run, record=...)``."""
    shape: dict[str, Any]
    """What a run that continues this one has to agree on."""
    resumed_from: Path | None = None
    """The checkpoint that the run continues from."""
    step: int = 0
    """Optimizer steps done."""
    checkpoints: list[Path] = field(default_factory=list)
    """Checkpoints that this process has saved."""
    observations: dict[str, dict[str, float]] = field(default_factory=dict)
    """On rank 0, of the last log record: what the optimizer tells of each parameter, by quantity, by name."""
    answers: list[dict[str, str]] = field(default_factory=list)
    """At the end: ``prompt`` and ``answer`` of each prompt."""

    @property
    def plan(self) -> BatchPlan:
        """How the data is cut into steps; ``plan.total_steps`` is the length of the run."""
        return self.layout.plan

    @property
    def options(self) -> RunOptions:
        """The core options."""
        options: RunOptions = self.resolved.core
        return options


@explaining_lack_of_memory()
def train(resolved: Resolved, catalog: Catalog) -> Run | None:
    """Train what ``resolved`` describes and return the finished run; None where it continues one that is finished.

    Started by a launcher, every process calls this; process groups stay up for the caller to leave.
    """
    for plugin in resolved.plugins:
        catalog.add_hooks(plugin.build(PluginContext(), object), plugin.component.name, plugin.offer)
    tokenizer = load_tokenizer(resolved.core.tokenizer)
    task = build_task(resolved, tokenizer)
    pretrained = find_pretrained(resolved.core)
    context = model_context(resolved, tokenizer, pretrained)
    if outline := build_outline(resolved, context):  # before the data is read, which may take long
        refuse_splitting(outline, resolved)
        refuse_too_large(outline, resolved, context)
        if pretrained:
            fitted(outline, pretrained)
    evaluated = build_evaluation_task(resolved, task)
    dataset = task.dataset()
    held_out = evaluated.dataset() if evaluated else None
    processes = join_processes(resolved.core.tensor_parallel_size)
    with RunLock() as lock:
        run = _build(resolved, catalog, context, pretrained, task, dataset, held_out, processes, lock)
        if run is None:
            return None
        try:
            with writing(f"{run.directory}: a file of the run or of a plugin", NO_ROOM_LEFT):
                run.hook.panda_run_start(run=run)
                _train(run)
                _finish(run)
                run.hook.panda_run_end(run=run)
                if processes.rank == 0:
                    write_end(run.directory, run.step, **_at_the_end(run.options, held_out))
        except BaseException as error:
            if not isinstance(error, UserError):
                catalog.tell_source(error)
            catalog.tell_exception(run, error)
            raise
        finally:
            run.engine.close()
    return run


def _build(
    resolved: Resolved,
    catalog: Catalog,
    context: ModelContext,
    pretrained: Pretrained | None,
    task: LanguageModelling,
    dataset: SampleSet,
    held_out: SampleSet | None,
    processes: Processes,
    lock: RunLock,
) -> Run | None:
    options: RunOptions = resolved.core
    if options.precision == "fp16" and processes.device.type == "cpu":
        raise UserError("precision: fp16 needs a GPU. Write `precision: bf16` or `fp32`.")
    continued, checkpoint = processes.agree(lambda: hold_continued(resolved, lock))
    shape = _shape(resolved, pretrained, dataset, checkpoint)
    progress = read_progress(checkpoint, shape) if checkpoint else START
    layout = lay_out(options, dataset, processes.data_ranks, progress)
    evaluation = lay_out_evaluation(options, held_out, processes.data_ranks) if held_out is not None else None
    is_trained = checkpoint and progress.step >= layout.plan.total_steps
    if (
        continued
        and is_trained
        and processes.agree(lambda: is_at_end(continued, progress.step, **_at_the_end(options, held_out)))
    ):
        if processes.rank == 0:
            print(
                f"{continued}: nothing is left to do: {progress.step:,} steps are done and exported. More of"
                f" `max_steps` or `num_train_epochs` trains on; `panda generate {continued}` answers."
            )
        return None
    schedule = build_schedule(resolved, layout.plan)
    config = deepspeed_config(options, world_size=processes.world_size, on_gpu=processes.device.type == "cuda")

    model, weights = build_weights(resolved, context, pretrained)
    model_name = resolved.components["model"].component.name
    if layout.packed:
        refuse_without_positions(model, model_name)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    base = model
    model = make_trainable(model, options, weights, config, processes)
    seed_random(options.seed + processes.data_rank)  # different where data is, for dropout
    optimizer = build_optimizer(resolved, model, processes.device)
    trained = sum(math.prod(whole_shape(p)) for p in model.parameters() if p.requires_grad)
    engine = Engine(model, optimizer, config, processes)
    if layout.packed:
        refuse_leaking(engine.evaluating(), model_name, len(task.tokenizer), processes.device)
    if checkpoint and not load_checkpoint(engine, checkpoint):
        # The random numbers of ranks that are no more, or were not yet, are nobody's: a stretch of new ones.
        seed_random(options.seed + processes.data_rank + progress.step * processes.data_ranks)
        if processes.rank == 0:
            print(f"{checkpoint}: spread anew, since ranks or ZeRO stage are others: exact to rounding", flush=True)
    directory = continued or processes.agree(lambda: make_directory(resolved, lock))

    @writing(f"{directory}: what the run says of itself", NO_ROOM_LEFT)
    def describe() -> None:
        if processes.rank > 0:
            return
        if checkpoint and checkpoint.parent == directory / "checkpoints":
            for path in set_aside_later(checkpoint):
                problem = damage(path)
                why = f"it is damaged: {problem}" if problem else "the run takes another way from here"
                print(f"set aside: {path}, since {why}", flush=True)
        facts = {
            "ranks": processes.world_size,
            "device": str(processes.device),
            "parameters": parameters,
            "trained_parameters": trained,
            "attention": getattr(getattr(model, "config", None), "_attn_implementation", None),
            "samples": len(dataset),
            "tokens": dataset.tokens,
            "supervised_tokens": dataset.supervised_tokens,
            "bad_rows": dataset.report.bad_rows,
            "eval_samples": len(evaluation.dataset) if evaluation else None,
            "checkpoint": pretrained.describe() if pretrained else None,
            **({"base_weights": base_weights(pretrained)} if options.use_lora else {}),
            "vocabulary": (context.config or {}).get("vocab_size"),
            "resumed_from": str(checkpoint) if checkpoint else None,
        }
        write_description(directory, resolved, config, facts)
        dtype = next(engine.module.parameters()).dtype
        chosen = resolved.components["model"]
        described = task.tokenizer, task.chat_template(), chosen, context, pretrained
        describe_model(directory / DESCRIPTION, base, dtype, *described)

    processes.together(describe)
    hook = catalog.plugins.hook
    parts = task, dataset, layout, evaluation, schedule, engine, hook
    return Run(resolved, directory, processes, *parts, shape, resumed_from=checkpoint, step=progress.step)


def _train(run: Run) -> None:
    """The loop. Reads numbers from the device only where they are logged or saved."""
    options, plan, engine = run.options, run.plan, run.engine
    start = read_progress(run.resumed_from, {}) if run.resumed_from else START
    counts = torch.tensor([start.tokens, start.supervised_tokens], dtype=torch.float64).to(run.processes.device)
    clock = Clock(start)
    saved_step = start.step if run.resumed_from else -1
    skipped, skipped_in_a_row = start.skipped_steps, 0

    def progress() -> Progress:
        tokens, supervised = counts.tolist()
        return Progress(run.step, plan.step_end(run.step), int(tokens), int(supervised), skipped)

    def save() -> None:
        begun = time.perf_counter()
        path = save_checkpoint(
            engine,
            run.directory / "checkpoints",
            progress(),
            run.shape,
            keep=options.save_total_limit,
        )
        run.checkpoints.append(path)
        run.hook.panda_checkpoint_saved(run=run, path=path)
        clock.leave_out(time.perf_counter() - begun)

    def evaluate() -> None:
        begun = time.perf_counter()
        _evaluate(run)
        clock.leave_out(time.perf_counter() - begun)

    for step, micro_batches in enumerate(clock.waiting_for(_batches(run, run.layout)), start.step + 1):
        factor = run.schedule(step - 1)
        engine.scale_learning_rate(factor)
        result = engine.step(micro_batches, run.task.loss)
        counts += result.counts
        run.step = step
        skipped += not result.applied
        skipped_in_a_row = 0 if result.applied else skipped_in_a_row + 1
        run.hook.panda_step_end(run=run, step=step)
        if run.processes.rank == 0 and (step % options.logging_steps == 0 or step == plan.total_steps):
            run.observations = engine.observations()
            rate = factor * options.learning_rate
            run.hook.panda_log(run=run, record=log_record(result, progress(), rate, clock, run.observations))
        if skipped_in_a_row == HOPELESS:
            raise UserError(
                f"step {step}: the last {HOPELESS} steps had gradients that are not finite and changed nothing. Lower"
                " `learning_rate`, look at the data, or write `precision: bf16` in place of fp16. `--resume` continues"
                " from a checkpoint before."
            )
        # Before it is saved: a run that goes on from this checkpoint has the record.
        if step == plan.total_steps or (options.eval_steps and step % options.eval_steps == 0):
            evaluate()
        for epoch in range(plan.step_end(step - 1) // plan.samples, plan.step_end(step) // plan.samples):
            run.hook.panda_epoch_end(run=run, epoch=epoch)
        if options.save_steps and step % options.save_steps == 0:
            save()
            saved_step = step
    if run.step == start.step:  # nothing was left to train
        evaluate()
    if saved_step != run.step:
        save()


def _evaluate(run: Run) -> None:
    """The loss on data that is not trained on, if there is any. Draws no random numbers, and leaves no trace."""
    if run.evaluation is None:
        return
    begun = time.perf_counter()
    micro_batches = chain.from_iterable(_batches(run, run.evaluation))
    loss, counts = run.engine.evaluate(micro_batches, run.task.loss)
    if run.processes.rank == 0:
        record = evaluation_record(run.step, loss, counts, begun)
        run.hook.panda_evaluation(run=run, record=record)


def _batches(run: Run, layout: Layout) -> Iterator[list[Batch]]:
    """The micro batches of this rank in each step of ``layout``."""
    return step_batches(
        layout,
        rank=run.processes.data_rank,
        pad_token_id=run.task.tokenizer.pad_token_id or 0,
        num_workers=run.options.num_workers,
        prefetch_factor=run.options.prefetch_factor,
        pin_memory=run.processes.device.type == "cuda",
    )


def _finish(run: Run) -> None:
    """Export the model and have it answer."""
    run.processes.together(partial(_export, run))
    tokenizer = run.task.tokenizer
    prompts = list(run.options.prompts) or run.task.example_prompts(ANSWERED_PROMPTS)
    module = run.engine.evaluating()
    rows = run.options.per_gpu_eval_batch_size
    for start in range(0, len(prompts), rows):
        some = prompts[start : start + rows]
        continued = greedy(
            module,
            [run.task.encode_prompt(prompt) for prompt in some],
            max_new_tokens=ANSWER_TOKENS,
            pad_token_id=tokenizer.pad_token_id or 0,
            eos_token_id=run.task.last_token,
            device=run.processes.device,
        )
        run.answers += [
            {"prompt": prompt, "answer": tokenizer.decode(ids)} for prompt, ids in zip(some, continued, strict=True)
        ]
    if run.processes.rank == 0:
        text = json.dumps(run.answers, indent=2, ensure_ascii=False)
        (run.directory / "answers.json").write_text(text + "\n", encoding="utf-8")


def _at_the_end(options: RunOptions, held_out: SampleSet | None) -> dict[str, Any]:
    """What is done at the end beside the export, in words to compare: of a run that is done it need not be again."""
    return {"eval_data": held_out.fingerprint if held_out else None, "prompts": list(options.prompts)}


def _export(run: Run) -> None:
    """Have rank 0 write what the others help it to gather."""
    unread = dict(run.engine.weights(trained_only=run.options.use_lora))

    def read(name: str) -> torch.Tensor:
        return unread.pop(name).read()

    weights = {name: replace(tensor, read=partial(read, name)) for name, tensor in unread.items()}
    try:
        if run.processes.rank > 0:
            pass
        elif run.options.use_lora:
            adapters = {name: tensor.read() for name, tensor in weights.items()}
            described = load_tokenizer(str(run.directory / DESCRIPTION))
            export_adapters(cast("PeftModel", run.engine.module), adapters, run.directory / EXPORT, described)
        else:
            export(run.directory / DESCRIPTION, weights, run.directory / EXPORT)
    finally:
        for tensor in unread.values():  # on the other ranks, and on rank 0 where writing failed: they wait for it
            tensor.read()


def _shape(
    resolved: Resolved, pretrained: Pretrained | None, dataset: SampleSet, checkpoint: Path | None = None
) -> dict[str, Any]:
    """What the run of ``checkpoint`` and one that continues it have to agree on."""
    recorded = read_shape(checkpoint).get("base_weights") if checkpoint else None
    adapters = ", ".join(f"{key} {getattr(resolved.core, key)}" for key in LORA_KEYS)
    names = {kind: chosen.component.name for kind, chosen in resolved.components.items() if kind != "arch"}
    return {
        **names,
        **{
            f"{kind}.{key}": value
            for kind in ("model", "optimizer")
            for key, value in asdict(resolved.components[kind].options).items()
            if options_of(resolved.components[kind].component.options)[key].location is None
        },
        "weight_decay": resolved.core.weight_decay,
        "tensor_parallel_size": resolved.core.tensor_parallel_size,
        "precision": resolved.core.precision,
        "bit_training": resolved.core.bit_training,
        "weight_decay_on": resolved.core.weight_decay_on,
        "lr_multipliers": list(resolved.core.lr_multipliers),
        "adapters": adapters if resolved.core.use_lora else "none",
        "base": f"quantised to {resolved.core.quant_bits} bits" if resolved.core.use_quant else "whole",
        **({"base_weights": base_weights(pretrained, recorded)} if resolved.core.use_lora else {}),
        "seed": resolved.core.seed,
        "samples": len(dataset),
        "samples_per_epoch": sum(source.per_epoch for source in dataset.sources),
        "tokens": dataset.tokens,
        "data": dataset.fingerprint,
    }
