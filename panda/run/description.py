"""What a run directory records of its run: config.yaml, provenance.json, deepspeed.json."""

from __future__ import annotations

import json
import platform
import re
import sys
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

import panda
from panda.configuration.arguments import API
from panda.configuration.arguments import RECORDED_BY
from panda.configuration.user_code import flags_of_files
from panda.data.data_sets import name_and_commit
from panda.files.private import private
from panda.files.private import private_command
from panda.files.terminal import printable
from panda.files.whole import write_whole
from panda.registry import UserError
from panda.registry.api import API_VERSION
from panda.registry.location import path_in_package
from panda.registry.location import resolve_path
from panda.registry.resolve import Resolved
from panda.registry.settings import Setting
from panda.registry.user_files import executed_files
from panda.weights.finding import from_anywhere
from panda.weights.run_folders import EXPORT
from panda.weights.run_folders import PROVENANCE
from panda.weights.run_folders import RUN_CONFIG

FORMAT = 1
"""Of run directories that this version writes, in provenance.json. Higher ones are read only by later versions."""
BEGUN_FROM = "resumed_from"
"""The key in provenance.json for the checkpoint from which a start of the run went on."""
_OF_A_RUN = re.compile(rf"(?:^|/){re.escape(RUN_CONFIG)}:\d+$")
_PLACE_KEYS = ("output_dir", "resume")
"""Keys that say where a run is stored, not what it does: left out of config.yaml, so that it can be run again."""


def changes(resolved: Resolved, recorded: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """By key, the value that the run which is continued ``recorded`` in its config.yaml, and that of ``resolved``.

    Only keys whose values differ; a key that only one of the two has is ``None`` in the other.
    """
    if not recorded:
        return {}
    here = yaml.safe_load(config_text(resolved))
    unstated = {*_PLACE_KEYS, "tokenizer", API, RECORDED_BY}
    return {
        key: {"before": recorded.get(key), "now": here.get(key)}
        for key in [*here, *(key for key in recorded if key not in here)]
        if recorded.get(key) != here.get(key) and not (key in unstated and (key not in here or key not in recorded))
    }


def write_description(directory: Path, resolved: Resolved, deepspeed: dict[str, Any], facts: dict[str, Any]) -> None:
    """Write config.yaml, provenance.json (with ``facts``) and deepspeed.json.

    provenance.json keeps what it recorded of earlier starts of the run. Each file is replaced atomically.
    """
    before = read_provenance(directory)
    earlier = before.pop("earlier_starts", [])
    earlier = [*(earlier if isinstance(earlier, list) else []), *([before] if "started" in before else [])]
    write_whole(directory / RUN_CONFIG, config_text(resolved))
    _write_json(directory / "deepspeed.json", deepspeed)
    packages = ["torch", "transformers", "deepspeed", "peft", "tokenizers", "safetensors", "numpy", "pluggy"]
    packages += ["bitsandbytes"] * resolved.core.use_quant
    packages += ["flash-attn-4"] * resolved.core.flash_attention_4
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
    folder = resolved.core.user_dir and resolve_path(resolved.core.user_dir)
    user_files = private(executed_files(resolved.offers, folder))
    _report_changes(user_files, before)
    _write_json(
        directory / PROVENANCE,
        {
            "format": FORMAT,
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            "command": private_command(sys.argv),
            "components": private(components),
            **({"user_files": user_files} if user_files else {}),
            "origins": private({key: setting.origin for key, setting in resolved.settings.items()}),
            "python": platform.python_version(),
            "machine": platform.platform(),
            "packages": {name: metadata.version(name) for name in packages},
            **private(facts),
            "earlier_starts": earlier,
        },
    )


def _report_changes(user_files: Mapping[str, str], before: Mapping[str, Any]) -> None:
    """Say which files of the user are others than the run had ``before``."""
    recorded = before.get("user_files", {})
    changed = [file for file, content in user_files.items() if recorded.get(file, content) != content]
    for file in changed:
        print(f"note: {printable(file)} has changed since the run was started.", file=sys.stderr, flush=True)


def refuse_later(directory: Path) -> None:
    """Raise UserError where a later version of panda has written the run in ``directory``, in another format."""
    stated = read_provenance(directory).get("format")  # None: a run that has only begun, or of before 0.1.0
    if isinstance(stated, int) and stated > FORMAT:
        raise UserError(
            f"{directory}: it was written by a later version of panda, in format {stated}, and this one reads up to"
            f" {FORMAT}. Install that version."
        )


def write_end(directory: Path, step: int, agreement: dict[str, Any], **done: Any) -> None:
    """Record in provenance.json that the run ended after ``step``, and the work that was ``done`` at its end.

    ``agreement``: the facts that a run which continues this one has to share with it.
    """
    described = read_provenance(directory)
    _write_json(directory / PROVENANCE, described | {"end": {"step": step, "agreement": agreement, **done}})


def read_end(directory: Path) -> dict[str, Any] | None:
    """What ``write_end`` recorded of the run in ``directory``; None if it has not ended, or its export is gone."""
    end = read_provenance(directory).get("end")
    is_whole = isinstance(end, dict) and isinstance(end.get("step"), int)
    return end if is_whole and (directory / EXPORT).is_dir() else None


def read_provenance(directory: Path) -> dict[str, Any]:
    """What provenance.json of the run in ``directory`` says; empty where there is none, or it is damaged."""
    try:
        found = json.loads((directory / PROVENANCE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def origins_in(provenance: Mapping[str, Any]) -> dict[str, str]:
    """Where the value of each key came from, by what ``read_provenance`` found.

    A run that was resumed has most values from its own config.yaml: then it is where an earlier start had them from.
    """
    earlier = provenance.get("earlier_starts")
    found: dict[str, str] = {}
    for start in (*(earlier if isinstance(earlier, list) else []), provenance):
        origins = start.get("origins") if isinstance(start, dict) else None
        for key, origin in origins.items() if isinstance(origins, dict) else ():
            if key not in found or not _OF_A_RUN.search(str(origin)):
                found[str(key)] = str(origin)
    return found


def config_text(resolved: Resolved) -> str:
    """The resolved configuration as flat YAML that can be run again as it is, from any directory."""
    files = flags_of_files(resolved)
    lines = [
        f"# The whole configuration of a run, resolved. `panda-train --config THIS_FILE{files}` runs it again.",
        f"{API}: {API_VERSION}",
        f"{RECORDED_BY}: {panda.__version__}",
    ]
    owner = None
    for key, setting in resolved.settings.items():
        if key in _PLACE_KEYS or (key == "tokenizer" and setting.origin.startswith("checkpoint ")):
            continue  # such a tokenizer follows from `ckpt_path` again, also where that has been moved
        if setting.owner != owner:
            owner = setting.owner
            lines += ["", f"# {owner}"]
        value = _from_anywhere(replace(setting, value=resolved.lasting.get(key, setting.value)))
        written = yaml.safe_dump([value], default_flow_style=True, allow_unicode=True, width=10**6)
        lines.append(f"{resolved.in_full(key)}: {written.strip()[1:-1]}")
    return "\n".join(lines) + "\n"


def _from_anywhere(setting: Setting) -> Any:
    """The value of ``setting`` for YAML, with absolute paths."""
    if setting.location is None or setting.value is None:
        return list(setting.value) if isinstance(setting.value, tuple) else setting.value
    if isinstance(setting.value, tuple):
        texts = [_from_anywhere(replace(setting, value=text)) for text in setting.value]
        alone = setting.location.holds_data and len(texts) == 1 and "," not in texts[0]
        return texts[0] if alone else texts
    if not setting.value or path_in_package(setting.value) or "://" in setting.value:
        return setting.value
    if setting.location.holds_data and name_and_commit(setting.value):
        return setting.value
    if not setting.location.on_hub:
        return str(resolve_path(setting.value).absolute())
    return from_anywhere(setting.value)


def _write_json(path: Path, content: Any) -> None:
    write_whole(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
