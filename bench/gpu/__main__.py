"""Speed, memory and start-up time of panda's command line on a GPU, beside Hugging Face's Trainer.

    python bench/gpu --cases full-1.3b,lora-7b
    python bench/gpu --cases lora-7b,lora-7b+compile=true,lora-7b+compile=true+per_gpu_train_batch_size=8
    python bench/gpu --cases lora-7b --extra '--logging_steps 10' --no-peer
    python bench/gpu --cases full-1.3b-x1,full-1.3b-x2-zero1 --budget 560 --out results.jsonl
    python bench/gpu --trajectory full-1.3b full-1.3b+compile=true --steps 200
    python bench/gpu --gpus 8 --no-peer --stop
    python bench/gpu --table bench/results/*.jsonl
    python bench/gpu --cases tiny,tiny-lora          # on a CPU, in a minute or two

It makes what it needs, and keeps it in --work for the next call: a checkpoint of random bf16 weights, drawn on the
device; data (text.py says which; nothing is downloaded); token and compilation caches, which all runs share. Then
each case is a process of `panda-train` with all options as flags, under torchrun where it has several ranks, and
its peer one of transformers' Trainer, with and without DeepSpeed, over the same samples with the same batch and
precision. Variants with the same model, batch and data share a peer.

A run takes 3 steps that are not measured and --steps that are. Rates are medians over steps: tokens that are not
padding, those of them that carry loss, and slots, which include padding. Steps are timed by events on the device, by
a plugin that waits for nothing (marks.py). Caches of compiled code are shared, so the first run pays for the others.

MFU = (6 N + 12 layers width length) x slots a second / (cards x 989 TFLOP/s). N: all parameters with the head and
without the embedding. 4 N with adapters on a frozen base, whose gradients of weights are not computed. length: of a
row; of chats, which do not see each other, the mean of a sample. Recomputation is not counted, and the half of causal
attention that is masked is. Another peak: --peak_tflops.

Parts of a step, in seconds: waiting for data on the host (panda's data_wait), forward and backward of all micro batches
on the device, clipping and the optimizer, and the rest of the step. "?": not marked. Memory, GiB of the fullest card:
torch's peaks of allocated and reserved memory in training, and that of all processes, which nvidia-smi reads every
0.2 s; beside them what panda estimated for the device before it began. Time to step 1: from the start of the command
until the device has finished it. After the last: until the process has ended; "stopped": the run was ended there,
before it wrote anything (--stop).

A case that fails, runs out of memory or takes longer than --timeout is a row that says so, with the end of its log.
Rows go to --out as they come, one JSON object each, with command, date, versions and card.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from bench.gpu import trajectory
from bench.gpu.cases import CASES
from bench.gpu.cases import Case
from bench.gpu.cases import of_cards
from bench.gpu.cases import variant
from bench.gpu.measurement import ROOT
from bench.gpu.measurement import SKIPPED_STEPS
from bench.gpu.measurement import Settings
from bench.gpu.measurement import about
from bench.gpu.measurement import described
from bench.gpu.measurement import environment
from bench.gpu.measurement import panda_flags
from bench.gpu.measurement import peer_spec
from bench.gpu.measurement import row_of
from bench.gpu.measurement import run_panda
from bench.gpu.measurement import run_peer
from bench.gpu.report import PEERS
from bench.gpu.report import table
from bench.gpu.text import write_rows

LEAST_SECONDS = 20
"""A run is not started with less of the budget left."""


def main() -> int:
    given = arguments()
    if given.list:
        for name, case in CASES.items():
            flags = " ".join(f"--{key} {value}" for key, value in case.flags.items())
            print(f"{name}: {case.ranks} x {case.shape}, {case.data}, {flags}")
        return 0
    if given.table:
        print(table([json.loads(line) for file in given.table for line in file.read_text().splitlines()]))
        return 0
    settings = settings_of(given)
    wanted = of_cards(given.gpus) if given.gpus else [name for words in given.cases or () for name in words.split(",")]
    names = given.trajectory or wanted
    cases = {name: variant(name) for name in names}
    if given.trajectory:
        return compare(cases, settings, given)
    facts = about(settings, given.commit)
    print(f"{facts['date']}, {facts['card']}, {facts['versions']}, panda {facts['panda']}", flush=True)
    print(f"data: {data_note(cases, settings)}", flush=True)
    prepare([case for case in cases.values() if not obstacle(case, facts)], settings)
    rows = measure(cases, settings, given, facts)
    print("\n" + table(rows))
    return 0 if all(row["status"] == "ok" for row in rows) else 1


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python bench/gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    does = parser.add_mutually_exclusive_group(required=True)
    does.add_argument("--cases", nargs="+", help="names, and variants NAME+FLAG=VALUE+...; `ranks` is a FLAG, too")
    does.add_argument("--gpus", type=int, metavar="N", help="the cases of N GPUs, and those of one beside them")
    does.add_argument("--trajectory", nargs="+", metavar="VARIANT", help="losses of the steps of cases, CSV and PNG")
    does.add_argument("--table", nargs="+", type=Path, metavar="FILE", help="print the rows of results")
    does.add_argument("--list", action="store_true", help="print the cases")
    parser.add_argument("--steps", type=int, help="measured, after 3 that are not (10); of a trajectory, all (200)")
    parser.add_argument("--timeout", type=float, default=400, help="seconds of a run, at most")
    parser.add_argument("--budget", type=float, help="seconds of this call; cases that do not fit are skipped")
    parser.add_argument("--extra", default="", help="more flags of panda-train, for all cases, and not their peers")
    parser.add_argument("--peers", type=lambda text: text.split(","), default=list(PEERS), help=",".join(PEERS))
    parser.add_argument("--no-peer", dest="peers", action="store_const", const=[], help="panda only")
    parser.add_argument("--peer-extra", type=json.loads, default={}, help="more TrainingArguments, as JSON")
    parser.add_argument("--stop", action="store_true", help="end runs after their last step, before they export")
    parser.add_argument("--data", nargs="+", default=[], metavar="KIND=PATH", help="your own windows, answers or chats")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "panda-bench-gpu")
    parser.add_argument("--panda", type=Path, default=ROOT, help="root of the checkout to measure")
    parser.add_argument("--commit", help="its commit, where there is no git")
    parser.add_argument("--out", type=Path, help="bench/results/gpu-DATE.jsonl; of a trajectory, a .csv")
    parser.add_argument("--peak_tflops", type=float, default=989.0, help="of one card, dense bf16")
    parser.add_argument("--keep", action="store_true", help="keep the output of runs, which is in WORK/runs")
    return parser.parse_args()


def settings_of(given: argparse.Namespace) -> Settings:
    return Settings(
        work=given.work.resolve(),
        panda=given.panda.resolve(),
        steps=given.steps or 10,
        timeout=given.timeout,
        deadline=None if given.budget is None else time.monotonic() + given.budget,
        extra=tuple(shlex.split(given.extra)),
        ends=not given.stop,
        peer_more=given.peer_extra,
        peak_tflops=given.peak_tflops,
        data=dict(word.split("=", 1) for word in given.data),
    )


def data_note(cases: dict[str, Case], settings: Settings) -> str:
    """What the cases train on."""
    said = {
        "windows": "windows: this repository's sources and pages, a token a byte",
        "answers": "answers: the same text as prompts and answers that fill rows",
        "chats": "chats: generated, with the lengths of GSM8K in bytes, a token a byte",
    }
    kinds = {case.data for case in cases.values()}
    return "; ".join(
        f"{kind}: {settings.data[kind]}" if kind in settings.data else said[kind] for kind in sorted(kinds)
    )


def prepare(cases: list[Case], settings: Settings) -> None:
    """Make what is missing, in one process."""
    jobs: dict[str, dict[str, Any]] = {}
    for case in cases:
        if not case.arch:
            folder = str(settings.checkpoint(case))
            jobs[folder] = {"make": "checkpoint", "shape": case.shape, "folder": folder}
        rows, samples = settings.rows(case), settings.samples(case, settings.total_steps)
        if case.data not in settings.data:
            write_rows(case.data, case.length, rows)
        if samples.exists() and samples.stat().st_mtime < rows.stat().st_mtime:
            samples.unlink()
        told = ("per_gpu_train_batch_size", "gradient_accumulation_steps", "max_seq_length", "batching")
        plain = replace(case, flags={key: value for key, value in case.flags.items() if key in told}, arch="llama-7b")
        argv = panda_flags(plain, replace(settings, extra=()), settings.total_steps)
        jobs[str(samples)] = {"make": "samples", "argv": argv, "ranks": case.data_ranks, "file": str(samples)}
    missing = [job for path, job in jobs.items() if not Path(path).exists()]
    if not missing:
        return
    settings.work.mkdir(parents=True, exist_ok=True)
    file = settings.work / "jobs.json"
    file.write_text(json.dumps(missing))
    command = [sys.executable, "-m", "bench.gpu.preparation", str(file)]
    subprocess.run(command, env=environment(settings), check=True, cwd=settings.work)


def measure(
    cases: dict[str, Case], settings: Settings, given: argparse.Namespace, facts: dict[str, Any]
) -> list[dict[str, Any]]:
    """Run every case and its peers; each row is written as it comes."""
    out = given.out or ROOT / "bench" / "results" / f"gpu-{facts['date'][:10]}.jsonl"
    out.parent.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    of_peers: set[tuple[str, str]] = set()
    for name, case in cases.items():
        key = peer_key(case, settings) if case.peer is not None and given.peers else None
        wanted = ["panda"] + [peer for peer in given.peers if key and (key, peer) not in of_peers]
        for who in wanted:
            of_peers.add((str(key), who))
            base = name.partition("+")[0]
            shown = base if who != "panda" and key == peer_key(CASES[base], settings) else name
            row = {"case": shown, "run": who, "peer": key, **one(name, case, who, settings, given, facts)}
            row |= facts | {"of_case": described(case), "called": shlex.join(sys.argv)}
            rows.append(row)
            with out.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(row) + "\n")
            print(table([row]).splitlines()[2], flush=True)
    print(f"\nrows: {out}")
    return rows


def peer_key(case: Case, settings: Settings) -> str:
    """The same for variants whose peer is the same."""
    spec = peer_spec(case, settings, Path("-"), int(case.flags.get("zero_stage", 1)))
    return json.dumps({"ranks": case.ranks, **spec}, sort_keys=True)


def one(
    name: str, case: Case, who: str, settings: Settings, given: argparse.Namespace, facts: dict[str, Any]
) -> dict[str, Any]:
    """The row of one run, or why there was none."""
    if reason := obstacle(case, facts):
        return {"status": f"skipped: {reason}"}
    if settings.left() < LEAST_SECONDS:
        return {"status": "skipped: the budget of the call is spent"}
    folder = settings.work / "runs" / f"{name}-{who}"
    try:
        if who == "panda":
            outcome = run_panda(case, settings, folder, settings.total_steps, ends=settings.ends)
        else:
            outcome = run_peer(case, settings, folder, deepspeed=who == "hf-deepspeed")
        return row_of(case, who, outcome, folder, settings)
    finally:
        if not given.keep:
            shutil.rmtree(folder, ignore_errors=True)


def obstacle(case: Case, facts: dict[str, Any]) -> str:
    """Why this machine cannot run ``case``; empty where it can. A CPU runs small ones, of any number of ranks."""
    if facts["cards"] == 0:
        return "it needs a GPU" if case.needs_gpu else ""
    return f"it needs {case.ranks} cards, and there are {facts['cards']}" if case.ranks > facts["cards"] else ""


def compare(cases: dict[str, Case], settings: Settings, given: argparse.Namespace) -> int:
    """Train each variant for as many steps, and put their losses beside each other."""
    steps = given.steps or 200
    settings = replace(settings, steps=steps - SKIPPED_STEPS)
    facts = about(settings, given.commit)
    print(f"{facts['date']}, {facts['card']}, {facts['versions']}, panda {facts['panda']}", flush=True)
    print(f"data: {data_note(cases, settings)}", flush=True)
    prepare(list(cases.values()), settings)
    losses: dict[str, list[float | None]] = {}
    for name, case in cases.items():
        row = one(name, case, "panda", replace(settings, ends=False), given, facts)
        if row["status"] != "ok":
            print("\n".join([f"{name}: {row['status']}", *row.get("log", [])]), file=sys.stderr)
            return 1
        losses[name] = row["losses"]
        print(f"{name}: {len(losses[name])} steps, the last loss {losses[name][-1]}\n    {row['command']}", flush=True)
    out = (given.out or ROOT / "bench" / "results" / f"trajectory-{facts['date'][:10]}.csv").with_suffix(".csv")
    out.parent.mkdir(parents=True, exist_ok=True)
    trajectory.write_csv(losses, out)
    trajectory.draw(losses, out.with_suffix(".png"))
    print(f"\n{trajectory.differences(losses)}\n\n{out}, {out.with_suffix('.png')}")
    return 0


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(main())
