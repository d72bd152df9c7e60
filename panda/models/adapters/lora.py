"""Low-rank adapters (LoRA, arXiv 2106.09685) on a frozen base, through peft: adding, loading and exporting them."""

from __future__ import annotations

import json
import re
import shutil
import warnings
from pathlib import Path
from typing import TYPE_CHECKING
from typing import Any
from typing import cast

import torch

from panda.configuration.options import RunOptions
from panda.files.private import private
from panda.models.adapters.experts import ends_of_experts
from panda.models.adapters.experts import expert_parameters
from panda.models.adapters.linear_layers import linear_names
from panda.models.adapters.linear_layers import listed_names
from panda.models.adapters.new_rows import new_rows
from panda.models.adapters.new_rows import rows_of_partitioned_weights
from panda.models.adapters.targets import ALL_LINEAR
from panda.models.adapters.targets import chosen_targets
from panda.models.adapters.targets import linear_targets
from panda.registry import UserError
from panda.registry.errors import in_brief
from panda.weights.adapters import INSTEAD
from panda.weights.export import exporting
from panda.weights.files import safetensors_weights
from panda.weights.finding import base_location
from panda.weights.formats import ADAPTERS
from panda.weights.generation_config import GENERATION_CONFIG
from panda.weights.json_object import read_json_object
from panda.weights.parts import divided
from panda.weights.shards import ADAPTER_FILES
from panda.weights.stored_tensor import Weights
from panda.weights.tokenizers import write_tokenizer

if TYPE_CHECKING:
    from peft import LoraConfig
    from peft import PeftModel

PREFIX = "base_model.model."
"""The prefix that peft adds to the names of a base's modules."""
WHOLE = ".modules_to_save.default."
"""What peft has between the name of a module that is trained whole, and the names of its tensors."""
_STATED = (
    *("peft_type", "task_type", "base_model_name_or_path", "inference_mode", "r", "lora_alpha", "lora_dropout", "bias"),
    *("target_modules", "modules_to_save", "fan_in_fan_out", "init_lora_weights", "use_dora", "use_rslora"),
)
"""Keys of adapter_config.json that readers look for, also where they have their default value."""


def add_adapters(model: torch.nn.Module, options: RunOptions, spread_by: dict[str, Any] | None = None) -> PeftModel:
    """``model`` with adapters on the linear layers that ``options`` chooses; the rest of it is frozen.

    By default all linear layers except the output head get adapters. Their weights are drawn from torch's
    generator on torch's default device, in float32. Rows of the embedding and the head that the base has no token for,
    ``model.new_rows``, are trained too.
    ``spread_by`` is DeepSpeed's configuration if it has partitioned the weights of ``model`` over ranks.
    Raises UserError where there is no layer to put them on.
    """
    from peft import get_peft_model
    from transformers import PreTrainedModel
    from transformers.integrations.deepspeed import HfDeepSpeedConfig

    is_hugging_face = isinstance(model, PreTrainedModel)
    ends = ends_of_experts(model)
    linear = ", ".join([listed_names(model), *ends])
    targets, experts = chosen_targets(model, options.lora_target_modules)
    if targets == ALL_LINEAR and not is_hugging_face:
        raise UserError(
            f"use_lora: it is not known which linear layer of {type(model).__name__} is the output head. Name the"
            f" layers to adapt in `lora_target_modules`: it has {linear}."
        )
    config = adapter_config(options)
    config.target_modules = linear_targets(model) if targets == ALL_LINEAR else targets
    config.task_type = "CAUSAL_LM" if is_hugging_face else None
    config.trainable_token_indices = new_rows(model)
    if parts := list(getattr(model, "new_parts", ())):  # of the task: trained whole
        config.modules_to_save = parts
        config.exclude_modules = parts
    if experts:
        config.target_parameters = experts
    names_routers = any(target.rpartition(".")[2] == "gate" for target in targets)
    if experts or (expert_parameters(model) and (targets == ALL_LINEAR or names_routers)):
        # peft has none for adapters on parameters; to it, experts are linear layers too, and routers are parameters.
        config.lora_dropout = 0.0
    # As of peft 0.21 (2026-11), peft gathers partitioned weights before it reads them only if transformers has been
    # given DeepSpeed's configuration. Can go when peft recognises partitioned weights by themselves.
    zero3 = HfDeepSpeedConfig(spread_by) if spread_by else None  # type: ignore[no-untyped-call]
    try:
        with warnings.catch_warnings(), rows_of_partitioned_weights():
            # As of peft 0.21 with transformers 5.23 (2026-11), peft calls a function that transformers has deprecated.
            warnings.simplefilter("ignore", FutureWarning)
            # peft sets these patterns itself for experts, and then looks for them among layers.
            warnings.filterwarnings("ignore", message="The following (rank|alpha)_pattern keys")
            adapted = get_peft_model(model, config)
    except ValueError as problem:  # peft cannot adapt one of the layers
        if "ParamWrapper" in str(problem) and not experts:  # for a layer's name that peft takes for that of experts
            raise _taken_for_experts(ends) from problem
        said = in_brief(problem)
        raise UserError(f"lora_target_modules: {said}{' (adapters on experts)' * bool(experts)}.") from problem
    finally:
        del zero3  # transformers holds it weakly
    if targets != ALL_LINEAR and left_bare(adapted, targets):
        raise _taken_for_experts(ends)
    config.base_model_name_or_path = options.ckpt_path and private(base_location(options.ckpt_path, options.base_path))
    _settle(config, named=targets != ALL_LINEAR)
    return adapted


def _settle(config: LoraConfig, *, named: bool) -> None:
    """Give ``config``, with which peft has adapted a model, the form in which it is exported.

    ``named``: whether layers were chosen by name.
    """
    parts = config.modules_to_save or ()
    if parts:  # for peft that is a model of another class, such as a classifier, which "CAUSAL_LM" would not load on
        config.task_type = None
    if not named:
        config.exclude_modules = None  # the names that peft has made of it are whole ones, of none of the parts
    inside = tuple(f"{part}." for part in parts)
    # peft has sets, whose order differs between processes.
    config.target_modules = sorted(each for each in config.target_modules or () if not f"{each}.".startswith(inside))
    if config.target_parameters:
        config.target_parameters = sorted(config.target_parameters)


def _taken_for_experts(ends: list[str]) -> UserError:
    return UserError(
        "lora_target_modules: in this mixture of experts, peft takes gate_proj, up_proj and down_proj for names of"
        " experts, and cannot adapt other layers of these names. Leave them out; experts are named as parameters:"
        f" {', '.join(ends)}."
    )


def left_bare(model: PeftModel, targets: list[str] | str) -> list[str]:
    """Names of the linear layers of ``model`` that ``targets`` are to adapt, and that have no adapters.

    In mixtures of experts peft (0.21, 2026-11) takes `gate_proj`, `up_proj` and `down_proj` for names of experts, also
    when it loads adapters: dense layers and shared experts of these names cannot have any. Can go when it can.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    base: Any = model.get_base_model()
    adapted = [f"{name}." for name, module in base.named_modules() if isinstance(module, BaseTunerLayer)]
    bare = [name for name in linear_names(base) if not name.startswith(tuple(adapted))]
    if targets == ALL_LINEAR:
        return [name for name in bare if base.get_submodule(name) is not base.get_output_embeddings()]
    return [name for name in bare if any(name == target or name.endswith(f".{target}") for target in targets)]


def start_from(model: PeftModel, folder: Path) -> None:
    """Give the adapters of ``model`` the values of those in ``folder``. Raises UserError where they are of others."""
    stored = dict(stored_adapters(folder))
    # Of a mixture's experts, adapter_config.json does not say all: they can have been chosen with some layers only.
    instead = f" {INSTEAD}" * bool(cast("LoraConfig", model.peft_config["default"]).rank_pattern)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        written = name.replace(".default", "").replace(".modules_to_save", "")
        found = stored.pop(written, None) or stored.pop(written.removesuffix(".weight"), None)
        if found is None or found.shape != tuple(parameter.shape):
            said = f"{written} is {list(parameter.shape)}"
            raise UserError(
                f"{folder}: its adapters do not fit this model: {said}, and"
                f" {'missing' if found is None else list(found.shape)} there.{instead}"
            )
        parameter.data.copy_(found.read())
    if stored:
        raise UserError(f"{folder}: its adapters do not fit this model, which has no {next(iter(stored))}.{instead}")


def adapter_config(options: RunOptions) -> LoraConfig:
    """peft's configuration for adapters with ``options``, without the layers that they are on."""
    from peft import LoraConfig

    return LoraConfig(
        r=options.lora_r,
        lora_alpha=options.lora_alpha,  # type: ignore[arg-type]  # a scale, which need not be an integer
        lora_dropout=options.lora_dropout,
        use_dora=options.use_dora,
        use_rslora=options.use_rslora,
    )


def stand_in_for_parts(model: torch.nn.Module, weights: Weights) -> None:
    """Give ``model``, a base, modules that stand for the parts that a task gave it, of which ``weights`` have some.

    They only hold tensors of these names and shapes, for peft to write: the task is not asked for its parts again.
    """
    parts: dict[str, torch.nn.Module] = {}
    for name, stored in weights.items():
        part, found, path = name.removeprefix(PREFIX).partition(WHOLE)
        if not found:
            continue
        module = parts.setdefault(part, torch.nn.Module())
        *inner, last = path.split(".")
        for each in inner:
            if each not in dict(module.named_children()):
                module.add_module(each, torch.nn.Module())
            module = module.get_submodule(each)
        empty = torch.empty(stored.shape, dtype=stored.dtype, device="meta")
        module.register_parameter(last, torch.nn.Parameter(empty, requires_grad=False))
    for part, module in parts.items():
        model.add_module(part, module)
    model.new_parts = tuple(parts)  # type: ignore[assignment]


def put_adapters(model: PeftModel, weights: Weights, device: torch.device) -> None:
    """Put ``weights``, all that training changed, into ``model`` on ``device``, by its names and in their own type.

    Those of parts that a task gave the model are left out where ``model`` has no such parts: no answer needs them.

    Raises UserError where they are not those of such adapters.
    """
    state = model.state_dict(keep_vars=True)
    weights = {name: stored for name, stored in weights.items() if name in state or WHOLE not in name}
    absent = [name for name in weights if name not in state]
    lacking = [name for name, p in model.named_parameters() if p.requires_grad and name not in weights]
    if absent or lacking:
        raise UserError(f"these adapters are of another model: only one of the two has {(absent + lacking)[0]}.")
    for name, stored in weights.items():
        state[name].data = stored.read().to(device, copy=True)


def export_adapters(
    model: PeftModel,
    weights: dict[str, torch.Tensor],
    folder: Path,
    description: Path,
    tokenizer: Any,
    card: str = "",
    *,
    newest: str | None = None,
) -> None:
    """Write the adapters among ``weights``, which have ``model``'s names, so that plain peft loads them on the base.

    The folder ``description`` of the model says where answers end, which the base alone does not. ``card``
    and ``newest``: see ``exporting``.
    """
    with exporting(folder, card, newest=newest) as new:
        new.mkdir(parents=True)
        write_tokenizer(tokenizer, new)
        if (description / GENERATION_CONFIG).exists():
            shutil.copy(description / GENERATION_CONFIG, new)
        # Whole embeddings are never trained here, and rows of them are among the adapters. To find that out by itself,
        # peft (0.21, 2026-11) would ask the hub.
        model.save_pretrained(str(new), state_dict=weights, save_embedding_layers=False)
        (new / "README.md").unlink()  # peft's template of a model card, not filled in
        _shorten(new / ADAPTERS)


def _shorten(file: Path) -> None:
    """Leave out of ``file``, as peft wrote it, what only newer versions of peft know and has its default value.

    Versions before 0.14 refuse keys that they do not know, and those since then warn of them.
    """
    from peft import LoraConfig

    default: dict[str, Any] = LoraConfig().to_dict()  # type: ignore[no-untyped-call]
    values = json.loads(file.read_text(encoding="utf-8"))
    kept = {key: value for key, value in values.items() if key in _STATED or value != default.get(key)}
    kept.pop("peft_version", None)
    file.write_text(json.dumps(kept, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def stored_adapters(folder: Path) -> Weights:
    """The adapters in ``folder`` as peft writes them; only headers are read. Raises UserError where it has none."""
    from peft import PeftConfig

    if not (folder / ADAPTERS).exists():
        raise UserError(f"{folder}: it has no adapters (no {ADAPTERS}).")
    stored = safetensors_weights(folder, ADAPTER_FILES)
    if not stored:  # peft would look for them on the hub
        raise UserError(f"{folder}: it has {ADAPTERS}, but no safetensors with adapters; pickles are not read.")
    try:
        if PeftConfig.from_pretrained(str(folder)).peft_type is None:
            raise KeyError("peft_type")
    except Exception as problem:  # peft lets the exceptions of its parsers through
        raise UserError(
            f"{folder / ADAPTERS}: peft cannot read it: {type(problem).__name__}: {in_brief(problem)}. Was it written"
            " by a newer version? `pip install -U peft`."
        ) from problem
    return stored


_SHAPES = re.compile(r"size mismatch for (\S+): .*?torch\.Size\((\[.*?\])\).*?torch\.Size\((\[.*?\])\)")
"""In what torch says of weights that do not fit: a name, and the shapes stored and expected."""


def load_adapters(model: torch.nn.Module, folder: Path) -> PeftModel:
    """``model``, a base, with the adapters in ``folder``, without the parts beside them that a task gave the model.

    Raises UserError where they are not of that base.
    """
    from peft import PeftModel
    from peft import get_peft_model_state_dict

    stored = stored_adapters(folder)
    parts = read_json_object(folder / ADAPTERS).get("modules_to_save") or ()
    stored = divided(stored, [f"{PREFIX}{part}" for part in parts if not hasattr(model, part)])[0]
    unfit = f"{folder}: these adapters do not fit this {type(model).__name__}: they were trained on another base."
    layers = {name for name, _ in model.named_modules()}
    # Adapters on a parameter of a layer have the name of that layer, or of one of peft's around it.
    adapted = (
        re.split(r"\.lora_|\.token_adapter\.", name.removeprefix("base_model.model."))[0].replace(".base_layer", "")
        for name in stored
    )
    # As of 0.21 (2026-11), peft silently leaves out adapters of layers that the base lacks.
    if absent := [layer for layer in adapted if layer not in layers]:
        raise UserError(f"{unfit} It has no {absent[0]}.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers under a name that goes away
            warnings.filterwarnings("ignore", message="The following (rank|alpha)_pattern keys")  # see add_adapters
            warnings.filterwarnings("ignore", message="Found missing adapter keys")  # they are an error below
            loaded = PeftModel.from_pretrained(model, str(folder))
    except (RuntimeError, ValueError) as problem:  # shapes that differ
        shapes = _SHAPES.search(str(problem))
        said = f"{shapes[1]} is {shapes[2]} in them, and {shapes[3]} on it" if shapes else in_brief(problem)
        raise UserError(f"{unfit} {said}. Name the one that they were trained on.") from problem
    # peft leaves a layer bare that the file has nothing for, and passes over what no layer takes.
    taken = get_peft_model_state_dict(loaded, save_embedding_layers=False).keys()
    if bare := sorted(taken - stored.keys()):
        raise UserError(f"{unfit} They lack {bare[0]}.")
    if unused := sorted(stored.keys() - taken):
        raise UserError(f"{folder}: its {ADAPTERS} does not name the layer of {unused[0]}, which it has weights for.")
    return loaded
