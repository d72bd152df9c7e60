"""Answers of a trained model, as they come: what ``panda generate`` and ``panda chat`` do."""

from __future__ import annotations

import json
from collections.abc import Callable
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from panda.models.creation import keep_computed_float32
from panda.models.creation import without_weights
from panda.models.generation import continuation
from panda.models.matching import matched
from panda.models.weight_files import safetensors_weights
from panda.registry import Catalog
from panda.registry import UserError
from panda.registry.contexts import ModelContext
from panda.registry.options import build
from panda.stored_tensor import Weights
from panda.stored_tensor import put

_GENERATION = "generation_config.json"
Message = dict[str, str]
"""``role`` (``user`` or ``assistant``) and ``content``."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen."""

    max_new_tokens: int = 256
    temperature: float = 0.0
    """0 takes the likeliest token; 1 draws from the model's distribution."""
    top_p: float = 1.0
    """Of the likeliest tokens, as many as have this probability together."""


class Assistant:
    """A model and its tokenizer."""

    def __init__(
        self, folder: Path, weights: Weights | None, device: torch.device, module: torch.nn.Module | None = None
    ) -> None:
        """Load the model that ``folder`` describes, with ``weights``, or those in the folder where None are given.

        Or take ``module``, which is on ``device``. Raises UserError where the folder holds no model that can be loaded.
        """
        from transformers import AutoTokenizer
        from transformers import GenerationConfig

        try:
            self.tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        except Exception as problem:  # transformers raises what its parsers raise
            raise UserError(f"{folder}: no tokenizer could be loaded from it: {problem}") from problem
        self.model: Any = module or _module(folder, weights).to(device).eval()
        model: Any = self.model
        if (folder / _GENERATION).exists() and hasattr(model, "generation_config"):
            model.generation_config = GenerationConfig.from_pretrained(folder)
        self.device = device

    @property
    def has_template(self) -> bool:
        """Whether a dialogue can be rendered for the model."""
        return bool(self.tokenizer.chat_template)

    def encode(self, messages: list[Message]) -> list[int]:
        """Token ids of a dialogue, up to where the assistant speaks. Without a template: of the text alone."""
        if self.has_template:
            ids: list[int] = self.tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=True, return_dict=False
            )
            return ids
        begin = [] if self.tokenizer.bos_token_id is None else [self.tokenizer.bos_token_id]
        text = "".join(message["content"] for message in messages)
        return [*begin, *self.tokenizer(text, add_special_tokens=False)["input_ids"]]

    def answer(self, ids: list[int], sampling: Sampling, write: Callable[[str], None]) -> str:
        """Continue ``ids``; ``write`` is given the text piece by piece. Returns the whole of it."""
        from transformers import GenerationMixin
        from transformers import TextStreamer

        class Streamer(TextStreamer):
            def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
                write(text)

        streamer = Streamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        prompt = torch.tensor([ids], device=self.device)
        if isinstance(self.model, GenerationMixin):
            answer = self._generate(prompt, sampling, streamer)
        else:
            streamer.put(prompt[0])  # type: ignore[no-untyped-call]
            answer = []
            for token in self._continue(ids, sampling):
                streamer.put(torch.tensor([token]))  # type: ignore[no-untyped-call]
                answer.append(token)
            streamer.end()  # type: ignore[no-untyped-call]
        text: str = self.tokenizer.decode(answer, skip_special_tokens=True)
        return text

    def _generate(self, prompt: torch.Tensor, sampling: Sampling, streamer: Any) -> list[int]:
        model: Any = self.model
        draws = sampling.temperature > 0
        settings = model.generation_config
        pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else self.tokenizer.eos_token_id
        # What the checkpoint's own generation config says of drawing gives way to what was asked for.
        settings.update(
            do_sample=draws,
            temperature=sampling.temperature if draws else None,
            top_p=sampling.top_p if draws else None,
            top_k=0 if draws else None,
            max_new_tokens=sampling.max_new_tokens,
            max_length=None,
            pad_token_id=pad,
        )
        output = model.generate(prompt, attention_mask=torch.ones_like(prompt), streamer=streamer)
        answer: list[int] = output[0, prompt.shape[1] :].tolist()
        return answer

    def _continue(self, ids: list[int], sampling: Sampling) -> Iterator[int]:
        return continuation(
            self.model,
            ids,
            max_new_tokens=sampling.max_new_tokens,
            eos_token_id=self.tokenizer.eos_token_id,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            device=self.device,
        )


def _module(folder: Path, weights: Weights | None) -> torch.nn.Module:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as problem:
        raise UserError(f"{folder}: no model is described there: {problem}.") from None
    if "panda_model" in config:
        module = _panda_module(config)
    elif weights is None:
        return _transformers_module(folder)
    else:
        from transformers import AutoConfig
        from transformers import AutoModelForCausalLM

        described = AutoConfig.from_pretrained(folder)
        with without_weights():
            module = AutoModelForCausalLM.from_config(described, dtype=described.dtype)  # type: ignore[no-untyped-call]
    module.requires_grad_(False)
    found = matched(module, safetensors_weights(folder) if weights is None else weights, source=str(folder))
    keep_computed_float32(module)
    state: dict[str, Any] = module.state_dict(keep_vars=True)
    for name, stored in found.items():
        if isinstance(state[name], torch.nn.Parameter):
            put(module, name, stored.read().clone())
        else:
            state[name].copy_(stored.read())
    return module


def _transformers_module(folder: Path) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    try:
        module: torch.nn.Module = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", local_files_only=True)
    except Exception as problem:  # transformers raises what its parsers raise
        raise UserError(f"{folder}: transformers loads no model from it: {problem}") from problem
    return module


def _panda_module(config: dict[str, Any]) -> torch.nn.Module:
    """A model of a panda package, from what its export says of it."""
    catalog = Catalog()
    offer = catalog.find("model", config["panda_model"])
    component = catalog.load(offer)
    assert component is not None
    with without_weights():
        built: torch.nn.Module = component.factory(
            build(component.options, config["options"]), ModelContext(**config["context"])
        )
    return built
