"""How a conversation is written as text: in segments, each of which carries loss or does not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from typing import NamedTuple
from typing import Protocol

from panda.data.conversations import Turn
from panda.data.conversations import UnusableRowError
from panda.registry import UserError


class Span(NamedTuple):
    """A part of the text of a sample. Segments are tokenised separately, so that the border of the loss is exact."""

    text: str
    supervised: bool


class Template(Protocol):
    """A way to write conversations as text."""

    special: bool
    """Whether special tokens in the text are encoded as such, or as characters like any others."""
    end: list[int]
    """Token ids after each supervised segment."""
    last_token: int
    """The token that ends an answer: where generation stops."""

    def samples(self, turns: Sequence[Turn]) -> list[list[Span]]:
        """The segments of each sample that a conversation makes. Raises UnusableRowError."""
        ...

    def prompt(self, prompt: str) -> str:
        """The text that the model is given to answer ``prompt``."""
        ...

    def describe(self) -> dict[str, Any]:
        """Everything that decides what is written."""
        ...


class Plain:
    """Turns one after another, with a separator before each answer and the end-of-sequence token after it."""

    special = False

    def __init__(self, separator: str, tokenizer: Any) -> None:
        self.separator = separator
        self.last_token: int = tokenizer.eos_token_id
        self.end = [self.last_token]

    def samples(self, turns: Sequence[Turn]) -> list[list[Span]]:
        segments: list[Span] = []
        pending = ""
        for turn in turns:
            if turn.role == "assistant":
                segments += [Span(pending, False), Span(turn.text, True)]
                pending = ""
            else:
                pending += turn.text + self.separator
        return [segments]

    def prompt(self, prompt: str) -> str:
        return prompt + self.separator

    def describe(self) -> dict[str, Any]:
        return {"template": "plain", "separator": self.separator}


class Chat:
    """The tokenizer's chat template.

    An answer is found in the text by rendering the conversation up to it, with the generation prompt,
    and up to its end. Where a template changes earlier turns once there are later ones (say, leaves
    their reasoning out), each answer becomes a sample of its own, after the text that the model will be
    given to answer.
    """

    special = True

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.end: list[int] = []  # the template writes its own
        if not tokenizer.chat_template:
            raise UserError(
                "template: chat needs a tokenizer with a chat template (chat_template.jinja beside tokenizer.json), and"
                " this one has none. Write `template: plain`, or give the tokenizer one."
            )
        self.specials = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
        [_, answer] = self.samples([Turn("user", "a"), Turn("assistant", "b")])[0]
        # A model that never learns how an answer ends does not stop.
        ending = next((token for token in self.specials if answer.text.endswith(token)), None)
        if ending is None:
            raise UserError(
                f"template: the tokenizer's chat template ends an answer with {answer.text[-20:]!r}, not a special"
                " token: a model could not learn where to stop. Write `template: plain`, or correct the template."
            )
        self.last_token: int = tokenizer.convert_tokens_to_ids(ending)

    def samples(self, turns: Sequence[Turn]) -> list[list[Span]]:
        for turn in turns:
            if spelt := next((token for token in self.specials if token in turn.text), None):
                raise UnusableRowError(
                    f"a turn spells the special token {spelt!r}, and the chat template would turn it into one"
                )
        whole: list[Span] = []
        single: list[list[Span]] = []
        done = ""
        continues = True
        for number, turn in enumerate(turns):
            if turn.role != "assistant":
                continue
            before = self._render(turns[:number], ask=True)
            after = self._render(turns[: number + 1], ask=False)
            if not after.startswith(before):
                raise UnusableRowError(f"the chat template writes turn {number + 1} differently from the prompt for it")
            # Space after the end token belongs to the next turn: generation has stopped before it.
            answer = after[len(before) :].rstrip()
            continues = continues and before.startswith(done)
            whole += [Span(before[len(done) :], False), Span(answer, True)]
            single.append([Span(before, False), Span(answer, True)])
            done = before + answer
        return [whole] if continues else single

    def prompt(self, prompt: str) -> str:
        return self._render([Turn("user", prompt)], ask=True)

    def describe(self) -> dict[str, Any]:
        return {"template": "chat", "chat_template": self.tokenizer.chat_template}

    def _render(self, turns: Sequence[Turn], *, ask: bool) -> str:
        messages = [{"role": turn.role, "content": turn.text} for turn in turns]
        try:
            text: str = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=ask)
        except Exception as problem:  # a template can raise errors of jinja's and of its own
            raise UnusableRowError(f"the chat template refuses it: {problem}") from None
        return text
