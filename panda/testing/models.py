"""Whether a model keeps what panda relies on: ``check_model("gru-tiny")``."""

from __future__ import annotations

import inspect
import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from panda.configuration.arguments import parse_arguments
from panda.configuration.configure import configure
from panda.files.terminal import number_of
from panda.registry import Catalog
from panda.registry import UserError
from panda.registry.contexts import IGNORED_LABEL
from panda.registry.contexts import ModelContext
from panda.registry.resolve import Resolved
from panda.run.assembly import load_tokenizer
from panda.run.model import build_outline
from panda.run.model import model_context
from panda.testing.report import Report
from panda.testing.runs import Trained
from panda.testing.runs import as_flags
from panda.testing.runs import same_losses
from panda.testing.runs import train
from panda.testing.runs import zero3_at_once

LENGTH = 12
"""Tokens of the rows that are compared."""
TEXTS = ("heron", "frog", "bird", "reeds", "water", "stone", "night", "quiet")


def check_model(name: str, *, lora_target_modules: Sequence[str] = (), **options: object) -> None:
    """Check the model or the arch ``name``, with ``options``: its own, or any key of a run.

    ``lora_target_modules``: the layers for adapters, of a model of which panda does not know the output head.

    Tried are: the shape of its logits, the vocabulary, causality, rows beside each other and padding, packed rows,
    repetition, gradients, a run, ZeRO-3 on two ranks, the export and back, and adapters. Prints a line for each, and
    raises AssertionError that says what is broken and what to do. Choose options that make it small: it is trained on
    the CPU, for a few steps.
    """
    resolved = configure(parse_arguments(as_flags(_naming(name) | options))).resolved
    chosen = resolved.components["model"]
    report = Report(f"check_model {name}: {chosen.label} of {chosen.offer.describe()}")
    tried = report.tried("it is built", "Mend the factory.", lambda: _Trial.of(resolved))
    if tried is not None:
        for check in (_logits, _vocabulary, _causality, _rows, _padding, _packing, _repetition, _gradients):
            report.tried(check.__name__[1:], "Mend `forward`.", lambda check=check: check(report, tried))  # type: ignore[misc]
    report.finish()  # a run of such a model would say less
    with tempfile.TemporaryDirectory(prefix="panda-check-model-") as folder:
        _check_runs(report, Path(folder), _naming(name) | options, resolved, list(lora_target_modules))
    report.finish()


def _naming(name: str) -> dict[str, object]:
    """The key that names ``name``, an arch or else a model."""
    return {"arch" if Catalog().matches("arch", name) else "model": name}


# -- in this process --------------------------------------------------------------------------


@dataclass(frozen=True)
class _Trial:
    """A model with weights that hide nothing, such as a head of zeros would."""

    resolved: Resolved
    context: ModelContext
    module: torch.nn.Module

    @classmethod
    def of(cls, resolved: Resolved) -> _Trial:
        context = model_context(resolved, load_tokenizer(resolved.core.tokenizer))
        module = cls.built(resolved, context)
        draws = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in module.parameters():
                if parameter.is_floating_point():
                    parameter.add_(0.05 * torch.randn(parameter.shape, generator=draws))
        return cls(resolved, context, module.eval())

    @staticmethod
    def built(resolved: Resolved, context: ModelContext) -> torch.nn.Module:
        torch.manual_seed(0)
        module: torch.nn.Module = resolved.components["model"].build(context, torch.nn.Module)
        return module.float()

    def ids(self, rows: int, length: int = LENGTH, seed: int = 0) -> torch.Tensor:
        """Random tokens, int64 [rows, length]."""
        draws = torch.Generator().manual_seed(seed)
        return torch.randint(self.context.vocab_size, (rows, length), generator=draws)

    @torch.no_grad()
    def logits(self, ids: torch.Tensor, **inputs: torch.Tensor) -> torch.Tensor:
        output = self.module(ids, **inputs)
        found: torch.Tensor = getattr(output, "logits", output)
        return found.float()

    @property
    def takes_positions(self) -> bool:
        parameters = inspect.signature(self.module.forward).parameters
        return "position_ids" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def _moved(difference: torch.Tensor) -> float:
    return float(difference.abs().max()) if difference.numel() else 0.0


def _logits(report: Report, trial: _Trial) -> None:
    """Logits [rows, length, entries], finite."""
    logits = trial.logits(trial.ids(2))
    shape, least = list(logits.shape), trial.context.vocab_size
    report.judge(
        "logits",
        len(shape) == 3 and shape[:2] == [2, LENGTH] and shape[2] >= least and bool(logits.isfinite().all()),
        f"{shape} for tokens [2, {LENGTH}] and a tokenizer of {least} entries, "
        + ("finite" if bool(logits.isfinite().all()) else "and some not finite"),
        "`forward(input_ids)` has to return logits [rows, length, entries], at least `context.vocab_size` entries and"
        " all finite, or an object that has them as `logits`.",
    )


def _vocabulary(report: Report, trial: _Trial) -> None:
    """Every entry of the tokenizer has a row, also of a larger tokenizer."""
    every = torch.arange(trial.context.vocab_size).view(1, -1)
    for start in range(0, every.shape[1], LENGTH):
        trial.logits(every[:, start : start + LENGTH])
    larger = replace(trial.context, vocab_size=2 * trial.context.vocab_size + 1)
    advice = (
        "Make the embedding and the head `context.vocab_size` rows, or raise `UserError` where an option says fewer."
    )
    try:
        module = trial.built(trial.resolved, larger).eval()
    except UserError as problem:
        report.kept("vocabulary", f"all {every.numel()} entries have a row; a larger tokenizer is refused: {problem}")
        return
    with torch.no_grad():
        try:
            output = module(torch.tensor([[larger.vocab_size - 1]]))
            entries = getattr(output, "logits", output).shape[-1]
        except (IndexError, RuntimeError) as problem:
            report.broken(
                "vocabulary", f"the last of {larger.vocab_size} entries of a tokenizer has no row: {problem}", advice
            )
            return
    report.judge(
        "vocabulary",
        entries >= larger.vocab_size,
        f"{entries} logits for a tokenizer of {larger.vocab_size} entries, {trial.context.vocab_size} before",
        advice,
    )


def _causality(report: Report, trial: _Trial) -> None:
    """Logits of a token do not depend on later tokens, and do on earlier ones."""
    ids = trial.ids(1)
    logits = trial.logits(ids)
    reference = _moved(logits - trial.logits(trial.ids(1, seed=1)))
    ahead, seen = 0.0, []
    for position in range(LENGTH):
        changed = ids.clone()
        changed[:, position] = (changed[:, position] + 1) % trial.context.vocab_size
        difference = trial.logits(changed) - logits
        ahead = max(ahead, _moved(difference[:, :position]))
        seen.append(_moved(difference[:, position:]))
    report.judge(
        "causality",
        ahead <= 1e-5 * reference,
        f"logits move by {ahead:.2g} where a later token changes ({reference:.2g} where all do)",
        "A token must see only itself and those before it: mask attention, pad convolutions on the left, and take no"
        " mean over the row. Otherwise it is given what it has to predict, and its loss means nothing.",
    )
    blind = [position for position, moved in enumerate(seen) if moved <= 1e-6 * reference]
    report.judge(
        "attention",
        not blind,
        f"every one of {LENGTH} tokens changes its own logits or later ones"
        if not blind
        else f"changing the token at {blind} changes no logits",
        "Every token has to reach the prediction of the next one: look for a mask or a shift by one.",
    )


def _rows(report: Report, trial: _Trial) -> None:
    """The rows of a batch do not see each other."""
    ids = trial.ids(3)
    together, alone = trial.logits(ids), trial.logits(ids[1:2])
    moved, reference = _moved(together[1:2] - alone), _moved(together[0] - together[1])
    report.judge(
        "rows",
        moved <= 1e-3 * reference,
        f"logits of a row move by {moved:.2g} where others are beside it ({reference:.2g} between rows)",
        "Rows of a batch are different samples: take no statistics over them, as batch normalisation does.",
    )


def _padding(report: Report, trial: _Trial) -> None:
    """Tokens that fill a row up, after its sample, change nothing."""
    ids = trial.ids(2)
    pad = trial.context.pad_token_id or 0
    padded = torch.cat([ids, torch.full((2, 5), pad)], dim=1)
    logits = trial.logits(ids)
    moved = _moved(trial.logits(padded)[:, :LENGTH] - logits)
    reference = _moved(logits[0] - logits[1])
    report.judge(
        "padding",
        moved <= 1e-3 * reference,
        f"logits of a sample move by {moved:.2g} where 5 tokens of padding follow it",
        "Rows are filled up on the right, and the model is not given a mask: the length of a row must not matter.",
    )


def _packing(report: Report, trial: _Trial) -> None:
    """Samples that share a row do not see each other, and begin at position 0."""
    if not trial.takes_positions:
        report.note("packing", "`forward` takes no `position_ids`, so `batching: packed` is refused for this model")
        return
    first, second = trial.ids(2, 5), trial.ids(2, 7, seed=1)
    other = trial.ids(2, 5, seed=2)
    positions = torch.cat([torch.arange(5), torch.arange(7)]).repeat(2, 1)
    packed = trial.logits(torch.cat([first, second], dim=1), position_ids=positions)[:, 5:]
    beside = trial.logits(torch.cat([other, second], dim=1), position_ids=positions)[:, 5:]
    alone = trial.logits(second, position_ids=torch.arange(7).repeat(2, 1))
    reference = _moved(alone[0] - alone[1])
    leaked, shifted = _moved(packed - beside), _moved(packed - alone)
    advice = (
        "`position_ids` start at 0 in each sample of a row: attention, convolutions and states must not reach over such"
        " a start. A model that cannot do so should not take `position_ids`: packed rows are then refused."
    )
    report.judge(
        "packing",
        leaked <= 1e-5 * reference and shifted <= 1e-3 * reference,
        f"logits of a sample move by {leaked:.2g} where the one before it in its row changes, and by {shifted:.2g}"
        f" against that sample in a row of its own ({reference:.2g} between samples)",
        advice,
    )


def _repetition(report: Report, trial: _Trial) -> None:
    """Out of training, the same tokens give the same bits."""
    ids = trial.ids(2)
    moved = _moved(trial.logits(ids) - trial.logits(ids))
    report.judge(
        "repetition",
        moved == 0,
        f"logits of the same tokens twice, after `eval()`, move by {moved:.2g}",
        "Draw random numbers only where `self.training`, and keep no state from one call to the next.",
    )


def _gradients(report: Report, trial: _Trial) -> None:
    """The loss moves every parameter."""
    module = trial.module.train()
    module.zero_grad()
    ids = trial.ids(8, 4 * LENGTH)
    output = module(ids)
    logits = getattr(output, "logits", output).float()
    labels = ids[:, 1:].reshape(-1)
    torch.nn.functional.cross_entropy(
        logits[:, :-1].reshape(len(labels), -1), labels, ignore_index=IGNORED_LABEL
    ).backward()  # type: ignore[no-untyped-call]
    trained = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    without = [name for name, parameter in trained.items() if parameter.grad is None or not parameter.grad.any()]
    odd = [name for name, p in trained.items() if p.grad is not None and not bool(p.grad.isfinite().all())]
    module.eval()
    found = f"the loss reaches all {len(trained)} parameters"
    if without or odd:
        found = "; ".join(
            [f"no gradient in {', '.join(without[:8])}"] * bool(without)
            + [f"not finite in {', '.join(odd[:8])}"] * bool(odd)
        )
    report.judge(
        "gradients",
        not (without or odd),
        found,
        "Use every parameter in `forward`, and detach nothing; make what is not trained a buffer, or set"
        " `requires_grad=False`.",
    )
    untrained = sorted({name for name, _ in module.named_parameters()} - set(trained))
    if untrained:
        report.note("gradients", f"frozen: {', '.join(untrained[:8])}")


# -- in runs ----------------------------------------------------------------------------------


def _check_runs(
    report: Report, folder: Path, options: dict[str, object], resolved: Resolved, adapted: list[str]
) -> None:
    """Train the model in several ways, and compare."""
    rows = json.dumps([{"input": f"Where is the {text}?", "target": f"the {text} is here"} for text in TEXTS])
    for name in ("rows", "held-out"):
        (folder / name).mkdir()
        (folder / name / "rows.json").write_text(rows)
    common: dict[str, Any] = {
        "instruction_tuning_data_dir": folder / "rows",
        "max_seq_length": 64,
        "max_steps": 3,
        "per_gpu_train_batch_size": len(TEXTS),
        "per_gpu_eval_batch_size": len(TEXTS),
        "gradient_accumulation_steps": 1,
        "learning_rate": 1e-2,
        "adam_epsilon": 1e-4,  # so that rounding of gradients near zero does not become a step
        "lr_scheduler": "constant",
        "num_workers": 0,
        "save_final": False,
        "prompts": ["Where is the heron?"],
    } | options
    if options.get("optimizer", "adamw") != "adamw":
        del common["adam_epsilon"]
    held_out = {"eval_data_dir": folder / "held-out"}
    whole = report.tried(
        "training", "The message says which part failed.", lambda: train(folder / "whole", **common | held_out)
    )
    if whole is None:
        return
    report.judge(
        "training",
        all(loss is not None for loss in whole.losses) and whole.losses[-1] < whole.losses[0],
        f"losses of {len(whole.losses)} steps: {', '.join(map(_short, whole.losses))}",
        "The loss should fall on 8 samples: look at the scale of the initial weights.",
    )
    _check_zero3(report, folder, common, whole)
    loaded = _check_export(report, folder, common, whole, resolved)
    if loaded:
        targets = {"lora_target_modules": adapted} if adapted else {}
        _check_adapters(report, folder, common | targets, whole)


def _short(loss: float | None) -> str:
    return "not finite" if loss is None else f"{loss:.4f}"


def _check_zero3(report: Report, folder: Path, common: dict[str, Any], whole: Trained) -> None:
    advice = (
        "Under ZeRO-3 a rank has a weight only while the module that owns it runs: call modules, do not change weights"
        " or read their shapes in `forward`, and run the same modules on every rank, whatever the tokens."
    )
    split = {"per_gpu_train_batch_size": len(TEXTS) // 2}
    run = report.tried(
        "ZeRO-3",
        advice,
        lambda: train(folder / "zero3", ranks=2, **common | split | zero3_at_once(folder)),
    )
    if run is not None:
        report.judge("ZeRO-3", *same_losses(run.losses, whole.losses), advice)


def _check_export(report: Report, folder: Path, common: dict[str, Any], whole: Trained, resolved: Resolved) -> bool:
    """Whether the export of ``whole`` trains on where it was."""
    tokenizer = load_tokenizer(resolved.core.tokenizer)
    if build_outline(resolved, model_context(resolved, tokenizer)) is None:
        report.note(
            "export and back",
            "the factory fails under `torch.device('meta')`, where models are made without weights: a run can be"
            " continued, but not start from this model's export. Do not read values of weights in the factory",
        )
        return False
    advice = (
        "The export holds `state_dict()`, and is loaded into a module that the factory makes: all that decides logits"
        " has to be a parameter or a persistent buffer, or follow from options and context."
    )
    again = report.tried(
        "export and back",
        advice,
        lambda: train(folder / "again", **common | {"ckpt_path": whole.export, "max_steps": 1}),
    )
    if again is None:
        return False
    report.judge("export and back", *same_losses(again.losses[:1], [whole.evaluations[-1]["eval_loss"]], 1e-6), advice)
    return True


def _check_adapters(report: Report, folder: Path, common: dict[str, Any], whole: Trained) -> None:
    lora = {"ckpt_path": whole.export, "use_lora": True, "lora_r": 4, "lora_dropout": 0, "max_steps": 2}
    lora |= {"eval_data_dir": folder / "held-out"}
    advice = (
        "Adapters are put on `torch.nn.Linear` layers other than the head: call each of them as a module, and read no"
        " weight of one directly."
    )
    directory = folder / "lora"
    try:
        run = train(directory, **common | lora)
    except AssertionError as problem:
        _, is_refused, reason = str(problem).rpartition("\nerror: ")
        if is_refused and "Traceback" not in str(problem):
            report.note("adapters", f"`use_lora` is refused: {reason.splitlines()[0]}")
        else:
            report.failed("adapters", problem, advice)
        return
    found = load_file(next(run.export.glob("adapter_model*.safetensors")))
    second = [name for name in found if "lora_B" in name]
    still = [name for name in second if not bool(found[name].any())]
    base = whole.evaluations[-1]["eval_loss"]
    same, difference = same_losses(run.losses[:1], [base], 1e-6)
    strangers = [name for name in found if "lora_" not in name]
    report.judge(
        "adapters",
        same and bool(second) and not still and not strangers,
        f"adapters on {number_of(len(second), 'layer')}, of which {len(still)} did not move; first loss against the"
        f" base: {difference}" + (f"; also trained: {', '.join(strangers)}" if strangers else ""),
        advice,
    )
