"""Writes docs/certificates.md: `python docs/certificates.py` trains 400 small models, in 20 minutes on two cores."""

from __future__ import annotations

import sys
from datetime import UTC
from datetime import datetime
from importlib.metadata import version
from pathlib import Path

from panda.testing import optimizers

OPTIMIZERS = {
    "muon": ("--learning_rate", "0.003"),
    "nvlamb": ("--learning_rate", "0.01"),
    "adamw": (),
    "schedule_free_adamw": ("--learning_rate", "0.003"),
}
"""With their flags."""
HEAD = """# Certificates of optimizers

<!-- Written by docs/certificates.py. -->

Each table is what `python -m panda.testing.optimizers NAME` found: small models, trained as `panda-train` trains them,
on CPUs (gloo) and in fp32. A row is one way to spread a run: over data-parallel and tensor-parallel ranks, by a ZeRO
stage, with or without `offload_optimizer`. Its error is how far a parameter ended from where one process takes it, in
parts of the distance that it has moved, for the worst parameter. `same bits`: a run that was continued from its middle
ended with the same bits. The last column is the error of a run that went on from there with another number of ranks,
under another stage. In stage 3 every weight is partitioned, and there are several sub-groups.
"""


def main() -> None:
    """Make the certificates of the optimizers named on the command line, or of all; keep the others."""
    page = Path(__file__).with_name("certificates.md")
    held = page.read_text(encoding="utf-8") if page.exists() else ""
    before = {part.partition("\n")[0].strip(" `"): part.partition("\n")[2] for part in held.split("\n## ")[1:]}
    parts = []
    for name, flags in OPTIMIZERS.items():
        if name in (sys.argv[1:] or OPTIMIZERS):
            found = optimizers.check_optimizer(name, *flags)
            libraries = ", ".join(f"{each} {version(each)}" for each in ("torch", "deepspeed"))
            day = datetime.now(UTC).date()
            before[name] = f"\n{day}, {libraries}.\n\n```\n{found.table()}\n```\n"
        parts.append(f"\n## `{name}`\n{before.get(name, '').rstrip()}\n")
    page.write_text(HEAD + "".join(parts), encoding="utf-8")


if __name__ == "__main__":
    main()
