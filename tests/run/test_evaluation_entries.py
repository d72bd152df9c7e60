"""A name that no evaluation will have is refused before the data is read, whoever states the names."""

from __future__ import annotations

from typing import Any

import pytest
from distributions import Distributions

from panda.configuration.arguments import parse_arguments
from panda.configuration.configure import configure
from panda.registry import UserError
from panda.run.evaluation_entries import entries_of
from panda.run.preparation import Preparation
from panda.run.preparation import add_plugins
from panda.run.preparation import prepare

ACME = """

from panda.answers.metric import of_each, register_metric
from panda.tasks.instruct import Instruct, InstructOptions


class Scored(Instruct):
    def loss(self, model, batch): ...


@register_task("stated", options=InstructOptions)
class Stated(Scored):
    unit = "answers"
    metrics = {"accuracy": "higher", "rewards/kl": "lower", "length": None}
    shown = ("accuracy",)

    def loss(self, model, batch): ...


@register_task("unstated", options=InstructOptions)
class Unstated(Stated):
    '''A loss of its own.'''

    def loss(self, model, batch): ...


@register_task("shows", options=InstructOptions)
class Shows(Stated):
    shown = ("margin",)


@register_task("odd", options=InstructOptions)
class Odd(Stated):
    metrics = {"accuracy": "high"}


@register_task("taken", options=InstructOptions)
class Taken(Stated):
    metrics = {"accuracy": "higher", "learning_rate": None}


@register_task("hooked", options=InstructOptions)
class Hooked(Stated):
    @hookimpl
    def panda_evaluation_start(self, run): ...


@register_metric("stated-length")
def stated_length(options, context):
    return of_each(len, higher_is_better=False, names=("length2",))


@register_metric("unstated-length")
def unstated_length(options, context):
    return of_each(len)


@dataclass(frozen=True)
class WatcherOptions:
    '''Options of both.'''

    watched: Annotated[str, OfEvaluations()] | None = None
    '''A number of evaluations.'''


@register_plugin("adds", options=WatcherOptions)
class Adds:
    def __init__(self, options, context): ...

    @hookimpl
    def panda_evaluation_metrics(self, task): return {"added": "higher"}

    @hookimpl
    def panda_evaluation_start(self, run): ...


@register_plugin("names-a-set")
class NamesASet(Adds):
    @hookimpl
    def panda_evaluation_metrics(self): return {"chat_loss": None}


@register_plugin("states-oddly")
class StatesOddly(Adds):
    @hookimpl
    def panda_evaluation_metrics(self): return {"mine": "up"}


@register_plugin("states-a-list")
class StatesAList(Adds):
    @hookimpl
    def panda_evaluation_metrics(self): return ["mine"]


@register_plugin("adds-more")
class AddsMore:
    def __init__(self, options, context): ...

    @hookimpl
    def panda_evaluation_start(self, run): ...
"""
TASKS = ("stated", "unstated", "shows", "odd", "taken", "hooked")
METRICS = ("stated-length", "unstated-length")
PLUGINS = ("adds", "adds-more", "names-a-set", "states-oddly", "states-a-list")


@pytest.fixture
def entries(distributions: Distributions, monkeypatch: pytest.MonkeyPatch) -> Any:
    """``entries(*flags)``: what is known of the evaluations of a run whose data and model must not be read."""

    def slow(*_: Any, **__: Any) -> None:
        raise AssertionError("too late")

    for name in ("dataset_of", "build_outline", "build_with_weights"):
        monkeypatch.setattr(f"panda.run.preparation.{name}", slow)
    kinds = {"tasks": TASKS, "metrics": METRICS, "plugins": PLUGINS}
    names = {kind: dict.fromkeys(some, "acme_scores.all") for kind, some in kinds.items()}
    distributions.install("acme-scores", names, {"acme_scores.all": ACME})
    sample = "panda:data/sample/instruct"

    def found(*flags: str) -> Any:
        held_out = [sample, "panda:data/sample/pretrain"] if "--eval_names" in flags else [sample]
        argv = ["--instruction_tuning_data_dir", sample, "--eval_data_dir", *held_out, "--eval_steps", "1"]
        configuration = configure(parse_arguments([*argv, "--arch", "llama-tiny", *flags]))
        add_plugins(configuration)
        with pytest.raises(AssertionError, match="too late"):
            prepare(configuration, 1, evaluates=True)
        return entries_of(configuration.resolved, Preparation(configuration).task, configuration.hooks)

    return found


OF_LOSS = {"eval_loss": "lower", "eval_tokens": None, "eval_supervised_tokens": None, "eval_seconds": None}


def test_what_is_stated_is_known_with_the_names_of_sets(entries: Any) -> None:
    assert entries().better == OF_LOSS and entries().unstated == []
    flags = "--task stated --plugins eval_generate adds --eval_names chat code --eval_metrics stated-length rouge"
    found = entries(*flags.split())
    of_one = {"loss": "lower", "tokens": None, "answers": None, "accuracy": "higher", "rewards/kl": "lower"}
    of_one |= {"length": None, "length2": "lower", "rouge1": "higher", "rouge2": "higher", "rougeL": "higher"}
    prefixes = ("eval_", "eval_chat_", "eval_code_")
    expected = {f"{prefix}{name}": better for prefix in prefixes for name, better in of_one.items()}
    assert found.better == {**expected, "eval_seconds": None, "eval_added": "higher"} and found.unstated == []
    assert found.higher_is_better == {name for name, better in found.better.items() if better == "higher"}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            "--plugins best_checkpoint --best_metric eval_los",
            "best_metric: evaluations of this run have no 'eval_los'. Did you mean 'eval_loss'? They have:"
            " eval_loss, eval_tokens, eval_supervised_tokens, eval_seconds.",
        ),
        ("--plugins rate_on_plateau --plateau_metric eval_accuracy", "plateau_metric: evaluations of this run have no"),
        ("--task stated --plugins adds --watched accuracy", "no 'accuracy'. Did you mean 'eval_accuracy'?"),
        ("--task unstated --plugins adds --watched length", "no 'length'. They have: eval_loss,"),
        ("--plugins adds --watched eval_add", "Did you mean 'eval_added'?"),
        ("--eval_names chat code --plugins early_stopping --early_stopping_metric eval_chat_los", "'eval_chat_loss'"),
        ("--plugins eval_generate adds --watched eval_rougel", "Did you mean 'eval_rougeL' or 'eval_rouge2'"),
        (
            "--task shows",
            "task: Shows: `shown` names 'margin', which is none of its `metrics`: accuracy, rewards/kl, length.",
        ),
        ("--task taken", "task: a metric is called 'learning_rate', like another entry of a record."),
        ("--plugins states-oddly", "its panda_evaluation_metrics states: 'mine' is 'up'. Write one of"),
        ("--plugins states-a-list", "its panda_evaluation_metrics states are ['mine']. Write names, each with"),
        ("--task odd", "task: Odd: its `metrics`: 'accuracy' is 'high'. Write one of ('higher', 'lower', None)."),
    ],
)
def test_a_name_that_no_evaluation_will_have_is_refused(entries: Any, flags: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        entries(*flags.split())
    assert message in str(caught.value)


def test_names_of_sets_that_make_two_numbers_one_are_refused(entries: Any) -> None:
    with pytest.raises(UserError, match="eval_names: 'rewards/kl' cannot be part"):
        entries("--task", "stated", "--eval_names", "rewards/kl", "code")
    with pytest.raises(UserError, match="the metric `eval_chat_loss` has the name of another number"):
        entries("--plugins", "names-a-set", "--eval_names", "chat", "code")


@pytest.mark.parametrize(
    ("flags", "who"),
    [
        ("--task unstated", "acme-scores 1.0 (entry point panda.tasks: unstated = acme_scores.all)"),
        ("--task hooked", "acme-scores 1.0 (entry point panda.tasks: hooked = acme_scores.all)"),
        ("--plugins adds-more", "acme-scores 1.0 (entry point panda.plugins: adds-more = acme_scores.all)"),
        ("--plugins eval_generate --eval_metrics unstated-length", "panda-train"),
    ],
)
def test_where_something_states_no_names_the_first_evaluation_says_what_there_is(
    entries: Any, capsys: pytest.CaptureFixture[str], flags: str, who: str
) -> None:
    more = flags.split()
    place = more.index("--plugins") + 1 if "--plugins" in more else len(more)
    more[place:place] = ["best_checkpoint"] if "--plugins" in more else ["--plugins", "best_checkpoint"]
    entries(*more, "--best_metric", "eval_loss")
    assert "note: " not in capsys.readouterr().out
    entries(*more, "--best_metric", "eval_other")
    assert (
        "note: best_metric: whether evaluations have 'eval_other' is known at the first one, since their metrics are"
        f" not stated by {who}" in capsys.readouterr().out
    )
