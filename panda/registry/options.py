"""Options: the fields of a frozen dataclass are YAML keys, flags, help and validation at once.

    @dataclass(frozen=True)
    class WarmupOptions:
        \"\"\"Options of the warm-up.\"\"\"

        warmup_steps: Annotated[int, Meta(ge=0)] = 50
        \"\"\"Optimizer steps over which the learning rate rises to its peak.\"\"\"

A type is one of int, float, str, bool, Literal[...], tuple[...] of these, or any of them
``| None``; ``Meta`` gives bounds, and ``Location`` marks a path. The docstring under a
field is its help. A ``__post_init__`` that raises UserError refuses combinations of values.
"""

from __future__ import annotations

import ast
import functools
import inspect
import itertools
import math
import operator
import os
import re
import textwrap
import types
import typing
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
from dataclasses import MISSING
from dataclasses import dataclass
from dataclasses import fields
from typing import Annotated
from typing import Any
from typing import Literal

from panda.registry.errors import UserError
from panda.registry.location import Location as Location
from panda.registry.location import problem_of_path
from panda.registry.location import resolve_path

REQUIRED: Any = MISSING
"""Default of an option without one: the user has to give a value."""


@dataclass(frozen=True, kw_only=True)
class Meta:
    """Bounds of an option's value: ``Annotated[int, Meta(ge=1)]``. None is no bound."""

    ge: float | None = None
    gt: float | None = None
    le: float | None = None
    lt: float | None = None
    multiple_of: float | None = None
    min_length: int | None = None
    """Of a text, in characters, or of a list."""
    max_length: int | None = None
    pattern: str | None = None
    """A regular expression that matches somewhere in the text: ``^`` and ``$`` make it the whole."""

    @property
    def asked(self) -> dict[str, Any]:
        """The bounds that are not None."""
        return {name: bound for name, bound in vars(self).items() if bound is not None}


@dataclass(frozen=True)
class Names:
    """Marks an option whose text, or each of whose texts, names a component: ``Annotated[str, Names("reward")]``.

    Those components are then chosen by the run, and their options are keys of it.
    """

    kind: str
    """A kind that a package adds. Panda's own kinds have keys of their own."""


@dataclass(frozen=True)
class OfEvaluations:
    """Marks an option whose text names a number in the records of evaluations: ``Annotated[str, OfEvaluations()]``.

    A name that no evaluation of the run will have is refused before its data is read.
    """


@dataclass(frozen=True)
class Given:
    """A value as it was written, before its option is known."""

    value: str | bool | float | tuple[str | bool | float | None, ...] | None
    """Text for text and numbers, which Python code may give as such; True, False or None where YAML reads it so."""
    origin: str
    """Where it was written: ``run.yaml:3`` or ``--learning_rate``."""
    text: str = ""
    """Its characters, for messages."""
    is_nested: bool = False
    """Whether it is no scalar and no list of these, which no option takes; ``value`` is then only True."""

    def nested_problem(self, key: str) -> str:
        """What to say of ``key``, which has this nested value."""
        return (
            f"{self.origin}: the value of {key!r} is nested. panda's configuration is flat: one level, `key: value`,"
            " where a value is a scalar or a list of scalars. `panda translate` writes files of other tools so."
        )


@dataclass(frozen=True)
class Option:
    """One field of an options dataclass."""

    key: str
    type: Any
    default: Any
    doc: str

    @property
    def expects(self) -> str:
        """The values that are accepted, in words: ``an integer >= 1``."""
        return _describe(self.type)

    @property
    def location(self) -> Location | None:
        """The mark of a path; None for other options."""
        base, _, _, location = _parts(self.type)
        return _parts(typing.get_args(base)[0])[3] if self.is_list and location is None else location

    @property
    def is_list(self) -> bool:
        """Whether its value is a list."""
        return typing.get_origin(_parts(self.type)[0]) is tuple

    @property
    def choices(self) -> tuple[str, ...]:
        """The values that can be listed, as they are written; none for numbers and texts."""
        base = _parts(typing.get_args(self.type)[0])[0] if self.is_list else _parts(self.type)[0]
        if base is bool:
            return "true", "false"
        return tuple(map(str, typing.get_args(base))) if typing.get_origin(base) is Literal else ()

    @property
    def names(self) -> str | None:
        """The kind of the components that it names; None for other options."""
        return next((mark.kind for mark in self._marks() if isinstance(mark, Names)), None)

    @property
    def is_of_evaluations(self) -> bool:
        """Whether it names a number in the records of evaluations."""
        return any(isinstance(mark, OfEvaluations) for mark in self._marks())

    def _marks(self) -> Iterator[Any]:
        types = [self.type, *typing.get_args(self.type)]  # Annotated, or Annotated | None
        return (extra for each in types if typing.get_origin(each) is Annotated for extra in typing.get_args(each)[1:])

    def convert(self, given: Given) -> Any:
        """The value of this option that ``given`` stands for. Raises UserError for a value that does not fit."""
        if given.is_nested:
            raise UserError(given.nested_problem(self.key))
        is_own_flag = given.origin.removeprefix("--").replace("-", "_") == self.key
        at = given.origin if is_own_flag else f"{given.origin}: {self.key}"
        try:
            converted = _convert(self.type, given.value)
            if converted == "" and self.location and self.default != "":  # `--ckpt_path=$VARIABLE`, which is not set
                raise ValueError("It is empty: leave it out, or name a path; `.` is the working folder.")
            return converted
        except ValueError as problem:
            if given.value is True and not given.text:  # a flag that nothing follows
                raise UserError(f"{at}: a value is missing: {self.expects}.") from None
            shown = given.text or _as_text(given.value)
            shown = shown if len(shown) <= _SHOWN else f"{shown[:_SHOWN]}..."
            detail = f" {problem}" if str(problem) else ""
            raise UserError(f"{at}: {shown!r} is not {self.expects}.{detail}") from None

    def check(self, value: Any) -> Any:
        """``value``, a Python object, converted to this option's type. Raises ValueError where it does not fit."""
        return _convert(self.type, value)


@functools.cache
def options_of(cls: type) -> dict[str, Option]:
    """The options that the dataclass ``cls`` declares, in order."""
    hints = typing.get_type_hints(cls, include_extras=True)
    for field in fields(cls):
        _check_type(field.name, hints[field.name])
    docs = _field_docs(cls)
    return {
        field.name: Option(
            field.name,
            hints[field.name],
            field.default if field.default_factory is MISSING else field.default_factory(),
            docs.get(field.name, ""),
        )
        for field in fields(cls)
    }


def build(cls: type, values: Mapping[str, Any]) -> Any:
    """An instance of the options dataclass ``cls``, for code without a configuration file.

    Raises UserError for an unknown option or a value out of bounds.
    """
    known = options_of(cls)
    checked = {}
    for key, value in values.items():
        if key not in known:
            raise UserError(f"{cls.__name__} has no option {key!r}; it has: {', '.join(known) or 'none'}.")
        try:
            checked[key] = known[key].check(value)
        except ValueError as problem:
            raise UserError(f"{cls.__name__}.{key}: {value!r} is not {known[key].expects}. {problem}") from None
    return cls(**checked)


def _field_docs(cls: type) -> dict[str, str]:
    """Docstrings under the fields of ``cls`` and its bases, which only the source has."""
    docs: dict[str, str] = {}
    for base in reversed(cls.__mro__[:-1]):
        try:
            source = textwrap.dedent(inspect.getsource(base))
        except (OSError, TypeError):  # typed at a prompt, or a frozen application
            continue
        body = ast.parse(source).body[0].body  # type: ignore[attr-defined]
        for statement, following in itertools.pairwise(body):
            if (
                isinstance(statement, ast.AnnAssign)
                and isinstance(statement.target, ast.Name)
                and isinstance(following, ast.Expr)
                and isinstance(following.value, ast.Constant)
                and isinstance(following.value.value, str)
            ):
                docs[statement.target.id] = " ".join(following.value.value.split())
    return docs


def _parts(type_: Any) -> tuple[Any, Meta | None, bool, Location | None]:
    """The type without its wrappings, its bounds, whether None is allowed, and its mark as a path."""
    bounds = location = None
    optional = False
    while True:
        origin = typing.get_origin(type_)
        if origin is Annotated:
            type_, *extras = typing.get_args(type_)
            bounds = next((extra for extra in extras if isinstance(extra, Meta)), bounds)
            location = next((extra for extra in extras if isinstance(extra, Location)), location)
        elif origin in (typing.Union, types.UnionType):
            members = [member for member in typing.get_args(type_) if member is not type(None)]
            if len(members) != 1:
                raise TypeError(f"an option's type must be one type, or one type | None, not {type_}")
            optional, type_ = True, members[0]
        else:
            return type_, bounds, optional, location


def _check_type(key: str, type_: Any) -> None:
    """Raise TypeError for a type that no option can have."""
    base = _parts(type_)[0]
    if typing.get_origin(base) is tuple and typing.get_args(base):
        for member in typing.get_args(base):
            if member is not Ellipsis:
                _check_type(key, member)
    elif base not in (int, float, str, bool) and typing.get_origin(base) is not Literal:
        raise TypeError(
            f"option {key!r} has the type {type_}; panda's are int, float, str, bool, Literal, tuple of these,"
            " and any of them | None"
        )


def _describe(type_: Any) -> str:
    base, bounds, optional, _ = _parts(type_)
    words = [f" {_BOUNDS[name][0]} {bound}" for name, bound in bounds.asked.items()] if bounds else []
    limits = " and".join(words)
    if typing.get_origin(base) is Literal:
        choices = (str(choice).lower() if isinstance(choice, bool) else str(choice) for choice in typing.get_args(base))
        text = f"one of {', '.join(choices)}{limits}"
    elif typing.get_origin(base) is tuple:
        members = typing.get_args(base)
        several = "a list" if members[-1] is Ellipsis else f"{len(members)} values"
        text = f"{several}{limits}, each {_describe(members[0])}"
    else:
        plain = {int: "an integer", float: "a number", str: "a text", bool: "true or false"}[base]
        text = f"{plain}{limits}"
    return text + (", or none" if optional else "")


_BOUNDS: dict[str, tuple[str, Callable[[Any, Any], bool]]] = {
    "ge": (">=", operator.ge),
    "gt": (">", operator.gt),
    "le": ("<=", operator.le),
    "lt": ("<", operator.lt),
    "multiple_of": ("that is a multiple of", lambda value, factor: value % factor == 0),
    "min_length": ("of a length >=", lambda value, length: len(value) >= length),
    "max_length": ("of a length <=", lambda value, length: len(value) <= length),
    "pattern": ("that matches", lambda value, pattern: re.search(pattern, value) is not None),
}
"""Fields of ``Meta``: in words, and whether a value keeps to one."""


def _as_text(value: Any) -> str:
    if isinstance(value, tuple):
        return ", ".join(map(_as_text, value))
    return {True: "true", False: "false", None: "null"}.get(value, value) if not isinstance(value, str) else value


def _convert(type_: Any, value: Any) -> Any:
    """``value`` as a ``type_``. Raises ValueError; its text is a hint, or empty."""
    base, bounds, optional, location = _parts(type_)
    if value is None or (isinstance(value, str) and value.strip().lower() in ("none", "null", "~")):
        if optional:
            return None
        if value is None:
            raise ValueError("Nothing was given." if base is not str else _yaml_words("null"))
    converted = _convert_plain(base, value)
    if location and isinstance(converted, str) and converted and (problem := problem_of_path(converted)):
        raise ValueError(problem)
    if bounds and not all(_BOUNDS[name][1](converted, bound) for name, bound in bounds.asked.items()):
        raise ValueError("")
    return converted


def _convert_plain(base: Any, value: Any) -> Any:
    """``value`` as a ``base``, a type without wrappings, whatever its bounds."""
    if typing.get_origin(base) is tuple:
        return _convert_tuple(typing.get_args(base), value)
    is_literal = typing.get_origin(base) is Literal
    if base is bool or (is_literal and any(isinstance(choice, bool) for choice in typing.get_args(base))):
        if isinstance(value, bool):
            return value
        if isinstance(value, str) and value.lower() in _BOOLS:
            return _BOOLS[value.lower()]
        if base is bool:
            raise ValueError("")
    if isinstance(value, bool):
        raise ValueError("" if base in (int, float) else _yaml_words(value))
    if isinstance(value, (tuple, list)):
        raise ValueError("" if is_literal else "A single value was expected, not a list.")
    if is_literal:
        choices = {str(choice).lower(): choice for choice in typing.get_args(base)}
        if str(value).lower() in choices:
            return choices[str(value).lower()]
        raise ValueError("")
    if base is str:
        if not isinstance(value, str):
            raise ValueError("")
        if any("\ud800" <= character <= "\udfff" for character in value):
            raise ValueError("It is not UTF-8.")
        return value
    return _convert_number(base, value)


_BOOLS = {
    **dict.fromkeys(("true", "yes", "on", "1"), True),
    **dict.fromkeys(("false", "no", "off", "0"), False),
}


_COMMA = "It is one number, with a point for its fraction; `panda sweep` trains several values."


def _convert_number(base: type[int] | type[float], value: Any) -> int | float:
    if isinstance(value, str) and base is int and not _NUMBER.fullmatch(value):
        raise ValueError(_COMMA if "," in value else "")
    if isinstance(value, str):
        try:
            value = int(value) if base is int and value.lstrip("-").isdigit() else float(value)
        except ValueError:  # without what Python says of it
            raise ValueError(_COMMA if "," in value else "") from None
    if not isinstance(value, (int, float)):
        raise ValueError("")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError("It has to be finite.")
    try:
        converted = base(value)
    except OverflowError:  # of an integer, to a float
        raise ValueError("") from None
    if converted != value:  # an integer with a fraction
        raise ValueError("")
    if base is int and abs(converted) > _LARGEST:
        raise ValueError("It is too large.")
    return converted


_LARGEST = 2**63 - 1
"""Of integers, as of those that torch and numpy compute with."""
_SHOWN = 200
"""Characters of a wrong value in a message."""
_NUMBER = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?")
"""As JSON has them: ``1e3`` is an integer, and ``010``, of which YAML 1.1 makes 8, is none."""


def _convert_tuple(members: tuple[Any, ...], value: Any) -> tuple[Any, ...]:
    several = members[-1] is Ellipsis
    if isinstance(value, str) and several and _parts(members[0])[0] is str and not _has_paths(members[0], value):
        value = [value]  # one text: a prompt may hold commas
    if isinstance(value, (int, float)) and not isinstance(value, bool) and several:
        value = [value]
    if isinstance(value, str):
        inner = value.strip()
        if inner[:1] + inner[-1:] in ("()", "[]"):
            inner = inner[1:-1]
        value = [item.strip() for item in inner.split(",") if item.strip()]
    if not isinstance(value, (tuple, list)):
        raise ValueError("")
    if members[-1] is Ellipsis:
        members = (members[0],) * len(value)
    if len(value) != len(members):
        raise ValueError(f"{len(value)} {'was' if len(value) == 1 else 'were'} given.")
    return tuple(_convert(member, item) for member, item in zip(members, value, strict=True))


def _has_paths(member: Any, value: str) -> bool:
    """Whether ``value``, a list of ``member`` in one text, has paths between commas, and is not a path with commas."""
    location = _parts(member)[3]
    return location is not None and location.holds_data and not os.path.exists(resolve_path(value))


def _yaml_words(value: Any) -> str:
    word = {True: "yes, on and true", False: "no, off and false"}.get(value, "null and ~")
    kind = {True: "true", False: "false"}.get(value, "nothing")
    return f"YAML reads an unquoted {word} as {kind}: put it in quotes if you mean the word."
