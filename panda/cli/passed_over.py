"""What ``panda generate``, ``chat`` and ``export`` report of damaged checkpoints."""

from __future__ import annotations

import sys
from pathlib import Path

from panda.engine.checkpoints.folders import passed_over


def report_passed_over(path: Path) -> None:
    """Report on stderr the damaged checkpoints at ``path`` that are newer than the one that is used.

    The user has to know that the model is older than expected.
    """
    for checkpoint, problem in passed_over(path).items():
        print(f"{checkpoint}: passed over, since it is damaged: {problem}", file=sys.stderr)
