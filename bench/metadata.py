"""Measures what installed packages that a run does not name cost: CPU time of whole commands.

    python bench/metadata.py [--distributions 1000] [--repeats 7]

Makes that many distributions in a temporary folder, each with a METADATA of some kilobytes, an
entry_points.txt with one optimizer, and a module that registers it; puts the folder on the path of each
command, and prints the CPU time (user and system, the least of the repeats) without them and with them. What
they add is given in multiples of what they add to one `importlib.metadata.entry_points()`.
"""

from __future__ import annotations

import argparse
import os
import platform
import random
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

MODULE = '''\
"""The {name} optimizer, as a package offers one."""

from dataclasses import dataclass
from typing import Annotated

from panda import Meta, register_optimizer


@dataclass(frozen=True)
class Options:
    """Options of {name}."""

    {key}_momentum: Annotated[float, Meta(ge=0, lt=1)] = 0.9
    """Part of the last step that is taken again."""
    {key}_epsilon: Annotated[float, Meta(gt=0)] = 1e-8
    """Added to the denominator."""


@register_optimizer("{name}", options=Options)
def build(options, context):
    """Steps as {name} takes them.

    It is made for this measurement.
    """
    from torch.optim import SGD

    momentum = options.{key}_momentum
    return SGD(context.param_groups, momentum=momentum)
'''

METADATA = """\
Metadata-Version: 2.1
Name: {name}
Version: {version}
Summary: The {name} optimizer for panda
Author-email: Somebody <somebody@example.org>
License: Apache-2.0
Project-URL: Homepage, https://example.org/{name}
Keywords: deep learning,optimizer,training
Classifier: Development Status :: 4 - Beta
Classifier: Intended Audience :: Science/Research
Classifier: License :: OSI Approved :: Apache Software License
Classifier: Programming Language :: Python :: 3
Classifier: Programming Language :: Python :: 3.11
Classifier: Topic :: Scientific/Engineering :: Artificial Intelligence
Requires-Python: >=3.11
Description-Content-Type: text/markdown
Requires-Dist: torch>=2.0
Requires-Dist: numpy
Provides-Extra: test
Requires-Dist: pytest; extra == "test"

"""
README = "What it is, how it is installed, and what it was measured to do on data that nobody else has seen.\n" * 40

ENTRY_POINTS = ("-c", "import importlib.metadata; importlib.metadata.entry_points()")
TRAIN, PANDA = ("-m", "panda.cli.train"), ("-m", "panda")
COMMANDS: dict[str, tuple[str, ...]] = {
    "entry_points()": ENTRY_POINTS,
    "panda show optimizer adamw": (*PANDA, "show", "optimizer", "adamw"),
    "a misspelt name": (*TRAIN, "--arch", "llama-tinny"),
    "a misspelt optimizer": (*TRAIN, "--arch", "llama-tiny", "--optimizer", "adamv"),
    "panda-train --help": (*TRAIN, "--help"),
    "panda list": (*PANDA, "list"),
    "a misspelt key": (*TRAIN, "--arch", "llama-tiny", "--learning_rat", "1e-3"),
    "a key of what is not chosen": (*TRAIN, "--arch", "llama-tiny", "--trust_ratio_max", "3"),
}


def install(folder: Path, number: int) -> None:
    """Make ``number`` distributions in ``folder``."""
    draw = random.Random(0)
    for index in range(number):
        key = "".join(draw.choice("bcdfgklmnprstvz") + draw.choice("aeiou") for _ in range(4))
        name = f"{key}-{index}"
        stem = name.replace("-", "_")
        info = folder / f"{stem}-1.{index % 10}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(METADATA.format(name=name, version=f"1.{index % 10}") + README)
        (info / "entry_points.txt").write_text(f"[panda.optimizers]\n{name} = {stem}.optimizer\n")
        package = folder / stem
        package.mkdir()
        (package / "__init__.py").touch()
        (package / "optimizer.py").write_text(MODULE.format(name=name, key=key))


def cpu_seconds(arguments: tuple[str, ...], environment: dict[str, str], cwd: str) -> float:
    """What one command takes, user and system together."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *arguments], env=environment, cwd=cwd, capture_output=True, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--distributions", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=15)
    arguments = parser.parse_args()
    plain = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    print(f"Python {platform.python_version()}, {arguments.distributions} distributions, CPU seconds")
    print(f"{'':30}{'without':>10}{'with':>10}{'added':>10}{'multiple':>10}")
    with tempfile.TemporaryDirectory() as folder:
        site = Path(folder, "site")
        site.mkdir()
        install(site, arguments.distributions)
        unit = 0.0
        for title, command in COMMANDS.items():
            taken: list[list[float]] = [[], []]
            for _ in range(arguments.repeats):
                for of_kind, more in zip(taken, ({}, {"PYTHONPATH": str(site)}), strict=True):
                    of_kind.append(cpu_seconds(command, plain | more, folder))
            without, loaded = map(min, taken)
            added = loaded - without
            unit = unit or added
            print(f"{title:30}{without:10.3f}{loaded:10.3f}{added:10.3f}{added / unit:10.2f}")


if __name__ == "__main__":
    main()
