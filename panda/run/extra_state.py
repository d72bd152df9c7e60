"""What plugins keep in a checkpoint: values as JSON, tensors and copies of weights as safetensors; no pickle."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from safetensors.torch import save_file

from panda.engine.checkpoints.weights_copies import read_copies
from panda.engine.checkpoints.weights_copies import write_copies
from panda.engine.weights_copy import WeightsCopy
from panda.files.terminal import printable
from panda.registry import UserError
from panda.registry.offers import Offer
from panda.run.state import Run

FILE, TENSORS = "plugins.json", "plugins.safetensors"


def _key(offer: Offer) -> str:
    """What stands for the plugin of ``offer`` in a checkpoint: a file of the user's by its name, since it may move."""
    return f"{offer.kind} {Path(offer.file).name}:{offer.name}" if offer.file else f"{offer.kind} {offer.qualified}"


States = Mapping[str, tuple[Offer, dict[str, Any]]]
"""What plugins keep, each under what stands for it in a checkpoint."""


def states_of(run: Run) -> States:
    """What the plugins of ``run`` want to keep in a checkpoint. Every rank has to call it.

    A plugin that fails, on any rank, has none, so that the others' work is saved. Its failure is in ``run.unsaved`` on
    that rank, and ends the run when the checkpoint is complete.
    """
    found: dict[str, tuple[Offer, dict[str, Any]]] = {}
    failed = []
    for offer, save in run.hooks.by_plugin("panda_save_state"):
        key = _key(offer)
        try:
            state = _checked(save(run=run), offer)
            if key in found:
                raise UserError(f"panda_save_state returned a second state. This is a fault of {offer.describe()}.")
            found[key] = offer, state
        except Exception as failure:
            run.unsaved.append(failure)
            failed.append(key)
    everywhere = {key for keys in run.processes.from_all(failed) for key in keys}
    return {key: each for key, each in found.items() if key not in everywhere}


def write_state(run: Run, states: States, checkpoint: Path) -> list[Path]:
    """Write ``states`` to the folder ``checkpoint``; returns the files that this rank wrote. Every rank has to call it,
    and waits for none, since another may have failed before."""
    described: dict[str, Any] = {}
    tensors: dict[str, torch.Tensor] = {}
    copies: dict[str, WeightsCopy] = {}
    for key, (offer, state) in states.items():
        kept = {name: each for name, each in state.items() if _is_kept_apart(each)}
        values = {name: each for name, each in state.items() if name not in kept}
        prefix = f"{len(described)}."
        described[key] = {
            "version": offer.version,
            "values": values,
            "tensors": {name: prefix + name for name, each in kept.items() if torch.is_tensor(each)},
            "weights": {name: prefix + name for name, each in kept.items() if isinstance(each, WeightsCopy)},
        }
        for name, each in kept.items():
            if isinstance(each, WeightsCopy):
                copies[prefix + name] = each
            elif run.processes.rank == 0:
                tensors[prefix + name] = each.detach().cpu().clone(memory_format=torch.contiguous_format)
    evaluated = run.evaluated_weights[1] if run.evaluated_weights else None
    of_evaluated = next((name for name, copied in copies.items() if copied is evaluated), None)
    written = write_copies(run.engine, copies, checkpoint, evaluated=of_evaluated)
    if run.processes.rank == 0 and described:
        if tensors:
            save_file(tensors, checkpoint / TENSORS)
            written.append(checkpoint / TENSORS)
        (checkpoint / FILE).write_text(json.dumps(described, indent=1) + "\n", encoding="utf-8")
        written.append(checkpoint / FILE)
    return written


def _checked(state: Any, offer: Offer) -> dict[str, Any]:
    """``state``, which ``panda_save_state`` of ``offer`` returned. Raises UserError for what would not come back."""
    problem: str | None = None if isinstance(state, dict) else f"{type(state).__qualname__}, not a dict"
    if problem is None:
        problem = _not_json({name: each for name, each in state.items() if not _is_kept_apart(each)})
    if problem:
        raise UserError(
            f"panda_save_state returned {problem}. It returns a dict, by name: of tensors, of copies of weights, and of"
            " values of JSON: None, bools, numbers, texts, and lists and dicts of these, whose keys are texts."
            f" This is a fault of {offer.describe()}."
        )
    return dict(state)


def _is_kept_apart(value: Any) -> bool:
    return isinstance(value, (torch.Tensor, WeightsCopy))


def load_state(run: Run, checkpoint: Path) -> None:
    """Give the plugins of ``run`` what they kept in ``checkpoint``, and print where the two differ in their plugins.

    Every rank has to call it.
    """
    file = checkpoint / FILE
    described = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    tensors = load_file(checkpoint / TENSORS) if (checkpoint / TENSORS).exists() else {}
    notes = []
    for offer, load in run.hooks.by_plugin("panda_load_state"):
        found: Mapping[str, Any] | None = described.pop(_key(offer), None)
        if found is None:
            notes.append(
                f"{_key(offer)} is new in this run: {checkpoint.name} has no state of it, and it starts afresh"
            )
            continue
        copies = read_copies(run.engine, checkpoint, found["weights"].values())
        state = dict(found["values"])
        state |= {name: tensors[written] for name, written in found["tensors"].items()}
        state |= {name: copies[written] for name, written in found["weights"].items()}
        load(run=run, state=state)
    notes += [
        f"{key} is not in this run: its state in {checkpoint.name} is not used, nor kept in later checkpoints"
        for key in described
    ]
    if run.learning_rate_factor != 1:
        notes.append(
            f"until {checkpoint.name} hooks scaled the learning rate by {run.learning_rate_factor:g}, which stays so"
        )
    if run.processes.rank == 0:
        for note in notes:
            print(printable(f"note: {note}"), flush=True)


def _not_json(value: Any, path: str = "") -> str | None:
    """Where ``value`` would not come back from JSON as it is; None where it would."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return None
    items: Any = ()
    if isinstance(value, list):
        items = enumerate(value)
    elif isinstance(value, dict) and all(isinstance(key, str) for key in value):
        items = value.items()
    else:
        keys = [key for key in value if not isinstance(key, str)] if isinstance(value, dict) else []
        return f"at {path or 'its top'} " + (f"the key {keys[0]!r}" if keys else f"a {type(value).__qualname__}")
    return next((found for key, each in items if (found := _not_json(each, f"{path}[{key!r}]"))), None)
