from __future__ import annotations

import sys

import pytest
from distributions import Distributions
from distributions import forget_installed

from panda.registry import Catalog
from panda.registry.declarations import declarations
from panda.registry.declarations import module_summary
from panda.registry.kinds import KINDS
from panda.registry.options import options_of

SOURCE = '''
"""Docstring that is not first."""

@dataclass(frozen=True)
class Base:
    inherited: int = 1

@dataclass(frozen=True)
class Options(Base):
    size: Annotated[int, Meta(ge=1)] = 3
    LIMIT = 4

@register_model("tiny", options=Options, aliases=("small", "wee"))
def build(options, context):
    """Tiny.

    Longer.
    """

@register_plugin("watch")
class Watch:
    pass

raise SystemExit("imported")
'''


def test_a_module_is_read_and_not_run(distributions: Distributions) -> None:
    distributions.install("acme", {}, {"acme.deep.tiny": SOURCE})
    model, plugin = declarations("acme.deep.tiny")
    assert (model.kind, model.names, model.summary) == ("model", ("tiny", "small", "wee"), "Tiny.")
    assert model.keys == {"size", "inherited"}
    assert (plugin.kind, plugin.names, plugin.summary, plugin.keys) == ("plugin", ("watch",), "", frozenset())
    assert distributions.imported() == set()
    assert "acme" not in sys.modules


@pytest.mark.parametrize("imported", ["from acme.shared import Base", "from .shared import Base as Base"])
def test_options_of_another_module_are_read_there(distributions: Distributions, imported: str) -> None:
    tiny = f"""
{imported}

class TinyOptions(Base):
    size: int = 8

@register_model("tiny", options=TinyOptions)
def tiny(options, context): ...

@register_model("plain", options=Base)
def plain(options, context): ...
"""
    # Two modules that import from each other, as some do under TYPE_CHECKING.
    shared = "from acme.tiny import TinyOptions\nclass Base(TinyOptions):\n    shared: int = 1\n"
    distributions.install("acme", {}, {"acme.tiny": tiny, "acme.shared": shared})
    assert [each.keys for each in declarations("acme.tiny")] == [{"size", "shared"}] * 2
    assert distributions.imported() == set()


def test_a_source_that_cannot_be_read_declares_nothing(distributions: Distributions) -> None:
    site = distributions.install("acme", {}, {"acme.wrong": "def ("})
    (site / "acme" / "binary.py").write_bytes(b"\x00\xff")
    for module in ("acme.wrong", "acme.binary", "acme.missing", "missing", "missing.below", "math", "sys"):
        assert declarations(module) == ()
        assert module_summary(module) == ""


def test_a_namespace_package_below_another_is_no_obstacle(distributions: Distributions) -> None:
    site = distributions.install("acme", {"models": {"tiny": "acme_space.deep.deeper.tiny"}}, {})
    distributions.modules.add("acme_space")
    module = site / "acme_space" / "deep" / "deeper" / "tiny.py"
    module.parent.mkdir(parents=True)
    module.write_text(SOURCE)
    forget_installed()
    declarations("acme_space.deep.deeper.tiny")
    assert "acme_space" not in sys.modules


def test_a_finder_that_fails_is_no_obstacle(distributions: Distributions, monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        def find_spec(self, name: str, path: object = None, target: object = None) -> None:
            raise RuntimeError("broken")

    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    distributions.install("acme", {}, {"acme.tiny": SOURCE})
    assert len(declarations("acme.tiny")) == 2


def test_the_docstring_of_a_module_of_hooks_is_its_summary(distributions: Distributions) -> None:
    site = distributions.install("acme", {}, {"acme.hooks": ""})
    (site / "acme" / "hooks.py").write_text('"""Counts steps.\n\nSlowly."""\n')
    assert module_summary("acme.hooks") == "Counts steps."


def test_what_is_read_of_pandas_own_components_is_what_they_register() -> None:
    catalog = Catalog()
    for kind in KINDS:
        for offer in catalog.offers(kind):
            if offer.distribution == "panda-train":
                component = catalog.load(offer)
                declared = offer.declaration
                assert component is not None and declared is not None, offer
                assert set(declared.names) == {component.name, *component.aliases}
                assert declared.summary == component.summary
                assert declared.keys == set(options_of(component.options))
