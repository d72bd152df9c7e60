"""Loading a whole model to answer: a run's or an export's model, any folder, adapters on a base."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from panda.answers.assistant import Assistant
from panda.data.ingredients import versions
from panda.files.terminal import number_of
from panda.models.causal_lm import build_causal_lm
from panda.models.causal_lm import refuse_code_of_hub
from panda.models.initialisation.creation import keep_computed_float32
from panda.models.initialisation.creation import without_weights
from panda.registry import Catalog
from panda.registry import UserError
from panda.registry.contexts import ModelContext
from panda.registry.errors import in_brief
from panda.registry.options import build
from panda.weights.conversion import as_in_module
from panda.weights.files import safetensors_weights
from panda.weights.finding import Source
from panda.weights.finding import find_here
from panda.weights.finding import pretrained_at
from panda.weights.finding import whole_at
from panda.weights.formats import ADAPTERS
from panda.weights.formats import CONFIG
from panda.weights.generation_config import GENERATION_CONFIG
from panda.weights.hub import is_name
from panda.weights.json_object import read_json_object
from panda.weights.matching import matched
from panda.weights.matching import refuse_unlike
from panda.weights.parts import divided
from panda.weights.parts import parts_of
from panda.weights.pretrained import Pretrained
from panda.weights.stored_tensor import StoredTensor
from panda.weights.stored_tensor import Weights
from panda.weights.stored_tensor import places_of
from panda.weights.stored_tensor import put
from panda.weights.tokenizers import TOKENIZER
from panda.weights.tokenizers import has_tokenizer
from panda.weights.tokenizers import read_tokenizer
from panda.weights.tokenizers import rows_needed

Load = Callable[[torch.device], torch.nn.Module]
"""Loads a model on a device, to answer and not to be trained. Raises UserError where that fails."""


@dataclass(frozen=True)
class Answering:
    """A model that can answer: its tokenizer is read, the model itself is loaded on demand."""

    folder: Path
    """What to call it in messages."""
    tokenizer: Any
    load: Load
    described: Path
    """The folder that says where its answers end and how it generates."""
    base: Path | None = None
    """The same of the model under adapters."""

    def require_chat_template(self) -> None:
        """Raise UserError where a dialogue cannot be rendered for the model."""
        if not self.tokenizer.chat_template:
            raise UserError(
                f"{self.folder}: its tokenizer has no chat template, so dialogues are unknown to the model. `panda"
                " generate` continues a text with it."
            )

    def assistant(self, device: torch.device) -> Assistant:
        """The model on ``device``, loaded, with its tokenizer. Raises UserError where it cannot be loaded."""
        return Assistant(self.load(device), self.tokenizer, device, self.described, self.base)


def described_in(
    folder: Path, weights: Weights | None = None, *, load: Load | None = None, blocked: Sequence[str] = ()
) -> Answering:
    """The model that ``folder`` describes, an export or the description in a run, with ``weights`` or the folder's own.

    ``load`` replaces loading it from those; ``blocked``: what ``-p no:`` names. Raises UserError where the tokenizer
    cannot be read.
    """
    load = load or partial(_described_module, folder, weights, tuple(blocked))
    return Answering(folder, read_tokenizer(folder), load, folder)


def found_at(source: Source, blocked: Sequence[str] = ()) -> Answering:
    """The model in the folder at ``source``: an export, any in Hugging Face's format, or a delta with its base.

    ``blocked``: what ``-p no:`` names. Raises UserError as a run that starts from it would.
    """
    folder = Path(source.location)
    if source.base_path is None and "panda_model" in read_json_object(folder / CONFIG):
        return described_in(folder, blocked=blocked)
    pretrained = whole_at(replace(source, quantised=True))
    return Answering(folder, pretrained_tokenizer(pretrained), partial(_pretrained_module_on, pretrained), folder)


def with_adapters(source: Source, ckpt_path: str | None) -> Answering:
    """The adapters that peft keeps in the folder at ``source``, on the base at ``ckpt_path``, or the one they name.

    No run states how the base was trained on: it is whole, in the type that the adapters have. The ``base_path`` of
    ``source`` is that of the base. Raises UserError where there is no such base, or the adapters do not fit it.
    """
    from panda.models.adapters.lora import stored_adapters

    folder = Path(source.location)
    named: Any = read_json_object(folder / ADAPTERS).get("base_model_name_or_path")
    if ckpt_path is None and not (named and (find_here(named) or is_name(named))):
        said = f"names {named!r}, which is not a folder here" if named else "does not name it"
        raise UserError(
            f"{folder}: adapters whose base was not found: their {ADAPTERS} {said}. Name the folder of the weights that"
            " they were trained on with `--ckpt_path`; for adapters on random weights, name the run."
        )
    option = "--ckpt_path" if ckpt_path else f"{folder / ADAPTERS}, which `--ckpt_path` overrides"
    base = whole_at(replace(source, location=ckpt_path or named, option=option, quantised=True))
    stored_adapters(folder)  # so that what is wrong with them is reported before a base is loaded
    base = _with_rows_for(base, folder)
    tokenizer = pretrained_tokenizer(base, folder if has_tokenizer(folder) else None)
    described = folder if (folder / GENERATION_CONFIG).exists() else base.folder
    return Answering(folder, tokenizer, partial(_adapted_module, base, folder), described, base.folder)


def _with_rows_for(base: Pretrained, adapters: Path) -> Pretrained:
    """``base`` with a vocabulary that has all rows which ``adapters`` trained: those of added tokens come last."""
    trained = read_json_object(adapters / ADAPTERS).get("trainable_token_indices") or {}
    listed = trained.values() if isinstance(trained, dict) else [trained]
    rows = max((index + 1 for indices in listed for index in indices), default=0)
    if base.vocabulary is None or rows <= base.vocabulary:
        return base
    return replace(base, config={**base.config, "vocab_size": rows}, stored_rows=base.vocabulary)


def pretrained_tokenizer(pretrained: Pretrained, folder: Path | None = None) -> Any:
    """The tokenizer in ``folder`` if one is given, else that of ``pretrained``.

    Raises UserError where there is none, or one with ids beyond the rows of the weights.
    """
    holder = pretrained.with_tokenizer()
    folder = folder or (holder.folder if holder else None)
    if folder is None:
        raise UserError(
            f"{pretrained.folder}: it has no tokenizer that transformers loads (none of {', '.join(TOKENIZER)}). Put"
            " the files of the tokenizer that the model was trained with beside its weights."
        )
    tokenizer = read_tokenizer(folder)
    rows = pretrained.vocabulary
    needed = rows_needed(tokenizer)
    if rows is not None and needed > rows:
        raise UserError(
            f"{folder}: its tokenizer needs {number_of(needed, 'row')} (its highest id is {needed - 1:,}), and the"
            f" checkpoint in {pretrained.folder} has {rows:,} (vocab_size). Is it the tokenizer of these weights?"
            " Replace it with theirs."
        )
    return tokenizer


def pretrained_module(pretrained: Pretrained) -> torch.nn.Module:
    """The causal language model of ``pretrained``, on the CPU, in the type that its configuration states.

    Raises UserError with the names of tensors where those of the checkpoint are not those of the model.
    """
    if "quantization_config" in pretrained.config:
        return _transformers_module(pretrained)
    # All headers are read here, also for transformers, whose own errors do not name the file that is cut off.
    weights, config = pretrained.weights(), pretrained.config
    states_dtype = config.get("dtype") or config.get("torch_dtype")
    first_dtype = next((stored.dtype for stored in weights.values() if stored.dtype.is_floating_point), None)
    with without_weights():
        module = build_causal_lm(config, str(pretrained.folder), dtype=None if states_dtype else first_dtype)
    source = str(pretrained.folder)
    grow = (pretrained.stored_rows, config["vocab_size"]) if pretrained.stored_rows else None
    weights, _ = divided(weights, parts_of(config))
    found = matched(module, as_in_module(module, weights, source=source), source=source, grow_rows=grow)
    return _filled(module, {name: _cast(stored, module.dtype) for name, stored in found.items()})


def _pretrained_module_on(pretrained: Pretrained, device: torch.device) -> torch.nn.Module:
    return pretrained_module(pretrained).to(device).eval()


def _adapted_module(base: Pretrained, folder: Path, device: torch.device) -> torch.nn.Module:
    from panda.models.adapters.lora import load_adapters
    from panda.models.adapters.lora import stored_adapters

    module_of_base = pretrained_module(base)
    if "quantization_config" not in base.config:
        # The type that training computed in, as its export has it: the base may be stored in a shorter one.
        module_of_base.to(next(iter(stored_adapters(folder).values())).dtype)
    adapted: Any = load_adapters(module_of_base, folder)
    module: torch.nn.Module = adapted.get_base_model()
    return module.to(device).eval()


def _described_module(
    folder: Path, weights: Weights | None, blocked: Sequence[str], device: torch.device
) -> torch.nn.Module:
    config = read_json_object(folder / CONFIG)
    if "panda_model" in config:
        module = _panda_module(config, blocked)
    elif weights is None:
        return _pretrained_module_on(pretrained_at(Source(str(folder), "folder", quantised=True)), device)
    else:
        with without_weights():
            module = build_causal_lm(config, str(folder))
    weights = safetensors_weights(folder) if weights is None else weights
    weights, _ = divided(weights, parts_of(config))  # a task's own, which do not answer
    return _filled(module, matched(module, weights, source=str(folder))).to(device).eval()


def _filled(module: torch.nn.Module, found: Weights) -> torch.nn.Module:
    """``module``, frozen, with the tensors in ``found`` in the place of its own of these names."""
    module.requires_grad_(False)
    keep_computed_float32(module)
    state, places = module.state_dict(keep_vars=True), places_of(module)
    for name, stored in found.items():
        if isinstance(state[name], torch.nn.Parameter):
            put(places[name], stored.read().clone())
        else:
            state[name].copy_(stored.read())
    return module


def _cast(stored: StoredTensor, dtype: torch.dtype) -> StoredTensor:
    if not stored.dtype.is_floating_point or stored.dtype == dtype:
        return stored
    return replace(stored, dtype=dtype, read=lambda: stored.read().to(dtype))


def _transformers_module(pretrained: Pretrained) -> torch.nn.Module:
    """The model as transformers itself loads it, for weights that are stored quantised.

    Raises UserError where transformers would draw a tensor that is missing, or leave one out.
    """
    from transformers import AutoModelForCausalLM

    folder = pretrained.folder
    loading: Any = AutoModelForCausalLM
    if pretrained.base is not None:
        raise UserError(
            f"{folder}: transformers loads quantised weights itself, so this delta cannot be added meanwhile. Write the"
            " whole model with `panda delta apply`, and name that."
        )
    refuse_code_of_hub(pretrained.config, str(folder))
    try:
        module, info = loading.from_pretrained(
            folder, dtype="auto", local_files_only=True, trust_remote_code=False, output_loading_info=True
        )
    except Exception as problem:  # transformers lets the exceptions of its parsers through
        raise UserError(f"{folder}: transformers loads no model from it: {in_brief(problem)}.") from problem
    misshaped = [
        f"{name} is {list(found)} and should be {list(right)}" for name, found, right in info["mismatched_keys"]
    ]
    refuse_unlike(str(folder), sorted(info["missing_keys"]), sorted(info["unexpected_keys"]), misshaped)
    loaded: torch.nn.Module = module
    return loaded


def _panda_module(config: dict[str, Any], blocked: Sequence[str]) -> torch.nn.Module:
    """The model of a panda package that ``config`` of its export describes, without weights."""
    catalog = Catalog(blocked, runs_files=False)
    try:
        offer = catalog.find("model", config["panda_model"])
        component = catalog.load(offer)
    except UserError as problem:
        provider, version = config["panda_model"].rpartition(":")[0], config.get("panda_version")
        if not version or versions(provider) == {provider: version}:
            raise
        needed = f"The model came from {provider} {version}: `pip install {provider}=={version}`."
        raise UserError(f"{problem} {needed}") from problem
    assert component is not None
    with without_weights(), offer.attributed("the factory"):
        built: torch.nn.Module = component.factory(
            build(component.options, config["options"]), ModelContext(**config["context"])
        )
    return built
