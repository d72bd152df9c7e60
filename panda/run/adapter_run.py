"""A run directory with adapters, and the base model that they were trained on."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from typing import Any

from panda.configuration.arguments import arguments_of_run
from panda.configuration.configure import Configuration
from panda.configuration.configure import configure_model
from panda.data.ingredients import versions
from panda.registry import UserError
from panda.registry.choosing import BLOCK
from panda.registry.contexts import ModelContext
from panda.registry.offers import OWN_DISTRIBUTION
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
        facts = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(facts, dict) or ("base_weights" in facts and "checkpoint" not in facts):
            raise ValueError("it does not have the form that panda writes")
    except (ValueError, RecursionError) as problem:
        raise UserError(
            f"{file} is damaged: {problem}. It records whether {run} trained adapters or a whole model. Resume the run"
            " with `panda-train --resume`, which writes the file again."
        ) from None
    return facts


def _packages_lacking(facts: Mapping[str, Any]) -> str:
    """How to install what the model of a run came from, by the ``facts`` of its provenance, where it is not here."""
    lacking = []
    for label, component in facts.get("components", {}).items():
        name, version = component["distribution"], component["version"]
        if label.split(" ")[0] not in ("model", "arch") or name == OWN_DISTRIBUTION or not version:
            continue
        if versions(name) != {name: version}:
            lacking.append(f"{name}=={version}")
    if not lacking:
        return ""
    return f" The run's model came from it: `pip install {' '.join(dict.fromkeys(lacking))}`."


def adapter_run(run: Path, ckpt_path: str | None = None, blocked: Sequence[str] = ()) -> AdapterRun | None:
    """The adapter run in ``run``; None if that is not a run directory, or the run trained a whole model.

    Only its model is looked for: its task, optimizer and plugins may be gone. ``ckpt_path``: where the base is now, if
    it was moved; ``blocked``: what ``-p no:`` names. Raises UserError if the base found is not the one that the
    adapters were trained on.
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

    # Weights in pickles are recognised here by their hash, without reading them as such. Where the run had not allowed
    # them, they are not those that it trained on.
    flags = ["--ckpt_path", ckpt_path, "--allow_pickle", "true"] if ckpt_path else []
    flags += [word for name in blocked for word in ("-p", BLOCK + name)]
    with redirect_stdout(sys.stderr):  # stdout is for the model's answers
        try:
            configuration = configure_model(arguments_of_run(run, flags))
        except UserError as problem:
            hint = _packages_lacking(facts)
            if not hint and ckpt_path is None and facts["checkpoint"] is not None:
                hint = f" If the base of the adapters in {run} was moved, give its new location with `--ckpt_path`."
            raise UserError(f"{problem}{hint}") from problem
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
