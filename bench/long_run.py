"""Whether a long run grows: its memory, descriptors and threads, through many steps with evaluations and saves.

    python bench/long_run.py --steps 20000 --every 1000

Trains a tiny model by `panda-train`, and prints what its process holds every so many steps: resident memory, of it what
is not of files; open descriptors; threads; child processes; objects that Python's garbage collector knows. Those after
`--warm` steps are what later ones are compared with: the caches of torch are full by then. Exits with 1 where
descriptors, threads or children are more at the end than then, or memory by more than `--most` MiB.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

WATCHER = '''
import gc
import json
import os
from dataclasses import dataclass
from pathlib import Path

from panda.registry import hookimpl
from panda.registry import register_plugin


@dataclass(frozen=True)
class Options:
    watch_every: int = 1000
    """Steps between looks."""


def held() -> dict:
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    kib = {key: int(status[key].split()[0]) for key in ("VmRSS", "RssAnon")}
    task = f"/proc/self/task/{os.getpid()}/children"
    return {
        "resident_mib": round(kib["VmRSS"] / 1024, 1),
        "own_mib": round(kib["RssAnon"] / 1024, 1),
        "descriptors": len(os.listdir("/proc/self/fd")) - 1,
        "threads": int(status["Threads"]),
        "children": len(Path(task).read_text().split()),
        "objects": len(gc.get_objects()),
    }


@register_plugin("watcher", options=Options)
class Watcher:
    acts = False

    def __init__(self, options, context):
        self.every = options.watch_every

    @hookimpl
    def panda_step_end(self, run, step):
        if step % self.every == 0 or step == 1:
            gc.collect()
            with (run.directory / "held.jsonl").open("a") as file:
                file.write(json.dumps({"step": step} | held()) + "\\n")
'''
RUN = (
    *("--arch", "llama-tiny", "--num_layers", "1", "--hidden_size", "16", "--intermediate_size", "24"),
    *("--num_heads", "2", "--instruction_tuning_data_dir", "panda:data/sample/instruct", "--max_seq_length", "32"),
    *("--gradient_accumulation_steps", "1", "--num_workers", "1", "--save_total_limit", "2", "--zero_stage", "1"),
    *("--max_samples", "400", "--eval_fraction", "0.05", "--prompts", "a", "-p", "no:plot"),
)


def watched(given: argparse.Namespace, folder: Path) -> list[dict[str, float]]:
    """What the run held, every so many steps."""
    (folder / "watcher.py").write_text(WATCHER)
    often = str(given.often)
    argv = [
        *("-m", "panda.cli.train", *RUN, "--max_steps", str(given.steps), "--save_steps", often, "--eval_steps", often),
        *("--plugins", "./watcher.py:watcher", "--watch_every", str(given.every), "--output_dir", "run"),
    ]
    variables = {"OMP_NUM_THREADS": "1", "PANDA_CACHE": str(folder / "cache"), "PYTHONSAFEPATH": "1"}
    with (folder / "printed.txt").open("w") as printed:
        done = subprocess.run(
            [sys.executable, *argv, *given.extra],
            cwd=folder,
            env=os.environ | variables,
            stdout=printed,
            stderr=printed,
        )
    if done.returncode:
        sys.exit((folder / "printed.txt").read_text()[-3000:])
    return [json.loads(line) for line in (folder / "run" / "held.jsonl").read_text().splitlines()]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--every", type=int, default=1000, help="steps between looks")
    parser.add_argument("--often", type=int, default=100, help="steps between evaluations, and between saves")
    parser.add_argument("--warm", type=int, default=2000, help="steps after which nothing may grow")
    parser.add_argument("--most", type=float, default=8.0, help="MiB that memory may grow by")
    parser.add_argument("extra", nargs="*", help="more flags of panda-train, after `--`")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="panda-long-run-") as folder:
        rows = watched(given, Path(folder))
    print(f"| {' | '.join(rows[0])} |\n|{'---|' * len(rows[0])}")
    for row in rows:
        print(f"| {' | '.join(f'{value:,}' for value in row.values())} |")
    first, last = next(row for row in rows if row["step"] >= given.warm), rows[-1]
    grown = [key for key in ("descriptors", "threads", "children") if last[key] > first[key]]
    grown += [key for key in ("own_mib",) if last[key] > first[key] + given.most]
    print(f"grown since step {first['step']:,}: {', '.join(grown) or 'nothing'}")
    return 1 if grown else 0


if __name__ == "__main__":
    sys.exit(main())
