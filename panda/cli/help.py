"""``panda-train --help``: every flag of what would run, from the options themselves."""

from __future__ import annotations

import shutil
import textwrap

from panda.cli.arguments import Arguments
from panda.registry import Catalog
from panda.registry import UserError
from panda.registry.kinds import KINDS
from panda.registry.options import Option
from panda.registry.options import options_of
from panda.registry.resolve import CHOSEN_BY_NAME
from panda.run_options import RunOptions

USAGE = """\
usage: panda-train [--config FILE] [--KEY VALUE ...] [-p no:NAME]

Train a language model. Every key of the YAML file is a flag, with `-` or `_`; a flag wins over the
file. Name a task, an arch and an optimizer here to see their flags below.

examples:
  panda-train --config configs/instruct-tiny.yaml
  panda-train --config configs/instruct-tiny.yaml --learning_rate 2e-3 --run_name faster
  panda-train --task instruct --arch llama-7b --optimizer adamw --help
  torchrun --nproc_per_node 8 --no-python panda-train --config run.yaml --zero_stage 2

  --config FILE          flat YAML, one `key: value` a line (also --conf_path)
  -p no:NAME             leave a plugin, or everything of a distribution, out
  -h, --help             this"""


def print_train_help(arguments: Arguments) -> None:
    """Print the flags of every run, and of the components that ``arguments`` choose."""
    print(USAGE)
    print_options("options of every run", options_of(RunOptions))
    catalog = Catalog(arguments.blocked)
    for kind, name in _chosen_names(catalog, arguments).items():
        component = catalog.load(catalog.find(kind, name))
        assert component is not None
        print_options(f"{kind} {component.name}: {component.summary}", options_of(component.options))
    print()
    for kind in KINDS.values():
        names = ", ".join(dict.fromkeys(offer.name for offer in catalog.offers(kind.name)))
        print(_wrapped(f"{kind.plural}: {names}", indent=2))


def _chosen_names(catalog: Catalog, arguments: Arguments) -> dict[str, str]:
    core = options_of(RunOptions)
    chosen = {}
    for kind in (*CHOSEN_BY_NAME, "arch", "model"):
        given = arguments.given.get(kind)
        name = core[kind].convert(given) if given else core[kind].default
        if name is not None:
            chosen[kind] = name
    shape = chosen.pop("arch", None) or chosen.pop("model", None)
    if shape is not None:
        try:
            arch = catalog.load(catalog.find("arch", shape))
            chosen["model"] = arch.model if arch is not None and arch.model is not None else shape
        except UserError:
            catalog.find("model", shape)
            chosen["model"] = shape
    return chosen


def print_options(title: str, options: dict[str, Option]) -> None:
    """Print flags, defaults and help of ``options`` under ``title``."""
    if options:
        print(f"\n{title}")
    for key, option in options.items():
        default = ", ".join(map(str, option.default)) if isinstance(option.default, tuple) else option.default
        shown = "" if default in (None, "") else f" [{default!r}]" if isinstance(default, str) else f" [{default}]"
        print(f"  --{key}{shown}")
        print(_wrapped(f"{option.doc} ({option.expects})", indent=25))


def _wrapped(text: str, *, indent: int) -> str:
    width = max(60, min(110, shutil.get_terminal_size().columns))
    return textwrap.fill(text, width, initial_indent=" " * indent, subsequent_indent=" " * indent, break_on_hyphens=False)
