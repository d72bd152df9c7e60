from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from distributions import Distributions

from panda.configuration.arguments import parse_arguments
from panda.configuration.configure import configure
from panda.configuration.options import DEFAULT_PLUGINS
from panda.configuration.options import RunOptions
from panda.registry import Catalog
from panda.registry import UserError
from panda.registry.api import checked_api
from panda.registry.flat_yaml import load_flat_yaml
from panda.registry.options import Given
from panda.registry.resolve import Resolved
from panda.registry.resolve import resolve
from panda.run.description import config_text
from panda.run.description import write_description

ACME = """
@dataclass(frozen=True)
class TinyOptions:
    width: Annotated[int, Meta(ge=1)] = 8
    depth: int = 2
    share: float = 0.5

@register_model("tiny", options=TinyOptions)
def build(options, context): ...

@register_arch("tiny-wide", model="tiny")
def tiny_wide():
    return {"width": 64, "depth": 3}

@register_arch("tiny-unknown", model="tiny")
def tiny_unknown():
    return {"widht": 64}

@register_arch("tiny-bad", model="tiny")
def tiny_bad():
    return {"width": 0}

@register_arch("tiny-list", model="tiny")
def tiny_list():
    return [("width", 64)]

@register_arch("own-llama", model="panda-train:llama")
def own_llama():
    return {"num_layers": 2}
"""
READING = """
@dataclass(frozen=True)
class Options:
    files: tuple[Annotated[str, Location()], ...] = ()
    word: str = ""
    unset: Annotated[str, Location()] = ""
    remote: Annotated[str, Location()] = "s3://bucket/words"
    checkpoint: Annotated[str | None, Location(on_hub=True)] = None

@register_optimizer("reading", options=Options)
def build(options, context): ...
"""
NOT_TOGETHER = """
@dataclass(frozen=True)
class Options:
    low: int = 1
    high: int = 2

    def __post_init__(self):
        if self.low > self.high:
            raise UserError("low must not be above high")

@register_optimizer("between", options=Options)
def build(options, context):
    return "no optimizer"
"""
ARCHS = ("tiny-wide", "tiny-unknown", "tiny-bad", "tiny-list", "own-llama")

OPTIMIZER = """
@dataclass(frozen=True)
class Options:
    share: float = 0.25
    must: {must}

@register_optimizer("sharing", options=Options)
def build(options, context): ...
"""

DATA = ("--instruction_tuning_data_dir", "/data")


def resolved(*argv: str) -> Resolved:
    return configure(parse_arguments(list(argv))).resolved


def refused(*argv: str) -> str:
    with pytest.raises(UserError) as caught:
        resolved(*argv)
    return str(caught.value)


def yaml(tmp_path: Path, text: str) -> str:
    file = tmp_path / "run.yaml"
    file.write_text(text)
    return str(file)


@pytest.fixture
def acme(distributions: Distributions) -> Distributions:
    distributions.install(
        "acme-panda", {"models": {"tiny": "acme.tiny"}, "archs": dict.fromkeys(ARCHS, "acme.tiny")}, {"acme.tiny": ACME}
    )
    return distributions


# -- precedence -------------------------------------------------------------------------------


def test_each_level_wins_over_the_one_before_and_is_kept_as_origin(acme: Distributions, tmp_path: Path) -> None:
    file = yaml(tmp_path, "arch: tiny-wide\ndepth: 5\nseed: 7\nlearning_rate: 1e-4\n")
    run = resolved("--config", file, "--learning-rate", "2e-4")
    origins = {key: (setting.value, setting.origin) for key, setting in run.settings.items()}
    assert origins["share"] == (0.5, "default")
    assert origins["width"] == (64, "arch tiny-wide")
    assert origins["depth"] == (5, f"{file}:2")
    assert origins["seed"] == (7, f"{file}:3")
    assert origins["learning_rate"] == (2e-4, "--learning-rate")
    assert origins["weight_decay"] == (0.0, "default")
    assert resolved("--arch", "tiny-wide", "--width", "9").components["model"].options.width == 9
    assert run.core.learning_rate == 2e-4 and run.core.seed == 7
    options = run.components["model"].options
    assert (options.width, options.depth, options.share) == (64, 5, 0.5)


def test_a_setting_knows_its_owner() -> None:
    settings = resolved("--arch", "llama-tiny").settings
    assert settings["seed"].owner == "run"
    assert settings["adam_epsilon"].owner == "optimizer adamw"
    assert settings["num_layers"].owner == "model llama"
    assert settings["warmup_steps"].owner == "lr_scheduler warmup"


def test_values_that_are_changed_later_are_changed_everywhere(acme: Distributions) -> None:
    acme.install("bolt", {"optimizers": {"sharing": "bolt.o"}}, {"bolt.o": OPTIMIZER.format(must="int = 0")})
    run = resolved("--arch", "tiny-wide", "--optimizer", "sharing", "--max_steps", "3")
    model, optimizer = run.components["model"], run.components["optimizer"]
    assert (run.key_of(model, "width"), run.key_of(optimizer, "share")) == ("width", "optimizer.share")
    changed = run.with_values({"seed": 9, "width": 5, "optimizer.share": 0.125}, "a checkpoint")
    assert (changed.core.seed, changed.core.max_steps) == (9, 3)
    assert (changed.components["model"].options.width, changed.components["model"].options.depth) == (5, 3)
    assert changed.components["optimizer"].options.share == 0.125
    assert changed.components["model"].options.share == 0.5, "the same option of another component"
    origins = {key: (each.value, each.origin) for key, each in changed.settings.items() if each != run.settings[key]}
    assert origins == {
        key: (value, "a checkpoint") for key, value in (("seed", 9), ("width", 5), ("optimizer.share", 0.125))
    }
    assert run.core.seed != 9 and model.options.width == 64, "the first is as it was"


@pytest.mark.parametrize(
    ("arch", "message"),
    [
        ("tiny-unknown", "sets 'widht', which model 'tiny' lacks. Did you mean 'width'"),
        ("tiny-bad", "width: 0 is not an integer >= 1"),
        ("tiny-list", "not a mapping of options of 'tiny'"),
    ],
)
def test_an_arch_that_sets_what_its_model_cannot_take_is_an_error_with_its_place(
    acme: Distributions, arch: str, message: str
) -> None:
    text = refused("--arch", arch)
    assert text.startswith(f"arch {arch!r} at {acme.folder}") and "acme/tiny.py:" in text
    assert message in text


# -- arch and model ---------------------------------------------------------------------------


def test_model_takes_the_name_of_an_arch_as_the_document_writes_it() -> None:
    for argv in (["--model", "llama-7b"], ["--arch", "llama-7b"], ["--model", "LLaMA-7B", "--arch", "llama-7b"]):
        run = resolved(*argv)
        assert run.components["arch"].component.name == "llama-7b"
        assert run.components["model"].component.name == "llama"
        assert run.components["model"].options.hidden_size == 4096


def test_a_model_can_be_run_without_an_arch_or_with_one_of_its_own() -> None:
    assert "arch" not in resolved("--model", "llama").components
    assert resolved("--model", "llama", "--arch", "llama-13b").components["model"].options.num_layers == 40


def test_two_archs_and_an_arch_of_another_model_are_refused(acme: Distributions) -> None:
    message = refused("--model", "llama-7b", "--arch", "llama-13b")
    assert "--model: model 'llama-7b' is an arch, and arch 'llama-13b' (--arch) another. Give one of them." in message
    message = refused("--model", "llama", "--arch", "tiny-wide")
    assert "arch 'tiny-wide' belongs to model 'tiny', not to 'llama'" in message


def test_an_arch_of_a_package_can_belong_to_a_model_of_panda(acme: Distributions) -> None:
    for argv in (["--arch", "own-llama"], ["--arch", "own-llama", "--model", "llama"]):
        run = resolved(*argv)
        assert run.components["model"].offer.distribution == "panda-train"
        assert run.components["model"].options.num_layers == 2


def test_an_arch_means_the_model_of_its_own_distribution(acme: Distributions) -> None:
    acme.install("bolt", {"models": {"tiny": "bolt.tiny"}}, {"bolt.tiny": ACME})
    assert resolved("--arch", "tiny-wide").components["model"].offer.distribution == "acme-panda"
    assert acme.imported() == {"acme.tiny"}


def test_a_run_without_a_model_is_told_what_there_is() -> None:
    message = refused()
    assert message.startswith(
        "no model: name one with `arch` (or `--arch`), a checkpoint with `ckpt_path`, or a file that does with"
    )
    assert "RUN/config.yaml. Installed: " in message and "llama-1.3b, llama-125m," in message
    assert message.count("llama-7b") == 1


def test_without_a_model_only_what_is_unknown_is_said_to_be() -> None:
    message = refused("--seed", "3", "--learning_rat", "1e-3")
    assert "unknown key 'learning_rat'. Did you mean 'learning_rate'?" in message
    assert "seed" not in message


def test_an_unknown_model_is_told_archs_and_models() -> None:
    message = refused("--model", "lama")
    assert message.startswith("--model: unknown model or arch 'lama'. Did you mean 'llama'")


def test_a_blocked_arch_under_model_is_said_to_be_blocked(acme: Distributions) -> None:
    for name in ("tiny-wide", "tiny"):
        message = refused("--model", name, "-p", "no:acme-panda")
        assert "is provided by acme-panda 1.0" in message and "blocked" in message
    assert acme.imported() == set()


def test_a_qualified_model_can_be_an_arch_too(acme: Distributions) -> None:
    acme.install("bolt", {"archs": {"llama": "bolt.tiny"}}, {"bolt.tiny": ""})
    assert resolved("--model", "llama").components["model"].offer.distribution == "panda-train"
    assert resolved("--model", "acme-panda:tiny-wide").components["arch"].offer.distribution == "acme-panda"
    assert "bolt 1.0" in refused("--model", "bolt:llama"), "it is looked up as an arch"


# -- what is installed changes no run ---------------------------------------------------------


def test_an_installed_package_changes_no_run_that_does_not_name_it(
    distributions: Distributions, tmp_path: Path
) -> None:
    before = resolved("--arch", "llama-tiny", *DATA)
    taken = {
        "optimizers": {"adamw": "taken.x"},
        "readers": {"json": "taken.x"},
        "tasks": {"instruct": "taken.x"},
        "lr_schedulers": {"warmup": "taken.x"},
        "plugins": dict.fromkeys(DEFAULT_PLUGINS, "taken.x"),
    }
    distributions.install("taken", taken, {"taken.x": "raise SystemExit('imported')"})
    run = resolved("--arch", "llama-tiny", *DATA)
    assert run.components == before.components and run.plugins == before.plugins
    again = resolved("--config", yaml(tmp_path, config_text(run)))
    assert again.components == before.components and again.plugins == before.plugins
    assert distributions.imported() == set()
    named = resolved("--arch", "llama-tiny", "--optimizer", "adamw", "--plugins", "progress", *DATA)
    assert named.components == before.components and named.plugins[-1] in before.plugins
    assert distributions.imported() == set()


def test_a_key_that_a_neighbour_also_has_belongs_to_what_was_chosen(acme: Distributions) -> None:
    acme.install("bolt", {"models": {"other": "bolt.tiny"}}, {"bolt.tiny": ACME.replace('"tiny"', '"other"')})
    assert resolved("--arch", "tiny-wide", "--width", "3").components["model"].options.width == 3
    assert acme.imported() == {"acme.tiny"}


# -- keys -------------------------------------------------------------------------------------


def test_an_unknown_key_is_told_the_nearest_and_its_line(tmp_path: Path) -> None:
    file = yaml(tmp_path, "arch: llama-tiny\n\nlearning_rat: 1\n")
    assert refused("--config", file) == f"{file}:3: unknown key 'learning_rat'. Did you mean 'learning_rate'?"
    assert "Did you mean 'num_layers'" in refused("--arch", "llama-tiny", "--num_layer", "1")
    message = refused("--arch", "llama-tiny", "--qqqqqq", "1")
    assert message.startswith("--qqqqqq: unknown key 'qqqqqq'. `panda-train --help` lists the keys;")


def test_a_key_near_to_one_of_something_else_says_so() -> None:
    message = refused("--arch", "llama-tiny", "--powr", "1")
    assert "unknown key 'powr'. Did you mean 'power'" in message
    assert "a component that this run did not choose" in message


def test_a_known_key_that_nothing_uses_here_is_another_message() -> None:
    message = refused("--arch", "llama-tiny", "--lr_scheduler", "cosine", "--power", "2")
    assert message == (
        "--power: 'power' is known, but nothing that this run chose uses it: it is an option of lr_scheduler poly,"
        " and the run has lr_scheduler cosine. Leave it out, or choose what uses it: `--lr_scheduler poly`."
    )
    assert "or choose what uses it: `--plugins best_checkpoint`." in refused(
        "--arch", "llama-tiny", "--best_metric", "eval_loss"
    )
    assert resolved("--arch", "llama-tiny", "--lr_scheduler", "poly", "--power", "2").settings["power"].value == 2.0


def test_an_option_of_a_plugin_that_is_only_installed_is_known_without_an_import(acme: Distributions) -> None:
    message = refused("--arch", "llama-tiny", "--width", "3")
    assert "it is an option of model tiny, and the run has model llama" in message
    assert acme.imported() == set()


def test_sources_of_very_many_packages_are_not_looked_through(
    acme: Distributions, monkeypatch: pytest.MonkeyPatch
) -> None:
    acme.install("bolt", {"optimizers": {"sharing": "bolt.o"}}, {"bolt.o": OPTIMIZER.format(must="int = 0")})
    monkeypatch.setattr("panda.registry.offers.SOURCES_READ", 2)
    assert "an option of optimizer sharing" in refused("--arch", "llama-tiny", "--must", "3")
    monkeypatch.setattr("panda.registry.offers.SOURCES_READ", 1)
    message = refused("--arch", "llama-tiny", "--must", "3", "--power", "2")
    assert "unknown key 'must'" in message
    assert "Options of 2 modules of other packages were not looked through." in message
    assert "it is an option of lr_scheduler poly" in message, "panda's own are"


def test_a_renamed_key_is_told_its_name_here() -> None:
    message = refused("--arch", "llama-tiny", "--lr", "1e-3")
    assert message == "--lr: 'lr' is not one of panda's keys: write `learning_rate`."


def test_a_key_of_other_tools_that_is_an_option_of_a_component_is_that(acme: Distributions) -> None:
    """As `loss_type`: TRL's, which panda's own tasks do not have, and that of a package's task."""
    module = OPTIMIZER.format(must="int = 0").replace("must:", "loss_type:")
    acme.install("bolt", {"optimizers": {"sharing": "bolt.o"}}, {"bolt.o": module})
    message = refused("--arch", "llama-tiny", "--loss_type", "3")
    assert message.startswith("--loss_type: 'loss_type' is known, but nothing that this run chose uses it: it is an")


def test_several_problems_are_told_at_once(tmp_path: Path) -> None:
    file = yaml(
        tmp_path, "arch: llama-tiny\nlr: 1\nwamup_steps: 3\nseed: -1\npower: 2\nnum_layers: none\nrun_name: no\n"
    )
    lines = refused("--config", file).splitlines()
    assert sorted(line.removeprefix(f"{file}:")[0] for line in lines) == ["2", "3", "4", "5", "6", "7"]


def test_every_unknown_name_is_told_at_once() -> None:
    lines = refused(
        "--arch", "nothing", "--optimizer", "nope", "--plugins", "a", "b", "--reader", "cosine", "--seed", "x"
    ).splitlines()
    assert [line.partition(":")[0] for line in lines] == [
        "--seed",
        "--optimizer",
        "--reader",
        "--arch",
        "--plugins",
        "--plugins",
    ]


def test_a_key_that_two_chosen_components_have_is_written_with_its_kind(acme: Distributions, tmp_path: Path) -> None:
    acme.install("bolt", {"optimizers": {"sharing": "bolt.o"}}, {"bolt.o": OPTIMIZER.format(must="int = 0")})
    chosen = ("--arch", "tiny-wide", "--optimizer", "sharing", *DATA)
    message = refused(*chosen, "--share", "1")
    assert message == (
        "--share: 'share' is an option of more than one: write `model.share` (model tiny) and"
        " `optimizer.share` (optimizer sharing)."
    )
    file = yaml(tmp_path, "optimizer.share: 0.75\n")
    run = resolved(*chosen, "--config", file, "--model.share", "0.125")
    assert run.components["optimizer"].options.share == 0.75
    assert run.components["model"].options.share == 0.125
    assert run.settings["optimizer.share"].origin == f"{file}:1"
    assert "share" not in run.settings
    again = yaml(tmp_path, config_text(run))
    assert resolved("--config", again).components == run.components


def test_a_key_can_be_written_with_its_kind_where_nobody_else_has_it() -> None:
    run = resolved("--arch", "llama-tiny", "--optimizer.adam_epsilon", "1e-3")
    assert run.settings["adam_epsilon"].value == 1e-3
    message = refused("--arch", "llama-tiny", "--optimizer.adam_epsilon", "1e-3", "--adam_epsilon", "1e-3")
    assert "is also given at" in message
    assert "unknown key 'model.adam_epsilon'" in refused("--arch", "llama-tiny", "--model.adam_epsilon", "1") or (
        "nothing that this run chose" in refused("--arch", "llama-tiny", "--model.adam_epsilon", "1")
    )


def test_a_required_option_that_is_missing_is_told(acme: Distributions) -> None:
    acme.install(
        "bolt", {"optimizers": {"sharing": "bolt.o"}}, {"bolt.o": OPTIMIZER.format(must="int").replace("= 0.25", "")}
    )
    message = refused("--model", "llama", "--optimizer", "sharing")
    assert message.startswith("share: optimizer sharing needs a value: a number.")
    assert "must: optimizer sharing needs a value: an integer." in message


# -- plugins ----------------------------------------------------------------------------------

WATCH = """
@dataclass(frozen=True)
class Options:
    every: int = 1

@register_plugin("{name}", options=Options)
class Watch:
    def __init__(self, options, context): ...
"""


@pytest.fixture
def watchers(distributions: Distributions) -> Distributions:
    distributions.install(
        "acme",
        {"plugins": {"a-watch": "acme.a", "b-watch": "acme.b", "silent": "acme.c"}},
        {
            "acme.a": WATCH.format(name="a-watch"),
            "acme.b": WATCH.format(name="b-watch"),
            "acme.c": "@hookimpl\ndef panda_step_end(step): ...",
        },
        version="2.0",
    )
    return distributions


def names(run: Resolved) -> list[str]:
    return [chosen.component.name for chosen in run.plugins]


def test_plugins_are_added_to_pandas_own_by_yaml_or_flag(watchers: Distributions, tmp_path: Path) -> None:
    for line in ("plugins: [a-watch, B-Watch]", "plugins:\n- a-watch\n- acme:b-watch"):
        run = resolved("--arch", "llama-tiny", "--config", yaml(tmp_path, line))
        assert names(run) == [*DEFAULT_PLUGINS, "a-watch", "b-watch"]
    assert names(resolved("--arch", "llama-tiny", "--plugins", "a-watch", "b-watch"))[-2:] == ["a-watch", "b-watch"]
    assert names(resolved("--arch", "llama-tiny", "--config", yaml(tmp_path, "plugins: a-watch")))[-1] == "a-watch"


def test_a_plugin_that_is_named_twice_is_there_once(watchers: Distributions) -> None:
    run = resolved("--arch", "llama-tiny", "--plugins", "progress", "Progress", "a-watch", "acme:a-watch")
    assert names(run) == [*DEFAULT_PLUGINS, "a-watch"]


@pytest.mark.parametrize("blocked", ["plot", "panda.hooks.plot", "PLOT"])
def test_a_plugin_of_pandas_own_can_be_left_out(blocked: str) -> None:
    run = resolved("--arch", "llama-tiny", "-p", f"no:{blocked}")
    assert names(run) == [name for name in DEFAULT_PLUGINS if name != "plot"]
    assert names(resolved("--arch", "llama-tiny", "-p", f"no:{blocked}", "--plugins", "plot")) == names(run)


def test_a_plugin_name_that_is_wrong_is_explained(watchers: Distributions, tmp_path: Path) -> None:
    file = yaml(tmp_path, "arch: llama-tiny\nplugins: [a-wacth]\n")
    message = refused("--config", file)
    assert message.startswith(f"{file}:2: unknown plugin 'a-wacth'. Did you mean 'a-watch'")


def test_a_plugin_that_is_gone_can_be_left_out(tmp_path: Path) -> None:
    """As a configuration that a run has saved names it."""
    file = yaml(tmp_path, "arch: llama-tiny\nplugins: [gone:watch, 'no:plot']\n")
    message = refused("--config", file)
    assert "unknown plugin 'gone:watch'" in message and "`pip install gone`. `-p no:watch` runs without it." in message
    for blocked in ("watch", "WATCH", "gone"):
        assert names(resolved("--config", file, "-p", f"no:{blocked}")) == [
            name for name in DEFAULT_PLUGINS if name != "plot"
        ]


def test_a_key_of_two_plugins_is_written_with_the_plugins_name(watchers: Distributions) -> None:
    chosen = ("--arch", "llama-tiny", "--plugins", "a-watch", "b-watch")
    assert "write `a_watch.every` (plugin a-watch) and `b_watch.every` (plugin b-watch)" in refused(
        *chosen, "--every", "3"
    )
    run = resolved(*chosen, "--a-watch.every", "3", "--b_watch.every", "4")
    assert [chosen.options.every for chosen in run.plugins[-2:]] == [3, 4]
    assert run.settings["a_watch.every"].value == 3


def test_a_module_of_hooks_is_live_and_in_the_provenance(watchers: Distributions, tmp_path: Path) -> None:
    configuration = configure(parse_arguments(["--arch", "llama-tiny", "--plugins", "silent", "a-watch"]))
    run, hooks = configuration.resolved, configuration.hooks
    assert [offer.module for offer in run.hook_modules] == ["acme.c"]
    assert len(hooks.call.panda_step_end.get_hookimpls()) == 1
    write_description(tmp_path, run, {}, {})
    components = json.loads((tmp_path / "provenance.json").read_text())["components"]
    assert components["plugin silent"] == {"distribution": "acme", "version": "2.0", "module": "acme.c"}
    site = watchers.folder / "acme-2.0" / "acme" / "a.py"
    line = site.read_text().splitlines().index('@register_plugin("a-watch", options=Options)') + 1
    assert components["plugin a-watch"] == {
        "distribution": "acme",
        "version": "2.0",
        "module": "acme.a",
        "source": f"{site}:{line}",
    }
    assert components["optimizer adamw"]["distribution"] == "panda-train"


def test_the_resolved_configuration_runs_again_as_it_stands(watchers: Distributions, tmp_path: Path) -> None:
    run = resolved(
        *("--arch", "llama-tiny", "--plugins", "a-watch", "--prompts", "Say no, please.", "[x]", "--run_name", "no"),
        *DATA,
    )
    again = resolved("--config", yaml(tmp_path, config_text(run)))
    assert again.core == replace(run.core, plugins=("acme:a-watch",))
    assert again.components == run.components and again.plugins == run.plugins


def test_a_value_of_a_fraction_survives_the_resolved_configuration(tmp_path: Path) -> None:
    flags = ("--learning_rate", "1e-5", "--separator", " : ", "--adam_betas", ".5", ".75")
    run = resolved("--arch", "llama-tiny", *flags, *DATA)
    again = resolved("--config", yaml(tmp_path, config_text(run)))
    assert again.core == run.core and again.components == run.components


@pytest.mark.parametrize(
    ("written", "locations"),
    [
        ("a.jsonl, more/*.parquet", ("a.jsonl", "more/*.parquet")),
        (("a,b", "c"), ("a,b", "c")),
        ("there, too", ("there, too",)),
        ("x" * 200 + "," + "y" * 200, ("x" * 200, "y" * 200)),
    ],
)
def test_paths_of_data_are_separated_by_commas_unless_they_are_one_that_exists(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: str | tuple[str, ...], locations: tuple[str, ...]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there, too").mkdir()
    resolved = resolve(Catalog(), RunOptions, {"arch": Given("llama-tiny", ""), "eval_data_dir": Given(written, "")})
    assert resolved.core.eval_data_dir == locations
    again = load_flat_yaml(Path(yaml(tmp_path, config_text(resolved))))["eval_data_dir"]
    absolute = tuple(str(tmp_path / location) for location in locations)
    assert again.value == (absolute if len(absolute) > 1 or "," in absolute[0] else absolute[0])


def test_the_written_configuration_means_the_same_in_every_folder(
    distributions: Distributions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    distributions.install("acme", {"optimizers": {"reading": "acme.r"}}, {"acme.r": READING})
    for folder in ("here/pretrained-models/mine", "here/weights/org/theirs", "here/tokenizer", "elsewhere"):
        (tmp_path / folder).mkdir(parents=True)
    here, home = tmp_path / "here", Path.home()
    monkeypatch.chdir(here)
    given = {
        "arch": "llama-tiny",
        "optimizer": "reading",
        "tokenizer": "./tokenizer",
        "eval_data_dir": "../held-out",
        "token_cache": "~/cache",
        "deepspeed_config": "/etc/deepspeed.json",
        "ckpt_path": "mine",
        "base_path": "weights/org/theirs",
        "files": ("a.txt", "panda:data/b.txt"),
        "word": "a.txt",
        "checkpoint": "org/on-the-hub",
    }
    given = {key: Given(value, f"--{key}") for key, value in given.items()}
    text = config_text(resolve(Catalog(), RunOptions, given))
    written = parse_arguments(["--config", yaml(tmp_path, text)]).given
    values = {key: written[key].value for key in [*given, "instruction_tuning_data_dir", "unset", "remote"]}
    assert values == {
        "arch": "llama-tiny",
        "optimizer": "acme:reading",
        "tokenizer": f"{here}/tokenizer",
        "eval_data_dir": f"{here}/../held-out",
        "token_cache": f"{home}/cache",
        "deepspeed_config": "/etc/deepspeed.json",
        "ckpt_path": f"{here}/pretrained-models/mine",
        "base_path": f"{here}/weights/org/theirs",
        "files": (f"{here}/a.txt", "panda:data/b.txt"),
        "word": "a.txt",
        "checkpoint": "org/on-the-hub",
        "instruction_tuning_data_dir": f"{here}/dataset/instruction_tuning",
        "unset": "",
        "remote": "s3://bucket/words",
    }
    monkeypatch.chdir(tmp_path / "elsewhere")
    again = resolve(Catalog(), RunOptions, written)
    assert config_text(again) == text


# -- what factories check and return ----------------------------------------------------------


def test_options_that_do_not_go_together_are_told_with_everything_else(distributions: Distributions) -> None:
    distributions.install("acme", {"optimizers": {"between": "acme.b"}}, {"acme.b": NOT_TOGETHER})
    message = refused("--arch", "llama-tiny", "--optimizer", "between", "--low", "3", "--sead", "1")
    assert message.splitlines()[:2] == [
        "low must not be above high",
        "This came out of the options of optimizer 'between': acme 1.0 (entry point panda.optimizers: between ="
        " acme.b).",
    ]
    assert "unknown key 'sead'" in message


def test_an_error_that_an_author_raises_is_attributed_once_and_one_of_pandas_is_complete(
    distributions: Distributions,
) -> None:
    raising = NOT_TOGETHER.replace('return "no optimizer"', "context()")
    distributions.install("acme", {"optimizers": {"between": "acme.b"}}, {"acme.b": raising})
    chosen = resolved("--arch", "llama-tiny", "--optimizer", "between").components["optimizer"]

    def said(context: Callable[[], Any]) -> str:
        with pytest.raises(UserError) as caught, chosen.attributed("`step`"):
            chosen.build(context, object)
        return str(caught.value)

    of_author: dict[str, Any] = {"UserError": UserError, "__name__": "acme.more"}
    exec("def odd(): raise UserError('odd')", of_author)
    origin = "This came out of the factory of optimizer 'between': acme 1.0 (entry point panda.optimizers: between ="
    assert said(of_author["odd"]) == f"odd\n{origin} acme.b)."
    assert said(lambda: checked_api("x", "a file")).startswith("a file: 'x' is not a version")
    assert "This came out of" not in said(lambda: checked_api("x", "a file"))


def test_only_unknown_names_are_said_to_be_another_tools() -> None:
    message = refused("--task", "instrct", "--arch", "llama-tiny", "--optimizer", "adamw", "--lr_scheduler", "linear")
    assert message.splitlines() == [
        "--task: unknown task 'instrct'. Did you mean 'instruct'? `panda list tasks` shows what is installed."
    ]


def test_a_factory_that_returns_something_else_is_named_with_its_distribution(distributions: Distributions) -> None:
    distributions.install("acme", {"optimizers": {"between": "acme.b"}}, {"acme.b": NOT_TOGETHER})
    chosen = resolved("--arch", "llama-tiny", "--optimizer", "between").components["optimizer"]
    assert chosen.build(None, str) == "no optimizer"
    with pytest.raises(UserError, match=r"optimizer 'between' at .* returned 'no optimizer', and not a int") as caught:
        chosen.build(None, int)
    assert "This is a fault of acme 1.0 (entry point panda.optimizers: between = acme.b)" in str(caught.value)


# -- leaving out ------------------------------------------------------------------------------


def test_what_is_left_out_is_left_out_when_the_written_configuration_runs(tmp_path: Path) -> None:
    file = yaml(tmp_path, "arch: llama-tiny\nplugins: [plot, 'no:metrics']\n")
    run = resolved("--config", file, "-p", "no:plot")
    assert [plugin.component.name for plugin in run.plugins] == ["progress", "tensorboard", "guard"]
    again = resolved("--config", yaml(tmp_path, config_text(run)))
    assert again.settings["plugins"].value == ("plot", "no:metrics", "no:plot")
    assert [plugin.component.name for plugin in again.plugins] == ["progress", "tensorboard", "guard"]
