"""How tests start runs: forks behave like new processes, and no process is waited for in vain."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from launching import run_code

from panda.testing.processes import run_script
from panda.testing.processes import start
from panda.testing.warm import ON_GPU

forked = pytest.mark.skipif(ON_GPU, reason="beside a GPU processes are new interpreters")

FACTS = """
import json, os, random, sys
import numpy
panda = [name for name in sys.modules if name.split(".")[0] == "panda"]
print(json.dumps({
    "argv": sys.argv, "name": __name__, "path": sys.path[:2], "cwd": os.getcwd(), "panda": panda,
    "threads": len(os.listdir("/proc/self/task")), "stdin": sys.stdin.read(), "torch": "torch" in sys.modules,
    "drawn": [random.random(), float(numpy.random.random())], "rank": os.environ.get("RANK"),
}), flush=True)
"""


@forked
def test_a_fork_behaves_like_a_new_process(tmp_path: Path) -> None:
    (tmp_path / "facts.py").write_text(FACTS)
    with start(tmp_path / "facts.py", 1, "b", cwd=tmp_path, PYTHONPATH="/nowhere") as started:
        facts = json.loads(started.wait().stdout)
    drawn, again = facts.pop("drawn"), json.loads(run_code(FACTS, cwd=tmp_path))["drawn"]
    assert facts == {
        **{"argv": [str(tmp_path / "facts.py"), "1", "b"], "name": "__main__", "path": [str(tmp_path), "/nowhere"]},
        **{"cwd": str(tmp_path), "panda": [], "threads": 1, "stdin": "", "torch": True, "rank": None},
    }
    assert all(number != other for number, other in zip(drawn, again, strict=True))


ENDING = """
import atexit, sys, threading, time
atexit.register(print, "after the threads")
threading.Thread(target=lambda: (time.sleep(0.2), print("thread"))).start()
print("script")
sys.exit(%s)
"""


def test_a_fork_ends_like_an_interpreter(tmp_path: Path) -> None:
    """It waits for threads, calls what was registered, writes what was printed, and has the exit code."""
    for given, code, said in (("None", 0, ""), ("3", 3, ""), ("'why'", 1, "why\n")):
        (tmp_path / "ending.py").write_text(ENDING % given)
        with start(tmp_path / "ending.py", cwd=tmp_path) as started:
            done = started.wait()
        assert (done.returncode, done.stdout, done.stderr) == (code, "script\nthread\nafter the threads\n", said)


SERVED = """
import os, subprocess, sys
from pathlib import Path
from panda.testing import processes

os.environ["HELD"] = "for all that it starts"
subprocess.Popen = None
for number in range(2):
    print(processes.run_script(Path("inner.py"), number, cwd=Path.cwd(), ADDED="here"), end="")
"""


@forked
def test_a_process_that_starts_others_has_them_forked_from_the_same(tmp_path: Path) -> None:
    """It starts none to fork from. What it changed of its environment holds for them."""
    (tmp_path / "served.py").write_text(SERVED)
    (tmp_path / "inner.py").write_text("import os, sys; print(sys.argv[1], os.environ['HELD'], os.environ['ADDED'])")
    with start(tmp_path / "served.py", cwd=tmp_path, serving=True) as started:
        done = started.wait()
    lines = [f"{number} for all that it starts here" for number in range(2)]
    assert (done.returncode, done.stdout.splitlines()) == (0, lines), done.stderr
    assert run_code("print('next')", cwd=tmp_path) == "next\n"


GROUP = """
import sys, time, torch.distributed as dist
dist.init_process_group("gloo")
number = dist.get_rank()
if sys.argv[1] == "fail" and number == 1:
    raise SystemExit("rank 1 fails")
if sys.argv[1] == "fail":
    time.sleep(10_000)
held = [None] * dist.get_world_size()
dist.all_gather_object(held, number)
print(held, flush=True)
dist.destroy_process_group()
"""


def test_ranks_meet_and_one_that_fails_ends_the_others(tmp_path: Path) -> None:
    script = tmp_path / "group.py"
    script.write_text(GROUP)
    assert run_script(script, "meet", ranks=3, cwd=tmp_path).count("[0, 1, 2]") == 3
    with start(script, "fail", ranks=2, cwd=tmp_path) as started:
        done = started.wait()
    assert (done.returncode, done.stdout) == (1, "") and "rank 1 fails" in done.stderr


def test_a_hang_ends_with_what_was_printed_and_another_can_start(tmp_path: Path) -> None:
    hanging = tmp_path / "hanging.py"
    hanging.write_text("import time; print('so far', flush=True); time.sleep(1000)")
    with pytest.raises(AssertionError, match=r"after 0 s still ran: (?s:.*)so far"), start(hanging, cwd=tmp_path) as it:
        while not (it.stdout.exists() and it.stdout.read_text()):
            time.sleep(0.01)
        it.wait(0)
    with pytest.raises(ZeroDivisionError), start(hanging, cwd=tmp_path):
        _ = 1 / 0  # a test that fails while they run
    assert run_code("print('next')", cwd=tmp_path) == "next\n"


def test_a_thread_of_python_is_named_and_native_ones_are_no_reason_not_to_fork(tmp_path: Path) -> None:
    code = """
        import threading
        from panda.testing.warm import native_threads
        print(len(native_threads()))
        threading.Thread(target=threading.Event().wait, name="waits for ever", daemon=True).start()
        native_threads()
    """
    pool = os.environ | {"OPENBLAS_NUM_THREADS": "2"}
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=pool, timeout=60)
    assert done.stdout == "1\n", "numpy's OpenBLAS starts a thread for its second core"
    assert done.returncode == 1 and "and here run ['waits for ever']" in done.stderr
