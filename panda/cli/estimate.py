"""``panda estimate``: the memory that a configuration needs on each GPU, without reading its data or weights."""

from __future__ import annotations

import json
import sys
from contextlib import redirect_stdout
from typing import TYPE_CHECKING
from typing import Any
from typing import NamedTuple

from panda.cli.command import run_command
from panda.cli.configured import configured
from panda.cli.parser import in_short
from panda.files.activity import activity
from panda.files.terminal import fitted
from panda.files.terminal import number_of
from panda.registry import UserError

if TYPE_CHECKING:
    from panda.configuration.configure import Configuration
    from panda.registry.resolve import Resolved
    from panda.run.cards import Card
    from panda.run.compiling import Choice
    from panda.run.estimate import Estimate
    from panda.run.fitting import Estimates
    from panda.run.preparation import Preparation

USAGE = """\
usage: panda estimate CONFIG [--KEY VALUE ...]
           [--gpus N] [--card NAME|GIB] [--sweep] [--json]

Estimate the memory that a run needs on each GPU, by kind, with its longest
rows: max_seq_length tokens in each row of a micro batch. Says which cards it
fits, and the cheapest single change that makes it fit the others. Reads no
data and no weights, and needs no GPU.

  --gpus N          GPUs of the run; by default WORLD_SIZE, or as many as hold
                    one copy of the model
  --card NAME|GIB   h100, h200, a100, ..., or a number of GiB; by default this
                    machine's, or common ones
  --sweep           a table of ZeRO stages and numbers of GPUs
  --json            one JSON object, sizes in bytes

examples:
  panda estimate panda:configs/lora.yaml --zero_stage 3 --gpus 8 --card h100
  panda estimate --arch llama-7b --precision bf16 --sweep"""


def main(argv: list[str] | None = None) -> int:
    """Entry point of ``panda estimate``."""
    return run_command(_estimate, argv)


def _estimate(argv: list[str]) -> None:
    own, rest = _own_flags(argv)
    configuration = configured(rest, USAGE, reads_data=False)
    if configuration is None:
        return

    with redirect_stdout(sys.stderr), activity("loading torch"):  # stdout is for the estimate
        from panda.run.cards import CARDS
        from panda.run.cards import COMMON
        from panda.run.cards import named_card
        from panda.run.preparation import Preparation

    world_size = _world_size(own, configuration)
    prepared = Preparation(configuration, world_size)
    if "card" in own:
        cards = [named_card(own["card"])]
    else:
        cards = [prepared.card] if prepared.card else [CARDS[name.lower()] for name in COMMON]
    found = [_on(prepared, card) for card in cards]
    if "json" in own:
        print(json.dumps(_as_json(prepared, found), indent=2))
        return
    print("\n".join(fitted(_described(prepared).split("\n"), 2)))
    print("\n".join(_table(found)))
    for each in found:
        if not each.estimate.fits(each.card):
            from panda.run.fitting import advice

            text = advice(prepared.estimates, prepared.resolved, world_size, each.card)
            print("\n".join(fitted([f"{each.card.name}: does not fit. {text}"], 2)))
    if "sweep" in own:
        print("\n".join(_sweep(prepared, cards[0])))
    if found[0].estimate.approximate:
        print(f"note: approximate: {found[0].estimate.approximate}")


_FLAGS = {"--gpus": True, "--card": True, "--sweep": False, "--json": False}
"""The command's own flags, and whether each takes a value."""


def _own_flags(argv: list[str]) -> tuple[dict[str, str], list[str]]:
    """The values of the command's own flags in ``argv``, and the rest of it."""
    own: dict[str, str] = {}
    rest: list[str] = []
    words = iter(argv)
    for word in words:
        flag, equals, value = word.partition("=")
        if flag not in _FLAGS:
            rest.append(word)
            continue
        if _FLAGS[flag] and not equals:
            value = next(words, "")
        if _FLAGS[flag] != bool(value):
            raise UserError(f"{flag}: expected {'a value' if _FLAGS[flag] else 'no value'}.\n{in_short(USAGE)}")
        own[flag[2:]] = value
    return own, rest


def _world_size(own: dict[str, str], configuration: Configuration) -> int:
    from panda.run.first_look import planned_world_size

    text = own.get("gpus", str(planned_world_size(configuration)))
    if not text.isdecimal() or int(text) == 0:
        raise UserError(f"--gpus: {text!r} is not a number of GPUs.")
    return int(text)


class _OnCard(NamedTuple):
    """A run on GPUs of one kind."""

    card: Card
    how: str
    """How it keeps activations."""
    compiled: Choice
    estimate: Estimate
    staying: int
    """Layers that stay gathered in the room that is left."""


def _on(prepared: Preparation, card: Card) -> _OnCard:
    from panda.run.compiling import as_chosen
    from panda.run.compiling import choice
    from panda.run.compiling import long_run
    from panda.run.estimate import layers_that_stay

    how, found = _variant(prepared.estimates, prepared.resolved, prepared.world_size, card)
    so = prepared.resolved.with_values({"activation_checkpointing": how}, "estimated")
    model = prepared.estimates.model(prepared.resolved)
    assert model is not None
    staying = layers_that_stay(model, as_chosen(so, model, card), prepared.world_size, card)
    return _OnCard(card, how, choice(so, model, card, long_run(prepared.options)), found, staying)


def _variant(estimates: Estimates, resolved: Resolved, world_size: int, card: Card) -> tuple[str, Estimate]:
    from panda.run.fitting import on_card

    how, found = on_card(estimates, resolved, world_size, card)
    if found is None:
        name = resolved.components["model"].component.name
        raise UserError(f"model {name}: it can only be built with its weights, so its memory cannot be estimated.")
    return how, found


def _described(prepared: Preparation) -> str:
    options, components = prepared.options, prepared.resolved.components
    model = prepared.estimates.model(prepared.resolved)
    assert model is not None
    shape = components.get("arch", components["model"]).component.name
    trained = model.sizes.trained
    here = f"; {trained:,} trained" + " on each GPU" * (options.tensor_parallel_size > 1)
    said = [f"{shape}: {model.parameters:,} parameters{', all trained' if trained == model.parameters else here}"]
    said.append(f"{options.precision}, ZeRO stage {options.zero}, {components['optimizer'].component.name}")
    if options.use_quant:
        said.append(f"base in {options.quant_bits} bits")
    if options.use_lora:
        said.append(f"adapters of rank {options.lora_r}")
    if options.tensor_parallel_size > 1:
        said.append(f"tensor parallel over {options.tensor_parallel_size}")
    said += ["compiled"] * options.compiled
    rows = f"{options.per_gpu_train_batch_size} x {options.max_seq_length:,} tokens"
    gpus = number_of(prepared.world_size, "GPU")
    said.append(f"{options.batching} rows, {rows} a micro batch on each of {gpus}")
    return "\n".join([said[0], ", ".join(said[1:]), ""])


_MOMENTS = {
    "loss": "while the loss is computed",
    "backward": "in the backward pass",
    "step": "in the optimizer's step",
}


def _table(found: list[_OnCard]) -> list[str]:
    """A column for each card, with the parts of the memory in GiB."""
    from panda.engine.memory_parts import NAMES
    from panda.engine.memory_parts import gib

    rows = [["GiB on each GPU", *(each.card.name for each in found)]]
    rows.append(["activation_checkpointing", *(each.how for each in found)])
    rows.append(["compile", *map(_compile_cell, found)])
    for key, name in NAMES.items():
        sizes = [getattr(each.estimate.parts, key) for each in found]
        if any(sizes):
            rows.append([name, *map(gib, sizes)])
    rows.append(["in all", *(gib(each.estimate.parts.total) for each in found)])
    rows.append(["the card has", *(gib(each.card.memory) for each in found)])
    rows.append(["fits", *("yes" if each.estimate.fits(each.card) else "no" for each in found)])
    width, wide = max(len(row[0]) for row in rows), max(9, *(len(cell) for row in rows for cell in row[1:]))
    lines = [row[0].ljust(width) + "".join(f"  {cell:>{wide}}" for cell in row[1:]) for row in rows]
    chosen = [f"compile (auto): {each.compiled.why}." for each in found[:1] if each.compiled.why]
    stay = [f"{each.staying} on {each.card.name}" for each in found if each.staying]
    kept = [f"Layers that stay gathered through a step, in the room that is left: {', '.join(stay)}."] * bool(stay)
    return [*lines, f"A step holds most {_MOMENTS[found[0].estimate.moment]}.", *kept, *chosen, ""]


def _compile_cell(each: _OnCard) -> str:
    if each.compiled.begins is None:
        return str(each.compiled.compile).lower()
    return f"{each.compiled.begins:,}+ steps"


def _sweep(prepared: Preparation, card: Card) -> list[str]:
    """A row for each ZeRO stage, a column for each number of GPUs."""
    from panda.engine.memory_parts import gib
    from panda.run.fitting import RANKS
    from panda.run.fitting import STAGES
    from panda.run.fitting import refused

    options, wide = prepared.options, 10
    ranks = [number for number in RANKS if number % options.tensor_parallel_size == 0]
    lines = [f"GiB on each GPU, {card.name} ({gib(card.memory)} GiB); * fits, s and f with selective or full"]
    lines[0] += " activation_checkpointing"
    lines.append("ZeRO stage".ljust(12) + "".join(f"{f'{number} GPUs':>{wide}}" for number in ranks))
    for stage in STAGES:
        resolved = prepared.resolved.with_values({"zero_stage": stage}, "--sweep")
        if refused(resolved):
            lines.append(f"{stage:<12}refused")
            continue
        cells = []
        for number in ranks:
            how, estimate = _variant(prepared.estimates, resolved, number, card)
            mark = {"selective": " s", "full": " f"}.get(how, "") if options.activation_checkpointing == "auto" else ""
            cells.append(f"{gib(estimate.parts.total)}{mark}{'*' if estimate.fits(card) else ' '}")
        lines.append(f"{stage:<12}" + "".join(f"{cell:>{wide}}" for cell in cells))
    return lines


def _as_json(prepared: Preparation, found: list[_OnCard]) -> dict[str, Any]:
    from panda.run.fitting import cheapest_change

    model, options = prepared.estimates.model(prepared.resolved), prepared.options
    assert model is not None
    cards = []
    for card, how, compiled, estimate, staying in found:
        entry: dict[str, Any] = {
            "card": card.name,
            "memory": card.memory,
            "activation_checkpointing": how,
            "compile": compiled.compile,
            "compile_from_steps": compiled.begins,
            "parts": estimate.parts.by_kind(),
            "total": estimate.parts.total,
            "allocated": estimate.parts.allocated,
            "moment": estimate.moment,
            "fits": estimate.fits(card),
            "layers_that_stay": staying,
        }
        if not entry["fits"]:
            change = cheapest_change(prepared.estimates, prepared.resolved, prepared.world_size, card)
            entry["change"] = change and {**change[0].values, "gpus": change[0].world_size}
        cards.append(entry)
    return {
        "parameters": model.parameters,
        "trained": model.sizes.trained,
        "gpus": prepared.world_size,
        "zero_stage": options.zero,
        "rows": options.per_gpu_train_batch_size,
        "length": options.max_seq_length,
        "flops_per_token": model.flops(options.max_seq_length),
        "approximate": found[0].estimate.approximate or None,
        "cards": cards,
    }
