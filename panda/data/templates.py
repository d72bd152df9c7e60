"""How a conversation is written down: segments of text, each of which carries loss or does not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from typing import NamedTuple
from typing import Protocol

from panda.data.conversations import Turn
from panda.data.conversations import UnusableRowError
from panda.registry import UserError


class Segment(NamedTuple):
    """A stretch of a sample. Segments are tokenised apart, so the border of the loss is exact."""

    text: str
    supervised: bool


class Template(Protocol):
    """A way to write conversations down."""

    special: bool
    """Whether special tokens in the text are tokens. If not, they are characters like any others."""
    end: list[int]
    """Token ids behind each supervised segment."""
    last_token: int
    """The token that ends an answer: where generation stops."""

    def samples(self, turns: Sequence[Turn]) -> list[list[Segment]]:
        """The segments of each sample that a conversation makes. Raises UnusableRowError."""
        ...

    def prompt(self, prompt: str) -> str:
        """What the model is given to answer ``prompt``."""
        ...

    def describe(self) -> dict[str, Any]:
        """All that decides what is written."""
        ...


class Plain:
    """Turns behind one another; a separator before each answer, the end-of-sequence token behind it."""

    special = False

    def __init__(self, separator: str, tokenizer: Any) -> None:
        self.separator = separator
        self.last_token: int = tokenizer.eos_token_id
        self.end = [self.last_token]

    def samples(self, turns: Sequence[Turn]) -> list[list[Segment]]:
        segments: list[Segment] = []
        pending = ""
        for turn in turns:
            if turn.role == "assistant":
                segments += [Segment(pending, False), Segment(turn.text, True)]
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

    Which part of the text is an answer is found by rendering the conversation up to it, with the
    generation prompt, and up to its end. A template that writes earlier turns otherwise once there
    are later ones (and leaves their reasoning out, say) makes a sample of each answer, with what
    the model will be given to answer before it.
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
                f"template: the tokenizer's chat template ends an answer with {answer.text[-20:]!r}, no special token:"
                " a model could not learn where to stop. Write `template: plain`, or mend the template."
            )
        self.last_token: int = tokenizer.convert_tokens_to_ids(ending)

    def samples(self, turns: Sequence[Turn]) -> list[list[Segment]]:
        for turn in turns:
            if spelt := next((token for token in self.specials if token in turn.text), None):
                raise UnusableRowError(
                    f"a turn spells the special token {spelt!r}, which the chat template would make of it"
                )
        whole: list[Segment] = []
        single: list[list[Segment]] = []
        done = ""
        continues = True
        for number, turn in enumerate(turns):
            if turn.role != "assistant":
                continue
            before = self._render(turns[:number], ask=True)
            after = self._render(turns[: number + 1], ask=False)
            if not after.startswith(before):
                raise UnusableRowError(f"the chat template writes turn {number + 1} otherwise than it asks for it")
            # Space behind the end token belongs to what comes next: generation has stopped before it.
            answer = after[len(before) :].rstrip()
            continues = continues and before.startswith(done)
            whole += [Segment(before[len(done) :], False), Segment(answer, True)]
            single.append([Segment(before, False), Segment(answer, True)])
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
        except Exception as problem:  # a template raises what it likes, of jinja's or its own
            raise UnusableRowError(f"the chat template refuses it: {problem}") from None
        return text
