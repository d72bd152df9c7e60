"""The run directory: how it is chosen, and the files in it that record what ran.

docs/concepts.md lists its contents.
"""

from __future__ import annotations

import json
import platform
import sys
from dataclasses import replace
from datetime import UTC
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from panda.engine.checkpoints.folders import find_checkpoint
from panda.files.whole import write_whole
from panda.registry import UserError
from panda.registry.location import resolve_path
from panda.registry.resolve import Resolved
from panda.registry.settings import Setting
from panda.run.lock import RunLock
from panda.weights.finding import from_anywhere

PROVENANCE = "provenance.json"
"""The file that makes a folder a run directory."""

EXPORT = "export"
"""The folder of a run directory that holds the trained model."""

_PLACE_KEYS = ("output_dir", "resume")
"""Keys that say where a run is stored, not what it does: left out of config.yaml, so that it can be run again."""


def hold_continued(resolved: Resolved, lock: RunLock) -> tuple[Path | None, Path | None]:
    """The run directory to continue, held by ``lock``, and the checkpoint to continue from; each may be None.

    Raises UserError as ``find_directory`` does, and if another process holds the directory.
    """
    directory, checkpoint = find_directory(resolved)
    if not continues_in_place(resolved, directory, checkpoint):
        return None, checkpoint
    lock.take(directory)
    # Looked up again: the previous holder of the lock may have saved checkpoints since.
    return directory, find_checkpoint(directory) if resolved.core.resume == "auto" else find_directory(resolved)[1]


def make_directory(resolved: Resolved, lock: RunLock) -> Path:
    """Make the directory of a run that does not continue one in place, and hold it by ``lock``.

    Raises UserError if that would mix two runs.
    """
    while True:
        directory, _ = find_directory(resolved)
        try:
            directory.mkdir(parents=True, exist_ok=True)
            (directory / PROVENANCE).open("x").close()  # of several runs that start at once, one succeeds
        except FileExistsError:
            if resolved.core.resume == "auto":
                lock.take(directory)
                raise UserError(
                    f"{directory}: another run has just started in it. Start again to continue that run."
                ) from None
            continue  # takes the next number, or raises UserError if this directory was given
        except OSError as problem:
            raise UserError(f"output_dir: cannot make {str(directory)!r}: {problem.strerror}.") from None
        lock.take(directory)
        return directory


def continues_in_place(resolved: Resolved, directory: Path, checkpoint: Path | None) -> bool:
    """Whether a run in ``directory``, from ``checkpoint``, continues the run that is already there."""
    owner = checkpoint.resolve().parent.parent if checkpoint else None
    return (directory / PROVENANCE).exists() and (resolved.core.resume == "auto" or owner == directory.resolve())


def find_directory(resolved: Resolved) -> tuple[Path, Path | None]:
    """The run directory, and the checkpoint to continue from, if any. Creates and locks nothing.

    Raises UserError if that would mix two runs, or if the checkpoint does not exist.
    """
    options = resolved.core
    given = resolve_path(options.output_dir) if options.output_dir else None
    default = Path("runs") / run_name(resolved)
    if options.resume == "auto":
        directory = given or _numbered(default, exists=True)
        if not (directory / PROVENANCE).exists():  # else it holds a run to continue
            _check_empty(directory)
        return directory, find_checkpoint(directory)
    if options.resume is None:
        return _new(given, default), None
    checkpoint = find_checkpoint(resolve_path(options.resume))
    if checkpoint is None:
        raise UserError(
            f"resume: no complete checkpoint at {options.resume!r}. Give a run directory, its `checkpoints`, or one"
            " `step-...` folder; or `auto`."
        )
    is_in_run = checkpoint.absolute().parent.name == "checkpoints"
    if is_in_run and (given is None or given.resolve() == checkpoint.resolve().parent.parent):
        return given or checkpoint.parent.parent, checkpoint
    return _new(given, default), checkpoint


def _new(given: Path | None, default: Path) -> Path:
    """The directory of a new run. Raises UserError if ``given`` is not empty."""
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

    provenance.json keeps what it recorded of earlier starts of the run. Each file is replaced atomically.
    """
    try:
        before = json.loads((directory / PROVENANCE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        before = None
    earlier = [*before.pop("earlier_starts", []), before] if before else []
    write_whole(directory / "config.yaml", config_text(resolved))
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
        directory / PROVENANCE,
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


def write_end(directory: Path, step: int, **done: Any) -> None:
    """Record in provenance.json that the run ended after ``step``, and the work that was ``done`` at its end."""
    described = json.loads((directory / PROVENANCE).read_text(encoding="utf-8"))
    _write_json(directory / PROVENANCE, described | {"end": {"step": step, **done}})


def has_ended(directory: Path, step: int, **expected: Any) -> bool:
    """Whether the run in ``directory`` ended after ``step``, did all that is ``expected``, and still has its export.

    An empty value of ``expected`` asks for nothing.
    """
    try:
        end = json.loads((directory / PROVENANCE).read_text(encoding="utf-8"))["end"]
    except (OSError, ValueError, KeyError):
        return False
    is_done = all(end.get(key) == value for key, value in expected.items() if value)
    return is_done and end["step"] == step and (directory / EXPORT).is_dir()


def config_text(resolved: Resolved) -> str:
    """The resolved configuration as flat YAML that can be run again as it is, from any directory."""
    lines = ["# The whole configuration of a run, resolved. `panda-train --config THIS_FILE` runs it again."]
    owner = None
    for key, setting in resolved.settings.items():
        if key in _PLACE_KEYS or (key == "tokenizer" and setting.origin.startswith("checkpoint ")):
            continue  # such a tokenizer follows from `ckpt_path` again, also where that has been moved
        if setting.owner != owner:
            owner = setting.owner
            lines += ["", f"# {owner}"]
        value = _from_anywhere(setting)
        written = yaml.safe_dump([value], default_flow_style=True, allow_unicode=True, width=10**6)
        lines.append(f"{key}: {written.strip()[1:-1]}")
    return "\n".join(lines) + "\n"


def _from_anywhere(setting: Setting) -> Any:
    """The value of ``setting`` for YAML, with absolute paths."""
    if setting.location is None or setting.value is None:
        return list(setting.value) if isinstance(setting.value, tuple) else setting.value
    if isinstance(setting.value, tuple):
        return [_from_anywhere(replace(setting, value=text)) for text in setting.value]
    if not setting.value or setting.value.startswith("panda:") or "://" in setting.value:
        return setting.value
    if not setting.location.on_hub:
        return str(resolve_path(setting.value).absolute())
    return from_anywhere(setting.value)


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
    write_whole(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
