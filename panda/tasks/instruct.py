"""The ``instruct`` task: learn to answer. The prompt carries no loss; the answer and its end do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING
from typing import Annotated
from typing import Any

from panda.data.conversations import conversation_of
from panda.data.reading import Row
from panda.data.templates import Exchange
from panda.data.tokenised import Tokenised
from panda.data.tokenised import tokenised_of
from panda.registry import Location
from panda.registry import Meta
from panda.registry import register_task
from panda.registry.contexts import TaskContext
from panda.tasks.dialogue_task import DialogueTask
from panda.tasks.dialogue_task import InstructFormat
from panda.tasks.language_modelling import NextTokenOptions
from panda.tasks.row_task import check_weights
from panda.tasks.text_task import TextTask

if TYPE_CHECKING:
    from panda.data.token_dataset import Sample
    from panda.data.token_dataset import SampleBlock


@dataclass(frozen=True)
class InstructLoss(NextTokenOptions):
    """Which tokens of a dialogue carry loss."""

    train_on_prompt: bool = False
    """Train on the prompts too: on every token of a dialogue, and not only on answers and their ends."""


@dataclass(frozen=True)
class InstructOptions(InstructFormat, InstructLoss):
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
class Instruct(DialogueTask, TextTask):
    """Answers to instructions, of one or several turns: prompts carry no loss, answers and their ends do."""

    option = "instruction_tuning_data_dir"

    def __init__(self, options: InstructOptions, context: TaskContext) -> None:
        super().__init__(options, options.instruction_tuning_data_dir, context, options.data_weights)
        self.options = options
        self.label_smoothing = options.label_smoothing

    def describe(self) -> dict[str, Any]:
        return super().describe() | ({"train_on_prompt": True} if self.options.train_on_prompt else {})

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
        written = iter(self.tokens_of([each for row in rows if isinstance(row, list) for each in row]))
        for name in (name for each in parsed if not isinstance(each, Tokenised) for name in each[2]):
            block.report.add_unused(name)
        whole: list[tuple[str, list[int]]] = []
        for number, row in enumerate(rows):
            block.begin(number)
            if isinstance(row, Tokenised):
                block.report.truncated += row.cut
                block.add(row.token_ids, row.supervised, row.weights)
                continue
            sample: list[tuple[list[int], list[int], float]] = []
            done: list[int] = []
            for exchange in row:
                prompt, answer = next(written)
                if prompt[: len(done)] != done:  # the template, or the tokenizer, writes earlier turns otherwise
                    self._add(sample, block)
                    sample, done = [], []
                sample.append((prompt[len(done) :], answer, exchange.weight))
                done = [*prompt, *answer]
            self._add(sample, block)
            whole.append((row[-1].before + row[-1].answer, done))
        block.report.altered += self.encoder.altered(*zip(*whole, strict=True)) if whole else 0

    def _add(self, exchanges: list[tuple[list[int], list[int], float]], block: SampleBlock) -> None:
        """Add a sample of prompts and answers in turn, each with the weight of the answer.

        Where it is too long, the last exchanges are left out. Where even the first one does not fit, its
        prompt is cut at the beginning, and then its answer at the end.
        """
        limit = self.context.max_seq_length
        *first, weight = exchanges[0]
        token_ids, supervised, cut = self.fitted(*first)
        weights = [weight] * len(token_ids)
        for prompt, answer, weight in exchanges[1:]:
            if cut or len(token_ids) + len(prompt) + len(answer) > limit:
                cut = True
                break
            token_ids += prompt + answer
            supervised += bytes(len(prompt)) + b"\1" * len(answer)
            weights += [weight] * (len(prompt) + len(answer))
        if self.options.train_on_prompt:
            supervised = b"\0" + b"\1" * (len(token_ids) - 1)
        block.report.truncated += cut
        block.add(token_ids, supervised, None if set(weights) == {1.0} else weights)

    def question(self, sample: Sample) -> tuple[list[int], list[int]] | None:
        """The last answer, and all that comes before it. Under ``train_on_prompt`` no sample says where that is."""
        supervised = sample["supervised"]
        ends = supervised.nonzero()[0]
        if self.options.train_on_prompt or not len(ends):
            return None
        end = int(ends[-1]) + 1
        before = (supervised[:end] == 0).nonzero()[0]
        start = int(before[-1]) + 1 if len(before) else 0
        if start < 2:  # a text, of which the first token carries no loss
            return None
        token_ids = sample["token_ids"].tolist()
        return token_ids[:start], token_ids[start:end]

    def example_prompt(self, parsed: Any) -> str:
        # The text of tokens has its template around it already, and a prompt is given one.
        asked: str = "" if isinstance(parsed, Tokenised) else parsed[0]
        return asked
