"""Answers of a model, streamed: what ``panda generate`` and ``panda chat`` print."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from panda.answers.generation import continuation
from panda.data.conversations import Turn
from panda.data.conversations import UnusableRowError
from panda.data.encoding import Encoder
from panda.data.templates import ChatTemplate
from panda.registry import UserError

_GENERATION = "generation_config.json"
Message = dict[str, str]
"""``role`` (``user`` or ``assistant``) and ``content``."""


@dataclass(frozen=True)
class Sampling:
    """How each token of an answer is chosen."""

    max_new_tokens: int = 256
    temperature: float = 0.0
    """0 takes the likeliest token; 1 samples from the model's distribution."""
    top_p: float = 1.0
    """Samples only from the likeliest tokens, as many as have this probability together."""


class Assistant:
    """A model and its tokenizer."""

    def __init__(self, model: Any, tokenizer: Any, device: torch.device, described: Path) -> None:
        """``model`` is on ``device``; it uses the generation config in the folder ``described``, if there is one."""
        from transformers import GenerationConfig

        self.model = model
        self.tokenizer = tokenizer
        self.device = device
        if (described / _GENERATION).exists() and hasattr(model, "generation_config"):
            model.generation_config = GenerationConfig.from_pretrained(described)

    @property
    def has_template(self) -> bool:
        """Whether a dialogue can be rendered for the model."""
        return bool(self.tokenizer.chat_template)

    def encode(self, messages: list[Message]) -> list[int]:
        """Token ids of a dialogue up to the assistant's turn; without a template, of the text only.

        Special tokens that it spells are characters, as in training. Raises UserError where the template refuses it.
        """
        encoder = Encoder(self.tokenizer)
        try:
            if self.has_template:
                template = ChatTemplate(self.tokenizer)
                return template.encode([template.prompt([Turn(each["role"], each["content"]) for each in messages])])[0]
            text = encoder.as_characters("".join(message["content"] for message in messages))
        except UnusableRowError as problem:
            raise UserError(str(problem)) from None
        return [*encoder.begin, *encoder.encode([text])[0]]

    def answer(self, ids: list[int], sampling: Sampling, write: Callable[[str], None]) -> str:
        """Continue ``ids``, and call ``write`` with each piece of text as it comes. Returns the whole text."""
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
        # What was asked for overrides what the checkpoint's generation config says about sampling.
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
