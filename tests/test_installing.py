"""Installing packages changes no run that does not name them: not one bit, whatever they offer."""

from __future__ import annotations

import filecmp
import json
from collections.abc import Iterator
from configparser import ConfigParser
from pathlib import Path

import pytest
import torch
import yaml
from distributions import IMPORTS
from launching import run_panda

from panda.configuration.options import RunOptions
from panda.registry import Catalog
from panda.registry.kinds import KINDS
from panda.registry.options import options_of

PLUGINS = Path(__file__).parents[1] / "plugins"

OPTIONS = "\n".join(
    ["@dataclass(frozen=True)", "class Options:", *(f"    {key}: str = ''" for key in options_of(RunOptions)), ""]
)
"""Options with the names of all core keys."""

TINY = {
    **{"arch": "llama-tiny", "num_layers": 1, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2},
    **{"max_seq_length": 32, "instruction_tuning_data_dir": "rows.json", "gradient_accumulation_steps": 2},
    **{"max_steps": 3, "prompts": ["a"], "plugins": ["no:plot", "no:tensorboard"], "eval_data_dir": "rows.json"},
    **{"num_workers": 1, "save_steps": 2},
}

ALL_OWN = {"task": "instruct", "optimizer": "adamw", "lr_scheduler": "warmup", "reader": "auto", "template": "auto"}
"""Names that are all panda's own, written down, where the other run leaves them to defaults."""


def distribution(site: Path, name: str, entry_points: dict[str, dict[str, str]]) -> None:
    info = site / f"{name.replace('-', '_')}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    lines = []
    for group, names in entry_points.items():
        lines += [f"[{group}]", *(f"{entry} = {module}" for entry, module in names.items())]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All packages of this repository, and 1,000 others, each of which ends the process that imports it."""
    folder = tmp_path_factory.mktemp("site")
    for package in sorted(PLUGINS.iterdir()):
        setup = ConfigParser()
        setup.read(package / "setup.cfg")
        groups = {}
        for group, text in setup["options.entry_points"].items():
            groups[group] = dict(line.replace(" ", "").split("=") for line in text.strip().splitlines())
        module = next(path.parent.name for path in package.glob("panda_*/__init__.py"))
        (folder / module).symlink_to(package / module)
        distribution(folder, package.name, groups)
    catalog = Catalog()
    own = {kind: [offer.name for offer in catalog.offers(kind) if offer.is_own] for kind in KINDS}
    for number in range(1000):
        module, entry_points = f"foreign{number}", {"console_scripts": {f"foreign{number}": f"foreign{number}"}}
        if number % 2:  # one in two offers all names of one kind of panda's own, in other letters, and one of its own
            kind = [kind for kind in KINDS if kind != "kind"][number // 2 % 7]
            names = [*(name.upper() for name in own[kind]), f"foreign-{number}"]
            entry_points[f"panda.{KINDS[kind].plural}"] = dict.fromkeys(names, module)
            entry_points["panda.kinds"] = {("task", "reward", "run", f"kind{number}")[number % 4]: module}
            entry_points["panda.api"] = {"version": str(number // 7)}
        if number == 7:  # its source can be read, and it has options with the names of all core keys
            source = IMPORTS + OPTIONS + "@register_optimizer('adamw', options=Options)\ndef build(o, c): ...\n"
            (folder / f"{module}.py").write_text(source + "raise SystemExit('a foreign module was imported')\n")
        else:
            (folder / f"{module}.py").write_text("raise SystemExit('a foreign module was imported')\n")
        distribution(folder, f"foreign-{number}", entry_points)
    return folder


def trained(folder: Path, name: str, config: dict[str, object], site: Path | None) -> Path:
    (folder / "rows.json").write_text(json.dumps([{"input": "a" * n, "target": "b" * n} for n in range(1, 9)]))
    (folder / "run.yaml").write_text(yaml.safe_dump(config | {"run_name": name}))
    environment = {"PYTHONPATH": str(site)} if site else {}
    done = run_panda("panda-train", "--config", "run.yaml", cwd=folder, **environment)
    assert done.returncode == 0, done.stderr
    assert "warning:" not in done.stderr
    return folder / "runs" / name


TIMES = {"tokens_per_second", "step_seconds", "data_wait", "eval_seconds"}


def records(run: Path) -> list[dict[str, object]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMES} for line in lines]


def tensors(state: object) -> Iterator[torch.Tensor]:
    """The tensors in ``state``, in order."""
    if isinstance(state, torch.Tensor):
        yield state
    elif isinstance(state, dict | list | tuple):
        for each in state.values() if isinstance(state, dict) else state:
            yield from tensors(each)


@pytest.mark.parametrize("config", [TINY, TINY | ALL_OWN], ids=["names-none", "all-own"])
def test_a_run_that_names_no_package_is_the_same_with_1000_installed(
    tmp_path: Path, site: Path, config: dict[str, object]
) -> None:
    alone, among = trained(tmp_path, "alone", config, None), trained(tmp_path, "among", config, site)
    assert records(alone) == records(among) and len(records(alone)) > 3
    names = [path.relative_to(alone) for path in alone.rglob("*") if path.is_file()]
    assert sorted(names) == sorted(path.relative_to(among) for path in among.rglob("*") if path.is_file())
    weights = [name for name in names if name.suffix in (".safetensors", ".pt")]
    assert weights and len({name.suffix for name in weights}) > 1
    for name in weights:
        if name.suffix == ".safetensors":
            assert filecmp.cmp(alone / name, among / name, shallow=False), name
        else:
            states = [list(tensors(torch.load(run / name, weights_only=False))) for run in (alone, among)]
            assert len(states[0]) == len(states[1]) and all(map(torch.equal, *states)), name
    config_of = {run: (run / "config.yaml").read_text().replace(run.name, "NAME") for run in (alone, among)}
    assert config_of[alone] == config_of[among]
    components = [json.loads((run / "provenance.json").read_text())["components"] for run in (alone, among)]
    assert components[0] == components[1]
    assert {each["distribution"] for each in components[0].values()} == {"panda-train"}


def test_they_are_listed_and_can_be_named(tmp_path: Path, site: Path) -> None:
    """What makes the runs above worth comparing: panda sees the packages."""
    done = run_panda("panda", "list", "optimizers", cwd=tmp_path, PYTHONPATH=str(site))
    assert done.returncode == 0 and done.stdout.count("\n") > 300
    for name in ("lion", "ADAMW"):
        assert f"\n  {name} " in done.stdout
    flags = ("--arch", "llama-tiny", "--instruction_tuning_data_dir", "x", "--optimizer")
    done = run_panda("panda-train", *flags, "foreign-21:adamw", cwd=tmp_path, PYTHONPATH=str(site))
    assert done.returncode == 2 and "it was written for version 3 of panda's API" in done.stderr
    done = run_panda("panda-train", *flags, "foreign-7:adamw", cwd=tmp_path, PYTHONPATH=str(site))
    assert done.returncode == 2 and "SystemExit: a foreign module was imported" in done.stderr
