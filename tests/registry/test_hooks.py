from __future__ import annotations

import importlib
import pickle
from collections.abc import Callable
from copy import copy
from pathlib import Path
from typing import Any

import pytest
from distributions import Distributions

from panda.configuration.arguments import parse_arguments
from panda.configuration.configure import configure
from panda.data.reading import Reader
from panda.data.reading import Row
from panda.data.reading import rows_of
from panda.registry import Catalog
from panda.registry import Offer
from panda.registry import UserError
from panda.registry import hookimpl
from panda.registry.contexts import LRSchedulerContext
from panda.registry.contexts import ReaderContext
from panda.registry.errors import EndedBySignal
from panda.registry.hooks import Hooks
from panda.registry.hooks import caller

MODEL = """
@register_model("{name}")
def build(options, context):
    '''A model.'''
"""
ARCH = """
@register_arch("{name}-arch", model="{name}")
def arch():
    return {{}}
"""
HOOK = """
@hookimpl
def panda_step_end(run, step):
    return "{name}"
"""
OFFER = Offer("plugin", "watch", "acme.watch", "acme", "1.0")
OWN = Offer("plugin", "progress", "panda.hooks.progress", "panda-train", "0.1.0")
OF_WATCH = (
    "This came out of the hook {} of plugin 'watch': acme 1.0 (entry point panda.plugins: watch = acme.watch)."
    " `-p no:watch` runs without it."
)


def called(*argv: str) -> list[str]:
    """What the hooks return that are live in a run with these flags."""
    hooks = configure(parse_arguments(list(argv))).hooks
    returned: list[str] = hooks.call.panda_step_end(run=None, step=1)
    return returned


def notes(call: Callable[..., Any], *arguments: Any, **named: Any) -> list[str]:
    """The notes on what ``call`` raises."""
    with pytest.raises(Exception) as caught:
        call(*arguments, **named)
    return list(getattr(caught.value, "__notes__", ()))


# -- which are live ---------------------------------------------------------------------------


def test_hooks_are_live_only_in_runs_that_chose_their_module(distributions: Distributions) -> None:
    names = ("tiny", "large")
    distributions.install(
        "acme",
        {
            "models": {name: f"acme.{name}" for name in names},
            "archs": {f"{name}-arch": f"acme.{name}" for name in names},
            "plugins": {"watch": "acme.watch"},
        },
        {
            **{f"acme.{name}": (MODEL + ARCH + HOOK).format(name=name) for name in names},
            "acme.watch": HOOK.format(name="watch"),
        },
    )
    assert called("--arch", "tiny-arch") == ["tiny"], "and once, though the arch and the model share the module"
    assert called("--model", "large", "--plugins", "watch") == ["watch", "large"]
    assert called("--arch", "llama-tiny") == []


# -- what would never be called ---------------------------------------------------------------

MISTAKES = [
    (
        "@hookimpl\ndef panda_step_ned(run, step): ...",
        "'panda_step_ned' is no hook of panda's. Did you mean 'panda_step_end'",
    ),
    (
        "@hookimpl\ndef pnada_step_end(run, step): ...",
        "'pnada_step_end' is no hook of panda's. Did you mean 'panda_step_end'",
    ),
    (
        "def panda_step_ned(run, step): ...",
        "'panda_step_ned' is no hook of panda's, and not marked with @hookimpl. Did you mean 'panda_step_end'",
    ),
    ("@hookimpl\ndef panda_save_state(run): ...", "has panda_save_state and not panda_load_state"),
    (
        "@hookimpl\ndef panda_step_end(run, loss): ...",
        "takes 'loss', which it is not given: it may take any of run, step (",
    ),
    ("@hookimpl\ndef panda_step_end(run, step=0): ...", "has a default for 'step', so it would never be given it."),
    ("def panda_step_end(run, step): ...", "'panda_step_end' is not marked with @hookimpl"),
    ("@hookimpl\nasync def panda_step_end(run): ...", "'panda_step_end' is async"),
    ("@hookimpl\ndef panda_step_end(run):\n    yield", "'panda_step_end' has a `yield`"),
    ("@hookimpl(wrapper=True)\ndef panda_step_end(run): ...", "is not a generator function"),
]


@pytest.mark.parametrize(("hook", "problem"), MISTAKES)
@pytest.mark.parametrize("kind", ["model", "plugin"])
def test_a_hook_that_would_never_be_called_is_an_error(
    distributions: Distributions, hook: str, problem: str, kind: str
) -> None:
    source = f"from panda.registry import *\n{hook}\n" + ("" if kind == "plugin" else MODEL.format(name="tiny"))
    site = distributions.install("acme", {f"{kind}s": {"tiny": "acme.tiny"}}, {"acme.tiny": ""})
    (site / "acme" / "tiny.py").write_text(source)
    catalog, hooks = Catalog(), Hooks()
    offer = catalog.find(kind, "tiny")
    catalog.load(offer)
    for _ in range(2):  # the second time, too
        with pytest.raises(UserError) as caught:
            hooks.add(importlib.import_module("acme.tiny"), offer)
        assert str(caught.value).startswith("acme 1.0 (entry point panda.")
        assert problem in str(caught.value)
    assert hooks.call.panda_step_end(run=None, step=1) == []


def test_a_mistaken_hook_is_reported_before_a_run(distributions: Distributions) -> None:
    distributions.install("acme", {"plugins": {"watch": "acme.watch"}}, {"acme.watch": MISTAKES[0][0]})
    with pytest.raises(UserError, match="Did you mean 'panda_step_end'"):
        configure(parse_arguments(["--arch", "llama-tiny", "--plugins", "watch"]))


METHODS = """
@register_{kind}("tiny")
class Tiny:
    def __init__(self, options, context): ...

    @staticmethod
    def panda_home(): "is called as the author likes, and is like no hook"

    {hook}
"""


@pytest.mark.parametrize(("hook", "problem"), [pair for pair in MISTAKES if "save_state" not in pair[0]])
@pytest.mark.parametrize("kind", ["task", "model", "optimizer", "reader", "lr_scheduler", "plugin"])
def test_a_mistaken_hook_of_a_class_is_reported_before_a_run(
    distributions: Distributions, kind: str, hook: str, problem: str
) -> None:
    if "generator function" in problem:  # pluggy finds it where the object is added
        return
    method = hook.replace("\n", "\n    ").replace("(run", "(self, run")
    distributions.install(
        "acme", {f"{kind}s": {"tiny": "acme.tiny"}}, {"acme.tiny": METHODS.format(kind=kind, hook=method)}
    )
    names = [] if kind == "model" else ["--arch", "llama-tiny"]
    with pytest.raises(UserError) as caught:
        configure(parse_arguments([*names, "--plugins" if kind == "plugin" else f"--{kind}", "tiny"]))
    assert str(caught.value).startswith("acme 1.0 (entry point panda.")
    assert problem in str(caught.value)


@pytest.mark.parametrize("kind", ["task", "model", "optimizer", "reader", "lr_scheduler", "plugin"])
def test_a_factory_that_returns_nothing_is_an_error(distributions: Distributions, kind: str) -> None:
    source = f"""
        @register_{kind}("forgetful")
        def build(options, context):
            options
        """
    distributions.install("acme", {f"{kind}s": {"forgetful": "acme.forgetful"}}, {"acme.forgetful": source})
    names = [] if kind == "model" else ["--arch", "llama-tiny"]
    key = "--plugins" if kind == "plugin" else f"--{kind}"
    resolved = configure(parse_arguments([*names, key, "forgetful"])).resolved
    chosen = resolved.plugins[-1] if kind == "plugin" else resolved.components[kind]
    with pytest.raises(UserError, match=r"returned None, and not an? .*fault of acme 1\.0 .* = acme\.forgetful\)"):
        chosen.build(None, object)


@pytest.mark.parametrize(
    ("line", "raised", "said"),
    [
        ("import sys; sys.exit(143)", UserError, r"ended the process \(SystemExit: 143\).* fault of acme 1\.0"),
        ("from panda.registry.errors import EndedBySignal; raise EndedBySignal(143)", EndedBySignal, "^143$"),
    ],
)
def test_a_factory_is_at_fault_where_it_ends_the_process_and_not_where_a_signal_does(
    distributions: Distributions, line: str, raised: type[BaseException], said: str
) -> None:
    source = f"""
        @register_optimizer("ending")
        def build(options, context):
            {line}
        """
    distributions.install("acme", {"optimizers": {"ending": "acme.ending"}}, {"acme.ending": source})
    resolved = configure(parse_arguments(["--arch", "llama-tiny", "--optimizer", "ending"])).resolved
    with pytest.raises(raised, match=said):
        resolved.components["optimizer"].build(None, object)


def test_who_calls_a_hook_is_known_and_whether_it_acts() -> None:
    class Watching:
        acts = False

        @hookimpl
        def panda_step_end(self) -> Any:
            return caller()

    class Acting(Watching):
        acts = True

    hooks = Hooks()
    assert not hooks.acts("panda_step_end")
    hooks.add(Watching(), OWN)
    assert not hooks.acts("panda_step_end") and caller() is None
    hooks.add(Acting(), OFFER)
    assert hooks.acts("panda_step_end") and not hooks.acts("panda_step_start")
    labels = [(found.label, found.acts) for found in hooks.call.panda_step_end(run=None, step=1)]
    assert labels == [("plugin watch", True), ("plugin progress", False)]
    each = [(offer.name, call(run=None, step=1).label) for offer, call in hooks.by_plugin("panda_step_end")]
    assert each == [("progress", "plugin progress"), ("watch", "plugin watch")], "in order, and by itself"
    assert caller() is None


def test_an_object_of_a_plugin_factory_is_checked_like_a_module() -> None:
    class Misspelt:
        @hookimpl
        def panda_run_strat(self, run: Any) -> None: ...

    class Good:
        @property
        def panda_lazy(self) -> None:
            raise AssertionError("attributes are not evaluated")

        @hookimpl
        def panda_run_start(self, run: Any) -> str:
            return "method"

        @staticmethod
        @hookimpl
        def panda_step_end(step: int) -> int:
            return step

        @classmethod
        @hookimpl
        def panda_epoch_end(cls, epoch: int) -> str:
            return cls.__name__

    hooks = Hooks()
    with pytest.raises(
        UserError, match=r"= acme.watch\): 'panda_run_strat' is no hook of panda's. Did you mean 'panda_run_start'"
    ):
        hooks.add(Misspelt(), OFFER)
    hooks.add(Good(), OFFER)
    assert hooks.call.panda_run_start(run=None) == ["method"]
    assert hooks.call.panda_step_end(run=None, step=7) == [7]
    assert hooks.call.panda_epoch_end(run=None, epoch=1) == ["Good"]


# -- exceptions -------------------------------------------------------------------------------


def test_every_plugin_hears_of_an_exception_in_pluggys_order_whatever_one_of_them_does() -> None:
    heard: list[str] = []

    class Hearing:
        def __init__(self, name: str) -> None:
            self.name = name

        @hookimpl
        def panda_exception(self, error: BaseException) -> None:
            heard.append(f"{self.name}: {error}")

    class Failing:
        @hookimpl
        def panda_exception(self) -> None:
            raise RuntimeError("full")

    class Around:
        @hookimpl(wrapper=True)
        def panda_exception(self, run: object) -> Any:
            heard.append(f"around {run}")
            return (yield)

    hooks = Hooks()
    for plugin in (Hearing("first"), Failing(), Hearing("last"), Around()):
        hooks.add(plugin, OFFER)
    error = ValueError("boom")
    hooks.exception("run", error)
    assert heard == ["around run", "last: boom", "first: boom"]
    assert error.__notes__ == [
        f"then a panda_exception hook failed: RuntimeError('full') {OF_WATCH.format('panda_exception')}"
    ]


def test_an_exception_in_a_hook_names_whose_it_is() -> None:
    class Failing:
        @hookimpl
        def panda_step_end(self) -> None:
            raise RuntimeError("boom")

        @hookimpl(wrapper=True)
        def panda_log(self) -> Any:
            yield
            raise RuntimeError("boom")

        @hookimpl
        def panda_run_start(self) -> None:
            raise UserError("log in first")

        @hookimpl
        def panda_run_end(self) -> None:
            raise KeyboardInterrupt

    class Around:
        @hookimpl(wrapper=True)
        def panda_step_end(self) -> Any:
            return (yield)

    hooks = Hooks()
    hooks.add(Failing(), OFFER)
    hooks.add(Around(), OWN)
    assert notes(hooks.call.panda_step_end, run=None, step=1) == [OF_WATCH.format("panda_step_end")], "no other's"
    assert notes(hooks.call.panda_log, run=None, record={}) == [OF_WATCH.format("panda_log")]
    assert notes(hooks.call.panda_run_start, run=None) == [], "what the user can put right"
    with pytest.raises(KeyboardInterrupt) as caught:
        hooks.call.panda_run_end(run=None)
    assert not hasattr(caught.value, "__notes__"), "nobody's fault"

    own = Hooks()
    own.add(Failing(), OWN)
    assert notes(own.call.panda_step_end, run=None, step=1) == [
        "This came out of the hook panda_step_end of plugin 'progress', panda's own. `-p no:progress` runs without it."
    ]


FAILING = """
@register_lr_scheduler("steep")
def build(options, context):
    if context.total_steps < 1:
        raise RuntimeError("no steps")
    return lambda step: 1 / step

@register_reader("torn")
class Torn:
    suffixes = (".torn",)

    def __init__(self, options, context): ...

    def read(self, file):
        yield Row({}, file, 1)
        raise RuntimeError("torn")
"""


def of_acme(part: str, kind: str, name: str) -> str:
    return f"This came out of {part} of {kind} {name!r}: acme 1.0 (entry point panda.{kind}s: {name} = acme.failing)."


@pytest.fixture
def failing(distributions: Distributions) -> Any:
    """A run that chose a schedule and a reader of acme's, both of which fail."""
    distributions.install(
        "acme",
        {"lr_schedulers": {"steep": "acme.failing"}, "readers": {"torn": "acme.failing"}},
        {"acme.failing": "from panda.data.reading import Row\n" + FAILING},
    )
    flags = ("--arch", "llama-tiny", "--lr_scheduler", "steep", "--reader", "torn")
    return configure(parse_arguments(list(flags))).resolved


def test_an_exception_in_a_factory_names_whose_it_is(failing: Any) -> None:
    context = LRSchedulerContext(total_steps=0, learning_rate=1.0)
    assert notes(failing.components["lr_scheduler"].build, context, Callable) == [
        of_acme("the factory", "lr_scheduler", "steep")
    ]


def test_a_reader_may_be_a_class(distributions: Distributions) -> None:
    source = """
        class Plain:
            suffixes = (".plain",)

            @staticmethod
            def read(file):
                yield from ()

        @register_reader("plain")
        def plain(options, context):
            return Plain
        """
    distributions.install("acme", {"readers": {"plain": "acme.plain"}}, {"acme.plain": source})
    chosen = configure(parse_arguments(["--arch", "llama-tiny", "--reader", "plain"])).resolved.components["reader"]
    reader = chosen.build(ReaderContext(), Reader)
    assert list(rows_of(reader, Path("a.plain"))) == []


def test_an_exception_in_a_schedule_that_a_hook_calls_is_the_schedules(failing: Any) -> None:
    schedule = failing.components["lr_scheduler"].build(LRSchedulerContext(1, 1.0), Callable)
    assert schedule(2) == 0.5

    class Calling:
        @hookimpl
        def panda_step_end(self, step: int) -> None:
            schedule(step)

        @hookimpl
        def panda_epoch_end(self, epoch: int) -> None:
            schedule(epoch, epoch)

    hooks = Hooks()
    hooks.add(Calling(), OWN)
    assert notes(hooks.call.panda_step_end, run=None, step=0) == [of_acme("the schedule", "lr_scheduler", "steep")]
    [note] = notes(hooks.call.panda_epoch_end, run=None, epoch=1)
    assert "of plugin 'progress'" in note, "a wrong call is the caller's"


def test_an_exception_in_a_reader_names_whose_it_is_also_of_a_copy(failing: Any) -> None:
    reader = failing.components["reader"].build(ReaderContext(), object)
    assert type(reader).__name__ == "Torn"
    expected = [of_acme("`read`", "reader", "torn")]
    for each in (reader, copy(reader), pickle.loads(pickle.dumps(reader))):
        rows = rows_of(each, Path("a.torn"))
        assert next(rows) == Row({}, Path("a.torn"), 1)
        assert notes(next, rows) == expected
