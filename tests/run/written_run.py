"""Writes samples/run-1, a whole run of this version with its export, which later versions have to read.

    python tests/run/written_run.py FOLDER

Prints the losses that follow where the run goes on. Never write one of an older format again: add that of a new format
beside it.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

from panda.testing.runs import train

RUN: tuple[str, ...] = (
    *("--arch", "llama-tiny", "--num_layers", "1", "--hidden_size", "8", "--intermediate_size", "8"),
    *(
        "--num_heads",
        "1",
        "--max_seq_length",
        "32",
        "--gradient_accumulation_steps",
        "1",
        "--num_workers",
        "0",
        "--zero_stage",
        "1",
    ),
    *("--learning_rate", "0.01", "--prompts", "a", "--eval_fraction", "0.25"),
)
STEPS, MORE = 2, 5

ROWS = Path(__file__).with_name("samples") / "rows.json"

if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        data = {"instruction_tuning_data_dir": ROWS}
        short = train(Path(folder, "short"), *RUN, max_steps=STEPS, **data)
        print(train(Path(folder, "long"), *RUN, max_steps=MORE, **data).losses[STEPS:])
        shutil.copytree(short.directory, sys.argv[1])
        for name in ("provenance.json", "config.yaml"):  # where it was made does not matter
            file = Path(sys.argv[1], name)
            text = (
                file.read_text().replace(folder, "/home/someone/runs").replace(str(Path.cwd()), "/home/someone/panda")
            )
            file.write_text(text)
    for name in (".lock", "checkpoints/zero_to_fp32.py", "checkpoints/zero_to_torch.py"):
        Path(sys.argv[1], name).unlink(missing_ok=True)
