from __future__ import annotations

import functools
import importlib
import sys
from dataclasses import dataclass
from typing import cast

import pytest
from distributions import Distributions

from panda.registry import Catalog
from panda.registry import NoOptions
from panda.registry import UserError
from panda.registry import register_model
from panda.registry import register_optimizer
from panda.registry.components import recorded

ONE_MODEL = """
@register_model("tiny")
def build(options, context):
    '''A tiny model.

    More about it.
    '''
"""


def test_a_component_knows_where_it_came_from(distributions: Distributions) -> None:
    site = distributions.install(
        "acme-panda", {"models": {"tiny": "acme.tiny"}}, {"acme.tiny": ONE_MODEL}, version="2.1"
    )
    catalog = Catalog()
    offer = catalog.find("model", "tiny")
    component = catalog.load(offer)
    assert component is not None
    file = site / "acme" / "tiny.py"
    line = file.read_text().splitlines().index('@register_model("tiny")') + 1
    assert (offer.distribution, offer.version, component.module) == ("acme-panda", "2.1", "acme.tiny")
    assert component.source == (str(file), line)
    assert component.summary == "A tiny model."
    assert component.describe() == f"model 'tiny' at {file}:{line}"


def test_a_class_can_stand_where_the_factory_does(distributions: Distributions) -> None:
    source = """
    @register_plugin("counter")
    class Counter:
        '''Counts.'''

        def __init__(self, options, context): ...
    """
    site = distributions.install("acme", {"plugins": {"counter": "acme.counter"}}, {"acme.counter": source})
    catalog = Catalog()
    component = catalog.load(catalog.find("plugin", "counter"))
    assert component is not None
    file, line = component.source
    assert file == str(site / "acme" / "counter.py")
    assert (site / "acme" / "counter.py").read_text().splitlines()[line - 1] == '@register_plugin("counter")'
    assert component.summary == "Counts."


def test_a_module_that_is_reloaded_registers_the_same_thing_again(distributions: Distributions) -> None:
    distributions.install("acme", {"models": {"tiny": "acme.tiny"}}, {"acme.tiny": ONE_MODEL})
    catalog = Catalog()
    first = catalog.load(catalog.find("model", "tiny"))
    importlib.reload(sys.modules["acme.tiny"])
    second = catalog.load(catalog.find("model", "tiny"))
    assert first is not None and second is not None
    assert first.factory is not second.factory
    assert first.source == second.source


def test_two_things_under_one_name_in_a_module_are_an_error_that_names_both_places(
    distributions: Distributions,
) -> None:
    source = """
    @register_model("tiny")
    def one(options, context): ...

    @register_model("Tiny")
    def other(options, context): ...
    """
    site = distributions.install("acme", {"models": {"tiny": "acme.tiny"}}, {"acme.tiny": source})
    catalog = Catalog()
    with pytest.raises(UserError, match="two components of one name") as caught:
        catalog.load(catalog.find("model", "tiny"))
    lines = (site / "acme" / "tiny.py").read_text().splitlines()
    for name in ("tiny", "Tiny"):
        place = lines.index(f'@register_model("{name}")') + 1
        assert f"model '{name}' at {site / 'acme' / 'tiny.py'}:{place}" in str(caught.value)
    assert "acme 1.0" in str(caught.value)


def test_one_name_for_two_kinds_is_no_conflict(distributions: Distributions) -> None:
    source = """
    @register_model("tiny")
    def model(options, context): ...

    @register_optimizer("tiny")
    def optimizer(options, context): ...
    """
    distributions.install(
        "acme", {"models": {"tiny": "acme.tiny"}, "optimizers": {"tiny": "acme.tiny"}}, {"acme.tiny": source}
    )
    catalog = Catalog()
    for kind in ("model", "optimizer"):
        component = catalog.load(catalog.find(kind, "tiny"))
        assert component is not None and component.factory.__name__ == kind


def test_what_another_package_wrote_belongs_to_the_module_that_registers_it(distributions: Distributions) -> None:
    """Two plugins that wrap one class must not overwrite each other's options."""
    wrapper = """
    from elsewhere.lion import Lion

    @dataclass(frozen=True)
    class LionOptions:
        beta: float = {beta}

    register_optimizer("lion", options=LionOptions)(Lion)
    """
    distributions.install(
        "elsewhere", {}, {"elsewhere.lion": "class Lion:\n    def __init__(self, options, context): ..."}
    )
    for name, beta in (("acme", 0.1), ("bolt", 0.2)):
        distributions.install(
            name, {"optimizers": {"lion": f"{name}.lion"}}, {f"{name}.lion": wrapper.format(beta=beta)}
        )
    catalog = Catalog()
    for name, beta in (("acme", 0.1), ("bolt", 0.2)):
        component = catalog.load(catalog.find("optimizer", f"{name}:lion"))
        assert component is not None and component.options().beta == beta


def test_a_partial_function_can_be_registered(distributions: Distributions) -> None:
    part: functools.partial[object] = functools.partial(dict, a=1)
    register_model("test-partial")(part)
    component = recorded("model", "test-partial", __name__)
    assert component is not None and component.factory is part
    register_model("test-partial")(part)


def test_an_alias_leads_to_the_same_component(distributions: Distributions) -> None:
    source = """
    @register_model("tiny", aliases=("small",))
    def build(options, context): ...
    """
    distributions.install("acme", {"models": {"tiny": "acme.tiny", "small": "acme.tiny"}}, {"acme.tiny": source})
    catalog = Catalog()
    assert catalog.load(catalog.find("model", "SMALL")) is catalog.load(catalog.find("model", "tiny"))


def test_aliases_that_are_one_text_are_refused(distributions: Distributions) -> None:
    with pytest.raises(UserError, match="aliases must be a tuple"):
        register_model("test-alias", aliases=cast("tuple[str, ...]", "small"))


@pytest.mark.parametrize("name", ["", " tiny", "tiny ", "acme:tiny"])
def test_a_name_that_nobody_could_write_is_refused(distributions: Distributions, name: str) -> None:
    with pytest.raises(UserError, match="a name must not"):
        register_model(name)(NoOptions)


def test_options_that_can_change_are_refused(distributions: Distributions) -> None:
    @dataclass
    class Loose:
        size: int = 1

    for options in (Loose, dict):
        with pytest.raises(UserError, match="options must be a frozen dataclass"):
            register_optimizer("test-loose", options=options)(NoOptions)
