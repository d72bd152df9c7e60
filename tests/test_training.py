"""``panda.train``: runs from Python, several in one process, with components that the process has registered."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from launching import BIN
from launching import run_panda
from launching import run_script
from launching import start

import panda
from panda.configuration.arguments import arguments_of
from panda.configuration.arguments import parse_arguments
from panda.registry import UserError

TINY = {
    **{"arch": "llama-tiny", "num_layers": 1, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2},
    **{"max_seq_length": 32, "instruction_tuning_data_dir": "rows.json", "gradient_accumulation_steps": 1},
    **{"max_steps": 2, "prompts": ["a"], "plugins": ["no:plot", "no:tensorboard"], "num_workers": 1},
}

FLAGS = [word for key, value in TINY.items() for word in (f"--{key}", *(value if isinstance(value, list) else [value]))]

SCRIPT = f"""
import json
import os
import sys

import panda

TINY = {TINY!r}
environment = dict(os.environ)
"""

TWICE = """
import warnings

from panda.registry import NoOptions, hookimpl, register_plugin

@register_plugin("warns")
class Warns:
    acts = False

    def __init__(self, options, context): ...

    @hookimpl
    def panda_step_end(self, step):
        import torch

        code = "\\n" * step + "import warnings; warnings.warn('old', FutureWarning)"
        exec(compile(code, torch.__file__, "exec"), {"__name__": "torch"})
        warnings.warn_explicit(f"of the user, step {step}", FutureWarning, __file__, step)

sys.stderr = sys.stdout
first = panda.train(TINY, run_name="first")
second = panda.train("run.yaml", zero_stage=1, eval_data_dir="rows.json", save_final=False,
                     plugins=[*TINY["plugins"], "warns"])
try:
    panda.train(TINY, learning_rate=-1)
except panda.UserError as problem:
    print(problem)
third = panda.train(TINY, run_name="first", resume="auto", max_steps=3)
fourth = panda.train(TINY, run_name="first", resume="auto", max_steps=3)

import torch.distributed

assert not torch.distributed.is_initialized()
changed = {key for key in {*environment, *os.environ} if environment.get(key) != os.environ.get(key)}
assert not changed & {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"}, changed
runs = [[str(run.directory), run.step, run.records, run.evaluations] for run in (first, second, third, fourth)]
print(json.dumps(runs))
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    rows = [{"input": "a" * length, "target": "b"} for length in range(1, 9)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    (tmp_path / "run.yaml").write_text("\n".join(f"{key}: {json.dumps(value)}" for key, value in TINY.items()))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def script(folder: Path, text: str) -> Path:
    (folder / "script.py").write_text(SCRIPT + text)
    return folder / "script.py"


def test_runs_follow_each_other_in_one_process_as_on_the_command_line(folder: Path) -> None:
    done = run_panda("panda-train", *FLAGS, "--run_name", "line", cwd=folder)
    assert done.returncode == 0, done.stderr
    printed = run_script(script(folder, TWICE), cwd=folder)
    assert "panda.train(learning_rate=...): learning_rate: '-1' is not a number > 0" in printed
    first, second, third, fourth = json.loads(printed.splitlines()[-1])
    assert [run[:2] for run in (first, third, fourth)] == [["runs/first", 2], ["runs/first", 3], ["runs/first", 3]]
    assert third[2] == fourth[2] and [record["step"] for record in third[2]] == [1, 2, 3]
    written = [json.loads(line) for line in (folder / "runs/line/metrics.jsonl").read_text().splitlines()]
    assert [record["loss"] for record in first[2]] == [record["loss"] for record in written]
    assert second[0] == "runs/instruct-llama-tiny" and [record["step"] for record in second[3]] == [2]
    with_warnings = folder / second[0] / "log.txt"
    assert [line.split(": ", 1)[1] for line in with_warnings.read_text().splitlines()] == ["FutureWarning: old"] * 2
    assert "  log.txt            2 warnings of torch\n" in printed and printed.count("2 warnings of torch") == 1
    assert "FutureWarning: of the user, step 2" in printed and "FutureWarning: old" not in printed
    assert not (folder / first[0] / "log.txt").exists()
    assert second[2][0]["loss"] == pytest.approx(first[2][0]["loss"], rel=1e-6)  # ZeRO-1 of one rank


AGAIN = """
for stage in (3, 1, 3, 0):
    run = panda.train(TINY, zero_stage=stage, gradient_accumulation_steps=2, save_final=False)
    if environment["RANK"] == "0":
        print(json.dumps(run.records[-1]["loss"]))
import torch.distributed

assert not torch.distributed.is_initialized()
"""


def test_several_ranks_join_groups_again(folder: Path) -> None:
    printed = run_script(script(folder, AGAIN), ranks=2, cwd=folder)
    losses = [float(line) for line in printed.splitlines() if re.fullmatch(r"\d+\.\d+", line)]
    assert len(losses) == 4 and losses == pytest.approx([losses[0]] * 4, rel=1e-5)


REGISTERED = """
from dataclasses import dataclass

from panda import hookimpl


@dataclass(frozen=True)
class SlowOptions:
    '''Options.'''

    slowness: float = 2.0
    '''How slow.'''


@panda.register_optimizer("slow", options=SlowOptions)
def build_slow(options, context):
    '''Slow.'''
    import torch

    print("slowness", options.slowness, flush=True)
    return torch.optim.SGD(context.param_groups)


@panda.register_plugin("count")
class Count:
    '''Counts.'''

    def __init__(self, options, context): ...

    @hookimpl
    def panda_step_end(self, run, step):
        print(f"rank {run.processes.rank} step {step}\\n", end="", flush=True)


from panda.tasks.instruct import Instruct
from panda.tasks.instruct import InstructOptions


@panda.register_task("mine", options=InstructOptions)
class Mine(Instruct):
    '''Collates in a worker.'''

    def collate(self, rows, shape):
        from torch.utils.data import get_worker_info

        assert get_worker_info() is not None
        return super().collate(rows, shape)


PLUGINS = [*TINY["plugins"], "count"]
run = panda.train(TINY, task="mine", optimizer="slow", slowness=3, plugins=PLUGINS, save_final=False)
if os.environ.get("RANK", "0") == "0":
    print(json.dumps(str(run.directory)))
"""


@pytest.mark.parametrize("ranks", [0, 2])
def test_what_a_script_registers_can_be_named_on_every_rank_and_in_workers(folder: Path, ranks: int) -> None:
    file = script(folder, REGISTERED)
    with start(file, cwd=folder, ranks=ranks) as started:
        done = started.wait()
    assert done.returncode == 0, done.stderr
    for rank in range(ranks or 1):
        assert f"rank {rank} step 2" in done.stdout
    assert "slowness 3.0" in done.stdout
    run = folder / "runs" / "mine-llama-tiny"
    config = (run / "config.yaml").read_text()
    assert "optimizer: 'in_process:slow'" in config and "in_process:count" in config
    provenance = json.loads((run / "provenance.json").read_text())
    assert list(provenance["user_files"]) == [str(file)] and len(provenance["user_files"][str(file)]) == 64
    assert provenance["components"]["optimizer slow"]["source"].startswith(f"{file}:")
    assert provenance["origins"]["optimizer"] == "panda.train(optimizer=...)"
    again = run_panda("panda-train", "--config", run / "config.yaml", cwd=folder)
    assert again.returncode == 2
    assert "'in_process:slow'. It was registered by the process that called `panda.train`" in again.stderr


NOTEBOOK = """
def cell(number, source):
    '''As IPython runs one: the file does not exist, and is another one each time.'''
    import linecache

    name = f"/tmp/ipykernel_1/{number}.py"
    linecache.cache[name] = len(source), None, source.splitlines(True), name
    exec(compile(source, name, "exec"), globals())


TASK = '''
from panda.tasks.instruct import Instruct, InstructOptions

@panda.register_task("edited", options=InstructOptions)
class Edited(Instruct):
    "Edited."
    def samples(self, *given):
        MARK
        return super().samples(*given)
'''
del __file__
cell(1, TASK.replace("MARK", "pass"))
first = panda.train(TINY, task="edited", run_name="first", save_final=False)
cell(2, TASK.replace("MARK", "globals().setdefault('called', True)"))
second = panda.train(TINY, task="edited", run_name="second", save_final=False)
print(json.dumps([json.load(open(run.directory / "provenance.json"))["user_files"] for run in (first, second)]))
"""


def test_a_cell_that_is_edited_and_run_again_replaces_what_it_registered(folder: Path) -> None:
    first, second = json.loads(run_script(script(folder, NOTEBOOK), cwd=folder).splitlines()[-1])
    assert [*first, *second] == ["/tmp/ipykernel_1/1.py", "/tmp/ipykernel_1/2.py"]
    assert len({*first.values(), *second.values()}) == 2
    assert "unknown" not in {*first.values(), *second.values()}


@pytest.mark.parametrize("ranks", [0, 2])
def test_files_of_a_user_are_executed_on_every_rank(folder: Path, ranks: int) -> None:
    lab = folder / "lab"
    lab.mkdir()
    (lab / "slow.py").write_text("import json, os, panda\n" + REGISTERED.partition("PLUGINS = ")[0])
    flags = [*FLAGS[:-2], "--num_workers", 1, "--user_dir", "lab", "--optimizer", "slow", "--task", "mine"]
    flags[flags.index("--plugins") + 1 : flags.index("--plugins") + 1] = ["./lab/slow.py:count"]
    with start(BIN / "panda-train", *flags, cwd=folder, ranks=ranks) as started:
        done = started.wait()
    assert done.returncode == 0, done.stderr
    assert {f"rank {rank} step 2" for rank in range(ranks or 1)} <= set(done.stdout.splitlines())
    run = folder / "runs" / "mine-llama-tiny"
    assert list(json.loads((run / "provenance.json").read_text())["user_files"]) == [str(lab / "slow.py")]
    if ranks:
        return
    alone = run_panda("panda-train", "--config", run / "config.yaml", "--resume", "auto", cwd=folder)
    assert alone.returncode == 2 and f"--user_dir {lab}" in alone.stderr
    (lab / "slow.py").write_text((lab / "slow.py").read_text() + "\n# later\n")
    named = ["--user_dir", "lab", "--plugins", "lab/slow.py:count", "--output_dir", run, "--max_steps", 3]
    again = run_panda("panda-train", "--config", run / "config.yaml", "--resume", "auto", *named, cwd=folder)
    assert again.returncode == 0, again.stderr
    assert f"note: {lab / 'slow.py'} has changed since the run was started." in again.stderr
    answered = run_panda("panda", "generate", run, "--prompt", "a", cwd=folder)
    assert answered.returncode == 0 and "slowness" not in answered.stdout + answered.stderr


# -- what it is given -------------------------------------------------------------------------


def test_values_of_python_are_those_of_a_file(folder: Path) -> None:
    given = arguments_of({"prompts": ["a, b", "c"], "seed": np.int64(7), "learning_rate": np.float32(0.5)}, {})
    assert given.given["prompts"].value == ("a, b", "c")
    assert [given.given[key].value for key in ("seed", "learning_rate")] == [7, 0.5]
    given = arguments_of(Path("run.yaml"), {"output_dir": folder / "out", "save_final": False, "ckpt_path": None})
    assert given.given["max_steps"] == parse_arguments(["--config", "run.yaml"]).given["max_steps"]
    assert given.given["output_dir"].value == str(folder / "out") and given.given["save_final"].value is False
    assert given.given["ckpt_path"].value is None and given.in_process


@pytest.mark.parametrize(
    ("config", "flags", "message"),
    [
        (3, {}, "its first argument is the path of a YAML file, a mapping of keys to values, or None, not int"),
        ({"learning_rate": "abc"}, {}, r"config\['learning_rate'\]: learning_rate: 'abc' is not a number > 0"),
        ({}, {"learning_rate": -1}, r"panda.train\(learning_rate=...\): learning_rate: '-1' is not a number > 0"),
        ({}, {"learnig_rate": 1}, "unknown key 'learnig_rate'. Did you mean 'learning_rate'"),
        ({}, {"seed": {"a": 1}}, "the value of 'seed' is nested"),
        ({}, {"seed": object()}, "expected a text, a number, a truth value, None or a list of these, not a object"),
        ({"config": "x"}, {}, "cannot name another one"),
        ("nowhere.yaml", {}, "nowhere.yaml: no such configuration file"),
    ],
)
def test_what_is_wrong_is_a_user_error(folder: Path, config: object, flags: dict[str, object], message: str) -> None:
    base = TINY | config if isinstance(config, dict) else config
    with pytest.raises(UserError, match=message):
        panda.train(base, **flags)  # type: ignore[arg-type]


def test_importing_panda_imports_nothing_heavy() -> None:
    code = "import sys, panda; panda.train; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert not loaded & {"torch", "numpy", "transformers", "panda.configuration", "panda.run", "panda.runner"}
