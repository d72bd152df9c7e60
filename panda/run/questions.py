"""Samples of evaluation data that a model is asked: their prompts, and the answers in the data."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import replace
from typing import Any

from panda.answers.metric import Answer
from panda.answers.metric import Metric
from panda.answers.metric import MetricContext
from panda.answers.scored import Scored
from panda.answers.scored import scored
from panda.answers.text import decoded
from panda.data.token_dataset import SampleSet
from panda.files.terminal import number_of
from panda.registry import UserError
from panda.registry.chosen import Chosen
from panda.registry.contexts import Better
from panda.registry.resolve import Resolved
from panda.tasks.task import Task


@dataclass(frozen=True)
class Question:
    """A sample that is asked."""

    of: str
    """The name of its evaluation set; empty for the only one."""
    sample: int
    """Its number in the set."""
    prompt: list[int]
    reference: list[int]
    """The answer in the data, without the token that ends it."""

    def answered(self, task: Task, ids: Sequence[int], *, ended: bool, ends: Sequence[int]) -> Answer:
        """The answer ``ids``, of which one of ``ends`` may be the last."""
        kept = [*ids[:-1]] if ids and ids[-1] in ends else [*ids]
        prompt = task.tokenizer.decode(self.prompt, clean_up_tokenization_spaces=False)
        return Answer(prompt, decoded(task.tokenizer, kept), decoded(task.tokenizer, self.reference), ended)


@dataclass(frozen=True)
class Questions:
    """The samples of all evaluation sets that are asked."""

    asked: list[Question]
    notes: list[str]
    """What a user should know of those that are not."""


def questions_of(
    task: Task, sets: Mapping[str, SampleSet], rows: int, ends: Sequence[int], longest: int | None
) -> Questions:
    """Of each of ``sets`` ``rows`` samples, or all where it has fewer, spread evenly over it.

    ``ends``: the tokens that end an answer. ``longest``: the most tokens of a prompt; None for no limit.
    """
    asked, notes = [], []
    for name, dataset in sets.items():
        chosen = min(rows, len(dataset))
        found = [*_questions(task, name, dataset, [number * len(dataset) // chosen for number in range(chosen)], ends)]
        short = [each for each in found if longest is None or len(each.prompt) <= longest]
        whose = f"{name}: " * bool(name)
        if len(found) < chosen:
            have = "has" if chosen - len(found) == 1 else "have"
            notes.append(
                f"{whose}{chosen - len(found):,} of {number_of(chosen, 'sample')} {have} no prompt with an answer"
            )
        if len(short) < len(found):
            notes.append(
                f"{whose}{len(found) - len(short):,} of {chosen:,} prompts have more than {longest:,} tokens, and leave"
                " an answer no positions of the model"
            )
        asked += short
    return Questions(asked, notes)


def _questions(
    task: Task, name: str, dataset: SampleSet, samples: Sequence[int], ends: Sequence[int]
) -> Iterator[Question]:
    for sample in samples:
        if (found := task.question(dataset[sample])) is not None:
            prompt, answer = found
            end = next((place for place, token in enumerate(answer) if token in ends), len(answer))
            yield Question(name, sample, prompt, answer[:end])


def metrics_of(resolved: Resolved, task: Task) -> dict[str, Metric]:
    """The metrics that ``resolved`` names, built, by name."""
    context = MetricContext(task.tokenizer)
    return {each.name: _built(each, context) for each in resolved.named if each.component.kind == "metric"}


def _built(chosen: Chosen, context: MetricContext) -> Metric:
    """The metric that was ``chosen``: an error in it names its package."""
    metric: Metric = chosen.build(context, Metric)

    def score(answers: Sequence[Answer]) -> Mapping[str, float | Sequence[float]]:
        with chosen.attributed("the score"):
            return metric.score(answers)

    return replace(metric, score=score)


def stated_scores(metrics: Mapping[str, Metric], sets: Iterable[str]) -> dict[str, Better] | None:
    """The names that ``scores_of_sets`` will give, each with which value is the better one; None where they are not
    known. ``sets``: the names of the evaluation sets, or none."""
    found: dict[str, Better] = {}
    for metric in metrics.values():
        if metric.names is None:
            return None
        found |= dict.fromkeys(metric.names, "higher" if metric.higher_is_better else "lower")
    return found | {f"{of}_{name}": better for of in sets for name, better in found.items()}


def answer_records(
    questions: Sequence[Question], answers: Sequence[Answer], of_each: Sequence[Mapping[str, float]]
) -> list[dict[str, Any]]:
    """A record of each answer, with its scores, as files have them."""
    return [
        {
            **{"set": question.of, "sample": question.sample, "prompt": answer.prompt, "answer": answer.text},
            **{"reference": answer.reference, "ended": answer.ended, "scores": dict(scores)},
        }
        for question, answer, scores in zip(questions, answers, of_each, strict=True)
    ]


def score_sets(
    metrics: Mapping[str, Metric], questions: Sequence[Question], answers: Sequence[Answer]
) -> dict[str, Scored]:
    """What ``metrics`` give ``answers`` to ``questions``, by the name of the set; under an empty name, of all."""
    found = {"": scored(metrics, answers)}
    for name in dict.fromkeys(question.of for question in questions):
        if name:
            some = [answer for question, answer in zip(questions, answers, strict=True) if question.of == name]
            found[name] = scored(metrics, some)
    return found


def scores_of_sets(found: Mapping[str, Scored]) -> dict[str, float]:
    """The scores in ``found``, which ``score_sets`` gave, by the names of their entries.

    Raises UserError where two would have one name.
    """
    entries: dict[str, float] = {}
    for name, given in found.items():
        for metric, value in given.scores.items():
            entry = f"{name}_{metric}" if name else metric
            if entry in entries:
                raise UserError(
                    f"eval_names: {name!r}: the score {metric!r} of this set would be called `eval_{entry}`, like"
                    " another score. Name the set otherwise."
                )
            entries[entry] = value
    return entries


def higher_is_better(found: Mapping[str, Scored]) -> set[str]:
    """Of the names that ``scores_of_sets`` gives ``found`` those of scores of which a higher one is the better."""
    return {
        f"{name}_{metric}" if name else metric for name, given in found.items() for metric in given.higher_is_better
    }


def refuse_without_questions(questions: Questions, task: str) -> None:
    """Raise UserError where there is nothing to ask."""
    if not questions.asked:
        said = f" ({'; '.join(questions.notes)})" if questions.notes else ""
        raise UserError(
            f"eval_generate: no evaluation sample has a prompt and an answer to compare with{said}. With `task: {task}`"
            " leave the plugin `eval_generate` out, or evaluate on data of prompts and answers."
        )
