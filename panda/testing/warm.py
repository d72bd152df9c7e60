"""Forks processes that have already imported what a run imports, which would take each ten seconds of CPU time.

Started by processes.py. A line of its input asks for processes that run one script or module, one for each
``environments``; the answers are their process ids at once, and their exit codes when all have ended. As torchrun does,
it ends the others after one has failed. They end as any interpreter does, but do not take down first, module by module,
what they were forked with, and nothing of panda has been imported in them.

Where there is a GPU they are new interpreters: bitsandbytes initialises CUDA when it is imported, and a fork cannot use
CUDA after that (torch 2.11, 2026-11).
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import runpy
import signal
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import IO
from typing import Any

import numpy

IMPORTED = (
    "accelerate",
    "bitsandbytes",
    "deepspeed",
    "deepspeed.module_inject.auto_ep_layer",
    "deepspeed.ops.op_builder.all_ops",
    "matplotlib.backends.backend_agg",
    "matplotlib.figure",
    "peft",
    "safetensors.torch",
    "torch._dynamo",
    "torch.nn.attention.varlen",
    "torch.utils.tensorboard",
    "transformers.models.auto.modeling_auto",
    "transformers.models.llama.modeling_llama",
)

ON_GPU = os.path.exists("/dev/nvidiactl") and os.environ.get("CUDA_VISIBLE_DEVICES") != ""
SERVER = "PANDA_TESTING_SERVER"
"""Names, to a process that starts others itself, a fork that forks for it: its own id, and two descriptors."""
ORDERS: IO[str]
ANSWERS: IO[str]
SECONDS_TO_SAY_WHY = 20
SAFE_PATH = "PYTHONSAFEPATH"
"""Of Python itself: with it, the folder of the script, or of a module the current one, is not on the path."""


def native_threads() -> list[str]:
    """The system's names of the threads of this process that are not Python's.

    Raises AssertionError, with their names, where there are threads of Python beside this one: a fork would wait for
    ever for a lock that one of them holds. Native ones hold no lock of Python; a pool such as OpenBLAS's is started
    again in the fork by its own handlers.
    """
    others = [each for each in threading.enumerate() if each is not threading.current_thread()]
    assert not others, f"a fork has no other thread's locks to wait for, and here run {[each.name for each in others]}"
    own = str(threading.get_native_id())
    return [
        (task / "comm").read_text(encoding="utf-8").strip()
        for task in Path("/proc/self/task").iterdir()
        if task.name != own
    ]


def become(order: dict[str, Any], environment: dict[str, str]) -> None:
    """Make this fork like a new process with that command line."""
    ORDERS.close()
    ANSWERS.close()
    os.chdir(order["cwd"])
    os.environ.update(environment)
    for descriptor, file in enumerate((os.devnull, order["stdout"], order["stderr"])):
        opened = os.open(file, os.O_RDWR | os.O_APPEND | os.O_CREAT)
        os.dup2(opened, descriptor)
        os.close(opened)
    sys.argv = order["argv"]
    first = order["cwd"] if order["is_module"] else os.path.dirname(sys.argv[0])
    sys.path[:0] = [
        *([] if environment.get(SAFE_PATH) else [first]),
        *filter(None, environment.get("PYTHONPATH", "").split(os.pathsep)),
    ]
    numpy.random.seed()  # Python reseeds its own generator in each fork


def end(pids: list[int]) -> list[int]:
    """Exit codes of ``pids``, in order, once all have ended. Seconds after one has failed, those that still run are
    killed: they wait for the failed one, and have reported that by then."""
    codes: dict[int, int] = {}

    def kill_others(*_: object) -> None:
        for other in set(pids) - set(codes):
            with suppress(ProcessLookupError):
                os.kill(other, signal.SIGKILL)

    signal.signal(signal.SIGALRM, kill_others)
    while len(codes) < len(pids):
        pid, status = os.wait()
        codes[pid] = os.waitstatus_to_exitcode(status)
        if codes[pid]:
            signal.alarm(SECONDS_TO_SAY_WHY)
    signal.alarm(0)
    return [codes[pid] for pid in pids]


def serve() -> dict[str, Any] | None:
    """Do each order. In a fork, returns what it has to run."""
    for line in iter(ORDERS.readline, ""):
        order: dict[str, Any] = json.loads(line)
        native_threads()
        pids = []
        for environment in order["environments"]:
            pids.append(os.fork())
            if not pids[-1]:
                if order["serving"] and not ON_GPU and is_server(environment):
                    return serve()
                become(order, environment)
                if ON_GPU:
                    os.execv(sys.executable, [sys.executable, *["-m"] * order["is_module"], *sys.argv])
                return order
        print(json.dumps(pids), file=ANSWERS, flush=True)
        print(json.dumps(end(pids)), file=ANSWERS, flush=True)
    return None


def is_server(environment: dict[str, str]) -> bool:
    """Fork once more: true in the fork, which serves the other; that finds it by its ``environment``."""
    global ORDERS, ANSWERS
    served = os.getpid()
    (orders, asking), (answered, answers) = os.pipe(), os.pipe()
    if os.fork():
        os.close(orders)
        os.close(answers)
        environment[SERVER] = f"{served} {asking} {answered}"
        return False
    ORDERS.close()
    ANSWERS.close()
    os.close(asking)
    os.close(answered)
    ORDERS, ANSWERS = os.fdopen(orders), os.fdopen(answers, "w")
    return True


def leave(code: int) -> None:
    """End this fork as an interpreter does, up to what it does with modules: that takes a third of a second here."""
    threading._shutdown()  # type: ignore[attr-defined]  # waits for threads, as multiprocessing has its forks do
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        if stream and not stream.closed:
            stream.flush()
    os._exit(code & 0xFF)


def warm_up() -> None:
    for name in IMPORTED:
        with suppress(ImportError):  # an extra, such as bitsandbytes
            importlib.import_module(name)
    with suppress(ImportError, AttributeError):  # transformers 5.0 to 5.23 compiles a thousand patterns, once a process
        importlib.import_module("transformers.conversion_mapping").get_checkpoint_conversion_mapping("llama")
    gc.collect()
    gc.freeze()


def main() -> None:
    global ORDERS, ANSWERS
    ORDERS, ANSWERS = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # text that imports print must not look like an answer
    if not ON_GPU:
        warm_up()
    if native := native_threads():
        print(f"{Path(__file__).name}: beside native threads {native}", file=sys.stderr)
    code: Any = 0
    if order := serve():
        try:
            if order["is_module"]:
                runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
            else:
                runpy.run_path(sys.argv[0], run_name="__main__")
        except SystemExit as ended:
            code = ended.code or 0
            if not isinstance(code, int):
                raise
    leave(code)


if __name__ == "__main__":
    main()
