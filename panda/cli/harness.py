"""`panda eval MODEL --harness TASK,...`: lm-evaluation-harness on a model, where it is installed."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from panda.configuration.arguments import Arguments
from panda.configuration.arguments import texts_of
from panda.registry import UserError
from panda.registry.location import resolve_path
from panda.registry.options import Given
from panda.weights.export_format import refuse_later_export
from panda.weights.formats import ADAPTERS
from panda.weights.formats import CONFIG
from panda.weights.json_object import read_json_object
from panda.weights.run_folders import exported_model

PACKAGE = "lm_eval"


def run_harness(location: str, own: Mapping[str, Given], arguments: Arguments, more: Sequence[str]) -> None:
    """Run lm-evaluation-harness on the tasks that ``own`` names, with ``more`` flags of its own, and end as it does."""
    others = [f"--{key}" for key in (*own, *arguments.given) if key not in ("harness", "ckpt_path")]
    if others:
        raise UserError(
            f"{', '.join(others)}: not with `--harness`, which reads the data of its own tasks. Flags of lm_eval come"
            " after `--`: `panda eval MODEL --harness hellaswag -- --limit 100 --output_path results`."
        )
    tasks = [name for text in texts_of(own["harness"]) for name in text.split(",") if name]
    if not tasks:
        raise UserError("--harness: name its tasks, as in `--harness hellaswag,arc_easy`.")
    model = model_arguments(location, own.get("ckpt_path"))
    if find_spec(PACKAGE) is None:
        raise UserError("--harness: lm-evaluation-harness is not installed here: `pip install 'panda-train[harness]'`.")
    words = [sys.executable, "-m", PACKAGE, "--model", "hf", "--model_args", model, "--tasks", ",".join(tasks), *more]
    print(" ".join(words[1:]), file=sys.stderr, flush=True)
    sys.stdout.flush()
    ended = subprocess.run(words, env=os.environ | {"TOKENIZERS_PARALLELISM": "false"}, check=False)
    if ended.returncode:
        raise UserError(f"--harness: lm_eval ended with code {ended.returncode}; what it printed says why.")


def model_arguments(location: str, ckpt_path: Given | None) -> str:
    """The `--model_args` of lm_eval for the model at ``location``. Raises UserError where transformers loads none."""
    folder = exported_model(resolve_path(location))
    refuse_later_export(folder)
    found: dict[str, Any] = {"pretrained": folder, "dtype": "auto"}
    if (folder / ADAPTERS).exists():
        base = ckpt_path.value if ckpt_path else read_json_object(folder / ADAPTERS).get("base_model_name_or_path")
        if not base or not Path(str(base)).is_dir():
            raise UserError(
                f"{folder}: adapters, whose base {base!r} is not a folder here. Give its location with `--ckpt_path`."
            )
        found |= {"pretrained": base, "peft": folder, "tokenizer": folder}
    elif ckpt_path is not None:
        raise UserError(f"--ckpt_path: {folder} holds no adapters, so it has no base. Leave --ckpt_path out.")
    elif not (folder / CONFIG).exists():
        raise UserError(
            f"{location!r} contains no model that transformers loads: no export, no {CONFIG}. `panda export {location}"
            " --output FOLDER` writes a run's checkpoint as one."
        )
    elif "panda_model" in read_json_object(folder / CONFIG):
        raise UserError(f"{folder}: the model is of a panda package, and lm_eval loads those of transformers only.")
    return ",".join(f"{key}={value}" for key, value in found.items())
