"""What a file names for DeepSpeed or FSDP, as panda's ZeRO stage."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from panda.configuration.translation.rules import Theirs
from panda.configuration.translation.rules import Translation

_STAGE = re.compile(r"(?:zero|z|stage)[-_]?([0-3])", re.IGNORECASE)


def read_sharding(theirs: Theirs, found: Translation) -> None:
    """ZeRO's stage from a file of DeepSpeed, its content or its name, or from FSDP."""
    written = theirs("deepspeed")
    nested = {
        key.removeprefix("deepspeed."): value for key, value in theirs.given.items() if key.startswith("deepspeed.")
    }
    if isinstance(written, str) and written:
        because = f"deepspeed: {written}"
        content = _read(Path(written))
        zero = content.get("zero_optimization", {}) if content else {}
        stage = zero.get("stage")
        offload = [
            key for key in ("offload_optimizer", "offload_param") if zero.get(key, {}).get("device", "none") != "none"
        ]
        if content is None:
            named = _STAGE.search(Path(written).name)
            stage = int(named[1]) if named else None
            offload = ["offload_optimizer and offload_param"] if "offload" in written.lower() else []
            because += ", by the name of the file"
    else:
        stage = nested.get("zero_optimization.stage")
        offload = [
            key
            for key in ("offload_optimizer", "offload_param")
            if nested.get(f"zero_optimization.{key}.device", "none") != "none"
        ]
        because = "deepspeed.zero_optimization.stage"
    if isinstance(stage, int):
        found.set("zero_stage", stage, because)
    elif written or nested:
        found.lost[f"deepspeed: {written or '...'}"] = "its ZeRO stage is not known here: set `zero_stage`"
    fsdp = theirs("fsdp") or any(value for key, value in theirs.given.items() if key.startswith("fsdp_config."))
    if fsdp and stage is None:
        _read_strategy(theirs, found)
        offload = [key for key in theirs.given if key.endswith("offload_params") and theirs(key)]
        for key in theirs.given:
            if key.startswith("fsdp_") and key not in offload and not key.endswith("activation_checkpointing"):
                found.ignored[key] = "ZeRO-3 gathers and releases each module's weights without being told how"
    for name in offload:
        found.lost[name] = (
            'write a JSON file with {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}, and name it with'
            " `deepspeed_config`"
        )


def _read_strategy(theirs: Theirs, found: Translation) -> None:
    """The stage that partitions what FSDP does."""
    named = [theirs(key) for key in ("fsdp", "fsdp_config.fsdp_sharding_strategy", "fsdp_config.sharding_strategy")]
    strategy = " ".join(str(name) for name in named if name).lower()
    resharded = [theirs(f"fsdp_config.{key}") for key in ("reshard_after_forward", "fsdp_reshard_after_forward")]
    if "no_shard" in strategy:
        found.set("zero_stage", 1, "fsdp: no_shard; in panda the optimizer state is partitioned")
    elif "shard_grad_op" in strategy or False in resharded:
        found.set("zero_stage", 2, "fsdp: gradients and optimizer state are partitioned")
    else:
        found.set("zero_stage", 3, "fsdp: weights, gradients and optimizer state are partitioned")


def _read(path: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None
