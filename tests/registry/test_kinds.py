"""A kind of component that a package adds: a toy distribution adds it, another one has components of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from distributions import Distributions

from panda.cli.main import main
from panda.cli.train import main as train
from panda.configuration.options import RunOptions
from panda.registry import Catalog
from panda.registry import UserError
from panda.registry.flat_yaml import load_flat_yaml
from panda.registry.offers import kind_named
from panda.registry.offers import kinds
from panda.registry.resolve import Resolved
from panda.registry.resolve import resolve

KIND = """
@register_kind("taste")
class Taste:
    '''How good a dish is.'''

register_taste = decorator_for("taste")
"""
COOK = """
from acme.kind import Taste
from acme.kind import register_taste

@dataclass(frozen=True)
class CookOptions:
    '''Options of cook.'''

    taste: Annotated[tuple[str, ...], Names("taste")] = ("sweet",)
    '''What a dish is judged by.'''
    judge: Annotated[str, Names("taste")] | None = None
    '''Another.'''

@register_task("cook", options=CookOptions)
def cook(options, context):
    '''Cooks.'''

@dataclass(frozen=True)
class SweetOptions:
    '''Options of sweet.'''

    sugar: Annotated[float, Meta(ge=0)] = 1.0
    '''Grams.'''
    amount: int = 1

@register_taste("sweet", options=SweetOptions)
def sweet(options, context):
    '''Sugar.'''
    return Taste()
"""
SOUR = """
from acme.kind import register_taste

@dataclass(frozen=True)
class SourOptions:
    '''Options of sour.'''

    amount: int = 2

@register_taste("very-sour", options=SourOptions, aliases=("acid",))
def sour(options, context):
    '''Lemon.'''
    return f"lemon {options.amount} {context}"
"""


@pytest.fixture
def acme(distributions: Distributions) -> Distributions:
    distributions.install(
        "acme-panda",
        {"kinds": {"taste": "acme.kind"}, "tasks": {"cook": "acme.cook"}, "tastes": {"sweet": "acme.cook"}},
        {"acme.kind": KIND, "acme.cook": COOK},
    )
    distributions.install(
        "lemon-panda", {"tastes": {"very-sour": "lemon.sour", "acid": "lemon.sour"}}, {"lemon.sour": SOUR}
    )
    return distributions


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def resolved(**values: Any) -> Resolved:
    lines = ["task: cook", "arch: llama-tiny", *(f"{key.replace('__', '.')}: {value}" for key, value in values.items())]
    Path("run.yaml").write_text("\n".join(lines))
    return resolve(Catalog(), RunOptions, load_flat_yaml(Path("run.yaml")))


def test_a_kind_is_listed_and_nothing_is_imported(acme: Distributions, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "tastes"]) == 0
    listed = capsys.readouterr().out
    assert listed.startswith("tastes: How good a dish is.\n")
    assert [line.split() for line in listed.splitlines()[1:]] == [
        ["acid", "lemon-panda", "1.0", "Lemon."],
        ["sweet", "acme-panda", "1.0", "Sugar."],
        ["very-sour", "lemon-panda", "1.0", "Lemon."],
    ]
    assert main(["list", "kinds"]) == 0
    assert "taste acme-panda 1.0 How good a dish is." in " ".join(capsys.readouterr().out.split())
    assert kind_named("taste") is not None and kinds()["taste"].group == "panda.tastes"
    assert acme.imported() == set()


def test_components_of_it_and_the_kind_itself_are_shown(
    acme: Distributions, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["show", "taste", "sweet"]) == 0
    assert "--sugar [1.0]" in capsys.readouterr().out
    assert main(["show", "kind", "taste"]) == 0
    assert "How good a dish is." in capsys.readouterr().out
    assert train(["--task", "cook", "--arch", "llama-tiny", "--taste", "acid", "--help"]) == 0
    printed = capsys.readouterr().out
    assert "taste very-sour: Lemon." in printed and "--sugar" not in printed
    assert "tastes: acid, sweet, very-sour" in printed


def test_options_name_components_whose_options_are_keys(acme: Distributions) -> None:
    run = resolved(taste="[acid, sweet]", sugar=2, very_sour__amount=5)
    assert [(chosen.name, chosen.options.amount) for chosen in run.named] == [("very-sour", 5), ("sweet", 1)]
    assert run.settings["sugar"].value == 2.0 and run.settings["sugar"].owner == "taste sweet"
    assert run.settings["sweet.amount"].value == 1
    assert set(run.components) == {"task", "model", "optimizer", "lr_scheduler", "reader", "arch"}
    assert run.named[0].build("here", str) == "lemon 5 here"
    with pytest.raises(UserError, match="returned 'lemon 5 here', and not a int"):
        run.named[0].build("here", int)
    changed = run.with_values({"sugar": 3.0}, "here")
    assert changed.named[1].options.sugar == 3.0
    assert [chosen.name for chosen in resolved(taste="acid", judge="sweet").named] == ["very-sour", "sweet"]
    assert [chosen.name for chosen in resolved(taste="sweet", judge="sweet").named] == ["sweet"]


def test_a_default_means_the_component_beside_it(acme: Distributions) -> None:
    acme.install(
        "other-panda", {"tastes": {"sweet": "other.sweet"}}, {"other.sweet": SOUR.replace("very-sour", "sweet")}
    )
    (chosen,) = resolved().named
    assert chosen.offer.distribution == "acme-panda"
    with pytest.raises(UserError, match=r"run.yaml:3: taste 'sweet' is offered by 2 distributions"):
        resolved(taste="sweet")
    (chosen,) = resolved(taste="'other-panda:sweet'").named
    assert chosen.offer.distribution == "other-panda"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"taste": "swet"}, r"run.yaml:3: unknown taste 'swet'. Did you mean 'sweet'\?"),
        ({"taste": "adamw"}, r"There is optimizer 'adamw'.* `panda list tastes` shows"),
        ({"taste": "[sweet, sweet]"}, "run.yaml:3: taste names taste 'sweet' twice"),
        ({"taste": "[acid, very-sour]"}, "run.yaml:3: taste names taste 'very-sour' twice"),
        ({"sugar": -1}, "'-1' is not a number >= 0"),
        ({"taste": "acid", "sugar": 2}, "'sugar' is known, but nothing that this run chose uses it: .*taste sweet"),
        ({"taste": "[sweet, acid]", "amount": 2}, "write `sweet.amount` .* and `very_sour.amount`"),
    ],
)
def test_mistakes_are_explained(acme: Distributions, values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        resolved(**values)


def test_a_kind_of_two_packages_is_refused_where_it_is_used(acme: Distributions) -> None:
    acme.install("rival-panda", {"kinds": {"taste": "rival.kind"}}, {"rival.kind": KIND})
    with pytest.raises(UserError, match=r"kind 'taste' is added by 2 distributions.*acme-panda, rival-panda"):
        resolved()
    Catalog().find("optimizer", "adamw")


def test_an_option_that_names_what_nobody_adds_is_a_fault_of_its_package(distributions: Distributions) -> None:
    cook = COOK.replace('Names("taste")', 'Names("reader")')
    distributions.install(
        "acme-panda",
        {"kinds": {"taste": "acme.kind"}, "tasks": {"cook": "acme.cook"}},
        {"acme.kind": KIND, "acme.cook": cook},
    )
    with pytest.raises(UserError, match=r"names components of kind 'reader', .*This is a fault of acme-panda"):
        resolved()


@pytest.mark.parametrize("name", ["optimizer", "kind", "Taste", "a-b", "ta.ste"])
def test_a_package_cannot_take_a_kind_of_pandas_own(distributions: Distributions, name: str) -> None:
    distributions.install("acme-panda", {"kinds": {name: "acme.kind"}}, {"acme.kind": KIND})
    assert list(kinds()) == ["task", "model", "arch", "optimizer", "lr_scheduler", "reader", "plugin", "kind", "metric"]
    assert [offer.distribution for offer in Catalog().offers("kind")] == ["panda-train"]
