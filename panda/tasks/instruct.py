"""The ``instruct`` task: learn to answer. The prompt carries no loss; the answer and its end do."""

from __future__ import annotations

from dataclasses import dataclass
from dataclasses import replace
from datetime import date
from typing import TYPE_CHECKING
from typing import Annotated
from typing import Any
from typing import Literal

from panda.data.conversations import Turn
from panda.data.conversations import conversation_of
from panda.data.reading import Row
from panda.data.templates import DATE_MACRO
from panda.data.templates import ChatTemplate
from panda.data.templates import Exchange
from panda.data.templates import dated
from panda.data.templates import plain_template
from panda.data.templates import with_template
from panda.data.tokenised import Tokenised
from panda.data.tokenised import tokenised_of
from panda.registry import Location
from panda.registry import Meta
from panda.registry import UserError
from panda.registry import register_task
from panda.registry.contexts import TaskContext
from panda.tasks.text_task import TextTask
from panda.tasks.text_task import check_weights

if TYPE_CHECKING:
    from panda.data.token_dataset import SampleBlock


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


@dataclass(frozen=True)
class InstructOptions(InstructFormat):
    """Options of the instruct task."""

    instruction_tuning_data_dir: tuple[Annotated[str, Location(holds_data=True)], ...] = (
        "./dataset/instruction_tuning",
    )
    """Folder, read recursively, file, pattern of files, or data set on the hub (`OWNER/NAME:CONFIGURATION:SPLIT`), or a
    list of these; rows have "input" and "target" (or other common names)."""
    data_weights: tuple[Annotated[float, Meta(gt=0)], ...] = ()
    """Passes over the data of each path in an epoch, `1, 0.5`; by default one over all. 2 shows each sample twice, 0.1
    another tenth of them each epoch."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_weights("data_weights", self.data_weights, self.instruction_tuning_data_dir)


@register_task("instruct", options=InstructOptions)
class Instruct(TextTask):
    """Answers to instructions, of one or several turns: prompts carry no loss, answers and their ends do."""

    option = "instruction_tuning_data_dir"

    def __init__(self, options: InstructOptions, context: TaskContext) -> None:
        templated = replace(context, tokenizer=_templated(options, context))
        super().__init__(options.instruction_tuning_data_dir, templated, options.data_weights)
        self.options = options
        self.is_plain = _is_plain(options, context)
        self._has_template = bool(context.tokenizer.chat_template)
        self.template = ChatTemplate(self.tokenizer)
        self._ends = self.template.end_tokens  # asked for here: it refuses a template before the data is read
        self._carries_date = DATE_MACRO in str(context.tokenizer.chat_template)

    def describe(self) -> dict[str, Any]:
        fields = {key: getattr(self.options, key) for key in ("input_field", "target_field")}
        return fields | {"chat_template": self.tokenizer.chat_template}

    def text_format(self) -> str:
        if self.is_plain:
            unused = ", and not the tokenizer's chat template" * self._has_template
            return f"plain, separator {self.options.separator!r}{unused}"
        said = "chat: the tokenizer's chat template"
        if self._carries_date:
            return f"{said}, with the date that it carries"
        return said + f", with the date {_day(self.options)}" * ("strftime_now" in str(self.tokenizer.chat_template))

    def parse(self, row: Row) -> tuple[str, list[Exchange], list[str]] | Tokenised:
        """The first thing that the user asks, the answers with what comes before each, and unused names."""
        if self.options.input_field is None:
            tokenised = tokenised_of(row.fields, self.vocabulary, all_carry_loss=False)
            if tokenised is not None:
                return tokenised.cut_to(self.context.max_seq_length)
        conversation = conversation_of(row.fields, self.options.input_field, self.options.target_field)
        asked = next((turn.text for turn in conversation.turns if turn.role == "user"), "")
        return asked, *self.template.exchanges(conversation)

    def add_samples(self, parsed: list[Any], block: SampleBlock) -> None:
        rows = [each if isinstance(each, Tokenised) else each[1] for each in parsed]
        texts = [text for row in rows if isinstance(row, list) for each in row for text in _texts(each)]
        for name in (name for each in parsed if not isinstance(each, Tokenised) for name in each[2]):
            block.report.add_unused(name)
        ids = iter(self.template.encode(texts))
        written: list[tuple[str, list[int]]] = []
        for row in rows:
            if isinstance(row, Tokenised):
                block.report.truncated += row.cut
                block.add(row.token_ids, row.supervised)
                continue
            sample: list[tuple[list[int], list[int]]] = []
            done: list[int] = []
            for exchange in row:
                prompt, whole = next(ids), next(ids)
                if whole[: len(prompt)] == prompt:
                    answer = whole[len(prompt) :]
                else:
                    answer = self.encoder.continuation(exchange.before, exchange.answer)
                if prompt[: len(done)] != done:  # the template, or the tokenizer, writes earlier turns otherwise
                    self._add(sample, block)
                    sample, done = [], []
                sample.append((prompt[len(done) :], answer))
                done = [*prompt, *answer]
            self._add(sample, block)
            written.append((row[-1].before + row[-1].answer, done))
        block.report.altered += self.encoder.altered(*zip(*written, strict=True)) if written else 0

    def _add(self, exchanges: list[tuple[list[int], list[int]]], block: SampleBlock) -> None:
        """Add a sample of prompts and answers in turn.

        Where it is too long, the last exchanges are left out. Where even the first one does not fit, its
        prompt is cut at the beginning, and then its answer at the end.
        """
        limit = self.context.max_seq_length
        prompt, answer = exchanges[0]
        whole = len(prompt) + len(answer)
        start = self.encoder.cut(prompt, max(0, limit - len(answer))) or prompt[-1:] or [self.tokenizer.eos_token_id]
        token_ids = [*start, *answer][:limit]
        supervised = bytes(len(start)) + b"\1" * (len(token_ids) - len(start))
        cut = len(start) < len(prompt) or max(whole, len(start) + len(answer)) > limit
        for prompt, answer in exchanges[1:]:
            if cut or len(token_ids) + len(prompt) + len(answer) > limit:
                cut = True
                break
            token_ids += prompt + answer
            supervised += bytes(len(prompt)) + b"\1" * len(answer)
        block.report.truncated += cut
        block.add(token_ids, supervised)

    @property
    def end_tokens(self) -> list[int]:
        return self._ends

    def prompt_ids(self, prompt: str) -> list[int]:
        return self.template.encode([self.template.prompt([Turn("user", prompt)])])[0]

    def example_prompt(self, parsed: Any) -> str:
        # The text of tokens has its template around it already, and a prompt is given one.
        asked: str = "" if isinstance(parsed, Tokenised) else parsed[0]
        return asked


def _is_plain(options: InstructOptions, context: TaskContext) -> bool:
    return options.template == "plain" or (options.template == "auto" and not context.tokenizer.chat_template)


def _templated(options: InstructOptions, context: TaskContext) -> Any:
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


def _day(options: InstructOptions) -> date:
    return date.fromisoformat(options.template_date) if options.template_date else date.today()


def _texts(exchange: Exchange) -> tuple[str, str]:
    return exchange.before, exchange.before + exchange.answer
