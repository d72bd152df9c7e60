"""The model of a run that names a checkpoint and no model: the one that the weights belong to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from panda.configuration.options import RunOptions
from panda.registry import Catalog
from panda.registry import UserError
from panda.registry.offers import OWN_DISTRIBUTION
from panda.registry.options import Given
from panda.registry.options import options_of
from panda.registry.settings import convert_options
from panda.weights.pretrained import Pretrained


@dataclass(frozen=True)
class _Named:
    """The options of a run that name its checkpoint."""

    ckpt_path: str | None
    base_path: str | None
    allow_pickle: bool


def checkpoint_alone(given: Mapping[str, Given]) -> Pretrained | None:
    """The checkpoint that ``given`` names without a model or arch.

    None if it names none, or in values that are refused later.
    """
    from panda.weights.finding import find_pretrained

    if "ckpt_path" not in given or any(key in given and given[key].value for key in ("model", "arch")):
        return None
    known = options_of(RunOptions)
    keys = ("ckpt_path", "base_path", "allow_pickle")
    settings, problems = convert_options({key: known[key] for key in keys}, given)
    if problems or settings["ckpt_path"].value is None:
        return None
    return find_pretrained(_Named(**{key: setting.value for key, setting in settings.items()}))


def model_of_checkpoint(pretrained: Pretrained, catalog: Catalog) -> str:
    """The name of the model that the weights of ``pretrained`` belong to.

    That of an export of a package's model is in its config.json. For others it is panda's own model of that type where
    it can express the configuration, since that can be split over GPUs (`tensor_parallel_size`), and else `hf`.
    """
    config: Mapping[str, Any] = pretrained.config
    if "panda_model" in config:
        return str(config["panda_model"])
    model_type = str(config.get("model_type"))
    own = f"{OWN_DISTRIBUTION}:{model_type}"
    if not catalog.matches("model", own):
        return "hf"
    component = catalog.load(catalog.find("model", own))
    of_checkpoint: Any = getattr(component and component.options, "of_checkpoint", None)
    if of_checkpoint is None:
        return "hf"
    try:
        of_checkpoint(Stated(config, pretrained.config_file))
    except UserError:
        return "hf"
    return model_type


class Stated(dict[str, Any]):
    """A configuration in which a missing key raises UserError."""

    def __init__(self, config: Mapping[str, Any], file: Path) -> None:
        super().__init__(config)
        self.file = file

    def __missing__(self, key: str) -> Any:
        raise UserError(f"{self.file}: it does not state {key!r}. Is it the complete configuration of these weights?")
