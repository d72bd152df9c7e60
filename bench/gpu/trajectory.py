"""Losses of variants of a case beside each other, step by step, from one start over the same data."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from collections.abc import Sequence
from pathlib import Path

Losses = Mapping[str, Sequence[float | None]]
"""Of each variant, the loss of each step."""


def write_csv(losses: Losses, file: Path) -> None:
    with file.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(["step", *losses])
        for step, row in enumerate(zip(*losses.values(), strict=False), 1):
            writer.writerow([step, *row])


def differences(losses: Losses) -> str:
    """A line for each variant but the first: how far its losses are from the first one's."""
    (reference, expected), *others = losses.items()
    lines = ["| variant | steps | largest difference | mean | mean of the last quarter | last loss | relative |"]
    lines += ["|---|---|---|---|---|---|---|"]
    for name, found in others:
        pairs = [(f, e) for f, e in zip(found, expected, strict=False) if f is not None and e is not None]
        if not pairs:
            lines.append(f"| {name} | 0 | | | | | |")
            continue
        apart = [abs(f - e) for f, e in pairs]
        late = apart[-max(1, len(apart) // 4) :]
        cells = [max(apart), sum(apart) / len(apart), sum(late) / len(late)]
        last, of_first = pairs[-1]
        lines.append(
            f"| {name} | {len(pairs)} | {' | '.join(f'{cell:.2e}' for cell in cells)} | {last:.4f} |"
            f" {(last - of_first) / of_first:+.2%} of {reference} |"
        )
    return "\n".join(lines)


def short_names(variants: Sequence[str]) -> list[str]:
    """``variants`` without the flags that all have; the case's name where nothing is left of one."""
    flags = [variant.split("+")[1:] for variant in variants]
    common = set(flags[0]).intersection(*flags)
    left = [", ".join(flag for flag in each if flag not in common) for each in flags]
    return [short or variant.partition("+")[0] for short, variant in zip(left, variants, strict=True)]


def draw(losses: Losses, file: Path) -> None:
    """The losses, and below their differences from the first variant's."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 6.5), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    (reference, expected), *others = zip(short_names([*losses]), losses.values(), strict=True)
    above.plot(range(1, len(expected) + 1), expected, label=reference)
    for name, found in others:
        (line,) = above.plot(range(1, len(found) + 1), found, label=name, linewidth=0.8)
        steps = [
            (step, f - e)
            for step, (f, e) in enumerate(zip(found, expected, strict=False), 1)
            if f is not None and e is not None
        ]
        below.plot([step for step, _ in steps], [apart for _, apart in steps], linewidth=0.8, color=line.get_color())
    above.set_ylabel("loss a supervised token")
    figure.legend(loc="outside upper left", fontsize="small")
    below.set_ylabel("difference from the first")
    below.set_xlabel("optimizer step")
    figure.savefig(file, dpi=110)
