"""Rows as a Markdown table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

COLUMNS = (
    "case",
    "run",
    "step s (min to max)",
    "tokens/s",
    "supervised/s",
    "slots/s",
    "MFU",
    "GiB allocated / reserved / device / estimated",
    "to step 1, s",
    "after the last, s",
    "data / forward / backward / optimizer / rest, s",
    "over the better peer",
)
PEERS = ("hf", "hf-deepspeed")


def table(rows: Sequence[dict[str, Any]]) -> str:
    """A line a row, and below the last lines of the logs of those that failed."""
    lines = [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    for row in rows:
        lines.append(f"| {' | '.join(_cells(row, _better_peer(row, rows)))} |")
    for row in rows:
        if row.get("log"):
            lines += ["", f"{row['case']}, {row['run']}: {row['status']}", *(f"    {line}" for line in row["log"])]
    return "\n".join(lines)


def _better_peer(row: dict[str, Any], rows: Sequence[dict[str, Any]]) -> float | None:
    """Tokens a second of the faster peer of the same model, batch and data."""
    same = [each for each in rows if each["run"] in PEERS and row.get("peer") and each.get("peer") == row["peer"]]
    return max((each["tokens_per_second"] for each in same if each.get("tokens_per_second")), default=None)


def _cells(row: dict[str, Any], peer: float | None) -> list[str]:
    name = [row["case"], row["run"]]
    if row["status"] != "ok" and not row.get("steps"):
        memory = _memory(row)
        return [*name, row["status"], "", "", "", "", memory, _number(row.get("to_first_step"), 1), "", "", ""]
    seconds = row["step_seconds"]
    parts = row.get("parts", {})
    own = row["run"] not in PEERS and peer and "tokens_per_second" in row
    failed = "" if row["status"] == "ok" else f"; {row['status']}"
    return [
        *name,
        f"{seconds['median']:.3f} ({seconds['min']:.3f} to {seconds['max']:.3f}, {row['steps']} steps){failed}",
        *(_number(row.get(f"{kind}_per_second")) for kind in ("tokens", "supervised", "slots")),
        "" if row.get("mfu") is None else f"{row['mfu']:.1%}",
        _memory(row),
        _number(row.get("to_first_step"), 1),
        _number(row.get("after_last_step"), 1) or "stopped",
        " / ".join(_number(parts.get(part), 3) or "?" for part in ("data", "forward", "backward", "optimizer", "rest")),
        f"{row['tokens_per_second'] / peer:.2f}" if own else "",
    ]


def _memory(row: dict[str, Any]) -> str:
    kinds = ("peak_allocated_gib", "peak_reserved_gib", "peak_device_gib", "estimated_gib")
    found = [_number(row.get(kind), 1) for kind in kinds]
    return " / ".join(each or "?" for each in found) if any(found) else ""


def _number(value: float | None, digits: int = 0) -> str:
    return "" if value is None else f"{value:,.{digits}f}"
