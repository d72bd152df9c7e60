"""A run that trained adapters: the base that it trained them on, for the commands that need both."""

from __future__ import annotations

import json
import sys
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from typing import Any

from panda.configuration.arguments import parse_arguments
from panda.configuration.configure import configure
from panda.configuration.options import RunOptions
from panda.registry import UserError
from panda.registry.contexts import ModelContext
from panda.registry.resolve import Resolved
from panda.run.directory import MODEL_FOLDER
from panda.run.directory import PROVENANCE

if TYPE_CHECKING:
    import torch

    from panda.weights.pretrained import Pretrained
    from panda.weights.stored_tensor import Weights

CKPT_PATH_HELP = "of adapters: the weights that they were trained on, where these have been moved"


@dataclass(frozen=True)
class AdapterRun:
    """A run directory with adapters, and how its base is made."""

    directory: Path
    resolved: Resolved
    context: ModelContext
    pretrained: Pretrained | None

    @property
    def options(self) -> RunOptions:
        options: RunOptions = self.resolved.core
        return options

    def base(self) -> tuple[torch.nn.Module, Weights]:
        """The base, and its weights, which it may still lack; each is read, or drawn again, when it is wanted."""
        from panda.run.model import build_weights

        return build_weights(self.resolved, self.context, self.pretrained)


def trained_adapters(run: Path) -> bool:
    """Whether ``run`` is a run directory, of adapters."""
    return "base_weights" in _facts(run)


def _facts(run: Path) -> dict[str, Any]:
    file = run / PROVENANCE
    if not file.exists():
        return {}
    try:
        facts: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as problem:
        raise UserError(
            f"{file}: damaged: {problem}. It says what {run} trained, adapters or a whole model; `panda-train` with"
            " `--resume` writes it again."
        ) from None
    return facts


def adapter_run(run: Path, ckpt_path: str | None = None) -> AdapterRun | None:
    """The run of adapters in ``run``; None where it is no run, or trained a whole model.

    ``ckpt_path`` says where its base is now. Raises UserError where that is not the base that the
    adapters were trained on.
    """
    facts = _facts(run)
    if "base_weights" not in facts:
        if ckpt_path is not None:
            raise UserError(f"--ckpt_path: {run} is no run of adapters, so there is no base to name.")
        return None
    if ckpt_path is not None and facts["checkpoint"] is None:
        raise UserError(
            f"--ckpt_path: the adapters in {run} were trained on random weights, drawn from the run's seed."
        )

    from panda.run.assembly import load_tokenizer
    from panda.run.model import model_context
    from panda.weights.pretrained import base_weights

    moved = ["--ckpt_path", ckpt_path] if ckpt_path else []
    with redirect_stdout(sys.stderr):  # what is printed is an answer
        try:
            configuration = configure(parse_arguments(["--config", str(run / "config.yaml"), *moved]))
        except UserError as problem:
            if moved or facts["checkpoint"] is None:
                raise
            hint = f"Where the base of the adapters in {run} has been moved, `--ckpt_path` names its new place."
            raise UserError(f"{problem} {hint}") from problem
    resolved, pretrained = configuration.resolved, configuration.pretrained
    found = base_weights(pretrained)
    if pretrained and found != facts["base_weights"]:
        raise UserError(
            f"{run}: its adapters were trained on another base: {facts['checkpoint']}, {facts['base_weights']}. Now"
            f" there is {pretrained.describe()}, {found}. Name the folder of the first with `--ckpt_path`."
        )
    tokenizer: Any = load_tokenizer(str(run / MODEL_FOLDER))
    return AdapterRun(run, resolved, model_context(resolved, tokenizer, pretrained), pretrained)
