"""What panda gains later takes nothing from configurations and packages that state an earlier version of its API."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from distributions import Distributions

from panda.configuration.arguments import parse_arguments
from panda.configuration.configure import configure
from panda.configuration.options import RunOptions
from panda.registry import Catalog
from panda.registry import UserError
from panda.registry import api
from panda.registry.options import options_of
from panda.registry.resolve import Resolved
from panda.run.description import config_text

OPTIMIZER = """
@dataclass(frozen=True)
class Options:
    seed: str = "theirs"
    share: float = 0.25

@register_optimizer("{name}", options=Options)
def build(options, context): ...
"""

MODEL = """
@register_model("{name}")
def build(options, context): ...

@register_arch("{name}-small", model="{name}")
def small():
    return {{}}
"""


@pytest.fixture(autouse=True)
def later(monkeypatch: pytest.MonkeyPatch) -> None:
    """panda has version 3 of its API; with 2 it gained the optimizer nvlamb, the model hf and the key seed."""
    monkeypatch.setattr(api, "API_VERSION", 3)
    monkeypatch.setattr(api, "GAINED_NAMES", {("optimizer", "nvlamb"): 2, ("model", "hf"): 2})
    monkeypatch.setattr(api, "GAINED_KEYS", {"seed": 2})


def install(
    distributions: Distributions, optimizer: str, *, states: object = None, name: str = "acme", version: str = "1.0"
) -> None:
    """A distribution with an ``optimizer``, which states a version of panda's API, or none."""
    module = f"{name}.{optimizer.replace('-', '_')}"
    source = OPTIMIZER.format(name=optimizer)
    site = distributions.install(name, {"optimizers": {optimizer: module}}, {module: source}, version=version)
    if states is not None:
        (entry_points,) = site.glob("*.dist-info/entry_points.txt")
        entry_points.write_text(entry_points.read_text() + f"[panda.api]\nversion = {states}\n")


def resolved(tmp_path: Path, text: str, *argv: str) -> Resolved:
    file = tmp_path / "run.yaml"
    file.write_text("arch: llama-tiny\ninstruction_tuning_data_dir: data\n" + text)
    return configure(parse_arguments(["--config", str(file), *argv])).resolved


# -- names ------------------------------------------------------------------------------------


def test_a_name_that_a_package_had_before_panda_is_an_error_that_names_both(
    distributions: Distributions, tmp_path: Path
) -> None:
    install(distributions, "NVLamb")
    with pytest.raises(UserError) as caught:
        resolved(tmp_path, "api: 1\noptimizer: nvlamb")
    message = str(caught.value)
    assert "run.yaml:4: optimizer 'nvlamb': panda has a component of this name since version 2 of its API" in message
    assert "written for version 1" in message
    assert "acme 1.0 (entry point panda.optimizers: NVLamb = acme.NVLamb)" in message
    assert message.endswith("Write `panda-train:nvlamb` or `acme:NVLamb`.")
    for spelling, distribution in (("acme:nvlamb", "acme"), ("panda-train:nvlamb", "panda-train")):
        run = resolved(tmp_path, f"api: 1\noptimizer: {spelling}")
        assert run.components["optimizer"].offer.distribution == distribution


def test_a_name_of_a_package_that_is_gone_does_not_become_pandas_own(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"of a package, which is not installed. Write `panda-train:nvlamb`\.$"):
        resolved(tmp_path, "api: 1\noptimizer: nvlamb")


@pytest.mark.parametrize("states", ["", "api: 2\n", "api: 3\n"])
def test_it_is_pandas_own_where_the_configuration_is_as_new_or_states_nothing(
    distributions: Distributions, tmp_path: Path, states: str
) -> None:
    install(distributions, "nvlamb")
    assert resolved(tmp_path, f"{states}optimizer: nvlamb").components["optimizer"].offer.is_own


def test_a_name_that_was_always_there_is_pandas_own_whatever_is_stated(
    distributions: Distributions, tmp_path: Path
) -> None:
    install(distributions, "adamw")
    assert resolved(tmp_path, "api: 1\noptimizer: adamw").components["optimizer"].offer.is_own
    assert resolved(tmp_path, "api: 1\n").components["optimizer"].offer.is_own  # the default


def test_a_name_that_a_package_writes_goes_by_the_version_that_the_package_states(distributions: Distributions) -> None:
    for name, states in (("older", 1), ("newer", 2)):
        source = "@register_arch('tiny-hf', model='hf')\ndef tiny():\n    return {}\n"
        site = distributions.install(name, {"archs": {f"{name}-hf": f"{name}.a"}}, {f"{name}.a": source})
        (site / name / "a.py").write_text((site / name / "a.py").read_text().replace("tiny-hf", f"{name}-hf"))
        (entry_points,) = site.glob("*.dist-info/entry_points.txt")
        entry_points.write_text(entry_points.read_text() + f"[panda.api]\nversion = {states}\n")
    with pytest.raises(UserError, match=r"older 1\.0 is written for version 1; .*Write `panda-train:hf`"):
        configure(parse_arguments(["--arch", "older-hf"]))
    run = configure(parse_arguments(["--arch", "newer-hf", "--instruction_tuning_data_dir", "d"])).resolved
    assert run.components["model"].offer.is_own


# -- versions ---------------------------------------------------------------------------------


@pytest.mark.parametrize("states", [4, "v4", "two", "0"])
def test_a_package_for_a_version_that_panda_lacks_is_refused_before_it_is_imported(
    distributions: Distributions, tmp_path: Path, states: object
) -> None:
    install(distributions, "sharing", states=states)
    with pytest.raises(UserError) as caught:
        resolved(tmp_path, "optimizer: sharing")
    message = str(caught.value)
    assert message.startswith("acme 1.0 (entry point panda.optimizers: sharing = acme.sharing): ")
    if str(states).endswith("4"):
        assert message.endswith(
            "it was written for version 4 of panda's API, and this panda has version 3. Install a newer one, `pip"
            " install --upgrade panda-train`, or an older acme."
        )
    else:
        assert message.endswith(f"{str(states)!r} is not a version of panda's API: expected a number from 1 to 3.")
    assert distributions.imported() == set()


def test_a_configuration_for_a_version_that_panda_lacks_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"run.yaml:3: api: it was written for version 4 of panda's API.* newer one"):
        resolved(tmp_path, "api: 4")
    with pytest.raises(UserError, match=r"run.yaml:3: api: 'new' is not a version"):
        resolved(tmp_path, "api: new")


# -- keys -------------------------------------------------------------------------------------


def seeds(run: Resolved) -> tuple[int, str]:
    """The seed of the run, and the option of this name of its optimizer."""
    return run.core.seed, run.components["optimizer"].options.seed


@pytest.mark.parametrize(
    ("config", "package", "theirs"),
    [
        (None, None, False),
        (None, 1, True),
        (None, "v1", True),
        (None, 2, False),
        (1, None, True),
        (1, 2, True),
        (2, 1, False),
    ],
)
def test_a_key_that_panda_gains_means_what_was_there_first(
    distributions: Distributions,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    config: int | None,
    package: int | str | None,
    theirs: bool,
) -> None:
    install(distributions, "sharing", states=package)
    text = (f"api: {config}\n" if config else "") + "optimizer: sharing\nseed: 7"
    run = resolved(tmp_path, text)
    assert seeds(run) == ((42, "7") if theirs else (7, "theirs"))
    warned = capsys.readouterr().err
    line = 4 + bool(config)
    means = "that of optimizer sharing" if theirs else "that of every run"
    assert f"run.yaml:{line}: 'seed' is taken as {means}." in warned
    assert "`run.seed`" in warned and "`optimizer.seed`" in warned


@pytest.mark.parametrize("spelling", ["optimizer.seed", "sharing.seed"])
def test_the_option_of_a_package_can_always_be_written_with_its_name(
    distributions: Distributions, tmp_path: Path, capsys: pytest.CaptureFixture[str], spelling: str
) -> None:
    install(distributions, "sharing")
    run = resolved(tmp_path, f"optimizer: sharing\n{spelling}: mine\nrun.seed: 7\nsharing.share: 0.5")
    assert seeds(run) == (7, "mine") and run.components["optimizer"].options.share == 0.5
    assert "warning" not in capsys.readouterr().err
    with pytest.raises(UserError, match="'share' is also given at"):
        resolved(tmp_path, "optimizer: sharing\nshare: 0.5\nsharing.share: 0.5")
    with pytest.raises(UserError, match=r"'seed' is also given at .*run.yaml:4"):
        resolved(tmp_path, "optimizer: sharing\nseed: 1\nrun.seed: 1")


@pytest.mark.parametrize("states", [None, 1])
def test_a_run_of_such_a_package_runs_again_from_its_own_configuration(
    distributions: Distributions, tmp_path: Path, capsys: pytest.CaptureFixture[str], states: int | None
) -> None:
    install(distributions, "sharing", states=states)
    run = resolved(tmp_path, "optimizer: sharing\noptimizer.seed: mine\nrun.seed: 7")
    recorded = tmp_path / "recorded.yaml"
    recorded.write_text(config_text(run))
    capsys.readouterr()
    again = configure(parse_arguments(["--config", str(recorded)])).resolved
    assert seeds(again) == (7, "mine") and config_text(again) == config_text(run)
    assert capsys.readouterr().err == ""


def test_a_component_whose_name_is_that_of_a_kind_takes_no_key_of_another(
    distributions: Distributions, tmp_path: Path
) -> None:
    """``task.share`` is an option of the task, also where an optimizer is called so."""
    install(distributions, "task")
    with pytest.raises(UserError, match=r"unknown key 'task\.share'|'task\.share' is known"):
        resolved(tmp_path, "optimizer: task\ntask.share: 0.5")
    assert resolved(tmp_path, "optimizer: task\noptimizer.share: 0.5").components["optimizer"].options.share == 0.5


def test_what_panda_has_is_of_version_1_or_entered_with_its_version(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name or a key that is in neither takes something from those who had it: see panda/registry/api.py."""
    monkeypatch.undo()
    first = json.loads(Path(__file__).with_name("api.json").read_text())
    catalog = Catalog()
    names = {(offer.kind, offer.name) for kind in catalog.kinds for offer in catalog.offers(kind) if offer.is_own}
    of_first = {(kind, name) for kind, several in first["names"].items() for name in several}
    assert names == of_first | set(api.GAINED_NAMES) and not of_first & set(api.GAINED_NAMES)
    assert set(options_of(RunOptions)) == set(first["keys"]) | set(api.GAINED_KEYS)
    assert not set(first["keys"]) & set(api.GAINED_KEYS)
    assert all(1 < version <= api.API_VERSION for version in (*api.GAINED_NAMES.values(), *api.GAINED_KEYS.values()))
