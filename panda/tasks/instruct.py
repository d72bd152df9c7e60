"""The ``instruct`` task: learn to answer. The prompt carries no loss; the answer and its end do."""

from __future__ import annotations

import json
from dataclasses import asdict
from dataclasses import dataclass
from typing import TYPE_CHECKING
from typing import Annotated
from typing import Any
from typing import Literal

from panda.data.conversations import Turn
from panda.data.conversations import conversation_of
from panda.data.reading import Row
from panda.data.templates import Chat
from panda.data.templates import Plain
from panda.data.templates import Template
from panda.registry import Location
from panda.registry import UserError
from panda.registry import register_task
from panda.registry.contexts import TaskContext
from panda.tasks.text_task import TextTask

if TYPE_CHECKING:
    from panda.data.token_dataset import SampleBlock


@dataclass(frozen=True)
class InstructFormat:
    """How rows become conversations, and conversations text."""

    input_field: str | None = None
    """Field of the prompt, with target_field. By default the common names: instruction/input/output, messages, ..."""
    target_field: str | None = None
    """Field of the answer, with input_field."""
    template: Literal["plain", "chat"] = "plain"
    """`plain` writes turns one after another; `chat` uses the tokenizer's chat template."""
    separator: str = "\n"
    """Text between prompt and answer in the plain template; it is part of the prompt."""

    def __post_init__(self) -> None:
        if (self.input_field is None) != (self.target_field is None):
            raise UserError("input_field and target_field are given together, or neither is.")


@dataclass(frozen=True)
class InstructOptions(InstructFormat):
    """Options of the instruct task."""

    instruction_tuning_data_dir: Annotated[str, Location(holds_data=True)] = "./dataset/instruction_tuning"
    """Folder, read recursively, or file of rows with "input" and "target" (or other common names)."""


@register_task("instruct", options=InstructOptions)
class Instruct(TextTask):
    """Answers to instructions, of one or several turns: prompts carry no loss, answers and their ends do."""

    option = "instruction_tuning_data_dir"

    def __init__(self, options: InstructOptions, context: TaskContext) -> None:
        super().__init__(options.instruction_tuning_data_dir, context)
        self.options = options
        self.template: Template = (
            Chat(self.tokenizer) if options.template == "chat" else Plain(options.separator, self.tokenizer)
        )
        self.special_tokens_in_text = self.template.special

    def describe(self) -> dict[str, Any]:
        fields = asdict(self.options)
        return {key: fields[key] for key in ("input_field", "target_field")} | self.template.describe()

    def parse(self, row: Row) -> tuple[str, list[list[tuple[str, bool]]]]:
        """The first thing that the user asks, and the segments of each sample."""
        turns: list[Turn] = conversation_of(row.fields, self.options.input_field, self.options.target_field)
        asked = next((turn.text for turn in turns if turn.role == "user"), "")
        return asked, [list(segments) for segments in self.template.samples(turns)]

    def add_samples(self, parsed: list[Any], block: SampleBlock) -> None:
        samples = [segments for _, of_row in parsed for segments in of_row]
        ids = iter(self.encode([text for segments in samples for text, _ in segments]))
        for segments in samples:
            exchanges = []
            for _ in segments[::2]:
                exchanges.append((next(ids), [*next(ids), *self.template.end]))
            self._add(exchanges, block)

    def _add(self, exchanges: list[tuple[list[int], list[int]]], block: SampleBlock) -> None:
        """Add a sample of prompts and answers in turn.

        Where it is too long, the last exchanges are left out. Where even the first one does not fit, its
        prompt is cut at the beginning, and then its answer at the end.
        """
        limit = self.context.max_seq_length
        prompt, answer = exchanges[0]
        prompt = self.without_bos(prompt)
        whole = len(self.bos) + len(prompt) + len(answer)
        room = limit - len(self.bos) - len(answer)
        kept = prompt[max(0, len(prompt) - max(0, room)) :]
        start = [*self.bos, *kept] or prompt[-1:] or [self.tokenizer.eos_token_id]
        token_ids = [*start, *answer][:limit]
        supervised = bytes(len(start)) + b"\1" * (len(token_ids) - len(start))
        cut = len(kept) < len(prompt) or max(whole, len(start) + len(answer)) > limit
        for prompt, answer in exchanges[1:]:
            if cut or len(token_ids) + len(prompt) + len(answer) > limit:
                cut = True
                break
            token_ids += prompt + answer
            supervised += bytes(len(prompt)) + b"\1" * len(answer)
        block.report.truncated += cut
        block.add(token_ids, supervised)

    @property
    def last_token(self) -> int:
        return self.template.last_token

    def prompt_text(self, prompt: str) -> str:
        return self.template.prompt(prompt)

    def text_format(self) -> str:
        if self.options.template == "chat":
            return "chat: the tokenizer's chat template"
        return f"plain, separator {self.options.separator!r}"

    def chat_template(self) -> str | None:
        if self.options.template == "chat":
            return None
        after_input = json.dumps(self.options.separator)
        return (
            "{{ bos_token }}"
            "{% for message in messages %}"
            "{% if message['role'] == 'assistant' %}{{ message['content'] + eos_token }}"
            f"{{% else %}}{{{{ message['content'] + {after_input} }}}}{{% endif %}}"
            "{% endfor %}"
        )

    def example_prompt(self, parsed: Any) -> str:
        asked: str = parsed[0]
        return asked
