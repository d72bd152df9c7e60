"""The ``eval_generate`` plugin: answers to evaluation data, scored and kept."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING
from typing import Annotated
from typing import Any

from panda.files.activity import activity
from panda.files.activity import say
from panda.files.terminal import number_of
from panda.hooks.closing import Closing
from panda.hooks.record_file import RecordFile
from panda.hooks.record_file import read_records
from panda.registry import Meta
from panda.registry import Names
from panda.registry import UserError
from panda.registry import hookimpl
from panda.registry import register_plugin
from panda.registry.contexts import PluginContext

if TYPE_CHECKING:
    from panda.answers.metric import Answer
    from panda.answers.metric import Metric
    from panda.answers.scored import Scored
    from panda.registry.contexts import Better
    from panda.registry.resolve import Resolved
    from panda.run.questions import Question
    from panda.runner import Run
    from panda.tasks.task import Task

FILE_NAME = "eval_answers.jsonl"


def read_answers(directory: str | Path) -> list[dict[str, Any]]:
    """The answers of the run in ``directory`` to its evaluation data, in order; ``step`` 0 is before training.

    Each has ``step``, ``set`` (the name of the evaluation set; empty for the only one), ``sample`` (its number in the
    set), ``prompt``, ``answer``, ``reference`` (the answer in the data), ``ended`` (whether it ended by itself) and
    ``scores``, by the name of the metric.
    """
    return read_records(Path(directory) / FILE_NAME)


@dataclass(frozen=True)
class EvalGenerateOptions:
    """Options of the eval_generate plugin."""

    eval_generate_rows: Annotated[int, Meta(ge=1, le=10**6)] = 16
    """Samples of each evaluation set that are answered, spread evenly over it."""
    eval_generate_tokens: Annotated[int, Meta(ge=1, le=10**6)] = 128
    """Most tokens of an answer."""
    eval_metrics: Annotated[tuple[str, ...], Names("metric")] = ("exact_match", "rouge")
    """What answers are scored by, beside those in the data: names of metrics. See `panda list metrics`."""


@register_plugin("eval_generate", options=EvalGenerateOptions)
class EvalGenerate(Closing[RecordFile]):
    """Has evaluation samples answered at each evaluation, scored and kept. `--plugins eval_generate`.

    With the likeliest tokens, as `panda generate` answers. Scores are in the evaluation's record as `eval_exact_match`
    and so on, and answers in `eval_answers.jsonl`, with those before the first step.
    """

    def __init__(self, options: EvalGenerateOptions, context: PluginContext) -> None:
        self.options = options
        self.metrics: dict[str, Metric] = {}
        self.questions: list[Question] = []
        self.known: set[int] = set()
        """Steps of an earlier start whose answers are in the file."""
        self.higher_is_better: set[str] = set()
        """Names of scores of which a higher one is the better."""

    @hookimpl
    def panda_evaluation_metrics(self, resolved: Resolved, task: Task) -> dict[str, Better] | None:
        from panda.run.questions import metrics_of
        from panda.run.questions import stated_scores

        self.metrics = metrics_of(resolved, task)
        return stated_scores(self.metrics, dict.fromkeys(resolved.core.eval_names))

    @hookimpl
    def panda_run_start(self, run: Run) -> None:
        from panda.run.questions import metrics_of
        from panda.run.questions import questions_of
        from panda.run.questions import refuse_without_questions

        self.metrics = self.metrics or metrics_of(run.resolved, run.task)
        sets = {name: layout.dataset for name, layout in run.evaluations.items()}
        longest = self._longest_prompt(run)
        found = questions_of(run.task, sets, self.options.eval_generate_rows, run.decoding.ends, longest)
        refuse_without_questions(found, run.options.task)
        self.questions = found.asked
        if run.processes.rank == 0:
            for note in found.notes:
                say(f"note: eval_generate: {note}")
            # at step 0 nothing is continued: what is there is of a start that ended before its first checkpoint
            last = run.step if run.step > 0 else -1
            self.known = {record["step"] for record in read_answers(run.directory) if record["step"] <= last}
            self.opened = RecordFile(run.directory / FILE_NAME, last)
        if run.step == 0:
            self._answer(run)

    def _longest_prompt(self, run: Run) -> int | None:
        from panda.answers.positions import held_positions

        positions = held_positions(run.engine.evaluating())
        if positions is not None and positions <= self.options.eval_generate_tokens:
            raise UserError(
                f"eval_generate_tokens: the model has {positions:,} positions, and an answer of"
                f" {self.options.eval_generate_tokens:,} tokens leaves none for its prompt. Write a smaller number."
            )
        return positions and positions - self.options.eval_generate_tokens

    @hookimpl
    def panda_evaluation_start(self, run: Run) -> None:
        for name, value in self._answer(run).items():
            run.log(name, value, higher_is_better=name in self.higher_is_better)

    def _answer(self, run: Run) -> dict[str, float]:
        """Have the questions answered, write the answers down, and return the scores by the names of their entries."""
        from panda.run.questions import answer_records
        from panda.run.questions import higher_is_better
        from panda.run.questions import scores_of_sets
        from panda.run.records import refuse_entries

        begun, count = time.perf_counter(), len(self.questions)
        with activity(f"answering {number_of(count, 'evaluation sample')}"), run.using_evaluated_weights():
            answers = self._answers(run)
        found = run.processes.from_rank_0(partial(self._scored, answers))
        scores, of_each = scores_of_sets(found), found[""].of_each
        self.higher_is_better = higher_is_better(found)
        refuse_entries(scores, [name for name in run.evaluations if name], run.task.unit)
        if self.opened is not None and run.step not in self.known:
            for record in answer_records(self.questions, answers, of_each):
                self.opened.write({"step": run.step} | record)
        shown = "".join(f"  {name} {value:.4g}" for name, value in found[""].scores.items())
        say(
            f"{time.strftime('%H:%M:%S')}  step {run.step}/{run.plan.total_steps}  {number_of(count, 'answer')}{shown}"
            f"  {time.perf_counter() - begun:.1f} s"
        )
        return scores

    def _answers(self, run: Run) -> list[Answer]:
        """The answers to all questions, each of which one data-parallel rank has asked. A collective."""
        ours = range(run.processes.data_rank, len(self.questions), run.processes.data_ranks)
        made = run.generate(
            [self.questions[number].prompt for number in ours],
            keys=[(run.step, number) for number in ours],
            max_new_tokens=self.options.eval_generate_tokens,
            temperature=0.0,
            end_tokens=run.decoding.ends,
            processors=run.decoding.processors,
            criteria=run.decoding.criteria(run.task.tokenizer, timed=False),
        )
        found: dict[int, tuple[list[int], bool]] = {}
        for some in run.processes.from_all(dict(zip(ours, zip(made.token_ids, made.ended, strict=True), strict=True))):
            found |= some
        return [
            question.answered(run.task, ids, ended=ended, ends=run.decoding.ends)
            for question, (ids, ended) in ((each, found[number]) for number, each in enumerate(self.questions))
        ]

    def _scored(self, answers: list[Answer]) -> dict[str, Scored]:
        from panda.run.questions import score_sets

        return score_sets(self.metrics, self.questions, answers)
