"""The configuration of `panda eval`: task, reader and metrics, of a run or of flags, over data to evaluate on."""

from __future__ import annotations

from collections.abc import Collection
from collections.abc import Mapping
from dataclasses import replace

from panda.configuration.arguments import Arguments
from panda.configuration.arguments import texts_of
from panda.configuration.configure import Configuration
from panda.configuration.options import RunOptions
from panda.configuration.spellings import RENAMED
from panda.configuration.user_code import catalog_of
from panda.configuration.user_code import refuse_unrepeated
from panda.registry import Catalog
from panda.registry import UserError
from panda.registry.choosing import BLOCK
from panda.registry.choosing import load_component
from panda.registry.errors import did_you_mean
from panda.registry.hooks import Hooks
from panda.registry.offers import OWN_DISTRIBUTION
from panda.registry.options import Given
from panda.registry.options import Option
from panda.registry.options import options_of
from panda.registry.resolve import resolve
from panda.registry.settings import CORE

PLUGIN = "eval_generate"
"""The plugin whose options say how many samples are answered, and how answers are scored."""
OF_THE_RUN = (
    *("task", "reader", "user_dir", "max_seq_length", "max_row_bytes", "token_cache", "per_gpu_eval_batch_size"),
    *("eval_data_dir", "eval_names"),
)
"""Keys of every run that are taken from the configuration of a run."""
TAKEN = (*OF_THE_RUN, "num_workers", "prefetch_factor")
"""Keys of every run that a flag can give."""
OWN = ("data", "output", "json", "harness", "ckpt_path", "base_path", "allow_pickle")
"""Flags of `panda eval` itself, which are no keys of its configuration."""
OF_A_FRACTION = ("eval_fraction", "max_samples", "seed")
"""Keys of every run that say which samples of its data are held out."""
WEIGHTS = ("data_weights", "instruct_weight", "pretrain_weight")
"""Options of panda's tasks with a value for each path of their own data, which is not read."""


def configure_evaluation(arguments: Arguments, flags: Collection[str], data: Given | None) -> Configuration:
    """The configuration of an evaluation on ``data``; without it, on the evaluation data that ``arguments`` name.

    Where these are of a run that held out a fraction of its data, ``eval_fraction`` and its data are kept.
    ``arguments``: flags over the configuration of a run, or over nothing; ``flags``: the keys that flags give. The
    model among the components stands for none. Raises UserError for flags without effect.
    """
    _refuse_without_effect({key: arguments.given[key] for key in flags})
    core = {key: given for key, given in arguments.given.items() if _name(key) in TAKEN or key in flags}
    answers = PLUGIN not in [name.rpartition(":")[2] for name in arguments.blocked]
    executed = {*core, "eval_metrics"} if answers else {*core}  # loaded below, before all keys that are taken are known
    recorded = {key: given for key, given in arguments.recorded.items() if key in executed}
    catalog = catalog_of(replace(arguments, given=core, recorded=recorded))
    task = _options(catalog, "task", core.get("task"), RunOptions.task)
    wanted = {*OF_THE_RUN, *task, *_options(catalog, "reader", core.get("reader"), RunOptions.reader)}
    if answers:
        plugin, metrics = _options(catalog, "plugin", None, PLUGIN), arguments.given.get("eval_metrics")
        wanted |= {*plugin}
        for name in texts_of(metrics) if metrics else plugin["eval_metrics"].default:
            wanted |= {*_options(catalog, "metric", metrics and replace(metrics, value=name), name)}
    _refuse_misspelt({key: arguments.given[key] for key in flags}, wanted)
    of_data = {key for key, option in task.items() if option.location and option.location.holds_data}
    is_part = data is None and holds_out(arguments)
    wanted = wanted | {*OF_A_FRACTION} if is_part else wanted - of_data - {*WEIGHTS}
    given = {key: value for key, value in arguments.given.items() if _name(key) in wanted or key in flags}
    recorded = {key: each for key, each in arguments.recorded.items() if key in given}
    refuse_unrepeated(replace(arguments, given=given, recorded=recorded))
    if data is not None:
        given = {key: value for key, value in given.items() if key != "eval_names" or key in flags}
        given["eval_data_dir"] = data
    held_out = given.get("eval_data_dir")
    if not is_part:
        if held_out is None or held_out.value is None:
            raise UserError("--data: name the data to evaluate on, a file, a folder or a data set.")
        given |= {key: _as(task[key], held_out) for key in of_data}
    given.setdefault("num_workers", Given(0, "", "0"))
    given["arch"] = Given("llama-tiny", "", "llama-tiny")  # any: the model that is evaluated is loaded by itself
    resolved = resolve(catalog, RunOptions, given, default_plugins=(PLUGIN,), renamed=RENAMED)
    return Configuration(resolved, Hooks(), None)


def holds_out(arguments: Arguments) -> bool:
    """Whether ``arguments`` are of a run that held out a fraction of its data, and no other is named to evaluate on."""
    fraction, named = arguments.recorded.get("eval_fraction"), arguments.given.get("eval_data_dir")
    has_other = named is not None and named.value is not None
    return bool(fraction and options_of(RunOptions)["eval_fraction"].convert(fraction)) and not has_other


def _options(catalog: Catalog, kind: str, given: Given | None, default: str) -> dict[str, Option]:
    """The options of the component of ``kind`` that ``given`` names, by default panda's own ``default``."""
    if given is None:
        offer = catalog.find(kind, f"{OWN_DISTRIBUTION}:{default}")
    else:
        offer = catalog.find(kind, str(given.value), given.origin)
    return dict(options_of(load_component(catalog, offer).options))


def _refuse_without_effect(flags: Mapping[str, Given]) -> None:
    core = options_of(RunOptions)
    for key, given in flags.items():
        if key == "plugins" and all(text.startswith(BLOCK) for text in texts_of(given)):
            continue
        if _name(key) in core and key.rpartition(".")[0] in ("", CORE) and _name(key) not in TAKEN:
            raise UserError(
                f"{given.origin}: `panda eval` has no use for this key. It takes {', '.join(TAKEN)}, the options of the"
                f" task, of the reader, of `{PLUGIN}` and of metrics."
            )


def _refuse_misspelt(flags: Mapping[str, Given], wanted: Collection[str]) -> None:
    """Raise UserError where a flag is near to one of the command itself; other unknown ones are those of a run."""
    known = {*wanted, *TAKEN, *OWN, "plugins"}
    for key, given in flags.items():
        hint = "" if _name(key) in known else did_you_mean(key, sorted(known))
        if any(repr(name) in hint for name in OWN):
            raise UserError(f"{given.origin}: unknown key {key!r}.{hint}")


def _as(option: Option, data: Given) -> Given:
    """``data`` as a value of ``option``: its first path, where that takes one."""
    return data if option.is_list or not isinstance(data.value, tuple) else replace(data, value=data.value[0])


def _name(key: str) -> str:
    return key.rpartition(".")[2]
