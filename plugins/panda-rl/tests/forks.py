"""Runs ``panda-train`` in forks of one process that has already imported what it imports, which takes ten seconds.

Started by conftest.py. A line of its input is an order, ``{"argv": [...], "ranks": 2, "log": "..."}``; the answer is
the exit code of each rank.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import signal
import socket
import sys
import traceback
from importlib.metadata import entry_points
from typing import Any

ANSWERS = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # text that imports print must not look like an answer

for name in ("deepspeed", "peft", "safetensors.torch", "transformers.models.llama.modeling_llama", "panda.runner"):
    importlib.import_module(name)
gc.freeze()


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port: int = taken.getsockname()[1]
        return port


def become(order: dict[str, Any], environment: dict[str, str]) -> None:
    """Be ``panda-train`` in this fork; does not return."""
    log = os.open(order["log"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ.update(environment)
    sys.argv = ["panda-train", *order["argv"]]
    [command] = entry_points(group="console_scripts", name="panda-train")
    code = 1
    try:
        code = command.load()()
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def run(order: dict[str, Any]) -> list[int]:
    """The exit code of each rank. When one has failed the others are killed: they would wait for it."""
    ranks = order["ranks"]
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(ranks)}
    pids = []
    for rank in range(ranks):
        environment = group | {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(ranks)}
        pids.append(os.fork())
        if not pids[-1]:
            become(order, environment if ranks > 1 else {})
    codes: dict[int, int] = {}
    while len(codes) < ranks:
        pid, status = os.wait()
        codes[pid] = os.waitstatus_to_exitcode(status)
        if codes[pid]:
            for other in set(pids) - set(codes):
                os.kill(other, signal.SIGKILL)
    return [codes[pid] for pid in pids]


for line in iter(sys.stdin.readline, ""):
    print(json.dumps(run(json.loads(line))), file=ANSWERS, flush=True)
