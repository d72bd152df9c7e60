"""Generates pages of docs/ from the code, the tests' tables and the bench's results: `python docs/generate.py`."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

from panda.configuration.options import RunOptions
from panda.configuration.refusals import REFUSALS
from panda.configuration.spellings import ACCEPTED_SPELLINGS
from panda.engine.deepspeed_config import OWNERS
from panda.engine.deepspeed_config import REFUSED
from panda.registry import Catalog
from panda.registry.catalog import OWN_DISTRIBUTION
from panda.registry.options import REQUIRED
from panda.registry.options import Option
from panda.registry.options import options_of

GENERATED = "<!-- Written by docs/generate.py from the code. Change the code, and run it again. -->\n\n"


def configuration() -> str:
    """Every key of the core and of panda's own components."""
    parts = [
        "# Configuration\n\n" + GENERATED,
        "A configuration is a flat YAML file, `key: value`, and every key is a flag: `--learning_rate 2e-5`. Per key,"
        " a flag wins over the file, the file over the arch, the arch over the default. `panda check FILE` prints each"
        " value with where it came from.\n\nA list is written `[a, b]` in YAML, and `--key a b` or `--key a,b` as a"
        " flag; a list of texts only as `--key a b`, since a text may contain commas. `--key`"
        " without a value is true. Of PandaLLM's spellings, "
        + " and ".join(f"`{old}` is taken as `{new}`" for old, new in ACCEPTED_SPELLINGS.items())
        + ", with a warning.\n\n## Every run\n\n",
        _table(options_of(RunOptions)),
    ]
    catalog = Catalog()
    for kind in catalog.kinds.values():
        if kind.name == "kind" or (kind.providers and OWN_DISTRIBUTION not in kind.providers):
            continue
        parts.append(f"\n## {kind.plural}\n\n{kind.summary[0].upper()}{kind.summary[1:]}.\n")
        shown = set()
        for offer in catalog.offers(kind.name):
            component = catalog.load(offer) if offer.distribution == OWN_DISTRIBUTION else None
            if component is None or component in shown:
                continue
            shown.add(component)
            aliases = f" (also {', '.join(f'`{alias}`' for alias in component.aliases)})" if component.aliases else ""
            parts.append(f"\n### `{component.name}`{aliases}\n\n{component.doc}\n\n")
            if component.model is not None:
                values = ", ".join(f"{key} {value}" for key, value in component.factory().items())
                parts.append(f"Model `{component.model}`: {values}.\n")
            elif options_of(component.options):
                parts.append(_table(options_of(component.options)))
    return "".join(parts)


def refusals() -> str:
    """The table of refusals."""
    lines = [f"| {r.what} | {r.reason} | {r.instead} |" for r in REFUSALS]
    owned = [f"| `{key}` | it follows from `{owner}` |" for key, owner in OWNERS.items()]
    refused = [f"| `{key}` | {reason} |" for key, reason in REFUSED.items()]
    return (
        "# What cannot be combined\n\n" + GENERATED + "Refused by `panda-train` and `panda check` before anything is"
        " built.\n\n| refused | since | instead |\n|---|---|---|\n"
        + "\n".join(lines)
        + "\n\n## Keys of DeepSpeed\n\nRefused in the file that `deepspeed_config` names, as is every key that"
        " DeepSpeed does not have.\n\n| refused | since |\n|---|---|\n" + "\n".join([*owned, *refused]) + "\n"
    )


def speed() -> str:
    """What was measured on GPUs."""
    page: str = runpy.run_path(str(Path(__file__).parent / "speed.py"))["speed"]()
    return page.format(generated=GENERATED)


def support() -> str:
    """What works together, and what tries it."""
    docs = Path(__file__).parent
    if (tests := str(docs.parent / "tests")) not in sys.path:
        sys.path.append(tests)
    page: str = runpy.run_path(str(docs / "support.py"))["support"]()
    return page.format(generated=GENERATED)


def _table(options: dict[str, Option]) -> str:
    rows = [f"| `{key}` | {_default(option)} | {option.expects} | {option.doc} |" for key, option in options.items()]
    return "\n".join(["| key | default | takes | |", "|---|---|---|---|", *rows]) + "\n"


def _default(option: Option) -> str:
    value = option.default
    if value is REQUIRED:
        return "required"
    if value is None or value == ():
        return ""
    return f"`{', '.join(map(str, value))}`" if isinstance(value, tuple) else f"`{value!r}`"


PAGES = {"configuration.md": configuration, "refusals.md": refusals, "speed.md": speed, "support.md": support}

if __name__ == "__main__":
    for name, page in PAGES.items():
        (Path(__file__).parent / name).write_text(page(), encoding="utf-8")
