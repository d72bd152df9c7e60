"""The ``kto`` task: answers that are good or bad by themselves, not in pairs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING
from typing import Annotated
from typing import Any

from panda import Meta
from panda import register_task
from panda.data.reading import Row
from panda.registry.contexts import TaskContext
from panda.tasks.task import Loss
from panda.tasks.task import Reference

from panda_preference.answers import Parsed
from panda_preference.answers import PreferenceTask
from panda_preference.answers import ReferenceOptions
from panda_preference.answers import Written
from panda_preference.answers import bad
from panda_preference.answers import noting
from panda_preference.rows import labelled_of

if TYPE_CHECKING:
    import torch
    from panda.data.batches import RowShape
    from panda.data.batches import Sample
    from panda.data.batches import TokenBatch
    from panda.data.token_dataset import SampleBlock


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

    unit = "answers"
    shown = ("rewards/margins", "kl")

    def __init__(self, options: KtoOptions, context: TaskContext) -> None:
        super().__init__(options, context)
        self.beta = options.beta
        self.weights = options.desirable_weight, options.undesirable_weight

    @classmethod
    def reference_of(cls, options: KtoOptions) -> Reference | None:
        return Reference(options.reference_path)

    @classmethod
    def largest_sample(cls, options: KtoOptions, max_seq_length: int) -> tuple[int, int]:
        return 2, max_seq_length

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
        micro batch; a sample here has its own, so that the loss does not depend on how a step is split.
        """
        texts = iter(self.write([text for each in parsed for text in each.answers]))
        found: list[tuple[Written, bool]] = []
        for each in parsed:
            written = [next(texts) for _ in each.answers]
            if any(isinstance(one, list) for one in written):
                written = list(self.pair(*written))
            if len(written) == 2 and written[0] == written[1]:
                bad(each, "both answers are the same tokens", block)
                continue
            found += [(one, good) for one, good in zip(written, each.values, strict=True) if isinstance(one, Written)]
        for (written_one, good), (other, _) in zip(found, [*found[-1:], *found[:-1]], strict=True):
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

    def collate(self, rows: list[list[Sample]], shape: RowShape) -> TokenBatch:
        """All answers, then all mismatched ones; ``desirable`` [answers]: bool."""
        import torch

        samples = [sample for row in rows for sample in row]
        sequences = [
            [(sample[side], sample[f"{side}_supervised"])] for side in ("answer", "mismatched") for sample in samples
        ]
        desirable = torch.tensor([bool(sample["desirable"][0]) for sample in samples])
        return self.batch(sequences, shape, len(samples), {"desirable": desirable})

    # -- loss ------------------------------------------------------------------------------------

    def statistics(self, model: Any, batch: TokenBatch) -> Mapping[str, torch.Tensor]:
        """The sum of the log-ratios of mismatched answers, and the answers of each kind."""
        ratios = self._log_ratios(model, half(batch, 1))[0]
        desirable = batch["desirable"].sum()
        return {"kl": ratios.sum(), "good": desirable, "bad": len(ratios) - desirable}

    def loss(self, model: Any, batch: TokenBatch, statistics: Mapping[str, torch.Tensor] = {}) -> Loss:
        import torch

        from panda_preference import losses

        answers = statistics["good"] + statistics["bad"]
        kl = (statistics["kl"] / answers).clamp(min=0)
        ratios, log_probs = self._log_ratios(model, half(batch, 0))
        desirable = batch["desirable"]
        of_answers = losses.kto(ratios, desirable, kl, self.beta, *self.weights)
        rewards, log_probs = self.beta * ratios.detach(), log_probs.detach()
        metrics: dict[str, tuple[Any, Any]] = {"kl": (kl * len(ratios), len(ratios))}
        means = []
        for name, mine, all_of_step in (
            ("chosen", desirable, statistics["good"]),
            ("rejected", ~desirable, statistics["bad"]),
        ):
            metrics[f"rewards/{name}"] = ((rewards * mine).sum(), mine.sum())
            metrics[f"logps/{name}"] = ((log_probs * mine).sum(), mine.sum())
            means.append((rewards * mine).sum() / all_of_step.clamp(min=1))
        # A difference of two means is no mean: what is added up is this batch's part of each.
        both_kinds = torch.minimum(statistics["good"], statistics["bad"]) > 0
        metrics["rewards/margins"] = ((means[0] - means[1]) * both_kinds, len(ratios) / answers * both_kinds)
        return Loss(of_answers.sum(), metrics)

    def _log_ratios(self, model: Any, batch: TokenBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probabilities of the answers less the reference's, and without it. Both [rows]."""
        import torch
        from panda.tasks.scores import sequence_log_probs

        log_probs = sequence_log_probs(model, batch)
        with torch.no_grad():
            reference = sequence_log_probs(self.reference, batch)
        return log_probs - reference, log_probs


def half(batch: TokenBatch, which: int) -> TokenBatch:
    """The first or the second half of the rows of ``batch``."""
    raise NotImplementedError
