"""The numbers that records of evaluations will have, as far as they are known before the data of a run is read."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Mapping
from dataclasses import dataclass
from dataclasses import field

from panda.files.activity import say
from panda.files.terminal import printable_line
from panda.registry import UserError
from panda.registry.chosen import Chosen
from panda.registry.contexts import Better
from panda.registry.errors import did_you_mean
from panda.registry.hooks import Hooks
from panda.registry.hooks import implements
from panda.registry.options import options_of
from panda.registry.resolve import Resolved
from panda.run.assembly import evaluation_sets
from panda.tasks.task import Task
from panda.tasks.task import checked_metrics
from panda.tasks.task import stated_metrics

STARTS = "eval_"
"""How the name of each begins."""


@dataclass
class Entries:
    """What is known of the numbers of evaluations."""

    better: dict[str, Better] = field(default_factory=dict)
    """By name, which value is the better one."""
    unstated: list[str] = field(default_factory=list)
    """Who adds numbers and does not state them."""

    @property
    def higher_is_better(self) -> set[str]:
        """The names of those of which a higher value is the better one."""
        return {name for name, better in self.better.items() if better == "higher"}

    def add(self, found: Mapping[str, Better], prefix: str = "") -> None:
        """Add what is ``found``, with ``prefix`` before the names. Raises UserError where one is there already."""
        for name, better in found.items():
            if (entry := f"{STARTS}{prefix}{name}") in self.better:
                where = f"eval_names: {prefix[:-1]!r}: its" if prefix else "evaluations: the metric"
                raise UserError(
                    f"{where} `{entry}` has the name of another number of evaluations. Name the"
                    f" {'set' if prefix else 'metric'} otherwise."
                )
            self.better[entry] = better


def entries_of(resolved: Resolved, task: Task, hooks: Hooks) -> Entries:
    """Those of the run that ``resolved`` describes, of which ``hooks`` has the plugins."""
    found = Entries()
    sets = [name for name in evaluation_sets(resolved.core) if name]
    of_task = stated_metrics(task)
    if of_task is None:
        found.unstated.append(resolved.components["task"].offer.describe())
    found.add({"loss": "lower", "tokens": None, task.unit: None, "seconds": None, **(of_task or {})})
    for name in sets:
        found.add({"loss": "lower", "tokens": None, task.unit: None, **(of_task or {})}, f"{name}_")
    stated = dict(hooks.by_plugin("panda_evaluation_metrics"))
    for offer, _ in hooks.by_plugin("panda_evaluation_start"):
        added = stated[offer](resolved=resolved, task=task) if offer in stated else None
        if added is None:
            found.unstated.append(offer.describe())
        else:
            found.add(
                checked_metrics(added, f"{offer.describe()}: the metrics that its panda_evaluation_metrics states")
            )
    found.unstated += [
        chosen.offer.describe()
        for chosen in resolved.chosen
        if chosen.component.kind != "plugin"
        and any(implements(each, "panda_evaluation_start") for each in (chosen.component.factory, *chosen.built))
    ]
    return found


def refuse_unknown(resolved: Resolved, entries: Entries) -> None:
    """Raise UserError where an option names a number that no evaluation of the run will have.

    Where that is not known yet, it is printed.
    """
    problems = []
    for chosen, option in _naming(resolved):
        name = getattr(chosen.options, option)
        if name in (None, *entries.better):
            continue
        key = resolved.key_of(chosen, option)
        origin = resolved.settings[key].origin
        at = f"{origin}: {key}" if ":" in origin else key
        if entries.unstated and name.startswith(STARTS):
            say(
                printable_line(
                    f"note: {at}: whether evaluations have {name!r} is known at the first one, since their metrics are"
                    f" not stated by {' or '.join(dict.fromkeys(entries.unstated))}"
                )
            )
            continue
        listed = ", ".join(entries.better) + ", and others" * bool(entries.unstated)
        # By what differs: all begin alike.
        short = {each.removeprefix(STARTS): None for each in entries.better}
        hint = did_you_mean(name.removeprefix(STARTS), short).replace(" '", f" '{STARTS}")
        problems.append(f"{at}: evaluations of this run have no {name!r}.{hint} They have: {listed}.")
    if problems:
        raise UserError("\n".join(problems))


def _naming(resolved: Resolved) -> Iterator[tuple[Chosen, str]]:
    """The options that name a number of evaluations, each with whose it is."""
    for chosen in resolved.chosen:
        for key, option in options_of(chosen.component.options).items():
            if option.is_of_evaluations:
                yield chosen, key
