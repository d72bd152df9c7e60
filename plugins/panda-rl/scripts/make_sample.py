"""Write panda_rl/sample/sums/sums.jsonl: sums of two digits that are a digit, as rows of a prompt and an answer.

python scripts/make_sample.py
"""

from __future__ import annotations

import json
from pathlib import Path

FILE = Path(__file__).parents[1] / "panda_rl" / "sample" / "sums" / "sums.jsonl"


def rows() -> list[dict[str, str]]:
    """Every sum of two digits that is below 10."""
    return [
        {"prompt": f"{first}+{second}", "answer": str(first + second)}
        for first in range(10)
        for second in range(10)
        if first + second < 10
    ]


if __name__ == "__main__":
    FILE.parent.mkdir(parents=True, exist_ok=True)
    FILE.write_text("".join(json.dumps(row) + "\n" for row in rows()), encoding="utf-8")
