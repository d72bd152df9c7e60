"""Imports the modules of packages, each in a process of its own, and says what is wrong with what they register."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from panda.installation.findings import Finding
from panda.installation.packages import Package
from panda.registry.declarations import source_file

TIMEOUT = 120.0
"""Seconds in which a module has to be imported."""
SLOW = 1.0
"""Seconds: help and errors wait for the import."""


@dataclass(frozen=True)
class Probed:
    """What importing a module showed."""

    module: str
    seconds: float
    heavy: tuple[str, ...]
    components: int
    options: int
    findings: tuple[Finding, ...]


def probe_modules(package: Package) -> list[Probed]:
    """Import every module that the entry points of ``package`` name and that is there."""
    modules = [module for module in package.modules if module and source_file(module) is not None]
    with ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1)) as pool:
        return list(pool.map(partial(_probed, package), modules))


def _probed(package: Package, module: str) -> Probed:
    subject = f"{package.label} (module {module})"
    with tempfile.TemporaryDirectory(prefix="panda-probe-") as folder:
        answer = Path(folder) / "answer.json"
        paths = os.pathsep.join(filter(None, sys.path))  # as this process finds packages
        command = [sys.executable, "-P", "-m", "panda.installation.probe", package.name, module, str(answer)]
        environment = {**os.environ, "PYTHONPATH": paths}
        try:
            done = subprocess.run(
                command, cwd=folder, env=environment, capture_output=True, text=True, timeout=TIMEOUT, check=False
            )
        except subprocess.TimeoutExpired:
            problem = f"importing it has not ended after {TIMEOUT:.0f} s"
            advice = "Do no work at the top of a module: leave it to the factory."
            return _without(module, Finding(subject, problem, advice))
        if not answer.exists():
            last = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:] or ["nothing was printed"]
            problem = f"importing it ended the process with exit code {done.returncode}: {last[0]}"
            return _without(module, Finding(subject, problem, "Do not end the process at the top of a module."))
        found: dict[str, Any] = json.loads(answer.read_text())
    findings = [*_import_findings(subject, found), *_component_findings(found)]
    options = sum(each["options"] for each in found["components"])
    return Probed(module, found["seconds"], tuple(found["heavy"]), len(found["components"]), options, tuple(findings))


def _without(module: str, finding: Finding) -> Probed:
    return Probed(module, 0.0, (), 0, 0, (finding,))


def _import_findings(subject: str, found: dict[str, Any]) -> list[Finding]:
    """What is wrong with importing a module."""
    findings = []
    if found["problem"]:
        advice = "Mend the module, or install what it lacks. `PANDA_TRACEBACK=1 panda show KIND NAME` shows all."
        findings.append(Finding(subject, f"it cannot be imported: {found['problem']}", advice))
    if found["heavy"]:
        problem = f"importing it imports {', '.join(found['heavy'])}, in {found['seconds']:.1f} s in all"
        advice = "Import them in the factory: help, lists and errors of who names the component wait for the module."
        findings.append(Finding(subject, problem, advice, is_broken=False))
    elif found["seconds"] > SLOW:
        problem = f"importing it takes {found['seconds']:.1f} s"
        findings.append(Finding(subject, problem, "Leave work to the factory.", is_broken=False))
    if found["printed"]:
        problem = f"importing it prints {found['printed'].strip()[:60]!r}"
        advice = "Print nothing at the top of a module: `panda list --json` and every rank would."
        findings.append(Finding(subject, problem, advice, is_broken=False))
    for change in found["changes"]:
        advice = "Change nothing of the process at the top of a module."
        findings.append(Finding(subject, change, advice))
    return findings


def _component_findings(found: dict[str, Any]) -> list[Finding]:
    """What is wrong with the components of a module."""
    return [
        Finding(
            each["subject"], problem.replace(f"{each['subject']}: ", "").replace(f"{each['subject']} ", "it "), advice
        )
        for each in found["components"]
        for problem, advice in each["problems"]
    ]
