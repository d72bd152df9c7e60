"""The run directory: which one it is, and the files that say what ran.

docs/concepts.md lists what it holds.
"""

from __future__ import annotations

import json
import platform
import sys
from datetime import UTC
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from panda.engine.checkpoint_folders import find_checkpoint
from panda.registry import UserError
from panda.registry.resolve import Resolved

DESCRIPTION = "provenance.json"
"""The file that makes a folder a run directory."""

_PLACE_KEYS = ("output_dir", "resume")
"""Keys that say where a run is and not what it does: left out of config.yaml, so that it runs again as it stands."""


def choose_directory(resolved: Resolved) -> tuple[Path, Path | None]:
    """The run directory, made, and the checkpoint to continue from if there is one.

    Raises UserError where that would mix two runs or the checkpoint is not there.
    """
    while True:
        directory, checkpoint = find_directory(resolved)
        owner = checkpoint.absolute().parent.parent if checkpoint else None
        is_run = (directory / DESCRIPTION).exists()
        if is_run and (resolved.core.resume == "auto" or owner == directory.absolute()):  # it is continued
            return directory, checkpoint
        try:
            directory.mkdir(parents=True, exist_ok=True)
            (directory / DESCRIPTION).open("x").close()  # of several runs that start at once, one gets it
        except FileExistsError:
            continue  # the next number is free, or it is an error now
        except OSError as problem:
            raise UserError(f"output_dir: cannot make {str(directory)!r}: {problem.strerror}.") from None
        return directory, checkpoint


def find_directory(resolved: Resolved) -> tuple[Path, Path | None]:
    """What ``choose_directory`` would choose; makes nothing."""
    options = resolved.core
    given = Path(options.output_dir) if options.output_dir else None
    default = Path("runs") / run_name(resolved)
    if options.resume == "auto":
        directory = given or _numbered(default, exists=True)
        if not (directory / DESCRIPTION).exists():  # where it is, a run is what the directory holds
            _check_empty(directory)
        return directory, find_checkpoint(directory)
    if options.resume is None:
        return _new(given, default), None
    checkpoint = find_checkpoint(Path(options.resume).expanduser())
    if checkpoint is None:
        raise UserError(
            f"resume: no complete checkpoint at {options.resume!r}. Give a run directory, its `checkpoints`, or one"
            " `step-...` folder; or `auto`."
        )
    owner = checkpoint.absolute().parent.parent if checkpoint.absolute().parent.name == "checkpoints" else None
    if owner is not None and (given is None or given.absolute() == owner):
        return given or checkpoint.parent.parent, checkpoint
    return _new(given, default), checkpoint


def _new(given: Path | None, default: Path) -> Path:
    """The directory of a new run. Raises UserError where the one that was given is not empty."""
    if given is None:
        return _numbered(default, exists=False)
    _check_empty(given)
    return given


def _check_empty(directory: Path) -> None:
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise UserError(
            f"output_dir: {str(directory)!r} is not empty. `--resume auto` continues the run in it; for a new run"
            " choose another directory, or move this one away."
        )


def run_name(resolved: Resolved) -> str:
    """The run's name: as given, or TASK-ARCH."""
    components = resolved.components
    shape = components.get("arch", components["model"]).component.name
    return resolved.core.run_name or f"{components['task'].component.name}-{shape}"


def write_description(directory: Path, resolved: Resolved, deepspeed: dict[str, Any], facts: dict[str, Any]) -> None:
    """Write config.yaml, provenance.json (with ``facts``) and deepspeed.json.

    What provenance.json said of earlier starts of the same run is kept in it.
    """
    try:
        before = json.loads((directory / DESCRIPTION).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        before = None
    earlier = [*before.pop("earlier_starts", []), before] if before else []
    (directory / "config.yaml").write_text(config_text(resolved), encoding="utf-8")
    _write_json(directory / "deepspeed.json", deepspeed)
    packages = ["torch", "transformers", "deepspeed", "peft", "tokenizers", "safetensors", "numpy", "pluggy"]
    packages += ["bitsandbytes"] * resolved.core.use_quant
    packages += ["fairscale"] * (resolved.core.tensor_parallel_size > 1)
    components = {
        chosen.label: {
            "distribution": chosen.offer.distribution,
            "version": chosen.offer.version,
            "module": chosen.offer.module,
            "source": "{}:{}".format(*chosen.component.source),
        }
        for chosen in resolved.chosen
    } | {
        f"plugin {offer.name}": {"distribution": offer.distribution, "version": offer.version, "module": offer.module}
        for offer in resolved.hook_modules
    }
    _write_json(
        directory / DESCRIPTION,
        {
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            "command": sys.argv,
            "components": components,
            "origins": {key: setting.origin for key, setting in resolved.settings.items()},
            "python": platform.python_version(),
            "machine": platform.platform(),
            "packages": {name: metadata.version(name) for name in packages},
            **facts,
            "earlier_starts": earlier,
        },
    )


def config_text(resolved: Resolved) -> str:
    """The resolved configuration as flat YAML that runs again as it stands."""
    lines = ["# The whole configuration of a run, resolved. `panda-train --config` with this file runs it again."]
    owner = None
    for key, setting in resolved.settings.items():
        if key in _PLACE_KEYS:
            continue
        if setting.owner != owner:
            owner = setting.owner
            lines += ["", f"# {owner}"]
        value = list(setting.value) if isinstance(setting.value, tuple) else setting.value
        written = yaml.safe_dump([value], default_flow_style=True, allow_unicode=True, width=10**6)
        lines.append(f"{key}: {written.strip()[1:-1]}")
    return "\n".join(lines) + "\n"


def _numbered(path: Path, *, exists: bool) -> Path:
    """``path``, ``path-2``, ``path-3``, ...: the first that does not exist, or the last that does."""
    number = 1
    last = path
    while True:
        candidate = path if number == 1 else path.with_name(f"{path.name}-{number}")
        if not candidate.exists():
            return last if exists else candidate
        last = candidate
        number += 1


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
