"""docs/speed.md: what `bench/gpu` measured on cards, from the rows of bench/results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
PEERS = ("hf", "hf-deepspeed")
PANDAS_OWN = ("compile", "deterministic", "activation_checkpointing", "save_final")


def rows() -> list[dict[str, Any]]:
    """All rows of bench/results, in the order in which they were measured."""
    files = sorted((ROOT / "bench" / "results").glob("*.jsonl"))
    found = [json.loads(line) for file in files for line in file.read_text(encoding="utf-8").splitlines()]
    return sorted(found, key=lambda row: row["date"])


def on(row: dict[str, Any]) -> tuple[int, str]:
    """The number of cards of a run, and what they are."""
    return row["of_case"]["ranks"], row["card"].replace("NVIDIA ", "").replace(" 80GB HBM3", "")


def speed() -> str:
    """The page."""
    measured, newest = rows(), {}
    for row in measured:
        if row["run"] == "panda":
            newest[row["case"], *on(row)] = row
    one = [row for row in newest.values() if row["of_case"]["ranks"] == 1]
    more = [row for row in newest.values() if row["of_case"]["ranks"] > 1]
    return f"""# Speed and memory on GPUs

{{generated}}Each row is a run of `panda-train` that `bench/gpu` started and measured. Its command is

```
python bench/gpu --cases CASE --stop
```

on a machine with such cards; `python bench/gpu --list` has the flags of each case, `--help` the formula of MFU, and
bench/results the whole command line, the versions and the parts of a step. Rows have synthetic data that fills them;
models have random weights. *Peer* is transformers' Trainer with or without DeepSpeed, the faster one where both ran,
over the same samples with the same batch, precision and stage, on such a card on the same day. Memory is what nvidia-
smi shows of the fullest card, beside what panda had estimated before the run. The newest row of each case and card;
bench/LOG.md has the others, what was tried, and what did not help.

## One card
{_table(one, measured)}
## Several cards of one machine
Rates and memory are those of each card.

{_table(more, measured)}"""


def _table(chosen: list[dict[str, Any]], measured: list[dict[str, Any]]) -> str:
    head = ("CASE", "on", "a step, s", "tokens/s", "MFU", "GiB used / estimated", "times the peer", "date", "panda")
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for row in sorted(chosen, key=lambda row: (row["case"], on(row))):
        cards, card = on(row)
        cells = [f"`{row['case']}`", f"{cards} x {card}", *_measured(row, cards, measured)]
        lines.append("| " + " | ".join([*cells, row["date"][:10], row["panda"]["commit"][:7]]) + " |")
    return "\n".join(lines) + "\n"


def _measured(row: dict[str, Any], cards: int, measured: list[dict[str, Any]]) -> list[str]:
    if not row.get("steps"):
        return [row["status"], "", "", _memory(row), ""]
    peer = _peer(row, measured)
    then = f"; then {row['status']}" if row["status"] == "out of memory" else ""
    return [
        f"{row['step_seconds']['median']:.3f}{then}",
        f"{row['tokens_per_second'] / cards:,.0f}",
        f"{row['mfu']:.1%}",
        _memory(row),
        f"{row['tokens_per_second'] / peer:.2f}" if peer else "",
    ]


def _memory(row: dict[str, Any]) -> str:
    found = (row.get("peak_device_gib"), row.get("estimated_gib"))
    return " / ".join("?" if each is None else f"{each:,.1f}" for each in found) if any(found) else ""


def _peer(row: dict[str, Any], measured: list[dict[str, Any]]) -> float | None:
    """Tokens a second of the faster peer that did the same on such a card on that day."""
    same = [
        each["tokens_per_second"]
        for each in measured
        if each["run"] in PEERS and each.get("tokens_per_second")
        if (on(each), each["date"][:10], _work(each)) == (on(row), row["date"][:10], _work(row))
    ]
    return max(same, default=None)


def _work(row: dict[str, Any]) -> tuple[Any, ...]:
    """The case, without the flags that a peer is not given."""
    case = row["of_case"]
    flags = {key: str(value).lower() for key, value in case["flags"].items() if key not in PANDAS_OWN}
    return case["shape"], case["data"], case["arch"], case["peer"], flags
