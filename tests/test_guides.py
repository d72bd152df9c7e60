"""The tutorial of chats works as it is written, and recipes and examples of deployment are what panda takes."""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from configparser import ConfigParser
from pathlib import Path

import pytest
import yaml
from chat_templates import LLAMA2
from checkpoint_files import llama
from checkpoint_files import save_hf
from distributions import fake_distributions

from panda.cli.grid import read_command
from panda.cli.main import main as panda
from panda.configuration.arguments import parse_arguments
from panda.configuration.configure import Configuration
from panda.configuration.configure import configure
from panda.testing.processes import start

ROOT = Path(__file__).parent.parent
TUTORIAL, RECIPES = ROOT / "docs" / "tutorial-chats.md", ROOT / "docs" / "recipes.md"
DEPLOY = ROOT / "docs" / "deploy"


def blocks(page: Path, *languages: str) -> list[tuple[str, str]]:
    """The language and the text of the fenced blocks of ``page`` in ``languages``, in their order."""
    found = re.findall(r"^```(\w+)\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    return [(language, block) for language, block in found if language in languages]


# -- the tutorial ---------------------------------------------------------------------------------


def test_the_tutorial_of_chats_works_as_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its files and commands in their order; the text after commands is what they print, and what is said in a chat."""
    monkeypatch.chdir(tmp_path)
    text = TUTORIAL.read_text(encoding="utf-8").partition("\n## With a useful model\n")[0]
    commands: list[str] = []
    output, done = "", 0
    for before, language, block in re.findall(r"([^\n]*)\n+```(\w+)\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        if language in ("json", "yaml"):
            file = Path(re.findall(r"`([\w./]+)`", before)[-1])
            file.parent.mkdir(exist_ok=True)
            file.write_text(block)
        elif language == "console":
            commands = block.splitlines()
            output = "".join(_run(shlex.split(line), tmp_path, capsys) for line in commands if "panda chat" not in line)
            done += len(commands)
        elif commands == ["panda chat runs/hide"]:
            said = [line.removeprefix("> ") for line in block.splitlines() if line.startswith("> ")]
            monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in said)))
            answers = _run(shlex.split(commands[0]), tmp_path, capsys).splitlines()
            assert block == "".join(f"> {line}\n{answer}\n" for line, answer in zip(said, answers, strict=True))
        else:
            assert block.strip() in output, output
    assert done >= 8 and Path("hide-model/model.safetensors").exists() and Path("both.png").exists()


def _run(words: list[str], folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """What a command prints to stdout."""
    if words[0] == "panda":
        assert panda(words[1:]) == 0, words
        return capsys.readouterr().out
    assert words[0] == "panda-train"
    with start("panda.cli.train", *words[1:], cwd=folder) as started:
        ended = started.wait()
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


# -- recipes --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with every file of the recipes, small checkpoints and data under their names, and their packages."""
    folder = tmp_path_factory.mktemp("recipes")
    files = {block.splitlines()[0].removeprefix("# "): block for _, block in blocks(RECIPES, "yaml")}
    lasting = yaml.safe_load(blocks(TUTORIAL, "yaml")[-1][1]) | {"instruction_tuning_data_dir": "data/chats"}
    files["tutorial.yaml"] = yaml.safe_dump(lasting)
    for name, text in files.items():
        (folder / name).write_text(text)
        if checkpoint := yaml.safe_load(text).get("ckpt_path"):
            save_hf(llama(max_position_embeddings=8192), folder / checkpoint)
            (folder / checkpoint / "chat_template.jinja").write_text(LLAMA2)
    for data in ("chats", "documents", "pairs", "sums"):
        (folder / "data" / data).mkdir(parents=True)
        (folder / "data" / data / "rows.jsonl").write_text(json.dumps({"text": "A heron."}) + "\n")
    with fake_distributions(folder / "site", "") as made:
        for package in ("panda-preference", "panda-rl"):
            setup = ConfigParser()
            setup.read(ROOT / "plugins" / package / "setup.cfg")
            groups = setup["options.entry_points"].items()
            names = {
                group.removeprefix("panda."): dict(line.split(" = ") for line in lines.strip().splitlines())
                for group, lines in groups
                if group != "panda.api"
            }
            site = made.install(package, names, {})
            module = package.replace("-", "_")
            (site / module).symlink_to(ROOT / "plugins" / package / module)
            made.modules.add(module)
        yield folder


def resolved(words: list[str]) -> Configuration:
    """The configuration of a line for the command line, without its launcher."""
    return configure(parse_arguments(words[words.index("panda-train") + 1 :]))


def recipes() -> list[str]:
    return [line for _, block in blocks(RECIPES, "console") for line in block.splitlines()]


@pytest.mark.parametrize("line", recipes())
def test_a_recipe_is_a_configuration(line: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    words = shlex.split(line)
    if "runs/full-7b" in words:
        (place / "runs/full-7b").mkdir(parents=True, exist_ok=True)
        (place / "runs/full-7b/config.yaml").write_text((place / "full-7b.yaml").read_text())
    found = resolved(words)
    assert found.pretrained is not None, "each begins with a checkpoint"
    assert all((place / data).exists() for data in _data_of(found))
    if "torchrun" in words:
        import torch.distributed.run as launcher

        parsed = launcher.parse_args(words[1:])
        assert parsed.no_python and parsed.training_script == "panda-train"


def _data_of(found: Configuration) -> list[str]:
    settings = found.resolved.settings
    return [path for key, each in settings.items() if key.endswith("_data_dir") and each.value for path in each.value]


def test_every_configuration_of_the_recipes_is_used(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {block.splitlines()[0].removeprefix("# ") for _, block in blocks(RECIPES, "yaml")}
    assert files == {word for line in recipes() for word in line.split() if word.endswith(".yaml")} and len(files) > 5
    monkeypatch.chdir(place)
    assert configure(parse_arguments(["--config", "tutorial.yaml"])).options.use_lora


def test_the_sweep_of_rates_is_three_runs(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ((_, script),) = blocks(RECIPES, "sh")
    monkeypatch.chdir(place)
    words = shlex.split(script)
    assert words[:2] == ["panda", "sweep"]
    points = read_command(words[2:], "").points
    found = [configure(parse_arguments(point.argv)).options for point in points]
    assert [each.eval_steps for each in found] == [50] * 3 and len({each.learning_rate for each in found}) == 3


# -- deployment -----------------------------------------------------------------------------------


def test_the_job_of_kubernetes_starts_a_run(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch.distributed.run as launcher

    service, job = yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text())
    name = job["metadata"]["name"]
    assert service["kind"] == "Service" and service["spec"]["selector"] == {"job-name": name}
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["command"] == ["torchrun"] and job["spec"]["completionMode"] == "Indexed"
    parsed = launcher.parse_args(container["args"])
    assert (
        parsed.rdzv_endpoint == f"{name}-0.{pod['subdomain']}:29500" and pod["subdomain"] == service["metadata"]["name"]
    )
    assert int(parsed.nnodes) == job["spec"]["completions"] == job["spec"]["parallelism"]
    assert int(parsed.nproc_per_node) == container["resources"]["limits"]["nvidia.com/gpu"]
    assert parsed.shutdown_timeout < pod["terminationGracePeriodSeconds"]
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in pod["volumes"]}
    monkeypatch.chdir(place)
    (place / "run.yaml").write_text((place / "lora.yaml").read_text())
    flags = [word.replace("/data/run.yaml", "run.yaml") for word in parsed.training_script_args]
    assert parsed.training_script == "panda-train" and resolved(["panda-train", *flags]).options.resume == "auto"


SHIMS = {
    "scontrol": 'echo "scontrol $*" >> "$NOTED"; test "$1" = requeue || printf "node-1\\nnode-2\\n"',
    "srun": """
while [ "${1#--}" != "$1" ]; do shift; done
for task in 0 1; do SLURM_PROCID=$task SLURM_LOCALID=0 SLURM_NTASKS=2 SLURM_NTASKS_PER_NODE=1 "$@" || code=$?; done
exit ${code:-0}
""",
    "panda-train": """
printf '%s\\n' "$RANK $LOCAL_RANK $WORLD_SIZE $LOCAL_WORLD_SIZE $MASTER_ADDR $MASTER_PORT" "$*" >> "$NOTED"
exit $ENDS
""",
}


@pytest.mark.parametrize(("ends", "is_queued"), [(75, True), (0, False), (2, False)])
def test_the_script_of_slurm_starts_a_run_and_queues_it_again_if_it_is_not_done(
    ends: int, is_queued: bool, tmp_path: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, text in SHIMS.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{text}")
        (tmp_path / name).chmod(0o755)
    slurm = {
        "SLURM_SUBMIT_DIR": "/shared",
        "SLURM_JOB_NAME": "panda",
        "SLURM_JOB_NODELIST": "n",
        "SLURM_JOB_ID": "12345",
    }
    own = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "NOTED": str(tmp_path / "noted"), "ENDS": str(ends)}
    done = subprocess.run(["bash", DEPLOY / "slurm.sh", "run.yaml"], env=os.environ | slurm | own, check=False)
    assert done.returncode == ends
    asked, *tasks = (tmp_path / "noted").read_text().splitlines()
    assert asked == "scontrol show hostnames n"
    queued = [tasks.pop()] if is_queued else []
    assert queued == ["scontrol requeue 12345"] * is_queued
    assert tasks[::2] == [f"{rank} 0 2 1 node-1 22345" for rank in (0, 1)] and tasks[1] == tasks[3]
    monkeypatch.chdir(place)
    (place / "run.yaml").write_text((place / "lora.yaml").read_text())
    words = tasks[1].replace("/shared/", "").split()
    options = resolved(["panda-train", *words]).options
    assert options.max_train_hours == 11.5 and options.output_dir == "runs/panda"


def test_the_image_is_made_of_what_there_is() -> None:
    """Its commands are shell, what it copies is there, and the extras and constraints that it names are."""
    text = re.sub(r"\\\n", "", (DEPLOY / "Dockerfile").read_text())
    lines = [line.split(" ", 1) for line in text.splitlines() if line and not line.startswith("#")]
    assert lines[0][0] == "FROM"
    assert {word for word, _ in lines} <= {"FROM", "RUN", "WORKDIR", "COPY", "ENV", "USER", "CMD"}
    for word, rest in lines:
        if word == "RUN":
            assert subprocess.run(["bash", "-n"], input=rest, text=True, check=False).returncode == 0, rest
    setup = ConfigParser()
    setup.read(ROOT / "setup.cfg")
    (extras,) = re.findall(r"'\.\[(.*?)\]'", text)
    assert set(extras.split(",")) <= set(setup["options.extras_require"]) and (ROOT / "constraints.txt").exists()
    assert "docs/deploy/Dockerfile" in text
