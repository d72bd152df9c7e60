"""Commands that only need the model of a run look for nothing else that the run had."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest
from distributions import installed_for_runs
from launching import run_panda

OPTIMIZER = """
@register_optimizer("slow")
def build(options, context):
    import torch

    return torch.optim.SGD(context.param_groups)
"""

TASK = """
from panda.tasks.instruct import Instruct, InstructOptions

@register_task("mine", options=InstructOptions)
class Mine(Instruct):
    '''Mine.'''
"""

PLUGIN = """
@register_plugin("loud")
class Loud:
    def __init__(self, options, context): ...
"""

MODEL = """
from panda.models.llama import LlamaOptions, build_llama

@register_model("copy", options=LlamaOptions)
def build(options, context):
    '''A model of the package.'''
    return build_llama(options, context)
"""

OWN = """
@register_model("own")
def build(options, context):
    '''A model that transformers does not know.'''
    import torch

    class Own(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.table = torch.nn.Embedding(context.vocab_size, 8)
            self.head = torch.nn.Linear(8, context.vocab_size)

        def forward(self, input_ids):
            return self.head(self.table(input_ids))

    return Own()
"""

TINY = "--num_layers 1 --hidden_size 16 --intermediate_size 24 --num_heads 2 --max_seq_length 32 --max_steps 1"
RUN = f"{TINY} --gradient_accumulation_steps 1 --prompts a --num_workers 0 --instruction_tuning_data_dir rows.json"
QUIET = ("-p", "no:plot", "-p", "no:tensorboard")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with three runs that took everything that they could from a package."""
    path = tmp_path_factory.mktemp("alone")
    kinds = {"optimizers": "slow", "tasks": "mine", "plugins": "loud", "models": "copy"}
    modules = {"acme.slow": OPTIMIZER, "acme.mine": TASK, "acme.loud": PLUGIN, "acme.copy": MODEL, "acme.own": OWN}
    entry_points = {kind: {name: f"acme.{name}"} for kind, name in kinds.items()}
    entry_points["models"]["own"] = "acme.own"
    environment = installed_for_runs(path / "site", "acme-panda", entry_points, modules, version="1.2")
    (path / "rows.json").write_text(json.dumps([{"input": "a", "target": "b"}] * 4))
    from_package = ["--task", "mine", "--optimizer", "slow", "--plugins", "loud"]
    lora = ["--use_lora", "--lora_r", "2"]
    for name, model in (("adapters", ["--arch", "llama-tiny", *lora]), ("theirs", ["--model", "copy", *lora])):
        flags = [*RUN.split(), *from_package, *model, "--output_dir", name, *QUIET]
        done = run_panda("panda-train", *flags, cwd=path, **environment)
        assert done.returncode == 0, done.stderr
    flags = [*RUN.split()[8:], *from_package, "--model", "own", "--output_dir", "whole", *QUIET]
    done = run_panda("panda-train", *flags, cwd=path, **environment)
    assert done.returncode == 0, done.stderr
    return path


def panda(*argv: object, cwd: Path, site: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = {"PYTHONPATH": str(site)} if site else {}
    return run_panda("panda", *argv, cwd=cwd, **environment)


def test_config_yaml_names_what_is_not_pandas_own_in_full(folder: Path) -> None:
    lines = (folder / "theirs" / "config.yaml").read_text().splitlines()
    assert "task: 'acme-panda:mine'" in lines and "optimizer: 'acme-panda:slow'" in lines
    assert "model: 'acme-panda:copy'" in lines and "lr_scheduler: warmup" in lines
    assert "plugins: ['acme-panda:loud', 'no:plot', 'no:tensorboard']" in lines
    assert "api: 1" in lines


def test_adapters_answer_and_are_exported_where_all_but_their_model_is_gone(folder: Path) -> None:
    for command in (("generate", "adapters", "--prompt", "a"), ("export", "adapters", "--output", "plain")):
        done = panda(*command, cwd=folder)
        assert done.returncode == 0, done.stderr
    done = panda("export", "adapters", "--merge", "-p", "no:acme-panda", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert (folder / "adapters" / "merged" / "config.json").exists()
    done = run_panda("panda-train", "--config", "adapters/config.yaml", cwd=folder)
    assert done.returncode == 2
    assert "No component of a distribution acme-panda is installed: `pip install acme-panda`." in done.stderr


@pytest.mark.parametrize(
    "command",
    [
        ("generate", "theirs", "--prompt", "a"),
        ("export", "theirs", "--output", "x"),
        ("export", "theirs", "--merge"),
        ("generate", "whole", "--prompt", "a"),
        ("generate", "whole/export", "--prompt", "a"),
    ],
)
def test_a_model_that_is_gone_is_named_with_its_package(folder: Path, command: tuple[str, ...]) -> None:
    done = panda(*command, cwd=folder)
    assert done.returncode == 2
    assert f"unknown model 'acme-panda:{'copy' if command[1] == 'theirs' else 'own'}'" in done.stderr
    assert "`pip install acme-panda==1.2`" in done.stderr


def test_a_model_answers_where_the_rest_of_its_package_is_broken_unless_it_is_blocked(
    folder: Path, tmp_path: Path
) -> None:
    site = tmp_path / "site"
    shutil.copytree(folder / "site" / "acme-panda-1.2", site)
    for name in ("slow", "mine", "loud"):
        (site / "acme" / f"{name}.py").write_text("raise RuntimeError")
    for run in ("theirs", "whole"):
        command = ("generate", run, "--prompt", "a")
        done = panda(*command, cwd=folder, site=site)
        assert done.returncode == 0, done.stderr
        done = panda(*command, "-p", "no:acme_panda", cwd=folder, site=site)
        assert done.returncode == 2 and "blocked by `-p no:`" in done.stderr
    done = panda("export", "whole", "--output", "again", cwd=folder)  # copies, and builds no model
    assert done.returncode == 0, done.stderr
    done = panda("generate", "whole", "--prompt", "a", "-p", "acme", cwd=folder)
    assert done.returncode == 2 and "expected `-p no:NAME`" in done.stderr
