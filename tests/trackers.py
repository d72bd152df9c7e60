"""Trains a run with trackers, and compares what they hold with metrics.jsonl.

    python tests/trackers.py [wandb] [mlflow] [trackio] [comet]

Takes an environment with panda and the clients of those that are named, by default of all. wandb and Comet write
offline, MLflow's server is started on this machine, and trackio keeps its files in a folder: nothing leaves it.
"""

from __future__ import annotations

import json
import os
import socket
import sqlite3
import struct
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from collections.abc import Iterator
from pathlib import Path

Numbers = dict[tuple[str, int], float]


TRACKERS = ("wandb", "mlflow", "trackio", "comet")


def main() -> None:
    chosen = sys.argv[1:] or list(TRACKERS)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        uri = f"http://127.0.0.1:{port}"
        os.environ |= {"WANDB_MODE": "offline", "TRACKIO_DIR": str(folder / "trackio"), "MLFLOW_TRACKING_URI": uri}
        os.environ["COMET_START_ONLINE"] = "0"
        places = ("--backend-store-uri", f"sqlite:///{folder}/m.db", "--artifacts-destination", str(folder / "a"))
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), *places]
        if "mlflow" not in chosen:
            command = ["sleep", "1000"]
        server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            if "mlflow" in chosen:
                _wait_for(port)
            few = ["--max_steps", "12", "--eval_steps", "4", "--eval_fraction", "0.05"]
            few += ["--plugins", *chosen]
            run = [sys.executable, "-m", "panda.cli.train", "--config", "panda:configs/instruct-tiny.yaml", *few]
            subprocess.run([*run, "--output_dir", str(folder / "run")], check=True)
            _compare(folder, chosen)
        finally:
            server.terminate()
            server.wait()


def _wait_for(port: int) -> None:
    until = time.monotonic() + 120
    while time.monotonic() < until:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return
        except OSError:
            time.sleep(0.5)
    sys.exit("MLflow's server does not start")


def _compare(folder: Path, chosen: list[str]) -> None:
    run = folder / "run"
    named = json.loads((run / "trackers.json").read_text())
    records = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    expected = {
        (key, record["step"]): value
        for record in records
        for key, value in record.items()
        if key != "step" and isinstance(value, (int, float))
    }
    found: dict[str, Callable[[], Numbers]] = {
        "wandb": lambda: _of_wandb(next(run.glob("wandb/offline-*/*.wandb"))),
        "mlflow": lambda: _of_mlflow(named["mlflow"], {key for key, _ in expected}),
        "trackio": lambda: _of_trackio(folder / "trackio" / "panda.db"),
        "comet": lambda: _of_comet(next((run / "comet").glob("*.zip")), {key for key, _ in expected}),
        "tensorboard": lambda: _of_tensorboard(run / "tensorboard"),
    }
    for name in [*chosen, "tensorboard"]:
        numbers = found[name]()
        wrong = [
            key for key in expected.keys() | numbers.keys() if not _same(expected.get(key), numbers.get(key), name)
        ]
        print(f"{name}: {len(numbers)} numbers, {len(wrong)} wrong or missing {wrong[:3] or ''}")
        if wrong:
            sys.exit(1)


def _same(expected: float | None, found: float | None, name: str) -> bool:
    if expected is None or found is None:
        return False
    return expected == found or (name == "tensorboard" and abs(expected - found) <= 1e-6 * abs(expected))  # float32


def _of_wandb(file: Path) -> Numbers:
    """The history in a file of wandb: protocol buffers in records as LevelDB's log has them, after 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    found: Numbers = {}
    for content in _records(file.read_bytes()):
        record = Record()
        record.ParseFromString(content)
        if record.WhichOneof("record_type") == "history":
            row = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            found |= {(key, row["step"]): value for key, value in row.items() if key[0] != "_" and key != "step"}
    return found


def _records(data: bytes) -> Iterator[bytes]:
    block, header, at, content = 32768, 7, 7, b""
    while at < len(data):
        if block - at % block < header:
            at += block - at % block
            continue
        _, length, part = struct.unpack("<IHB", data[at : at + header])
        content += data[at + header : at + header + length]
        at += header + length
        if part in (1, 4):  # whole, or the last part
            yield content
            content = b""


def _of_mlflow(name: str, keys: set[str]) -> Numbers:
    import mlflow

    client = mlflow.MlflowClient()
    return {(key, each.step): each.value for key in keys for each in client.get_metric_history(name, key)}


def _of_trackio(file: Path) -> Numbers:
    with sqlite3.connect(file) as connection:
        rows = connection.execute("SELECT step, metrics FROM metrics").fetchall()
    return {(key, step): value for step, values in rows for key, value in json.loads(values).items()}


def _of_comet(file: Path, keys: set[str]) -> Numbers:
    """The metrics ``keys`` in an archive of Comet, which has others of the machine: messages in JSON, one a line."""
    with zipfile.ZipFile(file) as archive:
        messages = [json.loads(line) for line in archive.read("messages.json").splitlines()]
    metrics = [each["payload"]["metric"] for each in messages if each["type"] == "metric_msg"]
    return {(each["metricName"], each["step"]): each["metricValue"] for each in metrics if each["metricName"] in keys}


def _of_tensorboard(folder: Path) -> Numbers:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    found: Numbers = {}
    for tag in events.Tags()["scalars"]:
        part, _, key = tag.partition("/")
        found |= {(f"eval_{key}" if part == "eval" else key, each.step): each.value for each in events.Scalars(tag)}
    return found


if __name__ == "__main__":
    main()
