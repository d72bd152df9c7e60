"""Imports one module of a package in a process of its own, and writes what happened: ``python -m`` this.

Its arguments are a distribution, a module and a file for the answer, which is JSON. Started by probing.py.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import io
import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from panda.configuration.options import RunOptions
from panda.registry import Catalog
from panda.registry import Component
from panda.registry import Offer
from panda.registry import UserError
from panda.registry.catalog import place
from panda.registry.hooks import Hooks
from panda.registry.hooks import has_hooks
from panda.registry.offers import all_installed
from panda.registry.offers import kinds
from panda.registry.options import options_of

HEAVY = (
    *("torch", "transformers", "deepspeed", "numpy", "tokenizers", "safetensors", "peft", "fairscale", "datasets"),
    *("pyarrow", "pandas", "scipy", "sklearn", "matplotlib", "tensorflow", "jax", "triton", "bitsandbytes", "PIL"),
)
"""Libraries that take long to import: a module that declares components leaves them to its factories."""


def probe(distribution: str, module: str) -> dict[str, Any]:
    """What importing ``module`` does, and what is wrong with the components that it was to register."""
    offers = [offer for offer in all_installed() if offer.distribution == distribution and offer.module == module]
    before, folder, threads = set(sys.modules), Path.cwd(), threading.active_count()
    printed = io.StringIO()
    begun = time.perf_counter()
    with contextlib.redirect_stdout(printed):
        problem = _imported(module)
    seconds = time.perf_counter() - begun
    found = {
        "seconds": seconds,
        "heavy": sorted({name for name in HEAVY if name in set(sys.modules) - before}),
        "printed": printed.getvalue(),
        "problem": problem,
        "changes": list(_changes(folder, threads)),
        "components": [],
    }
    os.chdir(folder)
    if not problem:
        found["components"] = [examined(offer) for offer in offers]
    return found


def _imported(module: str) -> str:
    """What is wrong with importing ``module``; empty if nothing."""
    try:
        importlib.import_module(module)
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        return f"{type(error).__name__}: {error}".rstrip(": ") + place(error, module).replace("\n  at", ", at")
    return ""


def _changes(folder: Path, threads: int) -> Iterator[str]:
    """What importing has changed for the whole process."""
    if Path.cwd() != folder:
        yield f"it changes the working directory to {Path.cwd()}"
    if threading.active_count() > threads:
        yield "it starts a thread, which processes that are forked later lack"


def examined(offer: Offer) -> dict[str, Any]:
    """The component of ``offer``, imported in this process, and its problems."""
    answer: dict[str, Any] = {"subject": offer.describe(), "problems": [], "options": 0, "hooks": 0}
    try:
        component = Catalog().load(offer)
        answer["problems"] += list(_hook_problems(offer, component))
    except UserError as problem:
        answer["problems"].append([str(problem), "Mend the package, and install it again if its entry points change."])
        return answer
    if component is None:
        module = importlib.import_module(offer.module)
        if not (module.__doc__ or "").strip():
            answer["problems"].append(["its module has no docstring, so lists say nothing of it", "Write one."])
        return answer
    if not component.summary:
        advice = "Write a docstring for the factory: its first line is shown."
        answer["problems"].append(["it has no description", advice])
    answer["options"] = len(options_of(component.options))
    answer["problems"] += list(_option_problems(component))
    return answer


def _hook_problems(offer: Offer, component: Component | None) -> Iterator[list[str]]:
    """Hooks in the module of ``component``, or of its class, that would never be called."""
    made: list[Any] = [importlib.import_module(offer.module)]
    if component is not None and inspect.isclass(component.factory):
        made.append(component.factory)
    for each in made:
        try:
            Hooks().add(each, offer)
        except UserError as problem:
            yield [str(problem), "Mend the hook: `panda list hooks` shows all of them."]
            return
    if component is not None and offer.kind == "plugin" and inspect.isclass(made[-1]) and not any(map(has_hooks, made)):
        yield ["it implements no hook, so it does nothing", "`panda list hooks` shows what it can implement."]


def _option_problems(component: Component) -> Iterator[list[str]]:
    """Options that have no help, or whose default is not a value that they take."""
    core = options_of(RunOptions)
    if component.kind not in ("arch", "kind") and options_of(component.options) and not _described(component.options):
        yield [f"{component.options.__name__} has no docstring", "Write one."]
    for key, option in options_of(component.options).items():
        if key in core:
            yield [f"its option {key!r} is one of panda's own", "Rename it: nobody could tell which is meant."]
        if not option.doc:
            yield [f"its option {key!r} has no help", "Write a docstring under the field."]
        if option.names is not None and option.names not in kinds():
            yield [
                f"its option {key!r} names components of kind {option.names!r}, which no installed package adds",
                "Require the package that adds it, or declare the kind under `panda.kinds`.",
            ]
    for name, value in vars(component.options).items():
        if name[0] != "_" and name not in options_of(component.options) and isinstance(value, (int, float, str, tuple)):
            yield [
                f"{component.options.__name__}.{name} has no type, so it is no option",
                f"Write `{name}: int = ...`.",
            ]


def _described(options: type) -> bool:
    """Whether the class has a docstring of its own, and not the one that dataclasses make."""
    return bool(options.__doc__) and not str(options.__doc__).startswith(f"{options.__name__}(")


if __name__ == "__main__":
    Path(sys.argv[3]).write_text(json.dumps(probe(sys.argv[1], sys.argv[2])))
    sys.stdout.flush()
    os._exit(0)  # a thread that the module started does not keep this process
