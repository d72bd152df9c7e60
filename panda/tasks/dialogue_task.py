"""A task whose rows are dialogues: how they are written for the model, and cut to the longest sample."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import replace
from datetime import date
from typing import TYPE_CHECKING
from typing import Any
from typing import Literal

from panda.data.conversations import Conversation
from panda.data.conversations import Turn
from panda.data.templates import DATE_MACRO
from panda.data.templates import ChatTemplate
from panda.data.templates import Exchange
from panda.data.templates import dated
from panda.data.templates import plain_template
from panda.data.templates import with_template
from panda.registry import UserError
from panda.registry.contexts import TaskContext
from panda.tasks.row_task import RowTask
from panda.tasks.task import refuse_without_end

if TYPE_CHECKING:
    from panda.data.locations import Locations


@dataclass(frozen=True)
class InstructFormat:
    """How rows become conversations, and conversations text."""

    input_field: str | None = None
    """Field of the prompt, with target_field. By default the common names: instruction/input/output, messages, ..."""
    target_field: str | None = None
    """Field of the answer, with input_field."""
    template: Literal["auto", "chat", "plain"] = "auto"
    """`chat`: the tokenizer's chat template; `plain`: turns one after another; `auto`: `chat` where there is one."""
    template_date: str | None = None
    """The date that a chat template writes where it asks for today's, YYYY-MM-DD; by default the day the run began."""
    separator: str = "\n"
    """Text between prompt and answer in the plain template; it is part of the prompt."""

    def __post_init__(self) -> None:
        if (self.input_field is None) != (self.target_field is None):
            raise UserError("input_field and target_field are given together, or neither is.")
        try:
            date.fromisoformat(self.template_date or "2026-01-01")
        except ValueError:
            raise UserError(f"template_date: {self.template_date!r} is not a date. Write YYYY-MM-DD.") from None


class DialogueTask(RowTask):
    """Rows that are dialogues, written as a chat template or the plain one does it."""

    def __init__(
        self, format: InstructFormat, locations: Locations, context: TaskContext, weights: Sequence[float] = ()
    ) -> None:
        """``format``: the task's options, of a class that is derived from InstructFormat."""
        templated = replace(context, tokenizer=_templated(format, context))
        super().__init__(locations, templated, weights)
        refuse_without_end(self.tokenizer)
        self.format = format
        self.is_plain = _is_plain(format, context)
        self._has_template = bool(context.tokenizer.chat_template)
        self.template = ChatTemplate(self.tokenizer)
        self._ends = self.template.end_tokens  # asked for here: it refuses a template before the data is read
        self._carries_date = DATE_MACRO in str(context.tokenizer.chat_template)

    def describe(self) -> dict[str, Any]:
        fields = {key: getattr(self.format, key) for key in ("input_field", "target_field")}
        return fields | {"chat_template": self.tokenizer.chat_template}

    def text_format(self) -> str:
        if self.is_plain:
            unused = ", and not the tokenizer's chat template" * self._has_template
            return f"plain, separator {self.format.separator!r}{unused}"
        said = "chat: the tokenizer's chat template"
        if self._carries_date:
            return f"{said}, with the date that it carries"
        return said + f", with the date {_day(self.format)}" * ("strftime_now" in str(self.tokenizer.chat_template))

    def exchange(self, turns: Sequence[Turn], answer: str) -> Exchange:
        """The texts of ``turns`` and of their ``answer``. Raises UnusableRowError where they cannot be written."""
        earlier = [replace(turn, supervised=False) for turn in turns]
        exchanges, _ = self.template.exchanges(Conversation([*earlier, Turn("assistant", answer)]))
        return exchanges[-1]

    def tokens_of(self, exchanges: Sequence[Exchange]) -> list[tuple[list[int], list[int]]]:
        """Of each exchange the tokens before the answer, and those of the answer with its end."""
        ids = iter(
            self.template.encode([text for each in exchanges for text in (each.before, each.before + each.answer)])
        )
        found = []
        for exchange in exchanges:
            prompt, whole = next(ids), next(ids)
            if whole[: len(prompt)] == prompt:
                answer = whole[len(prompt) :]
            else:
                answer = self.encoder.continuation(exchange.before, exchange.answer)
            found.append((prompt, answer))
        return found

    def fitted(self, prompt: Sequence[int], answer: Sequence[int]) -> tuple[list[int], bytes, bool]:
        """A sample of at most ``max_seq_length`` tokens, its supervision (of the answer), and whether it was cut.

        The prompt is cut at its beginning, and where even its last token leaves no room, the answer at its end.
        """
        limit = self.context.max_seq_length
        start = self.encoder.cut(list(prompt), max(0, limit - len(answer))) or list(prompt[-1:])
        start = start or [self.tokenizer.eos_token_id]
        token_ids = [*start, *answer][:limit]
        supervised = bytes(len(start)) + b"\1" * (len(token_ids) - len(start))
        was_cut = len(start) < len(prompt) or max(len(prompt), len(start)) + len(answer) > limit
        return token_ids, supervised, was_cut

    @property
    def end_tokens(self) -> list[int]:
        return self._ends

    def prompt_ids(self, prompt: str) -> list[int]:
        return self.template.encode([self.template.prompt([Turn("user", prompt)])])[0]


def _is_plain(options: InstructFormat, context: TaskContext) -> bool:
    return options.template == "plain" or (options.template == "auto" and not context.tokenizer.chat_template)


def _templated(options: InstructFormat, context: TaskContext) -> Any:
    """The tokenizer with the chat template that ``options`` choose, for a day that does not change."""
    tokenizer = context.tokenizer
    if _is_plain(options, context):
        return with_template(tokenizer, plain_template(options.separator))
    if not tokenizer.chat_template:
        raise UserError(
            "template: chat needs a tokenizer with a chat template (chat_template.jinja beside tokenizer.json), and"
            " this one has none. Write `template: plain`, or give the tokenizer one."
        )
    return with_template(tokenizer, dated(tokenizer.chat_template, _day(options)))


def _day(options: InstructFormat) -> date:
    return date.fromisoformat(options.template_date) if options.template_date else date.today()
