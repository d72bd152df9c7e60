from __future__ import annotations

import importlib.metadata
import sys
from typing import Any

import pytest
from distributions import Distributions
from distributions import forget_installed

from panda.registry import Catalog
from panda.registry import UserError
from panda.registry.declarations import declarations
from panda.registry.errors import EndedBySignal

MODEL = """
@register_model("{name}")
def build(options, context):
    '''A model.'''
"""


def model(name: str) -> str:
    return MODEL.format(name=name)


def refused(catalog: Catalog, kind: str, reference: str, origin: str = "") -> str:
    """The message of looking up and loading ``reference``."""
    with pytest.raises(UserError) as caught:
        catalog.load(catalog.find(kind, reference, origin))
    return str(caught.value)


# -- names cost nothing -----------------------------------------------------------------------


def test_nothing_is_imported_to_list_or_look_up_a_name(distributions: Distributions) -> None:
    distributions.install("acme", {"models": {"tiny": "acme.tiny"}}, {"acme.tiny": "raise SystemExit"})
    catalog = Catalog()
    assert "tiny" in [offer.name for offer in catalog.offers("model")]
    offer = catalog.find("model", "tiny")
    assert (offer.module, offer.qualified) == ("acme.tiny", "acme:tiny")
    with pytest.raises(UserError):
        catalog.find("model", "tinny")
    assert "acme" not in sys.modules


def test_only_the_module_of_the_chosen_component_is_imported(distributions: Distributions) -> None:
    names = ("tiny", "large", "huge")
    distributions.install(
        "acme",
        {"models": {name: f"acme.{name}" for name in names}},
        {f"acme.{name}": model(name) for name in names},
    )
    catalog = Catalog()
    component = catalog.load(catalog.find("model", "large"))
    assert component is not None and component.name == "large"
    assert distributions.imported() == {"acme.large"}


def test_metadata_is_scanned_once_in_a_process(distributions: Distributions, monkeypatch: pytest.MonkeyPatch) -> None:
    scans = []
    original = importlib.metadata.distributions

    def counted(**selection: Any) -> Any:
        scans.append(selection)
        return original(**selection)

    monkeypatch.setattr(importlib.metadata, "distributions", counted)
    distributions.install("acme", {"models": {"tiny": "acme.tiny"}}, {"acme.tiny": model("tiny")})
    for _ in range(2):
        catalog = Catalog()
        for kind in ("model", "arch", "plugin"):
            catalog.offers(kind)
        catalog.load(catalog.find("model", "tiny"))
    assert scans == [{}]


def test_names_match_without_case(distributions: Distributions) -> None:
    distributions.install("acme", {"models": {"Tiny": "acme.tiny"}}, {"acme.tiny": model("TINY")})
    catalog = Catalog()
    assert catalog.find("optimizer", "AdamW").name == "adamw"
    for spelling in ("tiny", "TINY", "Tiny", "acme:tiny", "ACME:TINY"):
        component = catalog.load(catalog.find("model", spelling))
        assert component is not None and component.name == "TINY"


# -- several that answer ----------------------------------------------------------------------


def shared(distributions: Distributions) -> None:
    distributions.install("acme-panda", {"models": {"shared": "acme.a"}}, {"acme.a": model("shared")}, version="1.2")
    distributions.install("bolt.panda", {"models": {"shared": "bolt.b"}}, {"bolt.b": model("shared")}, version="3.4")


def test_a_name_of_two_distributions_is_an_error_that_names_both_and_how_to_choose(
    distributions: Distributions,
) -> None:
    shared(distributions)
    message = refused(Catalog(), "model", "shared", "run.yaml:3")
    assert message.startswith("run.yaml:3: model 'shared' is offered by 2 distributions. Say which one:")
    for part in ("acme-panda:shared", "acme-panda 1.2", "acme.a", "bolt-panda:shared", "bolt-panda 3.4", "bolt.b"):
        assert part in message
    assert "acme" not in sys.modules and "bolt" not in sys.modules


@pytest.mark.parametrize("spelling", ["bolt-panda:shared", "bolt.panda:shared", "Bolt_Panda:SHARED"])
def test_the_qualified_spelling_chooses_and_imports_one(distributions: Distributions, spelling: str) -> None:
    shared(distributions)
    catalog = Catalog()
    component = catalog.load(catalog.find("model", spelling))
    assert component is not None and component.module == "bolt.b"
    assert distributions.imported() == {"bolt.b"}


def test_blocking_one_of_two_leaves_the_other(distributions: Distributions) -> None:
    shared(distributions)
    assert Catalog(["acme-panda"]).find("model", "shared").distribution == "bolt-panda"


@pytest.mark.parametrize("reference", ["adamw", "AdamW", "panda-train:adamw"])
def test_a_name_of_pandas_own_means_that_whoever_else_has_it(distributions: Distributions, reference: str) -> None:
    distributions.install("acme", {"optimizers": {"AdamW": "acme.a"}}, {"acme.a": ""})
    distributions.install("bolt", {"optimizers": {"adamw": "bolt.b"}}, {"bolt.b": ""})
    assert Catalog().find("optimizer", reference).module == "panda.optim.adamw"
    assert Catalog().find("optimizer", "acme:adamw").module == "acme.a"
    assert Catalog(["bolt"]).find("optimizer", reference).module == "panda.optim.adamw"
    assert distributions.imported() == set()


def test_metadata_that_is_there_twice_is_no_ambiguity(distributions: Distributions) -> None:
    """As after an upgrade that left its predecessor's folder, or with a source tree on the path."""
    for version in ("2.0", "1.0"):
        distributions.install(
            "acme-panda", {"models": {"tiny": "acme.tiny"}}, {"acme.tiny": model("tiny")}, version=version
        )
    assert Catalog().find("model", "tiny").version == "2.0"


def test_a_name_that_one_distribution_declares_twice_is_its_fault(distributions: Distributions) -> None:
    distributions.install("acme", {"models": {"tiny": "acme.a", "Tiny": "acme.b"}}, {})
    message = refused(Catalog(), "model", "tiny")
    assert "declared 2 times by acme 1.0" in message
    assert "tiny = acme.a" in message and "Tiny = acme.b" in message


# -- none that answers ------------------------------------------------------------------------


def test_an_unknown_name_is_told_the_nearest_ones_and_other_kinds(distributions: Distributions) -> None:
    catalog = Catalog()
    message = refused(catalog, "arch", "lama-65b", "--arch")
    assert message.startswith("--arch: unknown arch 'lama-65b'. Did you mean 'llama-65b'")
    assert message.endswith("`panda list archs` shows what is installed.")
    assert "There is lr_scheduler 'cosine'." in refused(catalog, "optimizer", "cosine")
    assert "Did you mean" not in refused(catalog, "arch", "zzzzzz")
    assert "Did you mean 'panda-train:llama'" in refused(catalog, "model", "panda-tran:llama")


# -- blocking ---------------------------------------------------------------------------------


@pytest.mark.parametrize("blocked", ["acme-panda", "Acme_Panda", "acme.tiny"])
def test_a_blocked_distribution_or_module_is_neither_listed_nor_imported(
    distributions: Distributions, blocked: str
) -> None:
    distributions.install("acme-panda", {"models": {"tiny": "acme.tiny"}}, {"acme.tiny": model("tiny")})
    catalog = Catalog([blocked])
    assert "tiny" not in [offer.name for offer in catalog.offers("model")]
    message = refused(catalog, "model", "tiny")
    assert message.startswith("model 'tiny' is provided by acme-panda 1.0 (entry point panda.models: tiny = acme.tiny)")
    assert message.endswith("but that is blocked by `-p no:`.")
    assert "acme" not in sys.modules


def test_a_plugin_is_blocked_by_its_own_name_and_a_model_of_that_name_is_not(distributions: Distributions) -> None:
    distributions.install("acme", {"plugins": {"watch": "acme.w"}, "models": {"watch": "acme.m"}}, {})
    catalog = Catalog(["Watch"])
    assert "blocked" in refused(catalog, "plugin", "watch")
    assert catalog.find("model", "watch").module == "acme.m"


@pytest.mark.parametrize("name", ["panda-train", "Panda_Train"])
def test_panda_cannot_block_itself(name: str) -> None:
    with pytest.raises(UserError, match="cannot block itself"):
        Catalog([name])


def test_blocked_names_that_nothing_has_are_told(distributions: Distributions) -> None:
    distributions.install("acme-panda", {"plugins": {"watch": "acme.w"}}, {})
    assert Catalog(["acme_panda", "watch", "acme.w", "plot", "wacht"]).unused_blocks() == ["wacht"]


# -- plugins that are broken ------------------------------------------------------------------

BROKEN = {
    "raises": ("raise RuntimeError('no luck')", "RuntimeError: no luck"),
    "exits": ("raise SystemExit(3)", "SystemExit: 3"),
    "wrong": ("def (", "SyntaxError: invalid syntax"),
    "needs": ("import not_installed_anywhere", "ModuleNotFoundError: No module named 'not_installed_anywhere'"),
}


def broken(distributions: Distributions) -> str:
    site = distributions.install(
        "bad-panda",
        {"models": {**{name: f"bad.{name}" for name in BROKEN}, "absent": "bad.absent", "empty": "bad.empty"}},
        {**{f"bad.{name}": source for name, (source, _) in BROKEN.items()}, "bad.empty": model("other")},
    )
    return str(site)


@pytest.mark.parametrize("name", BROKEN)
def test_a_plugin_that_fails_at_import_is_explained_with_file_and_line(distributions: Distributions, name: str) -> None:
    site = broken(distributions)
    message = refused(Catalog(), "model", name)
    assert message.startswith(f"could not import bad.{name}, which bad-panda 1.0 (entry point panda.models: {name}")
    assert BROKEN[name][1] in message
    file = f"{site}/bad/{name}.py"
    with open(file) as source:
        lines = len(source.read().splitlines())
    assert f"\n  at {file}:{lines}\n" in message


@pytest.mark.parametrize("raised", [EndedBySignal, KeyboardInterrupt])
def test_a_signal_that_comes_during_an_import_is_no_fault_of_the_module(
    distributions: Distributions, raised: type[BaseException]
) -> None:
    source = f"from {raised.__module__} import {raised.__name__}\nraise {raised.__name__}(143)"
    distributions.install("acme", {"models": {"tiny": "acme.tiny"}}, {"acme.tiny": source})
    with pytest.raises(raised, match="143"):
        Catalog().load(Catalog().find("model", "tiny"))


def test_a_module_that_is_not_there_is_not_blamed_on_a_line_of_python_itself(distributions: Distributions) -> None:
    broken(distributions)
    message = refused(Catalog(), "model", "absent")
    assert "ModuleNotFoundError: No module named 'bad.absent'" in message
    assert "\n  at " not in message


def test_metadata_that_promises_what_the_module_lacks_is_explained(distributions: Distributions) -> None:
    broken(distributions)
    message = refused(Catalog(), "model", "empty")
    assert "promises model 'empty', but importing bad.empty did not register that name: it registers 'other'" in message
    assert "a fault of bad-panda" in message


def test_a_broken_neighbour_changes_nothing(distributions: Distributions) -> None:
    before, models = Catalog().find("arch", "llama-65b"), len(Catalog().offers("model"))
    broken(distributions)
    catalog = Catalog()
    assert catalog.find("arch", "llama-65b") == before
    assert catalog.load(before) is not None
    assert len(catalog.offers("model")) == models + 6
    assert "bad" not in sys.modules


def test_a_folder_says_name_and_version_and_its_metadata_is_not_read(
    distributions: Distributions, monkeypatch: pytest.MonkeyPatch
) -> None:
    """METADATA holds a whole README; a distribution may also have lost it."""
    parsed: list[str] = []
    reading = property(lambda self: parsed.append(self._path.name))
    monkeypatch.setattr(importlib.metadata.PathDistribution, "metadata", reading)
    distributions.install("Acme_Panda", {"models": {"tiny": "lost.tiny"}}, {}, version="1.0+cu126")
    offer = Catalog().find("model", "acme-panda:tiny")
    assert (offer.distribution, offer.version) == ("acme-panda", "1.0+cu126")
    assert not any(name.startswith("Acme") for name in parsed)


@pytest.mark.parametrize(
    ("metadata", "version"), [("Name: lost\nVersion: 2.0\n", "2.0"), ("Name\n", "?"), ("", "?"), (None, "?")]
)
def test_a_folder_without_a_version_is_looked_into(
    distributions: Distributions, metadata: str | None, version: str
) -> None:
    """As of `setup.py develop`; and what it has may not be readable."""
    site = distributions.install("lost", {"models": {"tiny": "lost.tiny"}}, {"lost.tiny": model("tiny")})
    info = next(site.glob("*.dist-info")).rename(site / "lost.egg-info")
    (info / "METADATA").unlink()
    if metadata is not None:
        (info / "PKG-INFO").write_text(metadata)
    forget_installed()
    assert Catalog().find("model", "lost:tiny").version == version


def test_entry_points_that_cannot_be_parsed_cost_that_distribution_alone(distributions: Distributions) -> None:
    site = distributions.install("garbled", {"models": {"odd": "garbled.odd"}}, {})
    next(site.glob("*.dist-info")).joinpath("entry_points.txt").write_text("[panda.models]\nodd\n")
    distributions.install("acme", {"models": {"tiny": "acme.tiny"}}, {"acme.tiny": model("tiny")})
    with pytest.raises(Exception):  # noqa: B017 - what this is about: Python itself cannot read it
        importlib.metadata.entry_points()
    catalog = Catalog()
    assert catalog.find("model", "tiny").distribution == "acme"
    assert catalog.find("arch", "llama-tiny").distribution == "panda-train"


def test_options_of_a_type_that_panda_has_not_are_explained(distributions: Distributions) -> None:
    source = """
    @dataclass(frozen=True)
    class Options:
        sizes: list[int] = ()

    @register_model("tiny", options=Options)
    def build(options, context): ...
    """
    distributions.install("acme", {"models": {"tiny": "acme.tiny"}}, {"acme.tiny": source})
    message = refused(Catalog(), "model", "tiny")
    assert "its options cannot be used: option 'sizes' has the type list[int]" in message


def test_a_plugin_that_has_neither_a_factory_nor_hooks_is_an_error(distributions: Distributions) -> None:
    distributions.install("acme", {"plugins": {"watch": "acme.watch"}}, {"acme.watch": ""})
    assert "it registers no plugin" in refused(Catalog(), "plugin", "watch")


# -- what list shows --------------------------------------------------------------------------


def test_an_offer_can_tell_what_it_is_without_an_import(distributions: Distributions) -> None:
    distributions.install("acme", {"models": {"TINY": "acme.tiny"}}, {"acme.tiny": model("tiny")})
    declaration = Catalog().find("model", "tiny").declaration
    assert declaration is not None and declaration.summary == "A model."
    assert "acme" not in sys.modules
    assert declarations("acme.tiny") == (declaration,)
