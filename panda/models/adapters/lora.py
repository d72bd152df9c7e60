"""Low-rank adapters (LoRA, arXiv 2106.09685) on a frozen base, through peft: on, and out."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING
from typing import Any

import torch

from panda.configuration.options import RunOptions
from panda.models.adapters.linear_layers import listed_names
from panda.registry import UserError
from panda.registry.errors import in_brief
from panda.weights.export import replacing
from panda.weights.files import safetensors_weights
from panda.weights.finding import from_anywhere
from panda.weights.formats import ADAPTERS
from panda.weights.stored_tensor import Weights

if TYPE_CHECKING:
    from peft import LoraConfig
    from peft import PeftModel


def add_adapters(model: torch.nn.Module, options: RunOptions, spread_by: dict[str, Any] | None = None) -> PeftModel:
    """``model`` with adapters on the linear layers that ``options`` chooses; all else of it is frozen.

    By default on all of them but the output head. Their weights are drawn from torch's generator, in
    float32; the engine casts them with the model, and the optimizer keeps its own in float32. ``spread_by``:
    DeepSpeed's configuration, where that has spread the weights of ``model`` over ranks.
    Raises UserError where there is nothing to put them on.
    """
    from peft import get_peft_model
    from transformers import PreTrainedModel
    from transformers.integrations.deepspeed import HfDeepSpeedConfig

    is_hugging_face = isinstance(model, PreTrainedModel)
    linear = listed_names(model)
    targets = list(options.lora_target_modules)
    if not targets and not is_hugging_face:
        raise UserError(
            f"use_lora: which linear layer of {type(model).__name__} is the output head is not known. Name those to"
            f" adapt in `lora_target_modules`: it has {linear}."
        )
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name, _ in model.named_modules()):
            raise UserError(f"lora_target_modules: {type(model).__name__} has no {target!r}; it has {linear}.")
    config = adapter_config(options)
    config.target_modules, config.task_type = targets or "all-linear", "CAUSAL_LM" if is_hugging_face else None
    # Where it looks at weights peft gathers what is spread, if transformers, which it asks, has such a configuration.
    told = HfDeepSpeedConfig(spread_by) if spread_by else None  # type: ignore[no-untyped-call]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers under a name that goes away
            adapted = get_peft_model(model, config)
    except ValueError as problem:  # of a layer that peft cannot adapt
        raise UserError(f"lora_target_modules: {problem}") from problem
    finally:
        del told  # transformers holds it weakly
    config.base_model_name_or_path = options.ckpt_path and from_anywhere(options.ckpt_path)
    config.target_modules = sorted(config.target_modules or ())  # a set, written in another order each time
    return adapted


def adapter_config(options: RunOptions) -> LoraConfig:
    """What adapters are like by ``options``, on whichever layers."""
    from peft import LoraConfig

    return LoraConfig(
        r=options.lora_r,
        lora_alpha=options.lora_alpha,  # type: ignore[arg-type]  # a scale, and as good with a fraction
        lora_dropout=options.lora_dropout,
        use_dora=options.use_dora,
        use_rslora=options.use_rslora,
    )


def put_adapters(model: PeftModel, weights: Weights, device: torch.device) -> None:
    """Give ``model``, on ``device``, what training changed: ``weights``, by its own names, in the type that they have.

    Raises UserError where they are not of such adapters.
    """
    state = model.state_dict(keep_vars=True)
    absent = [name for name in weights if name not in state]
    untold = [name for name, p in model.named_parameters() if p.requires_grad and name not in weights]
    if absent or untold:
        raise UserError(f"these adapters are of another model: one of them has no {(absent + untold)[0]}.")
    for name, stored in weights.items():
        state[name].data = stored.read().to(device, copy=True)


def export_adapters(model: PeftModel, weights: dict[str, torch.Tensor], folder: Path, tokenizer: Any) -> None:
    """Write the adapters among ``weights`` (of ``model``, by its names) so that plain peft loads them on the base."""
    with replacing(folder) as temporary:
        temporary.mkdir(parents=True)
        tokenizer.save_pretrained(temporary)
        # Embeddings are never trained here; asked to find out, peft looks for the base on the hub.
        model.save_pretrained(str(temporary), state_dict=weights, save_embedding_layers=False)
        (temporary / "README.md").unlink()  # a form that nobody has filled in


def stored_adapters(folder: Path) -> Weights:
    """The adapters that peft keeps in ``folder``; their headers are read. Raises UserError where it has none."""
    from peft import PeftConfig

    if not (folder / ADAPTERS).exists():
        raise UserError(f"{folder}: no adapters there (no {ADAPTERS}).")
    stored = safetensors_weights(folder)
    if not stored:  # peft would look for them on the hub
        raise UserError(f"{folder}: it has {ADAPTERS}, and no safetensors with adapters; none are read from pickles.")
    try:
        if PeftConfig.from_pretrained(str(folder)).peft_type is None:
            raise KeyError("peft_type")
    except Exception as problem:  # peft raises what its parsers raise
        raise UserError(
            f"{folder / ADAPTERS}: peft makes no adapters of it: {type(problem).__name__}: {in_brief(problem)}. Were"
            " they made by a newer one? `pip install -U peft`."
        ) from problem
    return stored


def load_adapters(model: torch.nn.Module, folder: Path) -> PeftModel:
    """``model``, a base, with the adapters in ``folder``. Raises UserError where they are not of that base."""
    from peft import PeftModel

    stored = stored_adapters(folder)
    unfit = f"{folder}: these adapters do not fit this {type(model).__name__}: they were trained on another base."
    layers = {name for name, _ in model.named_modules()}
    adapted = (name.removeprefix("base_model.model.").partition(".lora_")[0] for name in stored)
    if absent := [layer for layer in adapted if layer not in layers]:  # peft leaves these out without a word
        raise UserError(f"{unfit} It has no {absent[0]}.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers under a name that goes away
            warnings.filterwarnings("error", message="Found missing adapter keys")  # of layers that would stay bare
            return PeftModel.from_pretrained(model, str(folder))
    except (RuntimeError, ValueError, UserWarning) as problem:  # shapes that differ, names that are not there
        raise UserError(f"{unfit} {in_brief(problem)}.") from problem
