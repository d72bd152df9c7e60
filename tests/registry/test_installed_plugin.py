"""The public door, as a stranger goes through it: pip builds and installs a package, a YAML names what it adds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

SETUP = """
[metadata]
name = {name}
version = {version}

[options]
packages = find:

[options.entry_points]
{entry_points}
"""

ACME = {
    "setup.cfg": SETUP.format(
        name="acme-panda",
        version="1.2.3",
        entry_points="""
panda.models =
    acme-bigram = acme_panda.bigram
panda.archs =
    acme-bigram-small = acme_panda.bigram
panda.optimizers =
    acme-descent = acme_panda.descent
""",
    ),
    "acme_panda/__init__.py": "",
    "acme_panda/bigram.py": '''
"""A model of one embedding and one linear map, its arch, and a hook."""

from dataclasses import dataclass
from typing import Annotated

from panda.registry import Meta
from panda.registry import hookimpl
from panda.registry import register_arch
from panda.registry import register_model


@dataclass(frozen=True)
class BigramOptions:
    """Options of the bigram model."""

    width: Annotated[int, Meta(ge=1)] = 8
    """Width of the embedding."""


@register_model("acme-bigram", options=BigramOptions)
def build_bigram(options, context):
    """The next token from the last one."""
    import torch

    class Bigram(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = torch.nn.Embedding(context.vocab_size, options.width)
            self.head = torch.nn.Linear(options.width, context.vocab_size)

        def forward(self, input_ids):
            return self.head(self.embedding(input_ids))

    return Bigram()


@register_arch("acme-bigram-small", model="acme-bigram")
def small():
    """A bigram model of 16."""
    return {"width": 16}


@hookimpl
def panda_run_start(run):
    print("acme is here")
''',
    "acme_panda/descent.py": '''
"""Gradient descent."""

from dataclasses import dataclass
from typing import Annotated

from panda.registry import Meta
from panda.registry import register_optimizer


@dataclass(frozen=True)
class DescentOptions:
    """Options of gradient descent."""

    momentum: Annotated[float, Meta(ge=0, lt=1)] = 0.0
    """Part of the last step that is taken again."""


@register_optimizer("acme-descent", options=DescentOptions)
def build_descent(options, context):
    """Stochastic gradient descent."""
    from torch.optim import SGD

    return SGD(context.param_groups, momentum=options.momentum)
''',
}

BROKEN = {
    "setup.cfg": SETUP.format(
        name="broken-panda",
        version="0.1",
        entry_points="""
panda.models =
    broken-raising = broken_panda.raising
    broken-promise = broken_panda.promise
panda.optimizers =
    adamw = broken_panda.raising
panda.plugins =
    broken-hook = broken_panda.hook
    progress = broken_panda.raising
""",
    ),
    "broken_panda/__init__.py": "raise RuntimeError('broken, and imported')\n",
    "broken_panda/raising.py": "",
    "broken_panda/promise.py": "",
    "broken_panda/hook.py": "",
}
"""Nothing of it can be imported, and it offers names of panda's own."""

HALF_BROKEN = {
    "setup.cfg": SETUP.format(
        name="half-panda",
        version="0.2",
        entry_points="""
panda.models =
    half-promise = half_panda.promise
panda.plugins =
    half-hook = half_panda.hook
    half-token = half_panda.token
""",
    ),
    "half_panda/__init__.py": "",
    "half_panda/promise.py": "",
    "half_panda/token.py": """
from panda.registry import UserError, register_plugin


@register_plugin("half-token")
def build(options, context):
    raise UserError("half-token: log in first")
""",
    "half_panda/hook.py": """
from panda.registry import hookimpl

@hookimpl
def panda_step_ned(run, step):
    pass
""",
}

PIP = (sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check")
OFFLINE = ("--no-index", "--no-deps", "--no-build-isolation", "--no-compile")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which pip has installed the three distributions."""
    folder = tmp_path_factory.mktemp("plugins")
    sources = []
    for name, files in (("acme", ACME), ("broken", BROKEN), ("half", HALF_BROKEN)):
        sources.append(str(folder / name))
        for file, text in files.items():
            path = folder / name / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(textwrap.dedent(text))
        (folder / name / "pyproject.toml").write_text(
            '[build-system]\nrequires = ["setuptools"]\nbuild-backend = "setuptools.build_meta"\n'
        )
    target = folder / "site"
    subprocess.run(
        [*PIP, *OFFLINE, "--target", str(target), *sources],
        check=True,
        timeout=900,
    )
    return target


def run(site: Path, cwd: Path, program: str, *argv: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(Path(sys.executable).with_name(program)), *argv],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        timeout=900,
    )


CONFIG = """
arch: acme-bigram-small
optimizer: acme-descent
momentum: 0.5
learning_rate: 1e-2
instruction_tuning_data_dir: panda:data/sample/instruct
"""
DATA = ("--instruction_tuning_data_dir", "panda:data/sample/instruct")
SMALL = (
    *("--num_workers", "0", "--gradient_accumulation_steps", "1", "--max_seq_length", "64", "--max_steps", "2"),
    *("-p", "no:plot", "-p", "no:tensorboard"),
)


def test_a_yaml_trains_what_an_installed_package_adds_beside_broken_ones(site: Path, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(CONFIG)
    done = run(site, tmp_path, "panda-train", "--config", "run.yaml", "--output_dir", "out", *SMALL)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "acme is here" in done.stdout
    provenance = json.loads((tmp_path / "out" / "provenance.json").read_text())
    components = provenance["components"]
    for label, file in (("model acme-bigram", "bigram.py"), ("optimizer acme-descent", "descent.py")):
        found = components[label]
        path, _, line = found["source"].rpartition(":")
        assert (found["distribution"], found["version"]) == ("acme-panda", "1.2.3")
        assert Path(path) == site / "acme_panda" / file
        assert Path(path).read_text().splitlines()[int(line) - 1].startswith(f'@register_{label.split()[0]}("')
    assert components["arch acme-bigram-small"]["module"] == "acme_panda.bigram"
    assert components["task instruct"]["distribution"] == "panda-train"
    assert provenance["origins"]["momentum"] == "run.yaml:4"
    assert provenance["origins"]["width"] == "arch acme-bigram-small"
    records = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [1, 2]


def test_listing_shows_the_broken_ones_and_imports_none(site: Path, tmp_path: Path) -> None:
    done = run(site, tmp_path, "panda", "list", "--json")
    assert done.returncode == 0 and done.stderr == ""
    rows = {(row["distribution"], row["name"]): row for row in json.loads(done.stdout)}
    assert rows["acme-panda", "acme-descent"]["summary"] == "Stochastic gradient descent."
    assert ("broken-panda", "broken-hook") in rows and ("half-panda", "half-promise") in rows
    shown = run(site, tmp_path, "panda", "show", "model", "acme-bigram")
    assert shown.returncode == 0 and "from     acme-panda 1.2.3" in shown.stdout
    helped = run(site, tmp_path, "panda-train", "--help", "--arch", "acme-bigram-small")
    assert helped.returncode == 0 and "  --width [16, of acme-bigram-small]" in helped.stdout


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (
            ["--model", "broken-raising"],
            ["could not import broken_panda.raising", "broken-panda 0.1", "RuntimeError: broken, and imported"],
        ),
        (["--model", "half-promise"], ["half-panda 0.2", "promises model 'half-promise'", "it registers no model"]),
        (
            ["--arch", "llama-tiny", "--plugins", "half-hook"],
            ["half-panda 0.2", "'panda_step_ned' is no hook of panda's. Did you mean 'panda_step_end'"],
        ),
        (["--arch", "llama-tiny", "--plugins", "half-token", *DATA], ["half-token: log in first"]),
        (
            ["--arch", "llama-tiny", "--optimizer", "broken-panda:adamw"],
            ["could not import broken_panda.raising", "broken-panda 0.1"],
        ),
        (["--model", "broken-raising", "-p", "no:broken-panda"], ["broken-panda 0.1", "blocked by `-p no:`"]),
    ],
)
def test_naming_what_is_broken_is_an_explained_error(
    site: Path, tmp_path: Path, argv: list[str], parts: list[str]
) -> None:
    done = run(site, tmp_path, "panda-train", *argv, *SMALL)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: ") and "Traceback" not in done.stderr
    for part in parts:
        assert part in done.stderr
    assert list(tmp_path.iterdir()) == []
