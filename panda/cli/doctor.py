"""``panda doctor``: what is wrong with what is installed, and what to do."""

from __future__ import annotations

from panda.cli.command import run_command
from panda.cli.parser import Parser
from panda.installation.findings import Finding
from panda.installation.machine import examine_machine
from panda.installation.machine import facts
from panda.installation.names import examine_names
from panda.installation.packages import Package
from panda.installation.packages import named
from panda.installation.packages import packages
from panda.installation.packages import stale
from panda.installation.probing import probe_modules
from panda.installation.requirements import missing_extras
from panda.installation.requirements import unmet
from panda.installation.user_folder import examine_folder
from panda.registry import UserError
from panda.registry.errors import did_you_mean
from panda.registry.location import resolve_path

BROKEN = 1
"""The exit code where something does not work."""


def main(argv: list[str] | None = None) -> int:
    """Entry point of ``panda doctor``. Returns 1 where something is broken."""
    found: list[Finding] = []
    code = run_command(lambda arguments: found.extend(_examine(arguments)), argv)
    return code or (BROKEN if any(finding.is_broken for finding in found) else 0)


def parser() -> Parser:
    """The flags of ``panda doctor``."""
    parser = Parser(
        prog="panda doctor",
        description="Examine what is installed: metadata, names, requirements, the modules of packages (each imported"
        " in a process of its own), and the machine. Says what to do; the exit code is 1 where something is broken.",
        epilog="example: panda doctor acme-panda",
    )
    parser.add_argument("distribution", nargs="*", help="packages to examine; by default all, and the machine")
    parser.add_argument(
        "--user_dir", "--user-dir", metavar="FOLDER", help="examine only the components in its files, which it imports"
    )
    parser.values["distribution"] = lambda _: (package.name for package in packages())
    return parser


def _examine(argv: list[str]) -> list[Finding]:
    arguments = parser().parse_args(argv)
    every = packages()
    chosen = [_chosen(every, name) for name in arguments.distribution]
    found: list[Finding] = []
    if arguments.user_dir is not None:
        folder = resolve_path(arguments.user_dir).absolute()
        offers, findings = examine_folder(folder)
        print(f"{folder}: {', '.join(offer.label for offer in offers) or 'no components'}")
        found += _printed(findings)
    elif not chosen:
        print("\n".join(facts()))
        found += _printed(examine_machine())
        chosen = every
    for package in chosen:
        found += _examine_package(package, every)
    broken = sum(finding.is_broken for finding in found)
    print(f"\n{broken} broken, {len(found) - broken} to look at" if found else "\nnothing is wrong")
    return found


def _examine_package(package: Package, every: list[Package]) -> list[Finding]:
    """Print and return what is wrong with ``package``."""
    print(f"\n{package.label}: {package.offered}", flush=True)
    found = _printed([*stale(package), *unmet(package), *examine_names(package, every)])
    said = {finding.subject for finding in found}
    for probed in [] if package.is_own else probe_modules(package):
        print(f"  {probed.module}: imported in {probed.seconds:.2f} s", flush=True)
        found += _printed([finding for finding in probed.findings if finding.subject not in said])
    for extra, missing in missing_extras(package).items():
        print(f"  extra {extra}: {', '.join(missing)} not installed")
    return found


def _chosen(every: list[Package], name: str) -> Package:
    package = named(every, name)
    if package is None:
        known = [each.name for each in every]
        raise UserError(
            f"{name}: no installed distribution of that name offers anything to panda or requires it."
            f"{did_you_mean(name, known)} There are: {', '.join(known)}."
        )
    return package


def _printed(findings: list[Finding]) -> list[Finding]:
    for finding in findings:
        print(f"  {'BROKEN' if finding.is_broken else 'note  '}  {finding}", flush=True)
    return findings
