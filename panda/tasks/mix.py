"""The ``mix`` task: instruct and pretrain data in one run, each as many times as its weight says."""

from __future__ import annotations

from dataclasses import dataclass
from dataclasses import fields
from typing import TYPE_CHECKING
from typing import Annotated
from typing import Any

from panda.registry import Location
from panda.registry import Meta
from panda.registry import UserError
from panda.registry import register_task
from panda.registry.contexts import TaskContext
from panda.tasks.dialogue_task import InstructFormat
from panda.tasks.instruct import Instruct
from panda.tasks.instruct import InstructLoss
from panda.tasks.instruct import InstructOptions
from panda.tasks.language_modelling import LanguageModelling
from panda.tasks.pretrain import Pretrain
from panda.tasks.pretrain import PretrainFormat
from panda.tasks.pretrain import PretrainOptions
from panda.tasks.row_task import check_weights
from panda.tasks.task import Task

if TYPE_CHECKING:
    from panda.data.locations import Locations
    from panda.data.token_dataset import Sample
    from panda.data.token_dataset import SampleSet


@dataclass(frozen=True)
class MixOptions(InstructFormat, PretrainFormat, InstructLoss):
    """Options of the mix task: those of instruct and of pretrain, and a weight for each."""

    instruction_tuning_data_dir: tuple[Annotated[str, Location(holds_data=True)], ...] | None = None
    """Folder, file, pattern or data set of instruct data, or a list; left out, the mix has only pretrain data."""
    pretraining_data_dir: tuple[Annotated[str, Location(holds_data=True)], ...] | None = None
    """Folder, file, pattern or data set of pretrain data, or a list; left out, the mix has only instruct data."""
    instruct_weight: tuple[Annotated[float, Meta(gt=0)], ...] = (1.0,)
    """Passes over the instruct data in an epoch: 2 shows each sample twice, 0.1 another tenth of them each epoch. One
    for all of it, or one for each path."""
    pretrain_weight: tuple[Annotated[float, Meta(gt=0)], ...] = (1.0,)
    """Passes over the pretrain data in an epoch, in the same way."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.instruction_tuning_data_dir is None and self.pretraining_data_dir is None:
            raise UserError("mix: give instruction_tuning_data_dir, pretraining_data_dir, or both.")
        for key, weights, locations in (
            ("instruct_weight", self.instruct_weight, self.instruction_tuning_data_dir),
            ("pretrain_weight", self.pretrain_weight, self.pretraining_data_dir),
        ):
            if len(weights) != 1 and locations is not None:
                check_weights(key, weights, locations)


@register_task("mix", options=MixOptions)
class Mix(LanguageModelling):
    """Instruct and pretrain data, shuffled together, each with its number of passes in an epoch."""

    def __init__(self, options: MixOptions, context: TaskContext) -> None:
        super().__init__(context)
        self.label_smoothing = options.label_smoothing
        self.tasks: list[tuple[str, Instruct | Pretrain, float]] = []
        if options.instruction_tuning_data_dir is not None:
            weight, weights = _weights(options.instruct_weight)
            instruct = Instruct(_part(InstructOptions, options, data_weights=weights), context)
            self.tasks.append(("instruct", instruct, weight))
        if options.pretraining_data_dir is not None:
            weight, weights = _weights(options.pretrain_weight)
            pretrain = Pretrain(_part(PretrainOptions, options, data_weights=weights), context)
            self.tasks.append(("pretrain", pretrain, weight))
        self.first = self.tasks[0][1]
        self.tokenizer = self.first.tokenizer

    def dataset(self) -> SampleSet:
        from panda.data.token_dataset import MixedDataset

        return MixedDataset(
            [
                (f"{name} {location}".strip(), dataset, weight * passes)
                for name, task, weight in self.tasks
                for location, dataset, passes in task.datasets()
            ]
        )

    def reading(self, locations: Locations, option: str) -> Task:
        return self.first.reading(locations, option)

    def question(self, sample: Sample) -> tuple[list[int], list[int]] | None:
        return self.first.question(sample)

    @property
    def end_tokens(self) -> list[int]:
        return self.first.end_tokens

    def text_format(self) -> str:
        return "; ".join(f"{name}: {task.text_format()}" for name, task, _ in self.tasks)

    def encode_prompt(self, prompt: str) -> list[int]:
        return self.first.encode_prompt(prompt)

    def example_prompts(self, count: int) -> list[str]:
        return self.first.example_prompts(count)


def _weights(weights: tuple[float, ...]) -> tuple[float, tuple[float, ...]]:
    """The weight of a part of the mix as a whole, and those of each of its paths, if they have some."""
    return (weights[0], ()) if len(weights) == 1 else (1.0, weights)


def _part(cls: type, options: MixOptions, **values: Any) -> Any:
    """The options of one part of the mix, with ``values`` for those that the mix does not have."""
    return cls(
        **{field.name: getattr(options, field.name) for field in fields(cls) if field.name not in values}, **values
    )
