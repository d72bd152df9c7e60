"""Components in files of a user: found by name, as those of packages are, and only what is named is imported."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from distributions import Distributions

from panda.cli.main import main
from panda.configuration.arguments import arguments_of
from panda.configuration.arguments import parse_arguments
from panda.configuration.configure import configure
from panda.configuration.configure import configure_model
from panda.registry import UserError
from panda.registry import components
from panda.registry import user_files
from panda.registry.resolve import Resolved
from panda.registry.user_files import executed_files
from panda.registry.user_files import offers_in_folder
from panda.run.description import config_text

LION = """
from dataclasses import dataclass

import lion_helper

from panda import hookimpl, register_optimizer


@dataclass(frozen=True)
class LionOptions:
    \"\"\"Options.\"\"\"

    lion_rate: float = 0.5
    \"\"\"How fast.\"\"\"


@register_optimizer("lion", options=LionOptions, aliases=("tiger",))
def build(options, context):
    \"\"\"A lion of the lab.\"\"\"
    return lion_helper.VALUE


@hookimpl
def panda_run_start(run): ...
"""

NEVER = """
import panda

@panda.register_model("never")
def build(options, context): ...

@panda.register_arch("never-small", model="never")
def small():
    return {}

raise RuntimeError("imported")
"""

SHOUT = """
from panda import hookimpl, register_plugin

@register_plugin("shout")
class Shout:
    def __init__(self, options, context): ...

    @hookimpl
    def panda_step_end(self, run): ...
"""

HOOKS = """
\"\"\"Only hooks.\"\"\"
from panda import hookimpl

@hookimpl(trylast=True)
def panda_run_end(run): ...
"""


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with files of a user, which are forgotten after the test."""
    folder = tmp_path / "lab"
    files = {
        "lion": LION,
        "lion_helper": "VALUE = 1",
        "never": NEVER,
        "only_hooks": HOOKS,
        "broken": "\ndef (",
    }
    files["inner/__init__"], files["inner/deep"] = "", SHOUT.replace("shout", "deep")
    for name, source in files.items():
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        (folder / f"{name}.py").write_text(source)
    (tmp_path / "mine.py").write_text(SHOUT)
    monkeypatch.chdir(tmp_path)
    path, executed = list(sys.path), dict(user_files._executed)
    yield folder
    sys.path[:] = path
    forgotten = imported(tmp_path)
    for name in forgotten:
        del sys.modules[name]
    components.forget(forgotten)
    user_files._executed.clear()
    user_files._executed.update(executed)  # files of earlier tests in this process, which panda would forget itself


RUN = ("--arch", "llama-tiny", "--instruction_tuning_data_dir", "data")


def resolved(*argv: object) -> Resolved:
    given = RUN[2:] if "--model" in argv else RUN
    return configure(parse_arguments([*given, *map(str, argv)])).resolved


def refused(*argv: object) -> str:
    with pytest.raises(UserError) as caught:
        resolved(*argv)
    return str(caught.value)


def imported(folder: Path) -> set[str]:
    files = {name: str(getattr(module, "__file__", "")) for name, module in sys.modules.items()}
    return {name for name, file in files.items() if file.startswith(str(folder))}


# -- a folder ---------------------------------------------------------------------------------


def test_a_name_of_the_folder_is_found_and_only_its_module_is_imported(lab: Path) -> None:
    run = resolved("--user_dir", lab, "--optimizer", "Lion", "--lion_rate", "0.25")
    chosen = run.components["optimizer"]
    assert chosen.options.lion_rate == 0.25 and chosen.component.factory(chosen.options, None) == 1
    assert imported(lab) == {"lion", "lion_helper"}
    assert chosen.offer.describe().startswith(f"{lab}/lion.py:18 ")
    assert resolved("--user_dir", "lab", "--optimizer", "user_dir:tiger").components["optimizer"].component is (
        chosen.component
    )


def test_hooks_beside_a_component_and_modules_of_hooks_are_live_where_they_are_named(lab: Path) -> None:
    hooks = configure(parse_arguments([*RUN, "--user_dir", "lab", "--optimizer", "lion"])).hooks
    assert len(hooks.call.panda_run_start.get_hookimpls()) == 1
    run = configure(parse_arguments([*RUN, "--user_dir", "lab", "--plugins", "only_hooks", "deep"]))
    assert [offer.name for offer in run.resolved.hook_modules] == ["only_hooks"]
    assert [chosen.name for chosen in run.resolved.plugins][-1] == "deep"
    assert imported(lab) >= {"only_hooks", "inner.deep"} and "never" not in sys.modules
    assert "unknown plugin 'lion'" in refused("--user_dir", "lab", "--plugins", "lion")


def test_a_name_of_the_folder_takes_no_name_of_panda_and_shares_none_in_silence(
    lab: Path, distributions: Distributions
) -> None:
    (lab / "ours.py").write_text(LION.replace('"lion"', '"adamw"'))
    assert resolved("--user_dir", "lab", "--optimizer", "adamw").components["optimizer"].offer.is_own
    assert not resolved("--user_dir", "lab", "--optimizer", "user_dir:adamw").components["optimizer"].offer.is_own
    source = "@register_optimizer('lion')\ndef build(options, context): ..."
    distributions.install("acme", {"optimizers": {"lion": "acme.lion"}}, {"acme.lion": source})
    message = refused("--user_dir", "lab", "--optimizer", "lion")
    assert "acme:lion" in message and "user_dir:lion" in message and f"{lab}/lion.py:18" in message
    run = resolved("--user_dir", "lab", "--optimizer", "acme:lion")
    assert run.components["optimizer"].component.module == "acme.lion"


def test_mistakes_are_explained_with_file_and_line(lab: Path) -> None:
    message = refused("--user_dir", "lab", "--optimizer", "loin")
    assert "Did you mean 'lion'?" in message and f"Not read: {lab}/broken.py:2: SyntaxError: " in message
    message = refused("--user_dir", "lab", "--model", "never")
    assert f"could not import {lab}/never.py for model 'never'" in message
    assert f"RuntimeError: imported\n  at {lab}/never.py:11" in message
    assert refused("--user_dir", "nowhere") == f"--user_dir: '{lab.parent}/nowhere' is not a folder."
    (lab / "twice.py").write_text(LION)
    message = refused("--user_dir", "lab", "--optimizer", "lion")
    assert f"optimizer 'lion' is declared 2 times: {lab}/lion.py:18 and {lab}/twice.py:18" in message
    assert "never" not in sys.modules


def test_a_file_whose_module_has_the_name_of_another_is_refused(lab: Path) -> None:
    (lab / "yaml.py").write_text(SHOUT.replace("shout", "clash"))
    message = refused("--user_dir", "lab", "--plugins", "clash")
    assert message.startswith(f"{lab}/yaml.py: it would be imported as 'yaml', and ") and "Rename it." in message
    (lab / "a.b.py").write_text(SHOUT.replace("shout", "dotted"))
    assert "rename the file" in refused("--user_dir", "lab", "--plugins", "dotted")


def test_a_declaration_that_does_not_register_is_explained(lab: Path) -> None:
    (lab / "undone.py").write_text(SHOUT.replace("shout", "undone") + "\nfrom panda.registry import components\n")
    with (lab / "undone.py").open("a") as file:
        file.write("components._recorded.pop(('plugin', 'undone', __name__))\n")
    message = refused("--user_dir", "lab", "--plugins", "undone")
    assert message.startswith(f"{lab}/undone.py:5 (plugin 'undone'): it is declared there, and importing the file did")


def test_a_package_is_a_folder_too(lab: Path) -> None:
    """With an ``__init__``, whose files import each other by the package's name."""
    package = lab.parent / "labpack"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "lion_helper.py").write_text("VALUE = 2")
    (package / "lion.py").write_text(LION.replace("import lion_helper", "from labpack import lion_helper"))
    chosen = resolved("--user_dir", "labpack", "--optimizer", "lion").components["optimizer"]
    assert chosen.component.module == "labpack.lion" and chosen.component.factory(chosen.options, None) == 2


def test_a_folder_adds_kinds(lab: Path) -> None:
    (lab / "tasting.py").write_text(
        "from typing import Annotated\nfrom dataclasses import dataclass\n"
        "from panda import Names, decorator_for, register_kind, register_plugin\n"
        "@register_kind('taste')\nclass Taste:\n    '''What tastes.'''\n"
        "register_taste = decorator_for('taste')\n"
        "@register_taste('salt')\ndef salt(options, context): ...\n"
        "@dataclass(frozen=True)\nclass Options:\n    tastes: Annotated[tuple[str, ...], Names('taste')] = ('salt',)\n"
        "@register_plugin('taster', options=Options)\nclass Taster:\n    def __init__(self, options, context): ...\n"
    )
    run = resolved("--user_dir", "lab", "--plugins", "taster")
    assert [chosen.name for chosen in run.named] == ["salt"]
    assert "\ntastes: ['user_dir:salt']\n" in config_text(run)
    assert "taste 'pepper'" in refused("--user_dir", "lab", "--plugins", "taster", "--tastes", "pepper")


def test_a_file_that_has_changed_is_imported_again(lab: Path) -> None:
    """As in a notebook: what runs is what provenance.json says."""
    run = resolved("--user_dir", "lab", "--optimizer", "lion")
    before = executed_files(run.offers, lab)
    (lab / "lion_helper.py").write_text("VALUE = 1 + 1")
    again = resolved("--user_dir", "lab", "--optimizer", "lion")
    chosen = again.components["optimizer"]
    assert chosen.component.factory(chosen.options, None) == 2
    after = executed_files(again.offers, lab)
    assert {file for file in after if before[file] != after[file]} == {f"{lab}/lion_helper.py"}


# -- one file ---------------------------------------------------------------------------------


def test_a_file_stands_where_a_name_does(lab: Path) -> None:
    for spelling in ("./mine.py:shout", "mine.py", f"{lab.parent}/mine.py:SHOUT"):
        assert [chosen.name for chosen in resolved("--plugins", spelling).plugins][-1] == "shout"
    assert resolved("--plugins", "lab/only_hooks.py").hook_modules[0].name == "only_hooks"
    assert resolved("--optimizer", "lab/lion.py:tiger").components["optimizer"].name == "lion"
    assert "unknown plugin 'shout'" in refused("--plugins", "./mine.py", "shout")


def test_an_arch_in_a_file_finds_its_model_there(lab: Path) -> None:
    (lab / "shapes.py").write_text(NEVER.replace("raise RuntimeError", "str").replace("never", "shape"))
    run = configure(parse_arguments(["--arch", "lab/shapes.py:shape-small", *RUN[2:]])).resolved
    assert run.components["model"].offer.file == f"{lab}/shapes.py"


def test_what_a_file_lacks_is_explained(lab: Path) -> None:
    assert refused("--plugins", "no.py:shout") == f"--plugins: {lab.parent}/no.py: no such file."
    assert f"it declares no plugin 'shot'. It has `{lab.parent}/mine.py:shout`." in refused("--plugins", "mine.py:shot")
    assert '`@register_optimizer("NAME")`, with the name written out' in refused("--optimizer", "mine.py:lion")
    assert "Name one: " in refused("--optimizer", "lab/lion.py")
    assert refused("--plugins", "lab/broken.py").startswith(f"--plugins: {lab}/broken.py:2: SyntaxError: ")


# -- what is recorded -------------------------------------------------------------------------


def recorded(*argv: object) -> str:
    file = Path("config.yaml")
    file.write_text(config_text(resolved(*argv)))
    return str(file)


def repeated(*argv: object) -> Resolved:
    return configure(parse_arguments(list(map(str, argv)))).resolved


def test_a_recorded_configuration_executes_files_only_where_the_command_line_names_them(lab: Path) -> None:
    flags = ("--user_dir", "lab", "--optimizer", "lion", "--plugins", "no:plot", "./mine.py:shout")
    config = recorded(*flags)
    text = Path(config).read_text()
    assert "optimizer: 'user_dir:lion'" in text and f"user_dir: {lab}\n" in text
    for name in imported(lab.parent):
        del sys.modules[name]
    with pytest.raises(UserError) as caught:
        repeated("--config", config)
    message = str(caught.value)
    needed = f"--plugins no:plot {lab.parent}/mine.py:shout --user_dir {lab}"
    assert message.endswith(f"add `{needed}`.") and f"{config}:" in message
    with pytest.raises(UserError, match="add `--plugins no:plot"):
        repeated("--config", config, "--user_dir", "lab")
    with pytest.raises(UserError, match="add `--user_dir"):
        arguments = arguments_of(config, {"plugins": ()})
        configure(arguments)
    with pytest.raises(UserError, match="add `--user_dir"):
        repeated("--config", config, "--plugins", "./mine.py:shout")
    assert imported(lab.parent) == set()
    run = repeated("--config", config, *needed.split())
    assert run.components["optimizer"].offer.distribution == "user_dir" and run.plugins[-1].name == "shout"
    lab.rename(lab.parent / "moved")
    assert repeated("--config", config, "--user_dir", "moved", "--plugins", "mine.py").core.user_dir == "moved"


def test_a_copied_configuration_is_a_recorded_one_and_one_of_the_user_is_not(lab: Path) -> None:
    text = Path(recorded("--optimizer", "lab/lion.py:lion")).read_text()
    Path("elsewhere").mkdir()
    Path("elsewhere/mine.yaml").write_text(text)
    with pytest.raises(UserError, match=f"add `--optimizer {lab}/lion.py:lion`"):
        repeated("--config", "elsewhere/mine.yaml")
    assert repeated("--config", "elsewhere/mine.yaml", "--user_dir", "lab").components["optimizer"].name == "lion"
    Path("own.yaml").write_text("user_dir: lab\noptimizer: lion\nplugins: [./mine.py]\narch: llama-tiny\n")
    run = repeated("--config", "own.yaml", *RUN[2:])
    assert run.components["optimizer"].name == "lion" and run.plugins[-1].name == "shout"


def test_only_training_executes_a_file(lab: Path) -> None:
    for flags in (("--model", "user_dir:never"), ("--arch", "user_dir:x"), ("--model", "lab/never.py:never")):
        arguments = parse_arguments([*flags, *RUN[2:]])
        with pytest.raises(UserError, match="in a file of the user's, and only training runs these"):
            configure_model(arguments)
    assert imported(lab) == set()


def test_the_commands_that_look_show_the_folder(lab: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "plugins", "--user_dir", "lab"]) == 0
    listed = capsys.readouterr().out
    assert "only_hooks" in listed and "Only hooks." in listed and "user_dir" in listed and imported(lab) == set()
    assert main(["show", "optimizer", "lion", "--user_dir", "lab"]) == 0
    assert "--lion_rate" in capsys.readouterr().out
    assert main(["list", "plugins"]) == 0 and "only_hooks" not in capsys.readouterr().out
    os.environ.pop("WORLD_SIZE", None)
    assert main(["train", "--user_dir", "lab", "--optimizer", "lion", "--help"]) == 0
    assert "--lion_rate [0.5]\n                         How fast." in capsys.readouterr().out


def test_another_folder_may_have_files_of_the_same_names_in_a_later_run_but_not_in_the_same(lab: Path) -> None:
    resolved("--user_dir", "lab", "--optimizer", "lion")
    other = lab.parent / "other"
    other.mkdir()
    (other / "lion.py").write_text(LION.replace("lion_helper.VALUE", "3").replace("import lion_helper", ""))
    chosen = resolved("--user_dir", "other", "--optimizer", "lion").components["optimizer"]
    assert chosen.component.factory(chosen.options, None) == 3
    chosen = resolved("--user_dir", "lab", "--optimizer", "lion").components["optimizer"]
    assert chosen.component.factory(chosen.options, None) == 1
    (other / "mine.py").write_text(SHOUT)
    message = refused("--plugins", "mine.py", "other/mine.py")
    assert message.startswith(f"{other}/mine.py: it would be imported as 'mine', and {lab.parent}/mine.py has the name")


def test_a_folder_that_is_not_of_components_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"--user_dir: '.*' has no Python file\. Name the folder that has your"):
        offers_in_folder(tmp_path, "--user_dir")
    for name in ("a.py", "b.py", "c.py", "d.txt"):
        (tmp_path / name).touch()
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "e.txt").touch()
    assert offers_in_folder(tmp_path, "--user_dir") == ([], [])
    for limit, most, said in (("MOST_FILES", 2, "2 Python files"), ("MOST_NAMES", 5, "5 files")):
        with monkeypatch.context() as patch:
            patch.setattr(f"panda.registry.user_files.{limit}", most)
            with pytest.raises(
                UserError, match=rf"user_dir: '.*' has more than {said} in it and its folders, and each"
            ):
                offers_in_folder(tmp_path, "--user_dir")
