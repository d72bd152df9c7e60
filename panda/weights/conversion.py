"""Weights as published and as transformers' modules have them, by transformers' own rules, a few tensors at a time.

transformers 5 renames tensors of some checkpoints when it loads them, and joins others: the experts of a mixture of
experts, each of which is a tensor of its own in files, are one tensor in the module. When it saves, it does the
reverse. Its rules are applied here to tensors without data first, which gives names and shapes; data is read and
converted for one tensor of the result at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import torch

from panda.registry import UserError
from panda.registry.errors import in_brief
from panda.weights.formats import CONFIG
from panda.weights.stored_tensor import StoredTensor
from panda.weights.stored_tensor import Weights


def as_in_module(module: Any, weights: Weights, *, source: str) -> Weights:
    """``weights`` of a checkpoint under the names that they have in ``module``, and joined or split as they are there.

    Those that transformers knows nothing of keep their names. ``source`` is what errors call the checkpoint. Raises
    UserError where tensors that belong together do not fit together.
    """
    from transformers import PreTrainedModel
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import dot_natural_key
    from transformers.core_model_loading import rename_source_key

    if not isinstance(module, PreTrainedModel):
        return weights
    rules = _Rules(get_model_conversion_mapping(module))
    wanted, prefix = module.state_dict(keep_vars=True), module.base_model_prefix
    parts: dict[str, _Part] = {}
    result: dict[str, StoredTensor] = {}
    for name in sorted(weights, key=dot_natural_key):
        renamed, pattern = rename_source_key(name, rules.renamings, rules.converters, prefix, wanted)
        if renamed not in wanted and name in wanted:
            renamed, pattern = name, None
        if renamed not in wanted or pattern is None:
            result[renamed if renamed in wanted else name] = weights[name]
            continue
        parts.setdefault(renamed, _Part(renamed, rules.converter(pattern), module)).add(pattern, weights[name].read)
        parts[renamed].sources.append((name, weights[name]))
    for part in parts.values():
        try:
            result |= part.results()
        except Exception as problem:  # whatever torch says of shapes that differ
            raise UserError(
                f"{source}: {part.first}: transformers cannot join {len(part.sources)} tensors,"
                f" {part.sources[0][0]} first: {in_brief(problem)}. Is it complete, and of this size?"
            ) from problem
    return result


def as_published(description: Path, weights: Weights) -> Weights:
    """``weights`` of the model that the folder ``description`` describes, as transformers saves it.

    To be read in their order, each once: then ``weights`` are too. A model that is not one of transformers keeps its
    weights as they are.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import dot_natural_key

    module = _outline_of(description)
    # As transformers does for a model that it did not load: a prefix that some checkpoints have is not added.
    known = get_model_conversion_mapping(module, add_legacy=False) if module is not None else []
    reverse = [rule.reverse_transform() for rule in reversed(known) if type(rule).__name__ != "PrefixChange"]
    if not reverse:
        return weights
    rules, ordered = _Rules(reverse), _Ordered(weights)
    parts: dict[str, _Part] = {}
    for name in sorted(weights, key=dot_natural_key):
        renamed, pattern = rules.converted(name)
        converter = rules.converter(pattern) if pattern is not None else None
        part = parts.setdefault(renamed, _Part(renamed, converter, module))
        part.add(pattern, partial(ordered.take, name))
        part.sources.append((name, weights[name]))
    number = {name: place for place, name in enumerate(weights)}
    result: dict[str, StoredTensor] = {}
    for part in sorted(parts.values(), key=lambda part: max(number[name] for name, _ in part.sources)):
        result |= {rules.renamed(name): stored for name, stored in part.results().items()}
    return result


class _Rules:
    """transformers' rules for a model, by their kind."""

    def __init__(self, rules: list[Any]) -> None:
        from transformers.core_model_loading import WeightConverter
        from transformers.core_model_loading import WeightRenaming

        self.renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
        self.converters = [rule for rule in rules if isinstance(rule, WeightConverter)]

    # transformers has functions for these two only from 5.23 on (2026-11).

    def converted(self, name: str) -> tuple[str, str | None]:
        """``name`` after the first converter that takes it, and that converter's pattern; None where none does."""
        for converter in self.converters:
            renamed, pattern = converter.rename_source_key(name)
            if pattern is not None:
                return renamed, pattern
        return name, None

    def renamed(self, name: str) -> str:
        """``name`` after all renamings in turn."""
        for renaming in self.renamings:
            name, _ = renaming.rename_source_key(name)
        return name

    def converter(self, pattern: str) -> Any:
        """The converter with ``pattern`` among its sources; as in transformers the last one, if there are several."""
        return next(rule for rule in reversed(self.converters) if pattern in rule.source_patterns)


class _Part:
    """Tensors that are converted together, by ``converter``; one that is only renamed, if that is None."""

    def __init__(self, first: str, converter: Any | None, module: Any) -> None:
        self.first = first
        self.sources: list[tuple[str, StoredTensor]] = []
        self._converter, self._module = converter, module
        self._reads: list[tuple[str | None, Callable[[], torch.Tensor]]] = []
        self._converted: dict[str, torch.Tensor] = {}

    def add(self, pattern: str | None, read: Callable[[], torch.Tensor]) -> None:
        self._reads.append((pattern, read))

    def results(self) -> dict[str, StoredTensor]:
        """The converted tensors, each made when it is read."""
        stored = [stored for _, stored in self.sources]
        if self._converter is None:
            return {self.first: StoredTensor(stored[0].shape, stored[0].dtype, self._reads[0][1])}
        without_data = [partial(torch.empty, each.shape, dtype=each.dtype, device="meta") for each in stored]
        outline = self._convert(without_data)
        return {
            name: StoredTensor(tuple(tensor.shape), tensor.dtype, partial(self._read, name))
            for name, tensor in outline.items()
        }

    def _read(self, name: str) -> torch.Tensor:
        if name not in self._converted:
            self._converted = self._convert([read for _, read in self._reads])
        return self._converted.pop(name)

    def _convert(self, reads: Sequence[Callable[[], torch.Tensor]]) -> dict[str, torch.Tensor]:
        assert self._converter is not None
        converter = deepcopy(self._converter)
        for (pattern, _), (name, _), read in zip(self._reads, self.sources, reads, strict=True):
            converter.add_tensor(self.first, name, pattern, read)
        converted = converter.convert(self.first, model=self._module, config=self._module.config)
        if isinstance(converted, tuple):  # up to 5.0, with what went wrong
            converted, _ = converted
        return {name: value[0] if isinstance(value, list) else value for name, value in converted.items()}


class _Ordered:
    """Reads ``weights`` in their order, each once, and keeps those that are not wanted yet."""

    def __init__(self, weights: Weights) -> None:
        self._weights, self._unread = weights, iter(weights)
        self._kept: dict[str, torch.Tensor] = {}

    def take(self, name: str) -> torch.Tensor:
        while name not in self._kept:
            following = next(self._unread)
            self._kept[following] = self._weights[following].read()
        return self._kept.pop(name)


def _outline_of(description: Path) -> Any | None:
    """The model of transformers that the folder describes, without weights; None for another."""
    from transformers import AutoConfig
    from transformers import AutoModelForCausalLM

    from panda.weights.json_object import read_json_object

    if "model_type" not in read_json_object(description / CONFIG):
        return None
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(
            AutoConfig.from_pretrained(description, trust_remote_code=False), trust_remote_code=False
        )  # type: ignore[no-untyped-call]
