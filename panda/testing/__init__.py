"""What authors of packages test their components with: fake distributions, runs, and checks of components.

Each check is a function that prints what it found, a line for each promise, and raises AssertionError where one is
broken. They need no pytest. Importing this package imports nothing heavy.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING
from typing import Any

if TYPE_CHECKING:
    from panda.testing.distributions import fake_distributions as fake_distributions
    from panda.testing.models import check_model as check_model
    from panda.testing.optimizers import check_optimizer as check_optimizer
    from panda.testing.plugins import check_plugin as check_plugin
    from panda.testing.runs import Trained as Trained
    from panda.testing.runs import train as train
    from panda.testing.tasks import check_task as check_task

_EXPORTED = {
    "check_model": "models",
    "check_optimizer": "optimizers",
    "check_plugin": "plugins",
    "check_task": "tasks",
    "fake_distributions": "distributions",
    "Trained": "runs",
    "train": "runs",
}
"""Public names, and the modules of this package that have them: each is imported when it is first asked for."""


def __getattr__(name: str) -> Any:
    if name not in _EXPORTED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has: {', '.join(_EXPORTED)}")
    return getattr(importlib.import_module(f"{__name__}.{_EXPORTED[name]}"), name)
