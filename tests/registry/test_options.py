from __future__ import annotations

from dataclasses import dataclass
from dataclasses import field
from typing import Annotated
from typing import Any
from typing import Literal

import pytest

from panda.configuration.options import RunOptions
from panda.registry import Catalog
from panda.registry import Meta
from panda.registry import UserError
from panda.registry.components import Component
from panda.registry.kinds import KINDS
from panda.registry.options import REQUIRED
from panda.registry.options import Given
from panda.registry.options import build
from panda.registry.options import options_of


@dataclass(frozen=True)
class Base:
    """A base."""

    inherited: int = 1
    """Help of the base."""


@dataclass(frozen=True)
class Sample(Base):
    """Options of every type."""

    count: Annotated[int, Meta(ge=1)] = 2
    """How many.

    Even more of it.
    """
    rate: Annotated[float, Meta(gt=0)] = 0.5
    fraction: Annotated[float, Meta(ge=0, lt=1)] = 0.0
    name: str = "x"
    maybe: str | None = None
    limit: Annotated[int, Meta(ge=1)] | None = None
    flag: bool = False
    precision: Literal["fp32", "bf16"] = "fp32"
    level: Literal[1, 2] = 1
    choice: Literal["auto", True, False] = "auto"
    betas: tuple[Annotated[float, Meta(ge=0, lt=1)], Annotated[float, Meta(ge=0, lt=1)]] = (0.9, 0.99)
    names: tuple[str, ...] = ()
    sizes: tuple[int, ...] = field(default_factory=lambda: (1, 2))
    few: Annotated[tuple[int, ...], Meta(min_length=1, max_length=2)] = (1,)
    block: Annotated[int, Meta(multiple_of=8)] = 8
    code: Annotated[str, Meta(min_length=2, pattern="^[a-z]+$")] = "ab"


def convert(key: str, value: Any, text: str = "") -> Any:
    return options_of(Sample)[key].convert(Given(value, "run.yaml:3", text))


def refusal(key: str, value: Any, text: str = "") -> str:
    with pytest.raises(UserError) as caught:
        convert(key, value, text)
    return str(caught.value)


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("count", "7", 7),
        ("rate", "1e-4", 1e-4),
        ("rate", "2", 2.0),
        ("rate", ".5", 0.5),
        ("name", "no", "no"),
        ("block", "16", 16),
        ("code", "xyz", "xyz"),
        ("name", "1e-4", "1e-4"),
        ("name", "", ""),
        ("maybe", None, None),
        ("maybe", "none", None),
        ("maybe", "something", "something"),
        ("limit", None, None),
        ("limit", "null", None),
        ("limit", "3", 3),
        ("flag", True, True),
        ("flag", "yes", True),
        ("flag", "On", True),
        ("flag", "TRUE", True),
        ("flag", "1", True),
        ("flag", False, False),
        ("flag", "no", False),
        ("flag", "off", False),
        ("flag", "0", False),
        ("precision", "BF16", "bf16"),
        ("level", "2", 2),
        ("level", "1", 1),
        ("choice", "auto", "auto"),
        ("choice", True, True),
        ("choice", "yes", True),
        ("choice", False, False),
        ("choice", "0", False),
        ("betas", "0.9, 0.95", (0.9, 0.95)),
        ("betas", "(0.9, 0.95)", (0.9, 0.95)),
        ("betas", "[0.9,0.95]", (0.9, 0.95)),
        ("betas", ("0.9", "0.95"), (0.9, 0.95)),
        ("names", ("a", "b"), ("a", "b")),
        ("names", "a", ("a",)),
        ("names", (), ()),
        ("names", "Say hello, please.", ("Say hello, please.",)),
        ("sizes", "3, 4, 5", (3, 4, 5)),
        ("sizes", "3", (3,)),
        ("count", "1e3", 1000),
        ("count", "2.0", 2),
        ("count", "9007199254740993", 9007199254740993),
        ("few", "3, 4", (3, 4)),
    ],
)
def test_a_value_is_converted_by_the_type_of_its_option(key: str, value: Any, expected: Any) -> None:
    converted = convert(key, value)
    assert converted == expected
    assert type(converted) is type(expected)


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("count", "0", "'0' is not an integer >= 1."),
        ("count", "1.5", "'1.5' is not an integer >= 1."),
        ("count", "many", "'many' is not an integer >= 1."),
        ("count", False, "'false' is not an integer >= 1."),
        ("rate", "0", "'0' is not a number > 0."),
        ("rate", "1e", "'1e' is not a number > 0."),
        ("rate", "nan", "'nan' is not a number > 0. It has to be finite."),
        ("rate", "inf", "'inf' is not a number > 0. It has to be finite."),
        ("rate", None, "'null' is not a number > 0. Nothing was given."),
        ("fraction", "1", "'1' is not a number >= 0 and < 1."),
        ("fraction", "-inf", "'-inf' is not a number >= 0 and < 1. It has to be finite."),
        ("flag", "maybe", "'maybe' is not true or false."),
        ("precision", "fp8", "'fp8' is not one of fp32, bf16."),
        ("level", "3", "'3' is not one of 1, 2."),
        ("choice", "maybe", "'maybe' is not one of auto, true, false."),
        ("betas", "0.9", "'0.9' is not 2 values, each a number >= 0 and < 1. 1 was given."),
        ("betas", "0.9, 1.5", "'0.9, 1.5' is not 2 values, each a number >= 0 and < 1."),
        ("betas", ("0.9", None), "'0.9, null' is not 2 values, each a number >= 0 and < 1. Nothing was given."),
        ("limit", "0", "'0' is not an integer >= 1, or none."),
        ("name", ("a", "b"), "'a, b' is not a text. A single value was expected, not a list."),
        ("sizes", "3, x", "'3, x' is not a list, each an integer."),
        ("sizes", "010", "'010' is not a list, each an integer."),
        ("sizes", "1_000", "'1_000' is not a list, each an integer."),
        ("sizes", "1e999", "'1e999' is not a list, each an integer. It has to be finite."),
        ("few", "1, 2, 3", "'1, 2, 3' is not a list of a length >= 1 and of a length <= 2, each an integer."),
        ("few", "()", "'()' is not a list of a length >= 1 and of a length <= 2, each an integer."),
        ("block", "12", "'12' is not an integer that is a multiple of 8."),
        ("code", "x", "'x' is not a text of a length >= 2 and that matches ^[a-z]+$."),
        ("code", "X1", "'X1' is not a text of a length >= 2 and that matches ^[a-z]+$."),
    ],
)
def test_a_value_that_does_not_fit_is_refused_with_what_was_expected(key: str, value: Any, expected: str) -> None:
    assert refusal(key, value) == f"run.yaml:3: {key}: {expected}"


def test_no_and_yes_without_quotes_are_told_what_yaml_makes_of_them() -> None:
    assert refusal("name", False, "no") == (
        "run.yaml:3: name: 'no' is not a text."
        " YAML reads an unquoted no, off and false as false: put it in quotes if you mean the word."
    )
    assert "YAML reads an unquoted yes, on and true as true" in refusal("maybe", True, "on")
    assert "YAML reads an unquoted null and ~ as nothing" in refusal("name", None, "~")
    assert "YAML reads an unquoted no" in refusal("precision", False, "no")


def test_a_flag_that_no_value_follows_is_not_said_to_be_true() -> None:
    for key in ("name", "count", "precision", "betas", "names"):
        with pytest.raises(UserError) as caught:
            options_of(Sample)[key].convert(Given(True, f"--{key}", ""))
        assert str(caught.value) == f"--{key}: a value is missing: {options_of(Sample)[key].expects}."
    for key in ("flag", "choice"):
        assert options_of(Sample)[key].convert(Given(True, f"--{key}", "")) is True


def test_the_docstring_under_a_field_is_its_help() -> None:
    options = options_of(Sample)
    assert options["count"].doc == "How many. Even more of it."
    assert options["inherited"].doc == "Help of the base."
    assert options["rate"].doc == ""
    assert list(options)[:2] == ["inherited", "count"]


def test_defaults_are_those_of_the_dataclass() -> None:
    @dataclass(frozen=True)
    class Needs:
        size: int

    assert options_of(Sample)["sizes"].default == (1, 2)
    assert options_of(Needs)["size"].default is REQUIRED


def test_a_type_that_nothing_converts_to_is_refused_by_name() -> None:
    for type_ in (list[str], int | str, tuple[bytes, ...], bytes):

        @dataclass(frozen=True)
        class Odd:
            thing: type_ = None  # type: ignore[valid-type]

        Odd.__annotations__["thing"] = type_
        with pytest.raises(TypeError, match="type"):
            options_of(Odd)


def test_python_objects_are_checked_like_text() -> None:
    assert build(Sample, {"count": 3, "betas": (0.5, 0.6), "level": 2, "flag": True}) == Sample(
        count=3, betas=(0.5, 0.6), level=2, flag=True
    )
    with pytest.raises(UserError, match=r"Sample.count: 0 is not an integer >= 1"):
        build(Sample, {"count": 0})
    with pytest.raises(UserError, match="Sample has no option 'cuont'"):
        build(Sample, {"cuont": 1})


def own_components() -> list[Component]:
    catalog = Catalog()
    offers = [offer for kind in KINDS for offer in catalog.offers(kind) if offer.distribution == "panda-train"]
    loaded = [catalog.load(offer) for offer in offers]
    assert len(loaded) > 15
    return [component for component in loaded if component is not None]


def test_every_option_of_pandas_own_has_help() -> None:
    dataclasses = {RunOptions, *(component.options for component in own_components())}
    without = [
        f"{cls.__name__}.{key}" for cls in dataclasses for key, option in options_of(cls).items() if not option.doc
    ]
    assert without == []


def test_every_component_of_pandas_own_says_what_it_is() -> None:
    assert [component.describe() for component in own_components() if not component.summary] == []


def test_defaults_of_pandas_own_options_are_values_that_they_accept() -> None:
    for cls in {RunOptions, *(component.options for component in own_components())}:
        for option in options_of(cls).values():
            if option.default is not REQUIRED:
                assert option.check(option.default) == option.default, option.key


def test_no_option_of_a_component_has_the_key_of_every_run() -> None:
    core = set(options_of(RunOptions)) | {"config", "help"}
    for component in own_components():
        assert not core & set(options_of(component.options)), component.describe()
