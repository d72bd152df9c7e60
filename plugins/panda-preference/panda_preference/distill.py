"""The ``distill`` task: a model learns another one's probabilities of next tokens, on answers that rows give."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING
from typing import Annotated
from typing import Any
from typing import Literal

from panda import Location
from panda import Meta
from panda import UserError
from panda import register_task
from panda.registry.contexts import IGNORED_LABEL
from panda.registry.contexts import TaskContext
from panda.tasks.instruct import Instruct
from panda.tasks.instruct import InstructOptions
from panda.tasks.task import Better
from panda.tasks.task import Loss
from panda.tasks.task import Reference

if TYPE_CHECKING:
    import torch
    from panda.data.batches import TokenBatch


@dataclass(frozen=True)
class DistillOptions(InstructOptions):
    """Options of the distill task: those of instruct, and the teacher."""

    teacher_path: Annotated[str, Location(on_hub=True)] | None = None
    """The model to learn from, a location like ckpt_path's. Its tokens have to be those of the run's tokenizer."""
    loss_type: Literal["forward_kl", "reverse_kl"] = "forward_kl"
    """`forward_kl`: cover all that the teacher may say; `reverse_kl`: say nothing that it would not."""
    temperature: Annotated[float, Meta(gt=0)] = 1.0
    """What both models' logits are divided by."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.teacher_path is None:
            raise UserError("teacher_path: it is missing. Give the folder, or the name on the hub, of the teacher.")
        if self.label_smoothing:
            raise UserError(
                "label_smoothing: distillation has no labels to smooth, but the teacher's probabilities, which a"
                " `temperature` above 1 makes smoother. Leave it out."
            )


@register_task("distill", options=DistillOptions)
class Distill(Instruct):
    """A teacher's next tokens, with their probabilities, on the answers of instruct rows (arXiv 1503.02531)."""

    metrics: Mapping[str, Better] = {"agreement": "higher", "cross_entropy": "lower"}
    layouts = ("padded", "grouped", "packed")
    shown = ("agreement",)

    def __init__(self, options: DistillOptions, context: TaskContext) -> None:
        super().__init__(options, context)
        assert options.teacher_path is not None
        self.loss_type, self.temperature = options.loss_type, options.temperature

    @classmethod
    def reference_of(cls, options: DistillOptions) -> Reference | None:
        return Reference(options.teacher_path)

    def loss(self, model: Any, batch: TokenBatch, statistics: Mapping[str, torch.Tensor] = {}) -> Loss:
        import torch
        from panda.tasks.scores import logits_of

        from panda_preference import losses

        wanted = batch.labels[:, 1:] != IGNORED_LABEL
        student = self._known(logits_of(model, batch)[:, :-1][wanted])
        teacher = self._known(logits_of(self.reference, batch)[:, :-1][wanted])
        of_tokens = losses.divergence(student, teacher, self.loss_type, self.temperature)
        agree = (student.argmax(-1) == teacher.argmax(-1)).sum()
        labels = batch.labels[:, 1:][wanted]
        of_labels = torch.nn.functional.cross_entropy(student.detach(), labels, reduction="sum")
        tokens = wanted.sum()
        if batch.weights is not None:
            of_tokens = of_tokens * batch.weights[:, 1:][wanted]
        return Loss(of_tokens.sum(), {"agreement": (agree, tokens), "cross_entropy": (of_labels, tokens)})

    def _known(self, logits: torch.Tensor) -> torch.Tensor:
        """The logits of tokens that the tokenizer has, in float32: models may have more rows, and each more of them."""
        return logits[:, : self.vocabulary].float()
