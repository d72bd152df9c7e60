"""What the tasks share: rows of preference data as token ids, and of which of them the log-probability counts."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING
from typing import Annotated
from typing import Any

from panda import Location
from panda import Meta
from panda import UserError
from panda.data.fields import Field
from panda.data.reading import BadRow
from panda.data.reading import Fields
from panda.data.reading import Row
from panda.registry.contexts import TaskContext
from panda.tasks.dialogue_task import DialogueFormat
from panda.tasks.dialogue_task import DialogueTask
from panda.tasks.task import Better
from panda.tasks.task import ShownPart
from panda.tasks.text_task import UnusableRowError

from panda_preference.rows import Answer
from panda_preference.rows import FieldNames
from panda_preference.rows import Pair
from panda_preference.rows import pair_of

if TYPE_CHECKING:
    import torch
    from panda.data.batches import RowShape
    from panda.data.batches import TokenBatch
    from panda.data.templates import Exchange
    from panda.data.token_dataset import Sample
    from panda.data.token_dataset import SampleBlock


@dataclass(frozen=True)
class PreferenceOptions(DialogueFormat):
    """Where preference data is, and how it is written."""

    preference_data_dir: tuple[Annotated[str, Location(holds_data=True)], ...] = ("./dataset/preference",)
    """Folder, read recursively, file, pattern of files, or data set on the hub (`OWNER/NAME:CONFIGURATION:SPLIT`), or a
    list of these; rows have "chosen" and "rejected", as text or as messages, and perhaps "prompt"."""
    data_weights: tuple[Annotated[float, Meta(gt=0)], ...] = ()
    """Passes over the data of each path in an epoch, `1, 0.5`; by default one over all."""
    prompt_field: str | None = None
    """Field of the prompt; by default the common names (prompt, instruction and input, question, messages, ...), or
    what both answers begin with."""
    chosen_field: str | None = None
    """Field of the preferred answer, with rejected_field; by default the common names (chosen, ...)."""
    rejected_field: str | None = None
    """Field of the other answer, with chosen_field."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.chosen_field is None) != (self.rejected_field is None):
            raise UserError("chosen_field and rejected_field are given together, or neither is.")
        if self.data_weights and len(self.data_weights) != len(self.preference_data_dir):
            raise UserError(
                f"data_weights: {len(self.data_weights)} weights are given for {len(self.preference_data_dir)} paths."
                " Give each path its weight, in their order."
            )


@dataclass(frozen=True)
class ReferenceOptions(PreferenceOptions):
    """With a model that the trained one is compared with."""

    reference_path: Annotated[str, Location(on_hub=True)] | None = None
    """The reference model, a location like ckpt_path's; by default the weights that the run starts from."""


@dataclass(frozen=True)
class Written:
    """An answer and what is before it, as token ids."""

    token_ids: list[int]
    supervised: bytes
    """A byte a token: 1 where it is of the answer."""

    @property
    def prompt_length(self) -> int:
        """The tokens before the answer."""
        return self.supervised.index(1)

    @property
    def prompt(self) -> list[int]:
        return self.token_ids[: self.prompt_length]

    def cut(self, prompt_length: int, prompt: list[int], limit: int) -> Written:
        """With ``prompt`` in place of the ``prompt_length`` tokens before the answer, and at most ``limit`` tokens."""
        ids = [*prompt, *self.token_ids[prompt_length:]]
        supervised = bytes(len(prompt)) + self.supervised[prompt_length:]
        return Written(ids[:limit], supervised[:limit])


@dataclass(frozen=True)
class Parsed:
    """A row, understood: its place, and the texts of its answers."""

    row: Row
    answers: tuple[list[Exchange] | str, ...]
    values: tuple[Any, ...] = ()
    """What else the row says: a margin, labels."""


class PreferenceTask(DialogueTask):
    """Rows whose answers are compared, not copied."""

    option = "preference_data_dir"
    options: PreferenceOptions

    def __init__(self, options: PreferenceOptions, context: TaskContext) -> None:
        super().__init__(options, options.preference_data_dir, context, options.data_weights)
        self.options = options
        self.names = FieldNames(options.prompt_field, options.chosen_field, options.rejected_field)

    def describe(self) -> dict[str, Any]:
        return super().describe() | {"names": [self.names.prompt, self.names.chosen, self.names.rejected]}

    def example_prompt(self, parsed: Parsed) -> str:
        return ""  # a prompt of several turns is no prompt to type, and a run can name `prompts`

    def parts(self, sample: Sample) -> list[ShownPart]:
        names = (each.name for each in self.fields if each.kind == "tokens")
        return [
            ShownPart(name, sample[name].tolist(), [bool(each) for each in sample[f"{name}_supervised"]])
            for name in names
        ]

    # -- text ------------------------------------------------------------------------------------

    def text_of(self, answer: Answer, fields: Fields) -> list[Exchange] | str:
        """The text of ``answer`` as the template writes it. What the template does not use is noted in ``fields``.

        Raises UnusableRowError where the template refuses it, or writes it so that it is no one text.
        """
        if isinstance(answer.text, str):
            text: str = self.encoder.as_characters(answer.text)
            return text
        exchanges, unused = self.template.exchanges(answer.text)
        for name in unused:
            fields.leave(name)
        if weighed := next((exchange.weight for exchange in exchanges if exchange.weight != 1), None):
            raise UnusableRowError(f"the weight of its answer is {weighed:g}: only all or nothing of one is compared")
        done = ""
        for exchange in exchanges:
            if not exchange.before.startswith(done):
                raise UnusableRowError(
                    "its answer has several turns, and the chat template writes the earlier ones differently before a"
                    " later one"
                )
            done = exchange.before + exchange.answer
        return exchanges

    def write(self, texts: list[list[Exchange] | str]) -> list[Written | list[int]]:
        """Token ids of ``texts``. Of a text without template, which does not say where its answer is, only the ids."""
        plain = [text for text in texts if isinstance(text, str)]
        rendered = [
            part
            for text in texts
            if not isinstance(text, str)
            for exchange in text
            for part in (exchange.before, exchange.before + exchange.answer)
        ]
        plain_ids, ids = iter(self.encoder.encode(plain)), iter(self.template.encode(rendered))
        return [self._whole(next(plain_ids)) if isinstance(text, str) else self._joined(text, ids) for text in texts]

    def _whole(self, ids: list[int]) -> list[int]:
        return [*self.encoder.begin, *ids, self.tokenizer.eos_token_id]

    def _joined(self, exchanges: list[Exchange], ids: Iterator[list[int]]) -> Written:
        tokens: list[int] = []
        supervised = b""
        written = ""
        for exchange in exchanges:
            prompt, whole = next(ids), next(ids)
            if prompt[: len(tokens)] != tokens:  # the tokenizer merges an answer's end with what follows
                prompt = [*tokens, *self.encoder.continuation(written, exchange.before[len(written) :])]
                whole = []
            if not tokens and not prompt:
                prompt = [self.tokenizer.eos_token_id]
            if whole[: len(prompt)] == prompt:
                answer = whole[len(prompt) :]
            else:
                answer = self.encoder.continuation(exchange.before, exchange.answer)
            supervised += bytes(len(prompt) - len(tokens)) + b"\1" * len(answer)
            tokens = [*prompt, *answer]
            written = exchange.before + exchange.answer
        return Written(tokens, supervised)

    # -- samples ---------------------------------------------------------------------------------

    def pair(self, first: Written | list[int], second: Written | list[int]) -> tuple[Written, Written]:
        """Both answers of a row: of texts without template, the prompt is the tokens that both begin with."""
        if isinstance(first, Written) and isinstance(second, Written):
            return first, second
        assert isinstance(first, list) and isinstance(second, list)
        shared = next(
            (n for n, (one, other) in enumerate(zip(first, second, strict=False)) if one != other),
            min(len(first), len(second)) - 1,
        )
        begun = [] if shared else [self.tokenizer.eos_token_id]
        start = max(shared, len(begun))
        whole = ([*begun, *ids] for ids in (first, second))
        one, other = (Written(ids, bytes(start) + b"\1" * (len(ids) - start)) for ids in whole)
        return one, other

    def fit(self, written: tuple[Written, ...], block: SampleBlock) -> tuple[Written, ...]:
        """``written``, answers to one prompt, each with at most max_seq_length tokens; one that is cut is counted.

        The prompt is cut at its beginning, by as much for all of them, and then an answer at its end.
        """
        limit = self.context.max_seq_length
        over = max(len(each.token_ids) for each in written) - limit
        if over <= 0:
            return written
        block.report.truncated += 1
        fitted = []
        for each in written:
            prompt = each.prompt
            start = self.encoder.cut(prompt, max(0, len(prompt) - over)) or prompt[-1:]
            fitted.append(each.cut(len(prompt), start, limit))
        return tuple(fitted)

    def batch(
        self,
        rows: list[list[tuple[Any, Any]]],
        shape: RowShape,
        units: int,
        arrays: dict[str, torch.Tensor] | None = None,
    ) -> TokenBatch:
        from panda.data.batches import token_batch

        return token_batch(rows, self.pad_token_id, shape, units=units, arrays=arrays or {})


def report_bad(parsed: Parsed, problem: str, block: SampleBlock) -> None:
    """Report a row of which only its tokens say that it cannot be used."""
    block.report.add_bad(BadRow(parsed.row.file, parsed.row.number, problem))


def noting(row: Row) -> Fields:
    """The fields of ``row``, which note what is read of them."""
    return row.fields if isinstance(row.fields, Fields) else Fields(row.fields)


class PairTask(PreferenceTask):
    """Pairs of answers, the preferred one first. A sample has both, each after the prompt."""

    unit = "pairs"
    shown = ("rewards/accuracies", "rewards/margins")
    fields: tuple[Field, ...] = (
        Field("chosen", "tokens"),
        Field("chosen_supervised", "supervised", along="chosen"),
        Field("rejected", "tokens"),
        Field("rejected_supervised", "supervised", along="rejected"),
    )
    has_margin = False
    """Whether the field ``margin`` of a row is used."""

    @classmethod
    def largest_sample(cls, options: Any, max_seq_length: int) -> tuple[int, int]:
        return 2, max_seq_length

    def parse(self, row: Row) -> Parsed:
        fields = noting(row)
        pair: Pair = pair_of(fields, self.names, has_margin=self.has_margin)
        texts = tuple(self.text_of(answer, fields) for answer in (pair.chosen, pair.rejected))
        return Parsed(row, texts, (pair.margin or 0.0,))

    def add_samples(self, parsed: list[Parsed], block: SampleBlock) -> None:
        written = iter(self.write([text for each in parsed for text in each.answers]))
        for number, each in enumerate(parsed):
            block.begin(number)
            chosen, rejected = self.pair(next(written), next(written))
            if chosen.token_ids == rejected.token_ids:
                report_bad(each, "both answers are the same tokens", block)
                continue
            chosen, rejected = self.fit((chosen, rejected), block)
            if chosen.token_ids == rejected.token_ids:
                report_bad(each, "both answers are the same as far as max_seq_length lets them be", block)
                block.report.truncated -= 1
                continue
            self.add(chosen, rejected, each.values, block)

    def add(self, chosen: Written, rejected: Written, values: tuple[Any, ...], block: SampleBlock) -> None:
        """Add the sample of a pair to ``block``."""
        block.add_arrays(
            chosen=chosen.token_ids,
            chosen_supervised=chosen.supervised,
            rejected=rejected.token_ids,
            rejected_supervised=rejected.supervised,
        )

    def collate(self, rows: list[list[Sample]], shape: RowShape) -> TokenBatch:
        """All preferred answers, then all others."""
        pairs = [sample for row in rows for sample in row]
        sequences = [
            [(sample[side], sample[f"{side}_supervised"])] for side in ("chosen", "rejected") for sample in pairs
        ]
        return self.batch(sequences, shape, len(pairs))


OF_REWARDS: Mapping[str, Better] = {
    "rewards/chosen": None,
    "rewards/rejected": None,
    "rewards/margins": "higher",
    "rewards/accuracies": "higher",
}
"""What ``reward_metrics`` gives, and which value of each is the better one."""
OF_LOG_PROBS: Mapping[str, Better] = {"logps/chosen": None, "logps/rejected": None}
"""The same of ``log_prob_metrics``."""


def reward_metrics(chosen: torch.Tensor, rejected: torch.Tensor) -> dict[str, tuple[Any, Any]]:
    """The metrics of pairs of rewards [pairs], by the names that TRL has for them."""
    chosen, rejected = chosen.detach(), rejected.detach()
    return {
        "rewards/chosen": (chosen.sum(), len(chosen)),
        "rewards/rejected": (rejected.sum(), len(chosen)),
        "rewards/margins": ((chosen - rejected).sum(), len(chosen)),
        "rewards/accuracies": ((chosen > rejected).sum(), len(chosen)),
    }


def log_prob_metrics(chosen: torch.Tensor, rejected: torch.Tensor) -> dict[str, tuple[Any, Any]]:
    """The log-probabilities of pairs [pairs], by TRL's names."""
    return {
        "logps/chosen": (chosen.detach().sum(), len(chosen)),
        "logps/rejected": (rejected.detach().sum(), len(rejected)),
    }
