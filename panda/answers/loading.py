"""What answers, loaded whole and not to be trained: a run's or an export's model, any folder, adapters on a base."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from panda.answers.assistant import Assistant
from panda.models.initialisation.creation import keep_computed_float32
from panda.models.initialisation.creation import without_weights
from panda.registry import Catalog
from panda.registry import UserError
from panda.registry.contexts import ModelContext
from panda.registry.errors import in_brief
from panda.registry.options import build
from panda.weights.files import safetensors_weights
from panda.weights.finding import find_here
from panda.weights.finding import pretrained_at
from panda.weights.finding import whole_at
from panda.weights.formats import ADAPTERS
from panda.weights.formats import CONFIG
from panda.weights.hub import is_name
from panda.weights.matching import matched
from panda.weights.matching import refuse_unlike
from panda.weights.pretrained import Pretrained
from panda.weights.pretrained import fitted
from panda.weights.stored_tensor import StoredTensor
from panda.weights.stored_tensor import Weights
from panda.weights.stored_tensor import put
from panda.weights.tokenizers import TOKENIZER
from panda.weights.tokenizers import has_tokenizer
from panda.weights.tokenizers import read_tokenizer


def assistant_of(
    folder: Path,
    weights: Weights | None,
    device: torch.device,
    load: Callable[[], torch.nn.Module] | None = None,
    *,
    chats: bool = False,
) -> Assistant:
    """What answers as ``folder`` describes it, an export or a run's description, with ``weights``, or the folder's own.

    Or with the module that ``load`` gives. Raises UserError where no model can be loaded; and, before one is,
    where it ``chats`` and its tokenizer has no chat template.
    """
    tokenizer = _fit(read_tokenizer(folder), folder, chats)
    module = load() if load else _module(folder, weights).to(device).eval()
    return Assistant(module, tokenizer, device, folder)


def assistant_in(
    folder: Path, base_path: str | None, device: torch.device, *, allow_pickle: bool, chats: bool = False
) -> Assistant:
    """What answers from ``folder``: an export, or any model in Hugging Face's format, added to its base if a delta.

    Raises UserError as a run that starts from it would.
    """
    if base_path is None and "panda_model" in _config(folder):
        return assistant_of(folder, None, device, chats=chats)
    pretrained = whole_at(str(folder), base_path, option="RUN", allow_pickle=allow_pickle, quantised=True)
    tokenizer = _fit(pretrained_tokenizer(pretrained), folder, chats)
    return Assistant(pretrained_module(pretrained).to(device), tokenizer, device, folder)


def assistant_with_adapters(
    folder: Path,
    ckpt_path: str | None,
    base_path: str | None,
    device: torch.device,
    *,
    allow_pickle: bool,
    chats: bool = False,
) -> Assistant:
    """What answers with the adapters that peft keeps in ``folder``, on the base at ``ckpt_path``, or the one they name.

    As plain peft does, on the base as it is stored: no run says how training had it. Raises UserError
    where there is no such base, or they are not of it.
    """
    from panda.models.adapters.lora import load_adapters
    from panda.models.adapters.lora import stored_adapters

    named: Any = _config(folder, ADAPTERS).get("base_model_name_or_path")
    if ckpt_path is None and not (named and (find_here(named) or is_name(named))):
        said = f"says that it is {named!r}, which is no folder here" if named else "does not say which it is"
        raise UserError(
            f"{folder}: adapters, and a base that is not found: their {ADAPTERS} {said}. Name the folder"
            " of the weights that they were trained on with `--ckpt_path`; of adapters on random weights, name"
            " the run."
        )
    location: str = ckpt_path or named
    option = "--ckpt_path" if ckpt_path else f"{folder / ADAPTERS}, for which `--ckpt_path` names another place"
    base = whole_at(location, base_path, option=option, allow_pickle=allow_pickle, quantised=True)
    stored_adapters(folder)  # what is wrong with them is told before a base is loaded
    tokenizer = _fit(pretrained_tokenizer(base, folder if has_tokenizer(folder) else None), folder, chats)
    adapted: Any = load_adapters(pretrained_module(base), folder)
    return Assistant(adapted.get_base_model().to(device).eval(), tokenizer, device, base.folder)


def _fit(tokenizer: Any, folder: Path, chats: bool) -> Any:
    if chats and not tokenizer.chat_template:
        raise UserError(
            f"{folder}: its tokenizer has no chat template, so the model does not know dialogues. `panda generate` has"
            " it continue a text."
        )
    return tokenizer


def pretrained_tokenizer(pretrained: Pretrained, folder: Path | None = None) -> Any:
    """The tokenizer of ``pretrained``, or the one in ``folder``, which comes before it.

    Raises UserError where there is none, or one with more entries than the weights have rows for.
    """
    holder = pretrained.with_tokenizer()
    folder = folder or (holder.folder if holder else None)
    if folder is None:
        raise UserError(
            f"{pretrained.folder}: it has no tokenizer that transformers loads (none of {', '.join(TOKENIZER)}). Put"
            " the files of the tokenizer that the model was trained with beside its weights."
        )
    tokenizer = read_tokenizer(folder)
    rows = pretrained.config.get("vocab_size")
    if rows is not None and len(tokenizer) > rows:
        raise UserError(
            f"{folder}: its tokenizer has {len(tokenizer):,} entries, and the checkpoint in {pretrained.folder}"
            f" {rows:,} rows for them (vocab_size). Is it the tokenizer of these weights? Put theirs in its place."
        )
    return tokenizer


def pretrained_module(pretrained: Pretrained) -> torch.nn.Module:
    """The causal language model of ``pretrained``, on the CPU, in the type that its configuration states.

    Raises UserError where its tensors are not those of the model, with their names.
    """
    from transformers import AutoConfig
    from transformers import AutoModelForCausalLM
    from transformers.conversion_mapping import get_model_conversion_mapping

    if "quantization_config" in pretrained.config:
        return _transformers_module(pretrained)
    # All headers are read here, also for transformers, whose own errors do not say which file is cut off.
    types = [stored.dtype for stored in pretrained.weights().values() if stored.dtype.is_floating_point]
    try:
        described = AutoConfig.from_pretrained(pretrained.folder, local_files_only=True)
        dtype = described.dtype or (types[0] if types else torch.float32)
        with without_weights():
            module: Any = AutoModelForCausalLM.from_config(described, dtype=dtype)  # type: ignore[no-untyped-call]
    except Exception as problem:  # transformers raises what its parsers raise
        raise UserError(
            f"{pretrained.folder}: transformers makes no causal language model of its {CONFIG}: {in_brief(problem)}."
        ) from problem
    if get_model_conversion_mapping(module, add_legacy=False):  # tensors are joined or renamed while they are loaded
        return _transformers_module(pretrained)
    found = fitted(module, pretrained)
    return _filled(module, {name: _cast(stored, dtype) for name, stored in found.items()})


def _config(folder: Path, name: str = CONFIG) -> dict[str, Any]:
    try:
        config = json.loads((folder / name).read_text(encoding="utf-8"))
    except (OSError, ValueError) as problem:
        raise UserError(f"{folder / name}: no model is described there: {problem}.") from None
    if not isinstance(config, dict):
        raise UserError(f"{folder / name}: expected a JSON object.")
    return config


def _module(folder: Path, weights: Weights | None) -> torch.nn.Module:
    config = _config(folder)
    if "panda_model" in config:
        module = _panda_module(config)
    elif weights is None:
        return pretrained_module(pretrained_at(str(folder), option="folder", quantised=True))
    else:
        from transformers import AutoConfig
        from transformers import AutoModelForCausalLM

        described = AutoConfig.from_pretrained(folder)
        with without_weights():
            module = AutoModelForCausalLM.from_config(described, dtype=described.dtype)  # type: ignore[no-untyped-call]
    return _filled(
        module, matched(module, safetensors_weights(folder) if weights is None else weights, source=str(folder))
    )


def _filled(module: torch.nn.Module, found: Weights) -> torch.nn.Module:
    """``module`` with what was ``found`` for it, to answer and not to be trained."""
    module.requires_grad_(False)
    keep_computed_float32(module)
    state: dict[str, Any] = module.state_dict(keep_vars=True)
    for name, stored in found.items():
        if isinstance(state[name], torch.nn.Parameter):
            put(module, name, stored.read().clone())
        else:
            state[name].copy_(stored.read())
    return module


def _cast(stored: StoredTensor, dtype: torch.dtype) -> StoredTensor:
    if not stored.dtype.is_floating_point or stored.dtype == dtype:
        return stored
    return replace(stored, dtype=dtype, read=lambda: stored.read().to(dtype))


def _transformers_module(pretrained: Pretrained) -> torch.nn.Module:
    """By transformers' own loading, for weights that it converts; what it would draw or leave out is an error."""
    from transformers import AutoModelForCausalLM

    folder = pretrained.folder
    loading: Any = AutoModelForCausalLM
    if pretrained.base is not None:
        raise UserError(
            f"{folder}: transformers joins or renames the tensors of such models while it loads them, so this delta"
            " cannot be added meanwhile. Write the whole model with `panda delta apply`, and name that."
        )
    try:
        module, info = loading.from_pretrained(folder, dtype="auto", local_files_only=True, output_loading_info=True)
    except Exception as problem:  # transformers raises what its parsers raise
        raise UserError(f"{folder}: transformers loads no model from it: {in_brief(problem)}.") from problem
    misshaped = [
        f"{name} is {list(found)} and should be {list(right)}" for name, found, right in info["mismatched_keys"]
    ]
    refuse_unlike(str(folder), sorted(info["missing_keys"]), sorted(info["unexpected_keys"]), misshaped)
    loaded: torch.nn.Module = module
    return loaded


def _panda_module(config: dict[str, Any]) -> torch.nn.Module:
    """A model of a panda package, from what its export says of it."""
    catalog = Catalog()
    offer = catalog.find("model", config["panda_model"])
    component = catalog.load(offer)
    assert component is not None
    with without_weights(), offer.attributed("the factory"):
        built: torch.nn.Module = component.factory(
            build(component.options, config["options"]), ModelContext(**config["context"])
        )
    return built
