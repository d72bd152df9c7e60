"""The ``instruct`` task: learn to answer. The prompt carries no loss; the answer and its end do."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

from panda.data.reading import Row
from panda.registry import register_task
from panda.registry.contexts import TaskContext
from panda.tasks.language_modelling import LanguageModelling

if TYPE_CHECKING:
    from panda.data.token_dataset import TokenDatasetBuilder


@dataclass(frozen=True)
class InstructOptions:
    """Options of the instruct task."""

    instruction_tuning_data_dir: str = "./dataset/instruction_tuning"
    """Folder, read recursively, or file of rows with "input" and "target"."""
    separator: str = "\n"
    """Text between input and target; the last of the prompt."""


@register_task("instruct", options=InstructOptions)
class Instruct(LanguageModelling):
    """Answers to instructions: rows of "input", which carries no loss, and "target", which does."""

    option = "instruction_tuning_data_dir"
    text_fields = ("input", "target")

    def __init__(self, options: InstructOptions, context: TaskContext) -> None:
        super().__init__(options.instruction_tuning_data_dir, context)
        self.separator = options.separator

    def check_row(self, row: Row) -> str | None:
        problem = super().check_row(row)
        if problem is None and not row.fields["target"]:
            return "field 'target' is empty"
        return problem

    def add_samples(self, rows: list[Row], builder: TokenDatasetBuilder) -> None:
        prompts = self.encode([self.prompt_text(row.fields["input"]) for row in rows])
        targets = self.encode([row.fields["target"] for row in rows])
        limit = self.context.max_seq_length
        for prompt, target in zip(prompts, targets, strict=True):
            answer = [*target, self.tokenizer.eos_token_id]
            # Prompt and target are tokenised apart, so the mask is exact. Where both are too long,
            # the prompt gives way first, from its beginning, and at least one token precedes the answer.
            room = limit - len(self.bos) - len(answer)
            kept = prompt[max(0, len(prompt) - max(0, room)) :]
            start = [*self.bos, *kept] or prompt[-1:] or answer[-1:]
            sample = [*start, *answer][:limit]
            builder.report.truncated += len(kept) < len(prompt) or len(start) + len(answer) > limit
            builder.add(sample, unsupervised=len(start))

    def prompt_text(self, prompt: str) -> str:
        return prompt + self.separator

    def chat_template(self) -> str:
        after_input = json.dumps(self.separator)
        return (
            "{{ bos_token }}"
            "{% for message in messages %}"
            "{% if message['role'] == 'assistant' %}{{ message['content'] + eos_token }}"
            f"{{% else %}}{{{{ message['content'] + {after_input} }}}}{{% endif %}}"
            "{% endfor %}"
        )

    def example_prompt(self, row: Row) -> str:
        return str(row.fields["input"])
