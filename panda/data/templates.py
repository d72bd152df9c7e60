"""How a conversation is written as text: by a chat template, the tokenizer's or the plain one."""

from __future__ import annotations

import copy
import json
import re
from ast import literal_eval
from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import replace
from datetime import date
from functools import cached_property
from itertools import pairwise
from typing import Any

from panda.data.conversations import Conversation
from panda.data.conversations import Turn
from panda.data.conversations import UnusableRowError
from panda.data.encoding import Encoder
from panda.data.rendering import INSTEAD
from panda.data.rendering import check_template
from panda.data.rendering import limited
from panda.registry import UserError

DATE_MACRO = "macro strftime_now"
"""What is in a template that carries a date."""
_PROBE = "Panda"
"""An answer that is in no template."""


@dataclass(frozen=True)
class Exchange:
    """An answer, and all of the text that the model is given to answer. Both as ``Encoder.encode`` reads them."""

    before: str
    answer: str
    """Ends with the token that ends it."""
    weight: float = 1.0
    """What the loss of the answer is multiplied by."""


@dataclass(frozen=True)
class _Habits:
    """What a template writes around any answer."""

    asked: list[Turn]
    """Turns that it takes before an answer."""
    opening: str
    """What the text before an answer ends in, and finished answers lack: a thought that begins, where there is one."""
    ending: str
    """What comes after an answer, up to the token that ends it, which is the last of it."""
    end: str
    """That token."""
    borders: re.Pattern[str] | None
    """Tokens of the template at which its texts can be divided; see ``Encoder.borders``."""


class ChatTemplate:
    """The chat template of a tokenizer. Whatever text content has, it stays characters: see ``Encoder``."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.encoder = Encoder(tokenizer)

    @cached_property
    def end_tokens(self) -> list[int]:
        """The tokens at which an answer ends.

        Raises UserError where there is none, so that a model could not learn it, or the template refuses any dialogue.
        """
        ends = dict.fromkeys([self._habits.end, *self._ends_of_calls()])
        ids = self.encoder.added | self.encoder.special
        return [ids[end] for end in ends]

    def exchanges(self, conversation: Conversation) -> tuple[list[Exchange], list[str]]:
        """Each supervised answer with the text before it; and the names of what the template does not use.

        Raises UnusableRowError where the template refuses the conversation, or cannot be continued with an answer.
        """
        exchanges = self._exchanges(conversation)
        first = conversation.turns[0]
        greets = first.role == "assistant" and first.supervised
        unused = ["messages[0], an answer to nothing, for loss"] if greets else []
        for name in sorted({name for turn in conversation.turns for name in turn.extras}):
            less = [
                replace(turn, extras={key: value for key, value in turn.extras.items() if key != name})
                for turn in conversation.turns
            ]
            if self._is_same(replace(conversation, turns=less), exchanges):
                unused.append(f"messages[].{name}")
        if conversation.tools and self._is_same(replace(conversation, tools=None), exchanges):
            unused.append("tools")
        return exchanges, [*unused, *self._unwritten(conversation, exchanges)]

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Token ids of texts that the template wrote, as ``Encoder.encode`` gives them.

        The texts of a conversation have most of their parts in common: each is encoded once.
        """
        divided = [self._parts(text) for text in texts]
        parts = list(dict.fromkeys(part for of_text in divided for part in of_text))
        ids = dict(zip(parts, self.encoder.encode(parts), strict=True))
        return [[token for part in of_text for token in ids[part]] for of_text in divided]

    def _parts(self, text: str) -> list[str]:
        if self._habits.borders is None:
            return [text]
        starts = [0, *(found.start() for found in self._habits.borders.finditer(text)), len(text)]
        return [text[start:end] for start, end in pairwise(starts) if start < end]

    def prompt(self, turns: Sequence[Turn]) -> str:
        """The text that the model is given to answer the last of ``turns``. Raises UnusableRowError."""
        return self._render(self._marked(turns), None, ask=True)

    def leaves_out(self, turns: Sequence[Turn], number: int) -> bool:
        """Whether the prompt of ``turns`` says nothing of the turn ``number``. Raises UnusableRowError."""
        other = [*turns]
        other[number] = replace(turns[number], text=f"{turns[number].text} {_PROBE}")
        return self.prompt(other) == self.prompt(turns)

    def _marked(self, turns: Sequence[Turn]) -> list[dict[str, Any]]:
        messages: list[dict[str, Any]] = self.encoder.as_characters([turn.message() for turn in turns])
        return messages

    def _unwritten(self, conversation: Conversation, exchanges: list[Exchange]) -> list[str]:
        """The roles whose content the template leaves out, before the last answer."""
        written = exchanges[-1].before + exchanges[-1].answer
        last = max(n for n, turn in enumerate(conversation.turns) if turn.role == "assistant" and turn.supervised)
        roles = {}
        for number, turn in enumerate(conversation.turns[:last]):
            if self.encoder.as_characters(turn.text).strip() in written:
                continue
            other = [*conversation.turns]  # it may be written in other words, or in an earlier prompt only
            other[number] = replace(turn, text=_PROBE)
            if self._is_same(replace(conversation, turns=other), exchanges):
                roles[f"messages[].content of {turn.role}"] = True
        return list(roles)

    def _is_same(self, conversation: Conversation, exchanges: list[Exchange]) -> bool:
        try:
            return self._exchanges(conversation) == exchanges
        except UnusableRowError:
            return False

    def _exchanges(self, conversation: Conversation) -> list[Exchange]:
        turns = conversation.turns
        messages, tools = self._marked(turns), self.encoder.as_characters(conversation.tools)
        exchanges = []
        for number, turn in enumerate(turns):
            if number and turn.role == "assistant" and turn.supervised:
                before = self._render(messages[:number], tools, ask=True)
                after = self._render(messages[: number + 1], tools, ask=False)
                answer = after[len(before) :] if after.startswith(before) else self._joined(before, turn, number + 1)
                ended = self._ended(answer, number + 1)
                if turn.extras.get("tool_calls") and not self._added.sub("", ended).strip():
                    raise UnusableRowError(f"the chat template writes nothing of turn {number + 1}, which calls a tool")
                exchanges.append(Exchange(before, ended, turn.weight))
        if not exchanges:
            raise UnusableRowError("nothing is before its only answer that a model could answer")
        return exchanges

    def _ended(self, answer: str, number: int) -> str:
        """``answer`` without what the template writes after its end: generation has stopped before that."""
        end = answer.find(self._habits.end)
        if end >= 0:
            end += len(self._habits.end)
            if more := self._added.sub("", answer[end:]).strip():
                said = self.encoder.readable(more)[:20]
                raise UnusableRowError(f"the chat template writes more of turn {number} after its end: {said!r}")
            return answer[:end]
        answer = answer.rstrip()
        last = next((token for token in self.encoder.added if answer.endswith(token)), None)
        if last is None:
            written = self.encoder.readable(answer)[-20:]
            raise UnusableRowError(f"the chat template ends turn {number} with {written!r}, not a token of its own")
        return answer

    def _joined(self, before: str, turn: Turn, number: int) -> str:
        """The answer of ``turn`` after a generation prompt that begins it, while finished answers begin otherwise.

        Such a template opens the block of thoughts for the model (``<think>``), and leaves thoughts out of answers.
        """
        opening = self._habits.opening
        if not (opening and before.endswith(opening)):
            raise UnusableRowError(f"the chat template writes turn {number} differently from the prompt for it")
        tag, space = opening.strip(), opening[len(opening.rstrip()) :]
        said: str = self.encoder.as_characters(turn.text).lstrip()
        thoughts: str | None = self.encoder.as_characters(turn.extras.get("reasoning_content"))
        if thoughts and re.fullmatch(r"<\w+>", tag):
            said = f"{tag}\n{thoughts.strip()}\n</{tag[1:]}\n\n{said}"
        if not tag or not said.startswith(tag):
            raise UnusableRowError(
                f"the chat template begins an answer with {opening!r}, and turn {number} does not begin so"
            )
        rest = said[len(tag) :]
        while space and rest[:1] == space[0]:
            space, rest = space[1:], rest[1:]
        return rest + self._habits.ending

    def _render(self, messages: list[dict[str, Any]], tools: Any, *, ask: bool) -> str:
        for written in self._written:
            check_template(written)
        try:
            with limited():
                text: str = self.tokenizer.apply_chat_template(
                    messages, tools=tools, tokenize=False, add_generation_prompt=ask
                )
        except UserError:  # of `limited`: each other conversation would take as long
            raise
        except Exception as problem:  # a template can raise errors of jinja's and of its own
            raise UnusableRowError(f"the chat template refuses it: {self.encoder.readable(str(problem))}") from None
        return text

    @cached_property
    def _written(self) -> list[str]:
        """The templates themselves; some tokenizers have several."""
        found = self.tokenizer.chat_template
        return [each for each in (found.values() if isinstance(found, dict) else [found]) if isinstance(each, str)]

    @cached_property
    def _habits(self) -> _Habits:
        asked, answer = [Turn("user", "a")], Turn("assistant", _PROBE)
        try:
            after = self._render(self._marked([*asked, answer]), None, ask=False)
        except UnusableRowError as problem:
            asked = [Turn("system", "a"), *asked]  # which some want
            try:
                after = self._render(self._marked([*asked, answer]), None, ask=False)
            except UnusableRowError:
                raise UserError(f"template: {problem} (a question and an answer). {INSTEAD}") from None
        ending = after.rpartition(_PROBE)[2]
        ends = self._added.findall(ending)
        if not ends:
            # A model that never learns how an answer ends does not stop.
            raise UserError(
                f"template: the tokenizer's chat template ends an answer with {ending[-20:]!r}, not a token of its"
                f" own: a model could not learn where to stop. {INSTEAD}"
            )
        before = self._render(self._marked(asked), None, ask=True)
        common = next((n for n, (one, other) in enumerate(zip(before, after, strict=False)) if one != other), None)
        borders = self.encoder.borders & set(self._added.findall(before + after))
        return _Habits(
            asked=asked,
            opening="" if common is None else before[common:],
            ending=ending[: ending.index(ends[0]) + len(ends[0])],
            end=ends[0],
            borders=re.compile("|".join(map(re.escape, borders))) if borders else None,
        )

    @cached_property
    def _added(self) -> re.Pattern[str]:
        longest_first = sorted(self.encoder.added | self.encoder.special, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")

    def _ends_of_calls(self) -> list[str]:
        """The token that ends an answer which calls a tool, where there are such: another one in some templates."""
        function = {"name": "a", "description": "a", "parameters": {"type": "object", "properties": {}}}
        call = {"type": "function", "function": {"name": "a", "arguments": {}}}
        turns = [*self._habits.asked, Turn("assistant", "", extras={"tool_calls": [call]})]
        try:
            [exchange] = self._exchanges(Conversation(turns, [{"type": "function", "function": function}]))
        except UnusableRowError:
            return []
        return [token for token in self.encoder.added if exchange.answer.endswith(token)]


def with_template(tokenizer: Any, chat_template: Any) -> Any:
    """A copy of ``tokenizer`` with ``chat_template``, which may be None."""
    copied = copy.copy(tokenizer)
    copied.chat_template = chat_template
    return copied


def plain_template(separator: str) -> str:
    """The chat template that writes turns one after another.

    ``separator`` comes after each turn that is not an answer, and the end-of-sequence token after an answer.
    """
    # As JSON a string is quoted as Jinja wants it; in ASCII it could hold halves of a surrogate pair.
    after_prompt = json.dumps(separator, ensure_ascii=False)
    return (
        "{{ bos_token }}"
        "{% for message in messages %}"
        "{% if message['role'] == 'assistant' %}{{ message['content'] + eos_token }}"
        f"{{% else %}}{{{{ message['content'] + {after_prompt} }}}}{{% endif %}}"
        "{% endfor %}"
    )


def dated(chat_template: Any, day: date) -> Any:
    """``chat_template``, or each of several by name, with ``day`` where it would write today's date.

    transformers gives templates the function ``strftime_now``: a macro takes its place, for the formats that the
    template has as strings. It refuses one that is put together of others.
    """
    if isinstance(chat_template, dict):
        return {name: dated(text, day) for name, text in chat_template.items()}
    if not chat_template or "strftime_now" not in chat_template or DATE_MACRO in chat_template:
        return chat_template
    from jinja2 import Environment

    tokens = Environment(autoescape=False).lex(chat_template)
    formats = {literal_eval(value) for _, kind, value in tokens if kind == "string" and "%" in value}
    dates = json.dumps({text: day.strftime(text) for text in sorted(formats)}, ensure_ascii=False)
    # transformers removes the newline after a block, so that the template begins on a line of its own as before.
    return (
        f"{{%- macro strftime_now(format) -%}}{{%- set dates = {dates} -%}}{{{{- dates[format] if format in dates else"
        " raise_exception('a format of the date that is not one string: ' ~ format) -}}{%- endmacro %}\n"
        f"{chat_template}"
    )
