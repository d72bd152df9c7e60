"""A run directory with adapters, and the base model that they were trained on."""

from __future__ import annotations

import json
import sys
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from typing import Any

from panda.configuration.arguments import parse_arguments
from panda.configuration.configure import Configuration
from panda.configuration.configure import configure
from panda.registry import UserError
from panda.registry.contexts import ModelContext
from panda.run.directory import MODEL_FOLDER
from panda.run.directory import PROVENANCE
from panda.weights.run_folders import EXPORT

if TYPE_CHECKING:
    import torch

    from panda.weights.pretrained import Pretrained
    from panda.weights.stored_tensor import Weights

CKPT_PATH_HELP = "for adapters: where their base is now, if it has been moved"


@dataclass(frozen=True)
class AdapterRun:
    """A run directory with adapters, and all that is needed to rebuild their base."""

    directory: Path
    configuration: Configuration
    context: ModelContext

    def base(self) -> tuple[torch.nn.Module, Weights]:
        """The base, and the weights to load into it; each is read, or drawn again, when it is needed."""
        from panda.run.model import build_weights

        return build_weights(self.configuration.resolved, self.context, self.configuration.pretrained)


def trained_adapters(run: Path) -> bool:
    """Whether ``run`` is the directory of a run that trains adapters."""
    return "base_weights" in _facts(run)


def refuse_another_base(pretrained: Pretrained) -> None:
    """Raise UserError where a run exported the adapters of ``pretrained``, and trained them on another base."""
    adapters = pretrained.adapters
    if adapters is None or adapters.name != EXPORT:
        return
    trained_on = _facts(adapters.parent).get("base_weights")
    if trained_on and trained_on != pretrained.identity:
        raise UserError(
            f"ckpt_path: the adapters in {adapters} were trained on {trained_on}, but the base found is"
            f" {pretrained.describe()}, {pretrained.identity}. Give the location of the original base with `base_path`."
        )


def _facts(run: Path) -> dict[str, Any]:
    file = run / PROVENANCE
    if not file.exists():
        return {}
    try:
        facts: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as problem:
        raise UserError(
            f"{file} is damaged: {problem}. It records whether {run} trained adapters or a whole model. Resume the run"
            " with `panda-train --resume`, which writes the file again."
        ) from None
    return facts


def adapter_run(run: Path, ckpt_path: str | None = None) -> AdapterRun | None:
    """The adapter run in ``run``; None if that is not a run directory, or the run trained a whole model.

    ``ckpt_path``: where the base is now, if it was moved. Raises UserError if the base found is not the
    one that the adapters were trained on.
    """
    facts = _facts(run)
    if "base_weights" not in facts:
        if ckpt_path is not None:
            raise UserError(f"--ckpt_path: {run} did not train adapters, so it has no base. Leave --ckpt_path out.")
        return None
    if ckpt_path is not None and facts["checkpoint"] is None:
        raise UserError(
            f"--ckpt_path: the adapters in {run} were trained on random weights, drawn from the run's seed."
        )

    from panda.run.assembly import load_tokenizer
    from panda.run.model import base_weights
    from panda.run.model import model_context

    moved = ["--ckpt_path", ckpt_path] if ckpt_path else []
    with redirect_stdout(sys.stderr):  # stdout is for the model's answers
        try:
            configuration = configure(parse_arguments(["--config", str(run / "config.yaml"), *moved]))
        except UserError as problem:
            if moved or facts["checkpoint"] is None:
                raise
            hint = f"If the base of the adapters in {run} was moved, give its new location with `--ckpt_path`."
            raise UserError(f"{problem} {hint}") from problem
    pretrained = configuration.pretrained
    found = base_weights(pretrained)
    if pretrained is None and found != facts["base_weights"]:
        raise UserError(
            f"{run}: its adapters were trained on weights that were {facts['base_weights']}, and here they would be"
            f" {found}: other numbers. Use it on a machine like the one that trained it."
        )
    if pretrained and found != facts["base_weights"]:
        raise UserError(
            f"{run}: its adapters were trained on {facts['checkpoint']}, {facts['base_weights']}, but the base found is"
            f" {pretrained.describe()}, {found}. Give the location of the original base with `--ckpt_path`."
        )
    tokenizer: Any = load_tokenizer(str(run / MODEL_FOLDER))
    return AdapterRun(run, configuration, model_context(configuration.resolved, tokenizer, pretrained))
