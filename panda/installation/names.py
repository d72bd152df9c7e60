"""What packages declare, against the groups that there are and the sources. Imports none of them."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from collections.abc import Sequence

from panda.installation.findings import Finding
from panda.installation.packages import API_GROUP
from panda.installation.packages import Package
from panda.installation.packages import module_of
from panda.installation.packages import parsed
from panda.installation.packages import plain
from panda.registry.api import checked_api
from panda.registry.declarations import declarations
from panda.registry.declarations import source_file
from panda.registry.errors import UserError
from panda.registry.kinds import KINDS
from panda.registry.offers import OWN_DISTRIBUTION
from panda.registry.offers import kinds


def examine_names(package: Package, every: Sequence[Package]) -> list[Finding]:
    """What is wrong with the names that ``package`` declares, of ``every`` package that there is."""
    return [
        *_lines(package),
        *_groups(package),
        *_api(package),
        *_entries(package),
        *_undeclared(package),
        *_shadowed(package, every),
    ]


def _lines(package: Package) -> Iterator[Finding]:
    for line in parsed(package.text)[1]:
        yield Finding(
            package.label,
            f"entry_points.txt has {line!r}, which is no `name = module`",
            "Mend the entry points of the package, and install it again.",
        )
    if not any(names for group, names in package.declared.items() if group != API_GROUP) and not package.is_own:
        yield Finding(
            package.label,
            "it requires panda-train, and has no entry points for it",
            'Declare its components: `[project.entry-points."panda.models"]` in pyproject.toml, and install it again.'
            " `panda new plugin` makes an example.",
            is_broken=any(declarations(module) for module in package.sources()),
        )


def _groups(package: Package) -> Iterator[Finding]:
    """Entry points in a group that panda does not read."""
    known = {kind.group: kind for kind in kinds().values()}
    for group, names in package.declared.items():
        if group in known or group == API_GROUP:
            continue
        near = difflib.get_close_matches(plain(group), known, n=1, cutoff=0.85)
        meant = f"Write `{near[0]}`" if near else f"Write one of {', '.join(known)}"
        yield Finding(
            f"{package.label} (entry point {group}: {', '.join(f'{name} = {value}' for name, value in names.items())})",
            f"{group!r} is no group that panda reads, so what is declared there does not exist",
            f"{meant}, and install it again. If another package adds that kind, install that.",
        )


def _api(package: Package) -> Iterator[Finding]:
    """A version of panda's API that is none, or that this panda lacks."""
    for name, value in package.declared.get(API_GROUP, {}).items():
        subject = f"{package.label} (entry point {API_GROUP}: {name} = {value})"
        if name != "version":
            yield Finding(subject, f"{name!r} states nothing", 'Write `version = "v1"`, and install it again.')
            continue
        try:
            checked_api(value.removeprefix("v"), "it")
        except UserError as problem:
            yield Finding(subject, str(problem).removeprefix("it: "), "Until then, nothing of it is imported.")


def _entries(package: Package) -> Iterator[Finding]:
    """Entry points whose module is not there, or whose source does not register the name."""
    known = {kind.group: kind.name for kind in kinds().values()}
    for group, names in package.declared.items():
        if group not in known:
            continue
        lower: dict[str, str] = {}
        for name, value in names.items():
            subject, module = f"{package.label} (entry point {group}: {name} = {value})", module_of(value)
            if name.lower() in lower:
                yield Finding(
                    subject,
                    f"{lower[name.lower()]!r} and {name!r} are one name: case does not count",
                    "Rename one of them.",
                )
            lower[name.lower()] = name
            if group == "panda.kinds" and (name in KINDS or not re.fullmatch("[a-z][a-z0-9_]*", name)):
                problem = "is one of panda's own" if name in KINDS else "is no word in small letters"
                yield Finding(subject, f"the kind {name!r} {problem}, so it is not added", "Rename it.")
            yield from _entry(subject, module, known[group], name)


def _entry(subject: str, module: str, kind: str, name: str) -> Iterator[Finding]:
    if not module or module.startswith(".") or not all(part.isidentifier() for part in module.split(".")):
        yield Finding(
            subject, f"{module!r} is no absolute module name", "Write it in full, `acme_panda.rwkv`, and install again."
        )
    elif source_file(module) is None:
        first = module.partition(".")[0]
        reason = f"the module {module!r}" if source_file(first) else f"{first!r}, in which it would be,"
        yield Finding(
            subject,
            f"{reason} is not there: it was renamed, or left out of the package",
            "Name the module that runs the decorator, list its package in `packages`, and install it again.",
        )
    else:
        known = [each for each in declarations(module) if each.kind == kind]
        others = [other for each in known for other in each.names]
        if known and name.lower() not in map(str.lower, others):
            yield Finding(
                subject,
                f"{module} registers {', '.join(map(repr, others))}, and no {kind} {name!r}",
                f'Write `@register_{kind}("{name}")` there, or the name that it registers in the entry point.',
            )


def _undeclared(package: Package) -> Iterator[Finding]:
    """Decorators of which no entry point says that they are there."""
    if package.is_own:
        return
    groups = {kind.name: kind.group for kind in kinds().values()}
    for module in package.sources():
        for each in declarations(module):
            group = groups.get(each.kind)
            names = package.declared.get(group or "", {})
            declared = {name.lower() for name, value in names.items() if module_of(value) == module}
            if group and not declared & {name.lower() for name in each.names}:
                yield Finding(
                    f"{package.label} (module {module}, line {each.line})",
                    f"it registers {each.kind} {each.names[0]!r}, which no entry point names, so nobody finds it",
                    f"Declare `{each.names[0]} = {module}` under `{group}`, and install it again.",
                )


def _shadowed(package: Package, every: Sequence[Package]) -> Iterator[Finding]:
    """Names that others have, too, so that they mean something else or nothing."""
    if package.is_own:
        return
    for group, names in package.declared.items():
        for name, value in names.items() if group != API_GROUP else ():
            having = [
                other
                for other in every
                if other is not package and name.lower() in map(str.lower, other.declared.get(group, {}))
            ]
            subject = f"{package.label} (entry point {group}: {name} = {value})"
            qualified = f"{package.name}:{name}"
            if any(other.is_own for other in having):
                problem = f"panda has {name!r} itself, and that is what the name alone means"
                yield Finding(subject, problem, f"Write `{qualified}` for this one, or rename it.", is_broken=False)
            elif having:
                others = " and ".join(
                    f"{other.label} ({value})" for other in having for value in [_value(other, group, name)]
                )
                problem = f"{name!r} is offered by {others}, too, so the name alone is an error"
                yield Finding(subject, problem, f"Write `{qualified}` where this one is meant.", is_broken=False)
    if any(name.startswith(f"{OWN_DISTRIBUTION}:") for names in package.declared.values() for name in names):
        yield Finding(package.label, "a name has `:` in it", "Names must not contain `:`: rename it.")


def _value(package: Package, group: str, name: str) -> str:
    return next(value for each, value in package.declared[group].items() if each.lower() == name.lower())
