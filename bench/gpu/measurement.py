"""Runs panda's command line and the peer, each in processes of its own, and makes a row of what they marked."""

from __future__ import annotations

import configparser
import hashlib
import json
import os
import platform
import re
import shlex
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextlib import suppress
from dataclasses import asdict
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil  # of deepspeed

from bench.gpu.cases import SHAPES
from bench.gpu.cases import TASKS
from bench.gpu.cases import Case
from bench.gpu.cases import is_on
from bench.gpu.marks import ENVIRONMENT

ROOT = Path(__file__).parents[2]
SKIPPED_STEPS = 3
"""The first steps of a run, which are not measured."""
SAMPLED_EVERY = 200
"""Milliseconds between two readings of the device's memory by nvidia-smi."""
GRACE = 10
"""Seconds from SIGTERM to SIGKILL, and from there until a card's memory is free."""
EMPTY = 1024
"""MiB that a card which nothing uses may hold."""
LOG_LINES = 15
"""Last lines of the log that the row of a failed run keeps."""
MFU = "(6 N, or 4 N with adapters on a frozen base, + 12 layers width length) x slots a second / (cards x {:g} TFLOP/s)"
NOTED = ("PYTORCH_", "TORCH", "CUDA_", "NCCL_", "OMP_", "DS_", "PANDA_")
"""Beginnings of environment variables that a row records: what they change is not in its command."""
PARTS = ("data", "forward", "backward", "optimizer")


@dataclass(frozen=True)
class Settings:
    """What is the same for all runs of a call."""

    work: Path
    """Checkpoints, data, caches and the output of runs; kept for the next call."""
    panda: Path
    """The root of the checkout that is measured."""
    steps: int
    """Measured, after SKIPPED_STEPS."""
    timeout: float
    deadline: float | None
    """``time.monotonic`` at which the budget of the call is spent."""
    extra: tuple[str, ...]
    """More flags of panda-train."""
    ends: bool
    """Whether runs go to their end; else they are stopped after their last step, before they export."""
    peer_more: dict[str, Any]
    peak_tflops: float
    data: dict[str, str]
    """The user's own data, by kind."""

    @property
    def total_steps(self) -> int:
        return SKIPPED_STEPS + self.steps

    def checkpoint(self, case: Case) -> Path:
        config = json.dumps(SHAPES[case.shape].config(), sort_keys=True).encode()
        return self.work / "checkpoints" / f"{case.shape}-{hashlib.sha256(config).hexdigest()[:8]}"

    def rows(self, case: Case) -> Path:
        if case.data in self.data:
            return Path(self.data[case.data]).resolve()
        name = f"answers-{case.length}" if case.data == "answers" else case.data
        return self.work / "data" / f"{name}.json"

    def samples(self, case: Case, steps: int) -> Path:
        each = case.rows * case.accumulation * case.data_ranks
        origin = self.data[case.data].replace("/", "_") if case.data in self.data else ""
        return self.work / "samples" / f"{case.data}{origin}-{case.length}-{each}x{steps}.npz"

    def left(self) -> float:
        """Seconds that a run may take."""
        return self.timeout if self.deadline is None else min(self.timeout, self.deadline - time.monotonic())


@dataclass(frozen=True)
class Outcome:
    """A command that has ended."""

    command: str
    code: int | None
    """None: it was ended, since it took too long."""
    began: float
    """Seconds since 1970."""
    ended: float
    log: str
    device_gib: float | None
    """Peak of the memory of the fullest card, all processes together, as nvidia-smi sees it."""


def panda_flags(case: Case, settings: Settings, steps: int) -> list[str]:
    """panda-train's flags, without those of the bench's own."""
    task, key = TASKS[case.data]
    flags: dict[str, Any] = {"task": task, key: settings.rows(case)}
    flags |= {"arch": case.arch} if case.arch else {"ckpt_path": settings.checkpoint(case)}
    flags |= {"max_steps": steps, **case.flags}
    for word in settings.extra:  # they come last, and a key is given once
        if word.startswith("--"):
            flags.pop(word[2:].partition("=")[0].replace("-", "_"), None)
    written = [part for name, value in flags.items() for part in (f"--{name}", _text(value))]
    return [*written, *settings.extra]


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def run_panda(case: Case, settings: Settings, folder: Path, steps: int, *, ends: bool) -> Outcome:
    """Train with panda's command line; its output and marks go to ``folder``."""
    argv = ["-m", "panda.cli.train", *panda_flags(case, settings, steps)]
    argv += ["--output_dir", str(folder / "run"), "--plugins", "bench-probe"]
    more = {} if ends else {"PANDA_BENCH_STOP": "1"}
    return _run(_launched(argv, case.ranks), folder, settings, case.ranks, more)


def peer_spec(case: Case, settings: Settings, folder: Path, zero_stage: int | None) -> dict[str, Any]:
    """What the peer is told: as the case, but for what its ``peer`` says."""
    own = dict(case.peer or {})
    spec = {
        "samples": str(settings.samples(case, settings.total_steps)),
        "output": str(folder),
        "rows": own.get("rows", case.rows),
        "accumulation": own.get("accumulation", case.accumulation),
        "steps": settings.total_steps,
        "learning_rate": float(case.flag("learning_rate")),
        "max_grad_norm": float(case.flag("max_grad_norm")),
        "grouped": case.data == "chats",
        "checkpointing": own.get("checkpointing", case.flags.get("activation_checkpointing") in ("full", "selective")),
        "zero_stage": zero_stage,
        "ends": settings.ends,
    }
    spec |= {"shape": case.shape} if case.arch else {"model": str(settings.checkpoint(case))}
    if case.uses_adapters:
        spec |= {"lora_r": int(case.flag("lora_r")), "lora_alpha": float(case.flag("lora_alpha"))}
    if is_on(case.flags.get("use_quant")):
        spec |= {"quantised": True}
    return spec | ({"more": settings.peer_more} if settings.peer_more else {})


def run_peer(case: Case, settings: Settings, folder: Path, *, deepspeed: bool) -> Outcome:
    stage = int(case.flags.get("zero_stage", 1)) if deepspeed else None
    argv = ["-m", "bench.gpu.peer", json.dumps(peer_spec(case, settings, folder, stage))]
    alone = {}
    if deepspeed and case.ranks == 1:  # it is started like a launcher's only process, without the launcher's seconds
        alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
        alone |= {"MASTER_PORT": str(_free_port())}
    return _run(_launched(argv, case.ranks), folder, settings, case.ranks, alone)


def _launched(argv: list[str], ranks: int) -> list[str]:
    if ranks == 1:
        return [sys.executable, *argv]
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks), *argv]


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def environment(settings: Settings, **more: str) -> dict[str, str]:
    """Of all processes that the bench starts: this bench, the panda that is measured, and caches that they share."""
    path = [_site(settings), settings.panda, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    caches = {
        "PANDA_CACHE": "tokens",
        "TORCHINDUCTOR_CACHE_DIR": "inductor",
        "TRITON_CACHE_DIR": "triton",
    }
    fixed = {"PYTHONPATH": os.pathsep.join(map(str, path)), "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    fixed |= {"OMP_WAIT_POLICY": "PASSIVE"}  # as panda sets it: on a shared CPU, spinning threads of the peer lose
    return os.environ | {name: str(settings.work / "caches" / place) for name, place in caches.items()} | fixed | more


def _site(settings: Settings) -> Path:
    """A folder with this bench, whose probe is a plugin, and with panda's names where panda is not installed."""
    site = settings.work / "site"
    shutil.rmtree(site, ignore_errors=True)
    site.mkdir(parents=True)
    (site / "bench").symlink_to(ROOT / "bench")  # the measured checkout may have another
    _declare(site, "panda-bench", {"panda.plugins": "bench-probe = bench.gpu.probe"})
    try:
        metadata.distribution("panda-train")
    except metadata.PackageNotFoundError:
        declared = configparser.ConfigParser(interpolation=None)
        declared.read(settings.panda / "setup.cfg")
        _declare(site, "panda-train", dict(declared["options.entry_points"]))
    return site


def _declare(site: Path, name: str, entry_points: dict[str, str]) -> None:
    info = site / f"{name.replace('-', '_')}-0.dist-info"
    info.mkdir(parents=True, exist_ok=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0\n")
    sections = (f"[{group}]\n{lines}\n" for group, lines in entry_points.items())
    (info / "entry_points.txt").write_text("".join(sections))


def _run(command: list[str], folder: Path, settings: Settings, ranks: int, more: dict[str, str]) -> Outcome:
    """Run ``command`` to its end, or until its time is up."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    given = more | {ENVIRONMENT: str(folder)}
    if "CUDA_VISIBLE_DEVICES" not in os.environ:  # transformers' Trainer would take all cards in one process
        given |= {"CUDA_VISIBLE_DEVICES": ",".join(map(str, range(ranks)))}
    log = folder / "log"
    _wait_for_memory()
    with log.open("w") as stream, _memory_of_device() as peak:
        began = time.time()
        process = subprocess.Popen(
            command,
            env=environment(settings, **given),
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            cwd=folder,
            start_new_session=True,
        )
        try:
            code: int | None = process.wait(max(1.0, settings.left()))
        except subprocess.TimeoutExpired:
            code = None
        finally:
            _end(process)
        ended = time.time()
    return Outcome(shlex.join(command), code, began, ended, log.read_text(errors="replace"), peak())


def _end(process: subprocess.Popen[bytes]) -> None:
    """End ``process``, with all that it has started: torchrun gives each rank a process group of its own."""
    with suppress(psutil.NoSuchProcess):
        started = psutil.Process(process.pid).children(recursive=True)
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)
        for left in started:
            with suppress(psutil.NoSuchProcess):
                left.kill()
    with suppress(ProcessLookupError):  # what outlives a process that has ended by itself
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


_USED = ("nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits")


def _visible() -> list[str]:
    """Options of nvidia-smi for the cards of this call: others may be in use by another."""
    cards = os.environ.get("CUDA_VISIBLE_DEVICES")
    return ["-i", cards] if cards else []


def _wait_for_memory() -> None:
    """Wait until the cards are as good as empty, GRACE seconds at most: memory outlives a killed process for a moment,
    and would be read as that of the next."""
    until = time.monotonic() + GRACE
    while any(float(used) > EMPTY for used in _output([*_USED, *_visible()]).split()) and time.monotonic() < until:
        time.sleep(SAMPLED_EVERY / 1000)


@contextmanager
def _memory_of_device() -> Iterator[Any]:
    """Reads the memory in use by nvidia-smi in the meantime; the result gives the peak in GiB, None without a GPU."""
    read: list[float] = []
    if shutil.which("nvidia-smi") is None:
        yield lambda: None
        return
    query = [*_USED, f"-lms={SAMPLED_EVERY}", *_visible()]
    with subprocess.Popen(query, stdout=subprocess.PIPE, text=True) as sampling:
        yield lambda: max(read, default=None)
        sampling.terminate()
        written = sampling.communicate()[0]
    read += [float(line) / 1024 for line in written.split() if line.isdigit()]


# -- from marks to a row ----------------------------------------------------------------------


def row_of(case: Case, who: str, outcome: Outcome, folder: Path, settings: Settings) -> dict[str, Any]:
    """What a run of ``who`` (panda, hf or hf-deepspeed) gave."""
    ranks = [_records(file) for file in sorted(folder.glob("rank-*.jsonl"))]
    first: list[dict[str, Any]] = ranks[0] if ranks else []
    events = {record["event"]: record for record in first}
    last = bool(ranks) and all(any(record["event"] == "last" for record in records) for records in ranks)
    row: dict[str, Any] = {"status": _status(outcome, last, settings), "command": outcome.command}
    row["to_first_step"] = _between(outcome.began, events.get("first"))
    if outcome.code == 0 and "end" in events:
        row["after_last_step"] = outcome.ended - events["last"]["at"]
    counting = [records for records in ranks if records[0]["counts"]]
    row |= _speed(case, counting, folder, settings)
    for kind in ("allocated", "reserved"):
        marked = [record for records in ranks for record in records if record["event"] in ("last", "failed")]
        found = [record[kind] for record in marked if kind in record]
        row[f"peak_{kind}_gib"] = max(found) / 2**30 if found else None
    row |= {"peak_device_gib": outcome.device_gib, "estimated_gib": _estimated(outcome.log), "losses": _losses(folder)}
    if row["status"] != "ok":
        row["log"] = outcome.log.rstrip().splitlines()[-LOG_LINES:]
    return row


def _estimated(log: str) -> float | None:
    """GiB of a card that panda said before it began that the run would need; None on a CPU."""
    found = re.search(r"about ([\d.,]+) of [\d.,]+ GiB on each GPU", " ".join(log.split()))
    return None if found is None else float(found[1].replace(",", ""))


def _records(file: Path) -> list[dict[str, Any]]:
    found = []
    for line in file.read_text().splitlines():
        with suppress(ValueError):  # the last line of a process that was killed
            found.append(json.loads(line))
    return found


def _status(outcome: Outcome, last: bool, settings: Settings) -> str:
    """``last``: each rank has taken its last step. Stopped there, those that are alive report the others as killed."""
    if last and (outcome.code == 0 or not settings.ends):
        return "ok"
    text = outcome.log.lower()
    if "out of memory" in text or "outofmemory" in text:
        return "out of memory"
    if outcome.code is None:
        return f"not done after {outcome.ended - outcome.began:.0f} s"
    return f"failed, exit code {outcome.code}" if outcome.code else "ended without its last step"


def _between(began: float, event: dict[str, Any] | None) -> float | None:
    return None if event is None else event["at"] - began


def _data_waits(folder: Path) -> dict[int, dict[str, float]]:
    """Of each step, the seconds that panda says that it waited for data; none where records are of several steps."""
    records = _metrics(folder)
    if [record["step"] for record in records] != list(range(1, len(records) + 1)):
        return {}
    return {record["step"]: {"data": record["data_wait"] * record["step_seconds"]} for record in records}


def _speed(case: Case, ranks: list[list[dict[str, Any]]], folder: Path, settings: Settings) -> dict[str, Any]:
    """The measured steps: rates are medians over steps of the tokens of all ranks over the seconds of the first."""
    steps = [[record for record in records if record["event"] == "step"] for records in ranks]
    together = [group for group in zip(*steps, strict=False) if group[0]["step"] > SKIPPED_STEPS]
    if not together or together[0][0]["seconds"] is None:
        return {"steps": 0}
    seconds = [group[0]["seconds"] for group in together]
    result: dict[str, Any] = {
        "steps": len(together),
        "step_seconds": {"median": statistics.median(seconds), "min": min(seconds), "max": max(seconds)},
    }
    for name in ("tokens", "supervised", "slots"):
        if all(name in record for group in together for record in group):
            sums = [sum(record[name] for record in group) for group in together]
            rates = [count / time_ for count, time_ in zip(sums, seconds, strict=True)]
            result[f"{name}_per_second"] = statistics.median(rates)
            result[f"{name}_per_second_mean"] = sum(sums) / sum(seconds)
    waits = _data_waits(folder)
    found = [group[0]["parts"] | waits.get(group[0]["step"], {}) for group in together]
    parts = {part: statistics.median(each[part] for each in found) for part in PARTS if all(part in e for e in found)}
    if len(parts) >= len(PARTS) - 1:
        parts["rest"] = max(0.0, statistics.median(seconds) - sum(parts.values()))
    return result | {"parts": parts, **_mfu(case, result, settings)}


def _mfu(case: Case, speed: dict[str, Any], settings: Settings) -> dict[str, Any]:
    """Operations a slot, and the share of the cards' peak; None on a CPU."""
    shape, length = SHAPES[case.shape], float(case.length)
    if case.data == "chats":  # which do not see each other
        with suppress(OSError):
            facts = json.loads(settings.samples(case, settings.total_steps).with_suffix(".json").read_text())
            length = facts["tokens"] / facts["samples"]
    operations = (4 if case.uses_adapters else 6) * shape.parameters + 12 * shape.layers * shape.hidden * length
    if "slots_per_second" not in speed or shutil.which("nvidia-smi") is None:
        return {"operations_per_slot": operations, "mfu": None}
    share = speed["slots_per_second"] * operations / (case.ranks * settings.peak_tflops * 1e12)
    return {"operations_per_slot": operations, "mfu": share, "mfu_formula": MFU.format(settings.peak_tflops)}


def _losses(folder: Path) -> list[float | None]:
    if (folder / "losses.json").exists():
        losses: list[float | None] = json.loads((folder / "losses.json").read_text())
        return losses
    return [record["loss"] for record in _metrics(folder)]


def _metrics(folder: Path) -> list[dict[str, Any]]:
    """The log records of panda's run."""
    file = folder / "run" / "metrics.jsonl"
    return [record for record in _records(file) if "loss" in record] if file.exists() else []


# -- what is measured where -------------------------------------------------------------------


PACKAGES = (
    *("torch", "transformers", "deepspeed", "accelerate", "peft", "bitsandbytes", "liger_kernel", "triton"),
    "flash-attn-4",
)
"""Whose versions a row carries."""


def about(settings: Settings, commit: str | None) -> dict[str, Any]:
    """Date, versions and card, which every row carries."""

    def version(package: str) -> str | None:
        with suppress(metadata.PackageNotFoundError):
            return metadata.version(package)
        return None

    digest = hashlib.sha256()
    for file in sorted((settings.panda / "panda").rglob("*.py")):
        digest.update(str(file.relative_to(settings.panda)).encode() + file.read_bytes())
    cards = _output(["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"])
    described = _output(["git", "-C", str(settings.panda), "describe", "--always", "--dirty", "--abbrev=12"])
    return {
        "date": time.strftime("%Y-%m-%d %H:%M", time.gmtime()),
        "card": cards.splitlines()[0] if cards else f"CPU, {platform.processor() or platform.machine()}",
        "cards": len(cards.splitlines()),
        "versions": {name: found for name in PACKAGES if (found := version(name))}
        | {"python": platform.python_version()},
        "panda": {"commit": commit or described or "unknown", "sources": digest.hexdigest()[:12]},
        "environment": {name: value for name, value in sorted(os.environ.items()) if name.startswith(NOTED)},
    }


def _output(command: list[str]) -> str:
    with suppress(OSError):
        done = subprocess.run(command, capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else ""
    return ""


def described(case: Case) -> dict[str, Any]:
    """The case, as plain objects."""
    return json.loads(json.dumps(asdict(case), default=str))  # type: ignore[no-any-return]
