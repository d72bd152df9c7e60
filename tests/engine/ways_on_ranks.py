"""Of scripts that try ways of training on several ranks: what is wrong with each way, as lines of JSON."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from deepspeed.accelerator import get_accelerator

from panda.engine.processes import Processes
from panda.engine.processes import join_processes


def try_ways(problems: Callable[[Processes, list[Any], Path], Any]) -> None:
    """Print each way of the command line with the ``problems`` of every rank."""
    # fp16, which panda trains on GPUs only: what is tried does not depend on the device.
    get_accelerator().is_fp16_supported = lambda: True
    processes = join_processes()
    with tempfile.TemporaryDirectory() as folder:
        for way in json.loads(sys.argv[1]):
            found = processes.from_all(problems(processes, way, Path(folder)))
            if processes.rank == 0:
                print(json.dumps([*way, found]), flush=True)
