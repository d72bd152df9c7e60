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
from panda.tasks.instruct import Instruct
from panda.tasks.instruct import InstructFormat
from panda.tasks.instruct import InstructOptions
from panda.tasks.language_modelling import LanguageModelling
from panda.tasks.pretrain import Pretrain
from panda.tasks.pretrain import PretrainFormat
from panda.tasks.pretrain import PretrainOptions

if TYPE_CHECKING:
    from panda.data.token_dataset import SampleSet


@dataclass(frozen=True)
class MixOptions(InstructFormat, PretrainFormat):
    """Options of the mix task: those of instruct and of pretrain, and a weight for each."""

    instruction_tuning_data_dir: Annotated[str, Location(holds_data=True)] | None = None
    """Folder or file of instruct data; left out, the mix has only pretrain data."""
    pretraining_data_dir: Annotated[str, Location(holds_data=True)] | None = None
    """Folder or file of pretrain data; left out, the mix has only instruct data."""
    instruct_weight: Annotated[float, Meta(gt=0)] = 1.0
    """Passes over the instruct data in an epoch: 2 shows each sample twice, 0.1 another tenth of them each epoch."""
    pretrain_weight: Annotated[float, Meta(gt=0)] = 1.0
    """Passes over the pretrain data in an epoch."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.instruction_tuning_data_dir is None and self.pretraining_data_dir is None:
            raise UserError("mix: give instruction_tuning_data_dir, pretraining_data_dir, or both.")


@register_task("mix", options=MixOptions)
class Mix(LanguageModelling):
    """Instruct and pretrain data, shuffled together, each with its number of passes in an epoch."""

    def __init__(self, options: MixOptions, context: TaskContext) -> None:
        super().__init__(context)
        self.parts: list[tuple[str, Instruct | Pretrain, float]] = []
        if options.instruction_tuning_data_dir is not None:
            instruct = Instruct(_part(InstructOptions, options), context)
            self.parts.append(("instruct", instruct, options.instruct_weight))
        if options.pretraining_data_dir is not None:
            pretrain = Pretrain(_part(PretrainOptions, options), context)
            self.parts.append(("pretrain", pretrain, options.pretrain_weight))
        self.first = self.parts[0][1]
        self.special_tokens_in_text = self.first.special_tokens_in_text

    def dataset(self) -> SampleSet:
        from panda.data.token_dataset import MixedDataset

        return MixedDataset([(name, task.dataset(), weight) for name, task, weight in self.parts])

    def reading(self, location: str, option: str) -> LanguageModelling:
        return self.first.reading(location, option)

    @property
    def last_token(self) -> int:
        return self.first.last_token

    def text_format(self) -> str:
        return "; ".join(f"{name}: {task.text_format()}" for name, task, _ in self.parts)

    def prompt_text(self, prompt: str) -> str:
        return self.first.prompt_text(prompt)

    def example_prompts(self, count: int) -> list[str]:
        return self.first.example_prompts(count)


def _part(cls: type, options: MixOptions) -> Any:
    """The options of one part of the mix."""
    return cls(**{field.name: getattr(options, field.name) for field in fields(cls)})
