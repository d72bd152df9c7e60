"""Whether a package is declared and built as panda relies on: ``check_plugin("acme-panda")``."""

from __future__ import annotations

from panda.files.terminal import number_of
from panda.installation.findings import Finding
from panda.installation.names import examine_names
from panda.installation.packages import named
from panda.installation.packages import packages
from panda.installation.packages import stale
from panda.installation.probing import probe_modules
from panda.installation.requirements import unmet
from panda.testing.report import Report


def check_plugin(distribution: str) -> None:
    """Check the installed package ``distribution``.

    Its metadata must be what its sources declare, and its requirements met; every name that it declares must be
    registered by the module that it names, and every component that it registers declared. Each module is imported in a
    process of its own: it must import nothing heavy, print nothing and change nothing. Options must have help, and
    defaults that they take; components descriptions; hooks must be ones. Prints a line for each, and raises
    AssertionError that says what is broken and what to do.
    """
    every = packages()
    package = named(every, distribution)
    if package is None:
        raise AssertionError(
            f"check_plugin: no installed distribution {distribution!r} offers anything to panda. Install the package,"
            " `pip install -e .`, and write its name as there."
        )
    report = Report(f"check_plugin {package.label}")
    _told(report, "installation", stale(package) + unmet(package), "metadata and requirements are as they should be")
    _told(report, "names", examine_names(package, every), f"declared and registered ({package.offered})")
    for probed in probe_modules(package):
        rules = [*probed.findings]
        for finding in rules:
            # What takes long here may not elsewhere; what is imported does not depend on the machine.
            if finding.is_broken or probed.heavy or "prints" in finding.problem:
                report.broken(probed.module, f"{finding.subject}: {finding.problem}", finding.advice)
            else:
                report.note(probed.module, f"{finding.problem}. {finding.advice}")
        if not rules:
            found = f"{number_of(probed.components, 'component')} with {number_of(probed.options, 'option')}"
            report.kept(probed.module, f"imported in {probed.seconds:.2f} s without anything heavy; {found}")
    report.finish()


def _told(report: Report, promise: str, findings: list[Finding], kept: str) -> None:
    """Report ``findings``, or what is ``kept`` where nothing is broken."""
    for finding in findings:
        if finding.is_broken:
            report.broken(promise, f"{finding.subject}: {finding.problem}", finding.advice)
        else:
            report.note(promise, f"{finding.subject}: {finding.problem}. {finding.advice}")
    if not any(finding.is_broken for finding in findings):
        report.kept(promise, kept)
