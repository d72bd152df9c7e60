"""``panda eval``: evaluates a model on data: loss, perplexity, token accuracy, and scores of its answers."""

from __future__ import annotations

import argparse
import json
import math
import shlex
import shutil
import sys
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
from contextlib import contextmanager
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING
from typing import Any

from panda.cli.answering import RUN_HELP
from panda.cli.answering import find_answering
from panda.cli.answering import note
from panda.cli.command import run_command
from panda.cli.parser import in_short
from panda.cli.run_folders import run_of
from panda.configuration.arguments import Arguments
from panda.configuration.arguments import arguments_of_run
from panda.configuration.arguments import parse_arguments
from panda.configuration.configure import Configuration
from panda.configuration.evaluation import OWN
from panda.configuration.evaluation import configure_evaluation
from panda.configuration.evaluation import holds_out
from panda.configuration.options import ALL_SETS
from panda.files.activity import activity
from panda.files.terminal import printable_line
from panda.files.whole import check_can_be_made
from panda.files.whole import write_whole
from panda.registry import UserError
from panda.registry.location import resolve_path
from panda.registry.options import Given
from panda.registry.options import Option

if TYPE_CHECKING:
    from panda.answers.loading import Answering
    from panda.answers.metric import Answer
    from panda.answers.scored import Scored
    from panda.data.token_dataset import SampleSet
    from panda.registry.resolve import Resolved
    from panda.run.evaluated import Measured
    from panda.run.questions import Question
    from panda.tasks.task import Task

USAGE = """\
usage: panda eval MODEL [--data PATH ...] [--KEY VALUE ...]
                  [-p no:eval_generate]
       panda eval MODEL --harness TASK,... [-- FLAGS OF LM_EVAL]

Evaluate a model: loss, perplexity and token accuracy over the supervised
tokens of data, and scores of the answers to some of its samples, beside the
answers in the data. MODEL is a run directory, an export, or any folder in
Hugging Face's format. Of a run, the newest checkpoint is evaluated, with the
run's own task, template and tokenizer.

  --data PATH ...          data to evaluate on; by default what the run was
                           evaluated on
  --eval_names NAME ...    a name for each path: paths of one name are a set,
                           with numbers of its own
  --task TASK              how data is read; by default that of the run, or
                           `instruct`
  --eval_generate_rows N   samples of each set that are answered;
                           `-p no:eval_generate` for none
  --eval_generate_tokens N most tokens of an answer
  --eval_metrics NAME ...  what answers are scored by: `panda list metrics`
  --config FILE            take the options of the task, such as
                           `input_field`, from this file
  --KEY VALUE              any option of the task, the reader or a metric
  --output FILE            also write the numbers, and the answers, to a JSON
                           file
  --json                   print that in place of the table
  --ckpt_path FOLDER       for adapters: where their base is now, if it has
                           been moved
  --base_path FOLDER       for a delta: the model that it is added to
  --allow_pickle           also read weights from pickles
  --harness TASK,...       evaluate by lm-evaluation-harness (`pip install
                           lm_eval`) on its tasks

example: panda eval runs/instruct-llama-tiny --data data/held-out.jsonl"""


def main(argv: list[str] | None = None) -> int:
    """Entry point of ``panda eval``."""
    return run_command(_eval, argv)


def _eval(argv: list[str]) -> None:
    argv, of_harness = (argv[: argv.index("--")], argv[argv.index("--") + 1 :]) if "--" in argv else (argv, [])
    if any(word in ("-h", "--help") for word in argv):
        print(USAGE)
        return
    if not argv:
        raise UserError(f"no model is given.\n{in_short(USAGE)}")
    if argv[0].startswith("-"):
        raise UserError(f"{argv[0]}: name the model first: `panda eval MODEL {argv[0]} ...`.\n{in_short(USAGE)}")
    location, arguments = argv[0], parse_arguments(argv[1:])
    own = {key: given for key, given in arguments.given.items() if key in OWN and given.origin.startswith("-")}
    for key in own:
        del arguments.given[key]  # those of a file are keys of a run, such as the base that it trained from
    if not _folder(location).is_dir():
        raise UserError(f"{location!r} is not a folder. Name {RUN_HELP}.")
    run_of(_folder(location))  # which refuses a later version's
    if "harness" in own:
        from panda.cli.harness import run_harness

        run_harness(location, own, arguments, of_harness)
        return
    if of_harness:
        raise UserError("--: flags after it are those of lm_eval, which `--harness TASK,...` runs.")
    from panda.engine.checkpoints.in_use import being_read

    output, as_json, _ = _output(own.get("output")), _switch(own, "json"), _switch(own, "allow_pickle")
    with redirect_stdout(sys.stderr):  # stdout is for the numbers
        with activity("loading torch"):
            configuration = _configured(location, arguments, own.get("data"))
        with being_read(_folder(location)) as checkpoint:
            found = _evaluated(location, checkpoint, configuration, own)
    text = json.dumps(_finite(found), indent=2, ensure_ascii=False, allow_nan=False)
    lines = map(printable_line, table(_columns(found), shutil.get_terminal_size().columns))
    print(text if as_json else "\n".join(lines), flush=True)  # before the file, which may find the disk full
    if output is not None:
        write_whole(output, text + "\n")


def _folder(location: str) -> Path:
    """The folder that ``location`` names, also by a file such as ``checkpoints/best``."""
    from panda.engine.checkpoints.folders import named_in

    return named_in(resolve_path(location))


def _output(given: Given | None) -> Path | None:
    if given is None:
        return None
    if not isinstance(given.value, str) or resolve_path(given.value).is_dir():
        raise UserError("--output: expected the path of a file, which is written.")
    path = resolve_path(given.value)
    if not path.absolute().parent.is_dir():
        raise UserError(f"--output: there is no folder {str(path.parent)!r} to write {path.name!r} to. Make it.")
    check_can_be_made(path, "--output")
    return path


def _configured(location: str, arguments: Arguments, data: Given | None) -> Configuration:
    from panda.run.first_look import look_for_inputs
    from panda.run.sources import with_lasting_sources

    flags = {key for key, given in arguments.given.items() if given.origin.startswith("-")}
    run = run_of(_folder(location))
    if run is not None and flags == {*arguments.given}:
        of_run = arguments_of_run(run, [])
        recorded = {key: given for key, given in of_run.recorded.items() if key not in flags}
        given = {**of_run.given, **arguments.given}
        arguments = replace(arguments, given=given, api=of_run.api, recorded=recorded)
    try:
        configuration = configure_evaluation(arguments, flags, data)
        with _telling_of_held_out(data is None and holds_out(arguments)):
            configuration = with_lasting_sources(configuration)
            look_for_inputs(configuration)
    except UserError as problem:
        raise UserError(str(problem).replace("eval_data_dir: ", "--data: ")) if data else problem from problem
    return configuration


@contextmanager
def _telling_of_held_out(is_part: bool) -> Iterator[None]:
    try:
        yield
    except UserError as problem:
        raise UserError(f"{problem} {_ELSE_NAME_DATA}" if is_part else str(problem)) from problem


_ELSE_NAME_DATA = (
    "The run held out a part of its own data (`eval_fraction`). To evaluate on other data, name it with `--data`."
)


def _evaluated(
    location: str, checkpoint: Path | None, configuration: Configuration, own: Mapping[str, Given]
) -> dict[str, Any]:
    """The numbers of all sets, and the answers. ``checkpoint``: what is held of it."""
    resolved = configuration.resolved
    places = {key: _text(own, key) for key in ("ckpt_path", "base_path")}
    with activity("loading the tokenizer"):
        answering = find_answering(
            argparse.Namespace(run=location, **places, allow_pickle=_switch(own, "allow_pickle"), p=[]), checkpoint
        )
    from panda.data.locations import each_of
    from panda.run.assembly import build_task
    from panda.run.assembly import evaluation_sets
    from panda.run.questions import answer_records
    from panda.run.sources import data_settings
    from panda.tasks.language_modelling import LanguageModelling

    task = build_task(resolved, answering.tokenizer)
    if not isinstance(task, LanguageModelling) or type(task).loss is not LanguageModelling.loss:
        again = shlex.join(["panda-train", "--resume", location, "--eval_data_dir"])
        raise UserError(
            f"task: the loss of {resolved.core.task!r} is not one of tokens, and its own numbers are in the run's"
            f" metrics.jsonl. `{again} DATA --output_dir NEW` gives those of other data: a run that has taken all its"
            " steps only evaluates. `--task instruct` evaluates the model on prompts and answers."
        )
    with activity("reading the data"):
        sets = _sets(resolved, task, location)
    for name, dataset in sets.items():
        cut = [dataset.report.cut(len(dataset), resolved.core.max_seq_length)] if dataset.report.truncated else []
        for line in [*cut, *dataset.report.lines()]:
            note(f"{name}: " * bool(name) + line)
    measured, questions, answers = _measured(answering, task, sets, configuration)
    found: dict[str, Any] = {"model": location, "task": resolved.core.task, "sets": {}}
    paths = evaluation_sets(resolved.core)
    scored = _scored(configuration, task, questions, answers)
    for name, each in measured.items():
        asked = sum(question.of == name for question in questions)
        scores = scored[name].scores if name and asked else {}
        found["sets"] |= {name: {"data": paths[name], **each.numbers(), "answers": asked, **scores}} if name else {}
    whole, every = _together(measured).numbers(), [path for each in paths.values() for path in each]
    every = every or [text for each in data_settings(resolved) for text in each_of(each.value)]
    found[ALL_SETS] = {"data": every, **whole, "answers": len(questions), **(scored[""].scores if scored else {})}
    found["answers"] = answer_records(questions, answers, scored[""].of_each if scored else [])
    return found


def _sets(resolved: Resolved, task: Task, location: str) -> dict[str, SampleSet]:
    """The samples to evaluate on, by the name of their set. Raises UserError where they are not those of the run."""
    from panda.data.selection import trained_and_held_out
    from panda.run.assembly import build_evaluation_tasks
    from panda.run.assembly import dataset_of
    from panda.run.description import read_provenance

    core, run = resolved.core, run_of(_folder(location))
    if not core.eval_fraction or run is None:
        return {name: dataset_of(resolved, each) for name, each in build_evaluation_tasks(resolved, task).items()}
    trained, held_out = trained_and_held_out(
        dataset_of(resolved, task), max_samples=core.max_samples, eval_fraction=core.eval_fraction, seed=core.seed
    )
    assert held_out is not None
    recorded, now = read_provenance(run), {"samples": len(trained), "tokens": trained.tokens}
    changed = [
        f"{key}: {recorded.get(key)} then, {value} now" for key, value in now.items() if recorded.get(key) != value
    ]
    if changed:  # other samples would be held out, of which the model has seen most
        raise UserError(
            f"eval_fraction: the data of {run}, or how it is read, has changed since ({'; '.join(changed)}), so what it"
            f" held out cannot be found. {_ELSE_NAME_DATA}"
        )
    return {"": held_out}


def _switch(own: Mapping[str, Given], key: str) -> bool:
    return key in own and bool(Option(key, bool, False, "").convert(own[key]))


def _text(own: Mapping[str, Given], key: str) -> str | None:
    if key not in own:
        return None
    if not isinstance(own[key].value, str):
        raise UserError(f"--{key}: expected a path.")
    return str(own[key].value)


def _measured(
    answering: Answering, task: Task, sets: Mapping[str, SampleSet], configuration: Configuration
) -> tuple[dict[str, Measured], list[Question], list[Answer]]:
    import numpy as np
    import torch

    from panda.answers.positions import held_positions
    from panda.run.evaluated import answered
    from panda.run.evaluated import measure
    from panda.run.questions import questions_of

    plugin = next((each.options for each in configuration.resolved.plugins), None)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with activity("reading the model"):
        assistant = answering.assistant(device)
    for line in assistant.notes:
        note(line)
    positions = held_positions(assistant.model)
    longest = max(int(dataset.lengths(np.arange(len(dataset))).max()) for dataset in sets.values())
    if positions is not None and longest > positions:
        raise UserError(
            f"max_seq_length: a sample has {longest:,} tokens, and the model has {positions:,} positions. Cut longer"
            f" samples with `--max_seq_length {positions}`."
        )
    with activity("evaluating", sum(map(len, sets.values())), unit="samples") as shown:
        options = configuration.options
        measured = {
            name: measure(assistant.model, task, dataset, options, device, shown) for name, dataset in sets.items()
        }
    if plugin is None:
        return measured, [], []
    most = plugin.eval_generate_tokens
    if positions is not None and positions <= most:
        raise UserError(f"eval_generate_tokens: the model has {positions:,} positions, which leaves no prompt any.")
    ends = assistant.decoding.ends
    found = questions_of(task, sets, plugin.eval_generate_rows, ends, positions and positions - most)
    for line in found.notes:
        note(f"eval_generate: {line}")
    if not found.asked:
        return measured, [], []
    with activity("answering", len(found.asked), unit="samples") as shown:
        return measured, found.asked, answered(assistant, task, found.asked, most, shown)


def _scored(
    configuration: Configuration, task: Task, questions: Sequence[Question], answers: Sequence[Answer]
) -> dict[str, Scored]:
    """The scores of each set that was asked; under an empty name, of all. None without questions."""
    if not questions:
        return {}
    from panda.run.questions import metrics_of
    from panda.run.questions import score_sets

    return score_sets(metrics_of(configuration.resolved, task), questions, answers)


def _together(measured: Mapping[str, Measured]) -> Measured:
    first, *others = measured.values()
    for each in others:
        first += each
    return first


# -- how it is shown ----------------------------------------------------------------------------


def _columns(found: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """By set, and by number, what the table says."""
    sets = {**found["sets"], ALL_SETS: found[ALL_SETS]} if len(found["sets"]) != 1 else found["sets"]
    return {
        name: {
            key: _shown(key, value)
            for key, value in numbers.items()
            if key != "data" and value is not None and (key, value) != ("answers", 0)  # none were asked for
        }
        for name, numbers in sets.items()
    }


def _shown(name: str, value: float) -> str:
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.3f}" if name == "perplexity" else f"{value:.4f}"


def table(columns: Mapping[str, Mapping[str, str]], width: int) -> list[str]:
    """Lines with a row for each number; sets that ``width`` characters have no room for follow below."""
    names = list(dict.fromkeys(key for numbers in columns.values() for key in numbers))
    labels = {name: name.replace("_", " ") if name in _SPELT else name for name in names}
    first = max(map(len, labels.values()))
    lines: list[str] = []
    left = list(columns)
    while left:
        shown: list[str] = []
        sizes: dict[str, int] = {}
        while left and (not shown or first + sum(sizes.values()) + 2 * len(sizes) + _wide(columns, left[0]) <= width):
            shown.append(left.pop(0))
            sizes[shown[-1]] = _wide(columns, shown[-1]) - 2
        lines += [""] if lines else []
        if len(columns) > 1:
            lines.append(" " * first + "".join(f"  {name:>{sizes[name]}}" for name in shown))
        for key in names:
            cells = "".join(f"  {columns[name].get(key, ''):>{sizes[name]}}" for name in shown)
            lines.append(f"{labels[key]:{first}}{cells}".rstrip())
    return lines


_SPELT = ("supervised_tokens", "token_accuracy")
"""Numbers whose names are words; scores of answers have those of their metrics."""


def _wide(columns: Mapping[str, Mapping[str, str]], name: str) -> int:
    return 2 + max(len(name), *map(len, columns[name].values()))


def _finite(value: Any) -> Any:
    """``value`` with null in place of NaN and infinity, which JSON lacks."""
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
