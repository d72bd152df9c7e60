"""Exports as GGUF, by llama.cpp's own script: it knows the names, tokenizers and architectures that llama.cpp reads."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from panda.files.activity import activity
from panda.files.whole import whole
from panda.registry import UserError

SCRIPT = "convert_hf_to_gguf.py"
"""Of a clone of llama.cpp. It brings the package `gguf` along, and needs torch and transformers, as panda does."""
TYPES = ("auto", "f32", "f16", "bf16", "q8_0")
"""Of weights that the script writes; `llama-quantize` makes smaller ones of them. auto: the type in the export."""
MAGIC = b"GGUF"
MOST_SAID = 300
"""Characters of what the script says last."""


def script_in(llama_cpp: Path) -> Path:
    """The script in ``llama_cpp``, a clone of llama.cpp. Raises UserError where there is none."""
    script = llama_cpp / SCRIPT
    if not script.is_file():
        raise UserError(
            f"--llama_cpp: {str(llama_cpp)!r} has no {SCRIPT}. Name a clone: `git clone"
            " https://github.com/ggml-org/llama.cpp`."
        )
    return script


def write_gguf(export: Path, file: Path, script: Path, kind: str) -> None:
    """Write the model in ``export`` to ``file`` by ``script``, which is run by this Python.

    Raises UserError where it fails, with what it says last; ``file`` is then left as it was.
    """
    with activity(f"writing {file} by {script.name}"), whole(file) as new:
        command = [sys.executable, str(script), str(export), "--outfile", str(new), "--outtype", kind]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
        if done.returncode != 0 or not new.is_file() or new.open("rb").read(len(MAGIC)) != MAGIC:
            lines = [line for line in (done.stderr or done.stdout).splitlines() if line.strip()]
            said = lines[-1].strip()[:MOST_SAID] if lines else "it said nothing"
            raise UserError(
                f"{file} is not written: {script} ended with {done.returncode}: {said}\nllama.cpp does"
                f" not read every architecture and tokenizer. The model itself is in {export}."
            )
