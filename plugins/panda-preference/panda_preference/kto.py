"""The ``kto`` task: answers that are good or bad by themselves, not in pairs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from dataclasses import replace
from typing import TYPE_CHECKING
from typing import Annotated
from typing import Any

from panda import Meta
from panda import register_task
from panda.data.fields import Field
from panda.data.reading import Row
from panda.registry.contexts import TaskContext
from panda.tasks.task import Better
from panda.tasks.task import Loss
from panda.tasks.task import Reference
from panda.tasks.task import ShownPart

from panda_preference.answers import OF_LOG_PROBS
from panda_preference.answers import Parsed
from panda_preference.answers import PreferenceTask
from panda_preference.answers import ReferenceOptions
from panda_preference.answers import Written
from panda_preference.answers import noting
from panda_preference.answers import report_bad
from panda_preference.rows import labelled_of

if TYPE_CHECKING:
    import torch
    from panda.data.batches import RowShape
    from panda.data.batches import TokenBatch
    from panda.data.token_dataset import Sample
    from panda.data.token_dataset import SampleBlock

    from panda_preference.kto_batch import AnswersBatch


@dataclass(frozen=True)
class KtoOptions(ReferenceOptions):
    """Options of the kto task."""

    beta: Annotated[float, Meta(gt=0)] = 0.1
    """How strongly the model is held to the reference: the factor of rewards."""
    desirable_weight: Annotated[float, Meta(gt=0)] = 1.0
    """The weight of answers that are labelled good."""
    undesirable_weight: Annotated[float, Meta(gt=0)] = 1.0
    """The weight of the others. Where there are more of one kind, weigh them so that both count alike."""


@register_task("kto", options=KtoOptions)
class Kto(PreferenceTask):
    """Answers labelled good or bad (KTO, arXiv 2402.01306): rows of "prompt", "completion" and "label", or pairs."""

    metrics: Mapping[str, Better] = {
        "kl": None,
        "rewards/chosen": None,
        "rewards/rejected": None,
        "rewards/margins": "higher",
        **OF_LOG_PROBS,
    }
    unit = "answers"
    fields = (
        Field("answer", "tokens"),
        Field("answer_supervised", "supervised", along="answer"),
        Field("mismatched", "tokens"),
        Field("mismatched_supervised", "uint8", along="mismatched"),
        Field("desirable", "uint8"),
    )
    shown = ("rewards/margins", "kl")

    def __init__(self, options: KtoOptions, context: TaskContext) -> None:
        super().__init__(options, context)
        self.beta = options.beta
        self.answer_weights = options.desirable_weight, options.undesirable_weight

    @classmethod
    def reference_of(cls, options: KtoOptions) -> Reference | None:
        return Reference(options.reference_path)

    @classmethod
    def largest_sample(cls, options: KtoOptions, max_seq_length: int) -> tuple[int, int]:
        return 1, max_seq_length  # the mismatched answer is run before, without gradients

    # -- data ------------------------------------------------------------------------------------

    def parse(self, row: Row) -> Parsed:
        fields = noting(row)
        labelled = labelled_of(fields, self.names)
        return Parsed(
            row,
            tuple(self.text_of(each.answer, fields) for each in labelled),
            tuple(each.desirable for each in labelled),
        )

    def add_samples(self, parsed: list[Parsed], block: SampleBlock) -> None:
        """Add each answer, with that of the sample before it as its mismatched one.

        The divergence is estimated from answers to other prompts (section 4.1 of the paper). TRL takes them from the
        micro batch; a sample here has its own, so that the loss does not depend on how a step is split. Of pairs, as
        in TRL, all preferred answers come first, since the two of a pair have the same prompt. A block of one answer
        has only that.
        """
        texts = iter(self.write([text for each in parsed for text in each.answers]))
        firsts: list[tuple[Written, bool, int]] = []
        seconds: list[tuple[Written, bool, int]] = []
        for number, each in enumerate(parsed):
            written = [next(texts) for _ in each.answers]
            if any(isinstance(one, list) for one in written):
                written = list(self.pair(*written))
            if len(written) == 2 and written[0] == written[1]:
                report_bad(each, "both answers are the same tokens", block)
                continue
            for of, one, good in zip((firsts, seconds), written, each.values, strict=False):
                assert isinstance(one, Written)
                of.append((one, good, number))
        found = firsts + seconds
        for (written_one, good, number), (other, *_) in zip(found, [*found[-1:], *found[:-1]], strict=True):
            block.begin(number)
            ids = [*written_one.prompt, *other.token_ids[other.prompt_length :]]
            mismatched = Written(ids, bytes(written_one.prompt_length) + other.supervised[other.prompt_length :])
            [fitted] = self.fit((written_one,), block)
            counted = block.report.truncated
            [fitted_other] = self.fit((mismatched,), block)
            block.report.truncated = counted  # of what is learned, nothing is cut there
            block.add_arrays(
                answer=fitted.token_ids,
                answer_supervised=fitted.supervised,
                mismatched=fitted_other.token_ids,
                mismatched_supervised=fitted_other.supervised,
                desirable=[good],
            )

    def collate(self, rows: list[list[Sample]], shape: RowShape) -> AnswersBatch:
        """All answers, and beside them all mismatched ones; ``desirable`` [answers]: bool."""
        import torch

        from panda_preference.kto_batch import AnswersBatch

        samples = [sample for row in rows for sample in row]
        desirable = torch.tensor([bool(sample["desirable"][0]) for sample in samples])
        answers, mismatched = (
            self.batch(
                [[(sample[side], sample[f"{side}_supervised"])] for sample in samples],
                shape,
                len(samples),
                {"desirable": desirable},
            )
            for side in ("answer", "mismatched")
        )
        return AnswersBatch.of(answers, mismatched)

    def parts(self, sample: Sample) -> list[ShownPart]:
        answer, mismatched = super().parts(sample)
        label = "good" if sample["desirable"][0] else "bad"
        return [replace(answer, name=f"{answer.name}, labelled {label}"), mismatched]

    # -- loss ------------------------------------------------------------------------------------

    def statistics(self, model: Any, batch: AnswersBatch) -> Mapping[str, torch.Tensor]:
        """The sum of the log-ratios of mismatched answers, and the answers of each kind."""
        ratios = self._log_ratios(model, batch.mismatched)[0]
        desirable = batch["desirable"].sum()
        return {"kl": ratios.sum(), "good": desirable, "bad": len(ratios) - desirable}

    def loss(self, model: Any, batch: AnswersBatch, statistics: Mapping[str, torch.Tensor] = {}) -> Loss:
        import torch

        from panda_preference import losses

        good, bad = statistics["good"].float(), statistics["bad"].float()
        answers = good + bad
        kl = (statistics["kl"] / answers).clamp(min=0).float()
        ratios, log_probs = self._log_ratios(model, batch)
        desirable = batch["desirable"]
        of_answers = losses.kto(ratios, desirable, kl, self.beta, *self.answer_weights)
        rewards, log_probs = self.beta * ratios.detach(), log_probs.detach()
        metrics: dict[str, tuple[Any, Any]] = {"kl": (kl * len(ratios), len(ratios))}
        means = []
        for name, mine, all_of_step in (
            ("chosen", desirable, good),
            ("rejected", ~desirable, bad),
        ):
            metrics[f"rewards/{name}"] = ((rewards * mine).sum(), mine.sum())
            metrics[f"logps/{name}"] = ((log_probs * mine).sum(), mine.sum())
            means.append((rewards * mine).sum() / all_of_step.clamp(min=1))
        # A difference of two means is no mean: what is added up is this batch's part of each.
        both_kinds = torch.minimum(good, bad) > 0
        metrics["rewards/margins"] = ((means[0] - means[1]) * both_kinds, len(ratios) / answers * both_kinds)
        return Loss(of_answers.sum(), metrics)

    def _log_ratios(self, model: Any, batch: TokenBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probabilities of the answers less the reference's, and without it. Both [rows]."""
        from panda.tasks.scores import sequence_log_probs

        log_probs = sequence_log_probs(model, batch)
        return log_probs - sequence_log_probs(self.reference, batch), log_probs
