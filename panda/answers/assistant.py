"""Answers of a model, streamed: what ``panda generate`` and ``panda chat`` print."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from panda.answers.generation import continuation
from panda.answers.generation import lengths_vary
from panda.answers.positions import held_positions
from panda.answers.text import Pieces
from panda.answers.text import decoded
from panda.data.conversations import Turn
from panda.data.conversations import UnusableRowError
from panda.data.templates import ChatTemplate
from panda.files.terminal import number_of
from panda.registry import UserError
from panda.weights.generation_config import answer_ends
from panda.weights.generation_config import asks_to_sample
from panda.weights.generation_config import decoding
from panda.weights.generation_config import generation_values
from panda.weights.generation_config import vocabulary_of

Message = dict[str, str]
"""``role`` (``system``, ``user`` or ``assistant``) and ``content``."""


@dataclass(frozen=True)
class Sampling:
    """How each token of an answer is chosen."""

    max_new_tokens: int = 256
    temperature: float = 0.0
    """0 takes the likeliest token; 1 samples from the model's distribution."""
    top_p: float = 1.0
    """Samples only from the likeliest tokens, as many as have this probability together."""


@dataclass(frozen=True)
class Answer:
    """What a model has answered."""

    text: str
    finish: str
    """Why it ended: ``stop`` by a token or a text at which answers end, ``length``, or ``time``, which was up."""
    prompt_tokens: int
    """Of the prompt, those that the model was given."""
    tokens: int
    """Of the answer, without the one that ends it."""


class Assistant:
    """A model and its tokenizer."""

    def __init__(
        self, model: Any, tokenizer: Any, device: torch.device, described: Path, base: Path | None = None
    ) -> None:
        """``model`` is on ``device``. The folder ``described`` says how it answers and where answers end, with the
        folder ``base`` of the model under adapters.

        Raises UserError where a file in them is not a JSON object.
        """
        self.model = model
        self.tokenizer = tokenizer
        self.template = ChatTemplate(tokenizer)
        self.device = device
        contents = generation_values(described, *([base] if base else []))
        values = contents[0] if contents else {}
        ends = answer_ends([], tokenizer, *contents)
        self.decoding = decoding(values, ends, tokenizer, vocabulary_of(model, tokenizer))
        self.notes = [note for note in [self.decoding.note(described)] if note]
        """What a user should know before the first answer, in lines."""
        if asked := asks_to_sample(values):
            self.notes.append(
                f"{described}: its generation config asks for sampling ({asked}); panda takes the likeliest token, or"
                " samples as --temperature and --top_p say"
            )
        self.positions = held_positions(model) if isinstance(model, torch.nn.Module) else None

    @property
    def has_template(self) -> bool:
        """Whether a dialogue can be rendered for the model."""
        return bool(self.tokenizer.chat_template)

    def encode(self, messages: list[Message]) -> list[int]:
        """Token ids of a dialogue up to the assistant's turn; without a template, of the text only.

        Special tokens that it spells are characters, as in training. Raises UserError where the template refuses it.
        """
        turns = [Turn(message["role"], message["content"]) for message in messages]
        encoder = self.template.encoder
        try:
            if not self.has_template:
                return encoder.encode_content("".join(turn.text for turn in turns))
            text = self.template.prompt(turns)
            if turns[0].role == "system" and self.template.leaves_out(turns, 0):
                raise UserError("the chat template leaves the system turn out. Go on without one.")
            return encoder.encode([text])[0]
        except UnusableRowError as problem:
            raise UserError(f"prompt: {problem}") from None

    def room(self, sampling: Sampling) -> int | None:
        """The most tokens of a prompt, so that an answer has as many positions as asked, or half of all."""
        return self.positions and self.positions - min(sampling.max_new_tokens, self.positions // 2)

    def answer(
        self,
        ids: list[int],
        sampling: Sampling,
        write: Callable[[str], None],
        note: Callable[[str], None],
    ) -> Answer:
        """Continue ``ids``, and call ``write`` with each piece of text as it comes.

        ``note`` is called with a line for whatever is cut: of a prompt the beginning, of an answer the end. Raises
        UserError for no ids.
        """
        from transformers import GenerationMixin

        if not ids:
            raise UserError(
                "the prompt is empty, and the tokenizer has no token with which a text begins. Write a prompt."
            )
        room, most = self.room(sampling), sampling.max_new_tokens
        if self.positions and room and len(ids) > room:
            note(
                f"prompt: its first {len(ids) - room:,} of {len(ids):,} tokens were left out; the model has"
                f" {self.positions:,} positions for prompt and answer"
            )
            ids = self.template.encoder.cut(ids, room)
        if self.positions:
            most = min(most, self.positions - len(ids))
        pieces = Pieces(self.tokenizer)
        tokens = self._generated if isinstance(self.model, GenerationMixin) else self._continued
        begun = time.time()
        answer = tokens(ids, most, sampling, lambda token: write(pieces.add(token)))
        write(pieces.rest())
        finish, allowed = "stop", self.decoding.honoured.get("max_time")
        if len(answer) == most:
            finish = "length"
            all_asked = most == sampling.max_new_tokens
            why = "`--max_new_tokens`" if all_asked else f"the model has {self.positions:,} positions"
            note(f"the answer was cut after {number_of(most, 'token')}: {why}")
        elif allowed is not None and time.time() - begun > allowed:
            finish = "time"
        return Answer(decoded(self.tokenizer, answer), finish, len(ids), len(answer))

    def _generated(self, ids: list[int], most: int, sampling: Sampling, on_token: Callable[[int], None]) -> list[int]:
        """The answer by transformers, which keeps keys and values; ``on_token`` is called with each token."""
        import transformers

        config: Any = transformers.GenerationConfig
        draws = sampling.temperature > 0
        pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else self.tokenizer.eos_token_id
        drawing = {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0} if draws else {}
        settings = config(
            do_sample=draws, max_new_tokens=most, eos_token_id=self.decoding.ends or None, pad_token_id=pad, **drawing
        )
        # What `settings` lack is taken from here: all that is followed of the model's own is in `decoding`.
        self.model.generation_config = config()
        prompt = torch.tensor([ids], device=self.device)
        with lengths_vary():
            output = self.model.generate(
                prompt,
                generation_config=settings,
                attention_mask=torch.ones_like(prompt),
                logits_processor=self.decoding.processors(ids, len(ids) + most, self.device),
                stopping_criteria=self.decoding.criteria(self.tokenizer, timed=True),
                streamer=_AnswerTokens(self.decoding.ends, on_token),
            )
        answer: list[int] = output[0, len(ids) :].tolist()
        return answer[:-1] if answer and answer[-1] in self.decoding.ends else answer

    def _continued(self, ids: list[int], most: int, sampling: Sampling, on_token: Callable[[int], None]) -> list[int]:
        """The answer of any other model; ``on_token`` is called with each token."""
        answer = []
        for token in continuation(
            self.model,
            ids,
            max_new_tokens=most,
            end_tokens=self.decoding.ends,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            processors=self.decoding.processors,
            criteria=self.decoding.criteria(self.tokenizer, timed=True),
            device=self.device,
        ):
            on_token(token)
            answer.append(token)
        return answer


class _AnswerTokens:
    """A streamer of transformers, which is given the prompt and then each token: passes on those of the answer."""

    def __init__(self, ends: list[int], on_token: Callable[[int], None]) -> None:
        self.ends, self.on_token = ends, on_token
        self.is_prompt = True

    def put(self, value: torch.Tensor) -> None:
        if not self.is_prompt:
            for token in value.flatten().tolist():
                if token not in self.ends:
                    self.on_token(token)
        self.is_prompt = False

    def end(self) -> None:
        """Called after the last token."""
