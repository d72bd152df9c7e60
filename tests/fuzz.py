"""Gives panda damaged and senseless input, in process, and counts what is neither done nor refused in words.

    python tests/fuzz.py --seconds 600 [--kind manifests] [--seed 1] [--processes] [--jobs 14]

Each case is made of the seed and its number alone, so that `--seed S --first N --cases 1` repeats it, with the
traceback. Every kind begins with something that works, and changes some of it. A case fails by an exception that is no
refusal, by taking longer than LONGEST seconds of CPU time (LATEST in all), and by a file outside of its folder that its
command line does not name. With `--processes` each case is a process of its own, a fork of this one, which must not end
by a signal either. They are counted by the place that raised; it exits with 1 if there are any. The others are `done`,
where the command did its work, or `refused`. With `--jobs`, so many forks share the cases.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import gzip
import importlib
import io
import json
import os
import pickle
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

LONGEST, LATEST = 10.0, 60.0
FIRST = 20
"""Cases of each kind that show what they all import."""
DONE, REFUSED = "done", "refused"
FINE = (DONE, REFUSED)

NUMBERS = ("0", "-1", "1e36", "1" + "0" * 30, "nan", "inf", "-0", "1e-400", "0x10", "1_000", "9" * 5000, "1.5", "٣", "")
TEXTS = (
    *("", " ", "~", "~nobody/x", "a\0b", "\udcff", "a" * 300, "a/" * 3000, "é竹😀", "\u202e", "../..", "/"),
    *("/dev/null", "/proc/self/mem", "null", "true", "[]", "{}", "[" * 2000, "*", "&a [*a]"),
    *("!!python/object:os.system x", "hf://x", "panda:", "panda:../..", "os:x", ":", "::", "a:b:c", "%s%n", "{0}"),
    *("-", "--", "file\nname", "\t", "'", '"', "#"),
)
PLAUSIBLE = ("0", "1", "2", "3", "7", "64", "1000", "0.5", "1e-3", "null", "auto", "none", "[1, 2]", "true")
PLAUSIBLE += ("instruct", "pretrain", "llama-tiny", "nvlamb", "muon", "cosine", "json", "ema", "guard", "a=1")
"""Values that some keys take: what comes after the reading of a configuration is reached only with such."""
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 10**30, 1e308, float("nan"), float("inf"), "", "x", [], {}, [None], {"": None}),
    *([[[]]], "1", "\ud800", {"a": {"b": []}}, 2**63, -(2**63), 0.5),
)
KEYS = ("task", "arch", "model", "optimizer", "lr_scheduler", "reader", "plugins", "zero_stage", "hidden_size", "x", "")


class _TooLong(BaseException):
    pass


def damaged_bytes(draw: random.Random, content: bytes) -> bytes:
    """``content`` with a bit, a byte, a stretch or its end changed."""
    data = bytearray(content)
    for _ in range(draw.choice((1, 1, 2, 8))):
        at = draw.randrange(len(data) + 1)
        match draw.randrange(6):
            case 0 if at < len(data):
                data[at] ^= 1 << draw.randrange(8)
            case 1:
                del data[at:]
            case 2:
                del data[at : at + draw.randrange(1, 20)]
            case 3:
                data[at:at] = draw.randbytes(draw.randrange(1, 9))
            case 4:
                data[at : at + 1] = draw.choice(
                    (b"\0", b"\xff", b'"', b"{", b"[", b"]", b"}", b",", b"\n", b"\xef\xbb\xbf")
                )
            case 5:
                other = draw.randrange(len(data) + 1)
                data[at:at] = data[min(at, other) : min(at, other) + 50]
    return bytes(data)


def damaged_json(draw: random.Random, value: Any, depth: int = 0) -> Any:
    """``value``, of JSON, with a part of it replaced, left out or added."""
    if depth > 6 or draw.random() < 0.2 or not isinstance(value, (dict, list)) or not value:
        return draw.choice(VALUES)
    if isinstance(value, list):
        at = draw.randrange(len(value))
        return [*value[:at], damaged_json(draw, value[at], depth + 1), *value[at + 1 :]]
    key = draw.choice(sorted(value, key=str))
    if draw.random() < 0.2:
        return {name: each for name, each in value.items() if name != key}
    return value | {draw.choice((key, key, key, "new")): damaged_json(draw, value[key], depth + 1)}


def damage_file(draw: random.Random, file: Path) -> None:
    """Change ``file``: its bytes, or what it says if it is JSON."""
    content = file.read_bytes()
    if file.suffix == ".json" and draw.random() < 0.6:
        written = json.dumps(damaged_json(draw, json.loads(content)))
        file.write_text("[" * 100_000 if draw.random() < 0.02 else written, encoding="utf-8", errors="surrogatepass")
        return
    file.write_bytes(damaged_bytes(draw, content))


class Bench:
    """What works, from which the cases are made, and the folder in which they run."""

    def __init__(self, folder: Path) -> None:
        from panda.registry.location import resolve_path

        self.folder, self.made = folder / "case", folder / "made"
        self.named = ""
        """The command line of the case, and what its configuration names."""
        self.code = 0
        """The exit code of its command."""
        self.made.mkdir(parents=True)
        self.rows = [{"instruction": f"say {n}", "input": "", "output": f"it is {n}"} for n in range(4)]
        (self.made / "rows.json").write_text(json.dumps(self.rows))
        self.tokenizer = resolve_path("panda:data/sample/tokenizer")
        self._make_model()
        self._make_run()

    def _make_model(self) -> None:
        import torch
        from transformers import LlamaConfig
        from transformers import LlamaForCausalLM

        sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        torch.manual_seed(0)
        LlamaForCausalLM(LlamaConfig(vocab_size=259, **sizes)).save_pretrained(self.made / "model")
        for file in self.tokenizer.iterdir():
            shutil.copy(file, self.made / "model" / file.name)

    def _make_run(self) -> None:
        """A run directory as far as no training is needed for it."""
        run = self.made / "run"
        checkpoint = run / "checkpoints/step-00000003"
        checkpoint.mkdir(parents=True)
        progress = {"step": 3, "position": 6, "tokens": 50, "units": 20, "skipped_steps": 0, "left_out_steps": 0}
        agreement = {"task": "instruct", "seed": 42, "task.separator": "\n"}
        (checkpoint / "layout-00000.json").write_text('{"ranks": 1, "wrapper": "none", "tensors": []}')
        size = (checkpoint / "layout-00000.json").stat().st_size
        # Of the first format, in which no sha256 refuses what is damaged before it is read.
        manifest = {"format": 1, "progress": progress, "agreement": agreement, "files": {"layout-00000.json": size}}
        (checkpoint / "manifest.json").write_text(json.dumps(manifest))
        records = [{"step": step, "loss": 1.0 / step, "learning_rate": 0.1} for step in range(1, 5)]
        (run / "metrics.jsonl").write_text("".join(f"{json.dumps(each)}\n" for each in records))
        end = {"step": 3, "agreement": agreement, "eval_data": None, "prompts": []}
        (run / "provenance.json").write_text(json.dumps({"command": ["x"], "earlier_starts": [], "end": end}))
        (run / "config.yaml").write_text("task: instruct\narch: llama-tiny\nseed: 42\n")
        shutil.copytree(self.made / "model", run / "export")

    def fresh(self, name: str) -> Path:
        """A copy of what was made under ``name``, in the folder of the case."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir()
        source, target = self.made / name, self.folder / name
        shutil.copytree(source, target) if source.is_dir() else shutil.copy(source, target)
        return target


def _command(bench: Bench, *argv: str, named: tuple[str, ...] = ()) -> None:
    """Run ``argv``, which may write to what it names, and to what is ``named`` in a file of it."""
    from panda.cli.main import main

    bench.named = "\n".join((*argv, *named))
    bench.code = main(list(argv))


def _flags(draw: random.Random, keys: list[str]) -> list[str]:
    words = []
    for _ in range(draw.choice((1, 1, 2, 3))):
        key = draw.choice([*keys, *KEYS])
        value = draw.choice((*NUMBERS, *TEXTS))
        words += draw.choice(([f"--{key}={value}"], [f"--{key}", value], [f"--{key}"], ["-p", f"no:{value}"], [value]))
    return words


@cache
def _fitting() -> dict[str, list[str]]:
    """The keys, and which of all values each takes."""
    from panda.configuration.options import RunOptions
    from panda.models.llama import LlamaOptions
    from panda.registry import UserError
    from panda.registry.flat_yaml import load_flat_yaml
    from panda.registry.options import options_of
    from panda.tasks.instruct import InstructOptions

    found: dict[str, list[str]] = {}
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        for kind in (RunOptions, LlamaOptions, InstructOptions):
            for key, option in options_of(kind).items():
                found[key] = []
                for value in dict.fromkeys((*option.choices, *PLAUSIBLE, *NUMBERS)):
                    Path(file.name).write_text(f"{key}: {value}\n", encoding="utf-8")
                    with contextlib.suppress(UserError):
                        option.convert(load_flat_yaml(Path(file.name))[key])
                        found[key].append(value)
    return found


def fuzz_command_lines(draw: random.Random, bench: Bench) -> None:
    rows = bench.fresh("rows.json")
    common = ["--arch", "llama-tiny", "--instruction_tuning_data_dir", str(rows)]
    command = draw.choice(
        ("check", "check", "estimate", "list", "show", "data", "generate", "export", "plot", "translate")
    )
    given = common if command in ("check", "estimate") else draw.choice(([], [str(rows)], [str(bench.folder)]))
    given = [*given, "--out", str(bench.folder / "a.png")] if command == "plot" else given
    _command(bench, command, *given, *_flags(draw, [*_fitting()]))


def fuzz_configurations(draw: random.Random, bench: Bench) -> None:
    from panda.configuration.translation.translate import TOOLS

    rows = bench.fresh("rows.json")
    command, file = draw.choice(("check", "check", "estimate", "translate")), bench.folder / "run.yaml"
    if command == "translate":
        tool = draw.choice(sorted(TOOLS))
        keys, more, lines = sorted(TOOLS[tool].keys), ["--from", tool], {}
    else:
        keys, more = sorted(_fitting()), []
        lines = {"task": "instruct", "arch": "llama-tiny", "instruction_tuning_data_dir": str(rows), "max_steps": "3"}
    senseless = draw.random() < 0.5
    for _ in range(draw.choice((1, 1, 2, 4))):
        key = draw.choice(keys)
        if senseless:
            value = draw.choice((*NUMBERS, *TEXTS))
            lines[key] = draw.choice((value, json.dumps(value), f"[{value}, {value}]", f"{{a: {value}}}"))
        else:
            lines[key] = draw.choice(_fitting().get(key) or PLAUSIBLE)
    text = "".join(f"{key}: {value}\n" for key, value in lines.items()).encode(errors="surrogateescape")
    file.write_bytes(damaged_bytes(draw, text) if draw.random() < 0.2 else text)
    _command(bench, command, str(file), *more, named=(*lines.values(),))


def _as_file(draw: random.Random, rows: Any, ending: str) -> bytes:
    """``rows``, of JSON, as a file with that ending has them, if it can."""
    flat = [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []
    if ending in (".parquet", ".arrow"):
        import pyarrow
        from pyarrow import feather
        from pyarrow import parquet

        written = io.BytesIO()
        with contextlib.suppress(pyarrow.ArrowException, TypeError, ValueError, OverflowError):  # of different types
            (parquet.write_table if ending == ".parquet" else feather.write_feather)(
                pyarrow.Table.from_pylist(flat), written
            )
        return written.getvalue()
    if ending in (".csv", ".tsv"):
        text = io.StringIO()
        names = list(dict.fromkeys(str(name) for row in flat for name in row))
        writer = csv.writer(text, delimiter="\t" if ending == ".tsv" else ",")
        writer.writerows([names, *([row.get(name, "") for name in names] for row in flat)])
        return text.getvalue().encode(errors="surrogatepass")
    lines = ending.startswith(".jsonl") and isinstance(rows, list)
    ascii_only = draw.random() < 0.5
    texts = [json.dumps(each, ensure_ascii=ascii_only) for each in (rows if lines else [rows])]
    return "\n".join(texts).encode(errors="surrogatepass")


def fuzz_data(draw: random.Random, bench: Bench) -> None:
    bench.fresh("rows.json").unlink()
    ending = draw.choice(
        (".json", ".jsonl", ".csv", ".tsv", ".txt", ".json.gz", ".parquet", ".jsonl.zst", ".arrow", "")
    )
    rows: Any = bench.rows
    for _ in range(draw.choice((0, 1, 1, 2))):
        rows = damaged_json(draw, rows)
    content = _as_file(draw, rows, draw.choice((*[ending] * 9, ".json")))  # now and then under another's name
    content = damaged_bytes(draw, content) if rows is bench.rows else content
    if ending.endswith(".gz"):
        content = gzip.compress(content)
        content = damaged_bytes(draw, content) if draw.random() < 0.2 else content
    file = bench.folder / f"rows{ending}"
    file.write_bytes(content)
    task = draw.choice(
        (["--task", "instruct", "--instruction_tuning_data_dir"], ["--task", "pretrain", "--pretraining_data_dir"])
    )
    given = ["--arch", "llama-tiny", *task, str(file), "--token_cache", str(bench.folder / "cache")]
    _command(bench, draw.choice(("prepare", "data")), *given)


def fuzz_models(draw: random.Random, bench: Bench) -> None:
    folder = bench.fresh("model")
    damage_file(draw, draw.choice([file for file in sorted(folder.iterdir()) if file.is_file()]))
    if draw.random() < 0.5:
        _command(bench, "generate", str(folder), "--prompt", "x", "--max_new_tokens", "1")
    else:
        rows = shutil.copy(bench.made / "rows.json", bench.folder)
        _command(bench, "check", "--ckpt_path", str(folder), "--instruction_tuning_data_dir", str(rows))


def fuzz_manifests(draw: random.Random, bench: Bench) -> None:
    from panda.engine.checkpoints.folders import find_checkpoint
    from panda.engine.checkpoints.folders import passed_over
    from panda.engine.checkpoints.manifest import read_progress
    from panda.hooks.metrics import read_evaluations
    from panda.hooks.metrics import read_metrics
    from panda.hooks.record_file import RecordFile
    from panda.registry import UserError
    from panda.run.description import read_end

    run = bench.fresh("run")
    checkpoint = run / "checkpoints/step-00000003"
    files = (checkpoint / "manifest.json", run / "metrics.jsonl", run / "provenance.json", run / "config.yaml")
    damage_file(draw, draw.choice(files))
    with contextlib.suppress(UserError):
        passed_over(run)
        if found := find_checkpoint(run):
            read_progress(found, {"task": "instruct", "seed": 42, "task.separator": "\n"})
    with contextlib.suppress(UserError):
        read_end(run)
        read_metrics(run), read_evaluations(run)
        RecordFile(run / "metrics.jsonl", 3).close()
    _command(
        bench,
        *draw.choice(
            (
                ["export", str(run)],
                ["plot", str(run), "--out", str(bench.folder / "a.png")],
                ["generate", str(run), "--prompt", "x", "--max_new_tokens", "1"],
            )
        ),
    )


FUZZED: dict[str, Callable[[random.Random, Bench], None]] = {
    "command lines": fuzz_command_lines,
    "configurations": fuzz_configurations,
    "data": fuzz_data,
    "models": fuzz_models,
    "manifests": fuzz_manifests,
}


def outcome(kind: str, number: int, seed: int, bench: Bench, *, verbose: bool = False) -> str:
    """How case ``number`` of ``kind`` failed, by place; one of FINE where it did not."""
    draw = random.Random(f"{kind} {seed} {number}")
    before, begun = _around(bench), time.process_time()
    bench.named, bench.code = "", 0
    silent = io.StringIO()

    def stop(signal_number: int, frame: Any) -> None:
        raise _TooLong

    signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, LATEST, 1)
    try:
        with contextlib.redirect_stdout(silent), contextlib.redirect_stderr(silent):
            sys.stdin = io.StringIO("")
            FUZZED[kind](draw, bench)
    except (SystemExit, KeyboardInterrupt) as problem:
        if isinstance(problem, KeyboardInterrupt):
            raise
    except BaseException as problem:
        if verbose:
            traceback.print_exc()
        frames = traceback.extract_tb(problem.__traceback__)
        own = [each for each in frames if "/panda/" in each.filename] or frames
        return f"{type(problem).__name__} at {Path(own[-1].filename).name}:{own[-1].lineno}"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    if not _names_around(bench) and (outside := {name for name in _around(bench) - before if name not in bench.named}):
        return f"a file outside: {sorted(outside)[:1]}"
    if time.process_time() - begun > LONGEST:
        return f"over {LONGEST:g} s"
    return REFUSED if bench.code else DONE


def outcome_of_process(kind: str, number: int, seed: int, bench: Bench, *, verbose: bool = False) -> str:
    """As ``outcome``, of a process of its own."""
    reading, writing = os.pipe()
    if not (child := os.fork()):
        with open(os.devnull, "r+b") as nowhere:
            os.dup2(nowhere.fileno(), 0)
            for descriptor in () if verbose else (1, 2):
                os.dup2(nowhere.fileno(), descriptor)
        os.write(writing, outcome(kind, number, seed, bench, verbose=verbose).encode(errors="replace"))
        os._exit(0)
    os.close(writing)
    deadline = time.monotonic() + 2 * LATEST
    while not os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT):
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
        time.sleep(0.002)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    with os.fdopen(reading, "rb") as said:
        found = said.read().decode()
    return f"ends with {code}" if code else found


def _names_around(bench: Bench) -> bool:
    """Whether the command line names one of the folders that ``_around`` looks into: `--token_cache panda:../..`."""
    named = {part for word in bench.named.split("\n") for part in (word, word.partition("=")[2]) if part}
    with contextlib.suppress(OSError, ValueError):
        return not {bench.folder.parent, Path.cwd()}.isdisjoint(Path(name).resolve() for name in named)
    return False


def _around(bench: Bench) -> set[str]:
    """The names beside the folder of the cases, and in the working folder, where `panda data` draws into `runs`."""
    return {*os.listdir(bench.folder.parent), *os.listdir(".")} - {bench.folder.name, "runs"}


def run(
    kinds: list[str],
    bench: Bench,
    *,
    seconds: float,
    cases: int | None,
    first: int,
    seed: int,
    step: int = 1,
    one: Callable[..., str] = outcome,
) -> dict[str, Counter[str]]:
    """How the cases of each of ``kinds`` ended, which take turns: one of FINE, or the failure."""
    found: dict[str, Counter[str]] = {kind: Counter() for kind in kinds}
    begun, number = time.monotonic(), first
    while time.monotonic() - begun < seconds and (cases is None or number < first + cases):
        for kind in kinds:
            ended = one(kind, number, seed, bench, verbose=cases == 1)
            found[kind][ended] += 1
            if ended not in FINE and found[kind][ended] == 1:
                print(f"{kind} {number}: {ended}", flush=True)
        number += step
    return found


def make_ready(bench: Bench) -> None:
    """Import what some cases of each kind import, so that each fork has it: by far the most that a case costs.

    Those cases run in a fork. Running anything here would start threads, which forks lack; importing does not.
    """
    reading, writing = os.pipe()
    if not (child := os.fork()):
        with open(os.devnull, "r+b") as nowhere:
            for descriptor in (0, 1, 2):
                os.dup2(nowhere.fileno(), descriptor)
        run(list(FUZZED), bench, seconds=LATEST, cases=FIRST, first=0, seed=0)
        os.write(writing, "\n".join(sys.modules).encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as said:
        names = said.read().decode().split("\n")
    os.waitpid(child, 0)
    for name in names:
        with contextlib.suppress(Exception):  # those of a user's folder, which is gone
            importlib.import_module(name)
    _fitting()


def run_job(given: argparse.Namespace, folder: Path, job: int) -> dict[str, Counter[str]]:
    """The cases of job ``job`` of ``given.jobs``, in ``folder``, which becomes the working folder."""
    os.environ["PANDA_CACHE"] = f"{folder}/cache"
    (folder / "here").mkdir(parents=True)
    bench = Bench(folder / "work")
    os.chdir(folder / "here")
    try:
        if given.processes:
            make_ready(bench)
        return run(
            given.kind or list(FUZZED),
            bench,
            seconds=given.seconds,
            cases=given.cases and given.cases - job,  # counted from `first`, which is `job` higher here
            first=given.first + job,
            seed=given.seed,
            step=given.jobs,
            one=outcome_of_process if given.processes else outcome,
        )
    finally:
        os.chdir("/")


def run_jobs(given: argparse.Namespace, folder: Path) -> dict[str, Counter[str]]:
    """What all jobs found, each of which is a fork."""
    children = []
    for job in range(given.jobs):
        if not (pid := os.fork()):
            try:
                found = run_job(given, folder / f"job-{job}", job)
                (folder / f"found-{job}").write_bytes(pickle.dumps(found))
            except BaseException:
                traceback.print_exc()
            os._exit(0)
        children.append(pid)
    summed: dict[str, Counter[str]] = {kind: Counter() for kind in given.kind or FUZZED}
    for job, pid in enumerate(children):
        os.waitpid(pid, 0)
        file = folder / f"found-{job}"
        for kind, counts in summed.items():
            counts += pickle.loads(file.read_bytes())[kind] if file.exists() else {f"job {job} does not end well": 1}
    return summed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--cases", type=int, help="most cases of each kind")
    parser.add_argument("--first", type=int, default=0, help="the number of the first case")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", action="store_true", help="each case in a process of its own")
    parser.add_argument("--kind", choices=FUZZED, action="append")
    parser.add_argument("--jobs", type=int, default=1, help="forks that share the cases")
    given = parser.parse_args()
    os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    with tempfile.TemporaryDirectory(prefix="panda-fuzz-") as folder:
        found = run_job(given, Path(folder), 0) if given.jobs == 1 else run_jobs(given, Path(folder))
    failures = 0
    for kind, counts in found.items():
        failed = {problem: count for problem, count in counts.most_common() if problem not in FINE}
        failures += sum(failed.values())
        fine = ", ".join(f"{counts[how]:,} {how}" for how in FINE)
        print(f"{kind:16}{sum(counts.values()):8,} cases: {fine}, {sum(failed.values()):,} failed")
        for problem, count in failed.items():
            print(f"{'':16}{count:8,} {problem}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
