"""What distributions require, against what is installed."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator

from packaging.requirements import InvalidRequirement
from packaging.requirements import Requirement

from panda.installation.findings import Finding
from panda.installation.packages import Package


def unmet(package: Package) -> list[Finding]:
    """The requirements of ``package`` that are not met; of extras only versions that do not fit."""
    found = []
    for text, requirement, extra in _requirements(package):
        if requirement is None:
            problem = f"its requirement {text!r} cannot be read"
            found.append(Finding(package.label, problem, "Mend `dependencies` of the package.", is_broken=False))
            continue
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            if not extra:
                advice = f"`pip install '{_plainly(requirement)}'`."
                found.append(Finding(package.label, f"it requires {text}, which is not installed", advice))
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            of = f"its extra {extra!r}" if extra else "it"
            found.append(
                Finding(
                    package.label,
                    f"{of} requires {_plainly(requirement)}, and {requirement.name} {version} is installed",
                    f"`pip install '{_plainly(requirement)}'`, or a version of {package.name} for what is installed.",
                    is_broken=not extra,
                )
            )
    return found


def missing_extras(package: Package) -> dict[str, list[str]]:
    """Of each extra of which something is not installed, what: for information."""
    missing: dict[str, list[str]] = {}
    for _, requirement, extra in _requirements(package):
        if requirement is not None and extra:
            try:
                importlib.metadata.version(requirement.name)
            except importlib.metadata.PackageNotFoundError:
                missing.setdefault(extra, []).append(requirement.name)
    return missing


def _requirements(package: Package) -> Iterator[tuple[str, Requirement | None, str]]:
    """Each that holds on this machine: its text, parsed, and the extra that it belongs to, or empty."""
    extras = package.distribution.metadata.get_all("Provides-Extra") or []
    for text in package.distribution.requires or []:
        try:
            requirement = Requirement(text)
        except InvalidRequirement:
            yield text, None, ""
            continue
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            yield text, requirement, ""
            continue
        for extra in extras:
            if requirement.marker.evaluate({"extra": extra}):
                yield text, requirement, extra


def _plainly(requirement: Requirement) -> str:
    extras = f"[{','.join(sorted(requirement.extras))}]" if requirement.extras else ""
    return f"{requirement.name}{extras}{requirement.specifier}"
