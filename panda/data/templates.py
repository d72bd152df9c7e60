"""How a conversation is written as text: by a chat template, the tokenizer's or the plain one."""

from __future__ import annotations

import copy
import json
import re
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
from panda.registry import UserError

_DIRECTIVE = re.compile("""(['"])((?:(?!\\1)[^\\\\])*%[A-Za-z-](?:(?!\\1)[^\\\\])*)\\1""")
"""A string in a template with a directive of strftime."""
_PROBE = "Panda"
"""An answer that is in no template."""


@dataclass(frozen=True)
class Exchange:
    """An answer, and all of the text that the model is given to answer. Both as ``Encoder.encode`` reads them."""

    before: str
    answer: str
    """Ends with the token that ends it."""


@dataclass(frozen=True)
class _Habits:
    """What a template writes around any answer."""

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
        self._asked = [Turn("user", "a")]

    @cached_property
    def end_tokens(self) -> list[int]:
        """The tokens at which an answer ends.

        Raises UserError where there is none, so that a model could not learn it, or the template refuses any dialogue.
        """
        ends = dict.fromkeys([self._habits.end, *self._ends_of_calls()])
        return [self.encoder.special[end] for end in ends]

    def exchanges(self, conversation: Conversation) -> tuple[list[Exchange], list[str]]:
        """Each supervised answer with the text before it; and the names of what the template does not use.

        Raises UnusableRowError where the template refuses the conversation, or cannot be continued with an answer.
        """
        exchanges = self._exchanges(conversation)
        unused = []
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
        return self._render(turns, None, ask=True)

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
        turns, tools = conversation.turns, conversation.tools
        exchanges = []
        for number, turn in enumerate(turns):
            if turn.role == "assistant" and turn.supervised:
                before = self._render(turns[:number], tools, ask=True)
                after = self._render(turns[: number + 1], tools, ask=False)
                answer = after[len(before) :] if after.startswith(before) else self._joined(before, turn, number + 1)
                exchanges.append(Exchange(before, self._ended(answer, number + 1)))
        return exchanges

    def _ended(self, answer: str, number: int) -> str:
        """``answer`` without what the template writes after its end: generation has stopped before that."""
        end = answer.find(self._habits.end)
        if end >= 0:
            return answer[: end + len(self._habits.end)]
        answer = answer.rstrip()
        last = next((token for token in self.encoder.special if answer.endswith(token)), None)
        if last is None:
            raise UnusableRowError(f"the chat template ends turn {number} with {answer[-20:]!r}, not a special token")
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

    def _render(self, turns: Sequence[Turn], tools: list[dict[str, Any]] | None, *, ask: bool) -> str:
        messages = self.encoder.as_characters([turn.message() for turn in turns])
        try:
            text: str = self.tokenizer.apply_chat_template(
                messages, tools=self.encoder.as_characters(tools), tokenize=False, add_generation_prompt=ask
            )
        except Exception as problem:  # a template can raise errors of jinja's and of its own
            raise UnusableRowError(f"the chat template refuses it: {problem}") from None
        return text

    @cached_property
    def _habits(self) -> _Habits:
        answer = Turn("assistant", _PROBE)
        try:
            after = self._render([*self._asked, answer], None, ask=False)
        except UnusableRowError as problem:
            self._asked.insert(0, Turn("system", "a"))  # which some want
            try:
                after = self._render([*self._asked, answer], None, ask=False)
            except UnusableRowError:
                raise UserError(
                    f"template: {problem} (a question and an answer). Write `template: plain`, or correct the"
                    " tokenizer's chat template."
                ) from None
        ending = after.rpartition(_PROBE)[2]
        special = self._special.findall(ending)
        if not special:
            # A model that never learns how an answer ends does not stop.
            raise UserError(
                f"template: the tokenizer's chat template ends an answer with {ending[-20:]!r}, not a special token:"
                " a model could not learn where to stop. Write `template: plain`, or correct the template."
            )
        before = self._render(self._asked, None, ask=True)
        common = next((n for n, (one, other) in enumerate(zip(before, after, strict=False)) if one != other), None)
        borders = self.encoder.borders & set(self._special.findall(before + after))
        return _Habits(
            opening="" if common is None else before[common:],
            ending=ending[: ending.index(special[0]) + len(special[0])],
            end=special[0],
            borders=re.compile("|".join(map(re.escape, borders))) if borders else None,
        )

    @cached_property
    def _special(self) -> re.Pattern[str]:
        longest_first = sorted(self.encoder.special, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")

    def _ends_of_calls(self) -> list[str]:
        """The token that ends an answer which calls a tool, where there are such: another one in some templates."""
        function = {"name": "a", "description": "a", "parameters": {"type": "object", "properties": {}}}
        call = {"type": "function", "function": {"name": "a", "arguments": {}}}
        turns = [*self._asked, Turn("assistant", "", extras={"tool_calls": [call]})]
        try:
            [exchange] = self._exchanges(Conversation(turns, [{"type": "function", "function": function}]))
        except UnusableRowError:
            return []
        return [token for token in self.encoder.special if exchange.answer.endswith(token)]


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

    transformers gives templates the function ``strftime_now``: a macro takes its place.
    """
    if isinstance(chat_template, dict):
        return {name: dated(text, day) for name, text in chat_template.items()}
    if not chat_template or "strftime_now" not in chat_template or "macro strftime_now" in chat_template:
        return chat_template
    formats = sorted({found[2] for found in _DIRECTIVE.finditer(chat_template)})
    dates = json.dumps({text: day.strftime(text) for text in formats}, ensure_ascii=False)
    # transformers removes the newline after a block, so that the template begins on a line of its own as before.
    return (
        f"{{%- macro strftime_now(format) -%}}{{{{- {dates}.get(format, '{day.isoformat()}') -}}}}{{%- endmacro %}}\n"
        f"{chat_template}"
    )
