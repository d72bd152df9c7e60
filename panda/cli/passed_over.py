"""What ``panda generate``, ``chat`` and ``export`` say of checkpoints that they cannot take."""

from __future__ import annotations

import sys
from pathlib import Path

from panda.engine.checkpoints.folders import passed_over


def tell_passed_over(path: Path) -> None:
    """Say on stderr which checkpoints at ``path`` are newer than the one that is taken, and damaged.

    An older one answers otherwise than the run's user expects, who has to know.
    """
    for checkpoint, problem in passed_over(path).items():
        print(f"{checkpoint}: passed over, since it is damaged: {problem}", file=sys.stderr)
