"""What the data of a run, and its model, say now: counts and lengths, the loss of each token, answers."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING
from typing import Any
from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - the customary name

from panda.answers.assistant import Assistant
from panda.answers.assistant import Sampling
from panda.answers.loading import found_at
from panda.configuration.configure import Configuration
from panda.data.held_out import shared_samples
from panda.data.places import place_of
from panda.engine.deepspeed_config import layers_staying
from panda.engine.memory_parts import GIB
from panda.engine.memory_parts import NAMES
from panda.files.activity import activity
from panda.files.terminal import number_of
from panda.files.terminal import printable_line
from panda.hooks.lengths import counted
from panda.registry import UserError
from panda.report.recorded import recorded_answers
from panda.report.recorded import whose_answers
from panda.report.reported import Answer
from panda.report.reported import Data
from panda.report.reported import Missing
from panda.report.reported import Piece
from panda.report.reported import Reported
from panda.report.reported import ShownSample
from panda.report.reported import public
from panda.run.assembly import lay_out
from panda.run.directory import MODEL_FOLDER
from panda.run.preparation import Preparation
from panda.weights.finding import Source
from panda.weights.pretrained import Pretrained

if TYPE_CHECKING:
    from panda.data.token_dataset import SampleSet

Found = TypeVar("Found")

BARS = 40
SHOWN_TOKENS = 400
"""Most tokens of a sample that are shown; the mean loss is that of all."""
ANSWER_TOKENS = 64
"""Most of an answer, as at the end of a run."""
BEFORE = "before training"
_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"


class Gathering:
    """The parts of a page that need the data or the model of a run: where one fails, the others are there."""

    def __init__(self, run: Path, reported: Reported, samples: int, answers: int, checkpoint: Path | None) -> None:
        """``samples``: how many are shown; ``answers``: how many prompts are answered, by that ``checkpoint``."""
        self.run, self.reported, self.samples, self.answers = run, reported, samples, answers
        self.checkpoint = checkpoint

    def done(self, configure: Callable[[], Configuration], load: Callable[[], Assistant]) -> Reported:
        """All of the page. ``configure`` gives the configuration of the run, ``load`` its model, or raises."""
        name = self.reported.recorded.name
        configuration = self.part("its configuration", configure)
        prepared: Preparation | Missing = (
            configuration if isinstance(configuration, Missing) else self._prepared(configuration)
        )
        sequences: list[Shown] = []
        found: dict[str, Any] = {"data": prepared, "samples": prepared}
        if not isinstance(prepared, Missing):
            whole = prepared
            found["data"] = self.part("its data", lambda: data_of(whole, self.reported.provenance))
            memory = self.part("its memory", lambda: memory_of(whole, self.run, self.reported.provenance))
            found["memory"] = {} if isinstance(memory, Missing) else memory
            chosen = self.part("its samples", lambda: chosen_samples(whole, self.samples))
            if isinstance(chosen, Missing):
                found["samples"] = chosen
            else:
                found["samples"] = Missing("none were asked for, or the task shows none")
                sequences, found["which_samples"] = chosen
        with activity(f"asking the model of {name}"):
            said = _Asking(self, sequences, prepared, configuration).done(load)
        self.reported = replace(self.reported, **found | said)
        return self.reported

    def _prepared(self, configuration: Configuration) -> Preparation | Missing:
        def prepare() -> Preparation:
            prepared = Preparation(configuration)
            with activity(f"reading the data of {self.reported.recorded.name}"):
                _ = prepared.dataset, prepared.held_out
            return prepared

        return self.part("its data", prepare)

    def part(self, what: str, gather: Callable[[], Found]) -> Found | Missing:
        """What ``gather`` returns, or why it cannot, which is also printed to stderr."""
        try:
            return gather()
        except UserError as problem:
            why = str(problem)
        except Exception as problem:  # of a task or a model of a package, of files that are gone or damaged
            why = f"{type(problem).__name__}: {problem}"
        why = public(" ".join(why.split()))
        said = f"note: {self.reported.recorded.name}: {what} cannot be shown: {why}"
        print(printable_line(said), file=sys.stderr, flush=True)
        return Missing(why)


@dataclass(frozen=True)
class Asked:
    """What a model makes of samples and prompts."""

    losses: list[list[float]]
    """Of each sequence, those of its tokens."""
    answers: list[Answer]


class _Asking:
    """The losses of samples and the answers to prompts, of a run's model and of the one that it began with."""

    def __init__(
        self,
        gathering: Gathering,
        sequences: list[Shown],
        prepared: Preparation | Missing,
        configuration: Configuration | Missing,
    ) -> None:
        self.gathering, self.sequences = gathering, sequences
        self.prepared, self.configuration = prepared, configuration
        self.recorded = recorded_answers(gathering.run, gathering.answers)
        self.encoded: dict[str, list[int]] = {}
        self.tokenizer: Any = None

    def done(self, load: Callable[[], Assistant]) -> dict[str, Any]:
        """The parts of a page, by name."""
        part = self.gathering.part
        if not self.sequences and not self.gathering.answers:
            return {"answers": Missing("none were asked for")}
        after = part("its model", lambda: self._after(load()))
        if isinstance(after, Missing):
            before, said = None, ""
        else:
            before, said = self._before()
        groups = [asked.answers for asked in (before, after) if isinstance(asked, Asked)]
        answers = merged(*groups, self.recorded)
        nothing = after if isinstance(after, Missing) else Missing("none were asked for, or there are no prompts")
        found: dict[str, Any] = {
            "answers": answers or nothing,
            "which_answers": f"The likeliest answers, of at most {ANSWER_TOKENS} tokens. {said}",
        }
        return found | self._samples(after, before)

    def _samples(self, after: Asked | Missing, before: Asked | None) -> dict[str, Any]:
        if not self.sequences or isinstance(self.prepared, Missing):
            return {}
        tokenizer = self.tokenizer or self.prepared.task.tokenizer
        losses = [None] * len(self.sequences) if isinstance(after, Missing) else after.losses
        samples = [shown(tokenizer, each, found) for each, found in zip(self.sequences, losses, strict=True)]
        if before is not None:
            means = [mean_loss(each, found) for each, found in zip(self.sequences, before.losses, strict=True)]
            samples = [replace(each, before=mean) for each, mean in zip(samples, means, strict=True)]
        found: dict[str, Any] = {"samples": samples}
        if isinstance(after, Missing):
            found["no_losses"] = after.why
        return found

    def _after(self, assistant: Assistant) -> Asked:
        prompts = [answer.prompt for answer in self.recorded] or self._prompts()
        self.tokenizer = assistant.tokenizer
        self.encoded = {prompt: assistant.encode([{"role": "user", "content": prompt}]) for prompt in prompts}
        whose = whose_answers(self.gathering.run, self.gathering.checkpoint)
        return self._ask(assistant, {} if self.recorded else self.encoded, whose)

    def _prompts(self) -> list[str]:
        if isinstance(self.prepared, Missing):
            return []
        own = list(self.prepared.options.prompts) or self.prepared.task.example_prompts(self.gathering.answers)
        return own[: self.gathering.answers]

    def _before(self) -> tuple[Asked | None, str]:
        """What the model that training began with says, and what there is to say of it."""
        if isinstance(self.configuration, Missing):
            return None, ""
        begun_with = self.configuration.pretrained
        if begun_with is None:
            return None, "Training began with random weights: there is nothing to compare with."
        found = self.gathering.part("the model before training", lambda: self._ask_before(begun_with))
        if isinstance(found, Missing):
            return None, f"The model before training cannot be shown: {found.why}"
        return found, f"Before training: {public(begun_with.describe())}, given the same tokens."

    def _ask_before(self, begun_with: Pretrained) -> Asked:
        assert isinstance(self.configuration, Configuration)
        if begun_with.adapters:
            raise UserError("training began with adapters, and the two are not put together here.")
        options = self.configuration.options
        where = Source(str(begun_with.folder), "ckpt_path", options.base_path, options.allow_pickle)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        begun_with.fetch()
        module = found_at(where).load(device)
        # With the tokenizer and the ends of the run: what differs is the weights.
        assistant = Assistant(module, self.tokenizer, device, self.gathering.run / MODEL_FOLDER)
        rows = begun_with.vocabulary
        largest = max(max(ids, default=0) for ids in (*self.encoded.values(), *(one.ids for one in self.sequences), []))
        if rows is not None and largest >= rows:
            raise UserError("it has no rows for tokens that the run added.")
        return self._ask(assistant, self.encoded, BEFORE)

    def _ask(self, assistant: Assistant, encoded: Mapping[str, list[int]], whose: str) -> Asked:
        losses = [token_losses(assistant, each.ids) for each in self.sequences]
        return Asked(losses, [Answer(prompt, {whose: answered(assistant, ids)}) for prompt, ids in encoded.items()])


# -- data


def data_of(prepared: Preparation, recorded: Mapping[str, Any]) -> Data:
    """The data of the run ``prepared``, of which provenance.json says what it was when it was ``recorded``."""
    dataset, report, limit = prepared.dataset, prepared.dataset.report, prepared.options.max_seq_length
    share = dataset.supervised_tokens / max(1, dataset.tokens)
    counts = {
        "files": f"{report.files:,}",
        "rows": f"{report.rows:,}",
        "rows that cannot be used": f"{report.bad_rows:,}",
        "samples": f"{len(dataset):,}",
        "tokens": f"{dataset.tokens:,}",
        "supervised tokens, which carry loss": f"{dataset.supervised_tokens:,} ({share:.1%})",
    }
    for name, held in prepared.held_out.items():
        what = f"held out, to evaluate on{f', as {name}' * bool(name)}"
        counts[what] = f"{number_of(len(held), 'sample')}, {number_of(held.tokens, 'token')}"
    remarks = [f"{number_of(count, 'row')}: {reason}" for reason, count in report.reasons.most_common()]
    remarks += [*report.first_bad_lines(), *report.unused_lines(), *report.notes]
    before = {key: recorded.get(key) for key in ("samples", "tokens", "supervised_tokens")}
    now = {"samples": len(dataset), "tokens": dataset.tokens, "supervised_tokens": dataset.supervised_tokens}
    if changed := [key for key, value in before.items() if isinstance(value, int) and value != now[key]]:
        said = ", ".join(f"{before[key]:,} {key.replace('_', ' ')}" for key in changed)
        remarks.insert(0, f"The data has changed since the run, which had {said}.")
    if len(dataset.sources) > 1:
        remarks += [f"{source.name}: {number_of(source.samples, 'sample')}" for source in dataset.sources]
    lengths = counted(dataset.lengths(np.arange(len(dataset))), BARS)
    cut = report.cut(len(dataset), limit).removesuffix(" (max_seq_length)")
    return Data(counts, [public(line) for line in remarks], lengths, limit, cut)


def memory_of(prepared: Preparation, run: Path, recorded: Mapping[str, Any]) -> dict[str, float]:
    """The estimate of the memory of each GPU by part, in GiB; empty where there can be none, and for a CPU.

    With the layers that stayed gathered, by the deepspeed.json of ``run``.
    """
    ranks = recorded.get("ranks")
    if not isinstance(ranks, int) or not str(recorded.get("device", "")).startswith("cuda"):
        return {}
    model = prepared.estimates.model(prepared.resolved)
    if model is None:
        return {}
    given: dict[str, Any] = json.loads((run / "deepspeed.json").read_text())["zero_optimization"]
    live = given.get("stage3_max_live_parameters", 0) if prepared.options.zero == 3 else 0
    staying = min(model.layers, layers_staying(live, model.sizes.layer, model.sizes.outside))
    estimate = prepared.estimates.of(prepared.resolved, ranks, staying)
    return {NAMES[name]: size / GIB for name, size in estimate.parts.by_kind().items()} if estimate else {}


# -- samples


@dataclass(frozen=True)
class Shown:
    """A sequence of tokens of a sample."""

    name: str
    ids: list[int]
    supervised: list[bool]


def chosen_samples(prepared: Preparation, count: int) -> tuple[list[Shown], str]:
    """Of ``count`` samples the sequences that the task shows, and which samples these are, in words."""
    for name, held in prepared.held_out.items():
        shared = shared_samples(prepared.dataset, held)
        trained = f"of which {shared:,} of {len(held):,} are also in the training data" if shared else ""
        which = f"Held-out samples{f' of {name}' * bool(name)}, {trained or 'which the run did not train on'}."
        return _sequences(prepared, held, range(min(count, len(held)))), which
    dataset = prepared.dataset
    order = lay_out(prepared.options, dataset, 1).order
    numbers = [int(number) for number in order.samples(range(min(count, order.epoch_samples)))]
    return _sequences(prepared, dataset, numbers), "The first samples that the run trained on."


def _sequences(prepared: Preparation, dataset: SampleSet, numbers: Sequence[int]) -> list[Shown]:
    found = []
    for number in numbers:
        place = place_of(dataset, number)
        name = f"sample {number + 1:,}" + (f", {public(place)}" if place else "")
        for part in prepared.task.parts(dataset[number]):
            if len(part.token_ids):
                ids, supervised = ([*map(int, part.token_ids)], [*map(bool, part.supervised)])
                found.append(Shown(f"{name}: {part.name}" if part.name else name, ids, supervised))
    return found


@torch.no_grad()
def token_losses(assistant: Assistant, ids: Sequence[int]) -> list[float]:
    """The cross-entropy of each of ``ids`` after those before it, in nats; NaN for the first, and beyond the model's
    positions."""
    most = assistant.positions or len(ids)
    row = torch.tensor(ids[:most], device=assistant.device)
    losses: list[float] = []
    if len(row) > 1:
        output = assistant.model(row[None])
        logits = getattr(output, "logits", output)[0, :-1].float()
        losses = F.cross_entropy(logits, row[1:], reduction="none").tolist()
    return [math.nan, *losses, *[math.nan] * (len(ids) - 1 - len(losses))][: len(ids)]


def mean_loss(sequence: Shown, losses: Sequence[float]) -> float | None:
    """The mean of ``losses`` over the supervised tokens of ``sequence``; None without any."""
    known = [
        loss
        for loss, supervised in zip(losses, sequence.supervised, strict=True)
        if supervised and not math.isnan(loss)
    ]
    return sum(known) / len(known) if known else None


def shown(tokenizer: Any, sequence: Shown, losses: Sequence[float] | None) -> ShownSample:
    """``sequence`` as text, with the loss of each token where it is known."""
    ids = sequence.ids[:SHOWN_TOKENS]
    found = list(_pieces(tokenizer, ids, sequence.supervised, losses))
    mean = mean_loss(sequence, losses) if losses is not None else None
    return ShownSample(sequence.name, found, len(sequence.ids) - len(ids), mean)


def _pieces(
    tokenizer: Any, ids: list[int], supervised: Sequence[bool], losses: Sequence[float] | None
) -> Iterator[Piece]:
    """The text of each token; tokens that only together are characters, or make them certain, are one piece."""
    begun, written = 0, ""
    for end in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[:end], clean_up_tokenization_spaces=False)
        is_last = end == len(ids)
        changes = end < len(ids) and supervised[end] != supervised[begun]
        if not is_last and not changes and (text.endswith(_INCOMPLETE) or not text.startswith(written)):
            continue
        new = text[len(written) :] if text.startswith(written) else tokenizer.decode(ids[begun:end])
        loss = sum(losses[begun:end]) if losses is not None else math.nan
        yield Piece(new, end - begun, supervised[begun], None if math.isnan(loss) else loss)
        begun, written = end, text


# -- answers


def answered(assistant: Assistant, ids: Sequence[int]) -> str:
    """The likeliest answer to ``ids``, with what was cut of it after it."""
    notes: list[str] = []
    text = assistant.answer(list(ids), Sampling(ANSWER_TOKENS), lambda piece: None, notes.append).text
    return f"{text} …" if any("answer was cut" in note for note in notes) else text


def merged(*groups: Sequence[Answer]) -> list[Answer]:
    """The answers of ``groups`` to the same prompts, by prompt."""
    found: dict[str, Answer] = {}
    for answer in (answer for group in groups for answer in group):
        before = found.get(answer.prompt)
        found[answer.prompt] = (
            replace(before, answers={**before.answers, **answer.answers}) if before is not None else answer
        )
    return list(found.values())
