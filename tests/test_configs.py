"""Every configuration that panda ships trains. The tiny ones do as they stand, and their resolved form runs again; the
others do in a folder that has a tiny checkpoint and a few rows under the names that they use."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import yaml
from chat_templates import LLAMA2
from checkpoint_files import llama
from checkpoint_files import save_hf
from launching import losses
from launching import metrics
from launching import train_many

from panda.cli.train import main

CONFIGS = Path(__file__).parent.parent / "configs"
OWN_TASKS = ("instruct", "mix", "pretrain")
TINY = sorted(path for path in CONFIGS.glob("*-tiny.yaml") if path.stem.removesuffix("-tiny") in OWN_TASKS)
"""Those of panda's own tasks; those of packages in plugins/ are trained by the tests of these."""
PACKAGED = {path.stem for path in CONFIGS.glob("*-tiny.yaml")} - {path.stem for path in TINY}
STEPS = 3
SHRUNK = {"max_steps": STEPS, "num_workers": 0, "max_seq_length": 64, "gradient_accumulation_steps": 2}
ALONE: dict[str, dict[str, object]] = {
    "lora": {},
    "qlora": {},
    "full": {},
    "chat": {"eval_steps": 2},
    "pretrain": {"hidden_size": 32, "intermediate_size": 48, "num_layers": 2, "num_heads": 4, "compile": "false"},
    "mix": {},
    "resume": {"save_steps": 1},
}
"""Those that one process runs, with what makes them smaller still."""
TOGETHER: dict[str, dict[str, object]] = {"zero3": {}, "tensor-parallel": {}}
"""Those that two processes run."""


@pytest.mark.parametrize("config", TINY, ids=lambda path: path.stem)
def test_a_tiny_configuration_trains(
    config: Path, processes: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["--config", str(config), "--max_steps", "4", "--run_name", "first"]) == 0, capsys.readouterr().err
    first, printed = Path("runs/first"), capsys.readouterr().out
    for name in ("config.yaml", "provenance.json", "deepspeed.json", "metrics.jsonl", "loss.png", "answers.json"):
        assert (first / name).stat().st_size > 0, name
        assert name in printed
    assert list((first / "tensorboard").iterdir()) and (first / "export" / "config.json").exists()
    assert losses(first)[-1] < losses(first)[0]

    assert main(["--config", str(first / "config.yaml")]) == 0, capsys.readouterr().err
    assert losses(Path("runs/first-2")) == losses(first)
    assert Path("runs/first-2/config.yaml").read_text() == (first / "config.yaml").read_text()


@pytest.fixture(scope="module")
def place() -> Iterator[Path]:
    """A folder with tiny checkpoints and data under the names in the configurations."""
    with TemporaryDirectory(prefix="panda-test-configs-") as folder:
        here = Path(folder)
        for name in ("HuggingFaceTB/SmolLM2-135M-Instruct", "HuggingFaceTB/SmolLM2-135M", "Qwen/Qwen3-8B"):
            checkpoint = save_hf(llama(), here / name)
            if "Instruct" in name or "Qwen" in name:
                (checkpoint / "chat_template.jinja").write_text(LLAMA2)
        save_hf(llama(vocab_size=260), here / "meta-llama/Llama-2-13b-hf")  # divided by two
        for data, rows in (("chats", 12), ("held-out-chats", 2), ("documents", 12)):
            (here / "data" / data).mkdir(parents=True)
            lines = [_row(data, number) for number in range(rows)]
            (here / "data" / data / "rows.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
        yield here


def _row(data: str, number: int) -> dict[str, Any]:
    if data == "documents":
        return {"text": f"Heron {number} waits in the reeds, and {'waits ' * number}again."}
    said = {"user": f"Where is {data} {number}?", "assistant": "In the reeds."}
    return {"messages": [{"role": role, "content": text} for role, text in said.items()] * (1 + number % 2)}


def flags(name: str, more: dict[str, object], output: str) -> list[object]:
    shrunk = SHRUNK | more | {"output_dir": output}
    return ["--config", CONFIGS / f"{name}.yaml", *(word for key in shrunk for word in (f"--{key}", shrunk[key]))]


@pytest.fixture(scope="module")
def outputs(place: Path) -> dict[int, str]:
    """What the runs print, by the number of processes. The resumable one is started twice, with more steps."""
    alone = [flags(name, more, f"runs/{name}") for name, more in ALONE.items()]
    alone.append(flags("resume", {"save_steps": 1, "max_steps": STEPS + 1}, "runs/resume"))
    together = [flags(name, more, f"runs/{name}") for name, more in TOGETHER.items()]
    return {ranks: train_many(runs, ranks=ranks, cwd=place) for ranks, runs in ((1, alone), (2, together))}


@pytest.mark.parametrize("name", [*ALONE, *TOGETHER])
def test_a_configuration_trains(name: str, outputs: dict[int, str], place: Path) -> None:
    run = place / "runs" / name
    found = [record["loss"] for record in metrics(run) if "loss" in record]
    assert len(found) == (STEPS + 1 if name == "resume" else STEPS)
    assert all(0 < loss < 100 for loss in found) and len(set(found)) == len(found)
    assert (run / "export").is_dir()


def test_every_configuration_is_run() -> None:
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == {
        path.stem for path in TINY
    } | PACKAGED | ALONE.keys() | TOGETHER.keys()


@pytest.mark.parametrize("config", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_command_in_a_configuration_starts_it(config: Path) -> None:
    commands = [line for line in config.read_text().splitlines() if line.startswith("#   ")]
    launcher = "torchrun --nproc_per_node 8 --no-python " if config.stem in ("pretrain", *TOGETHER) else ""
    assert commands == [f"#   {launcher}panda-train --config configs/{config.name}"]


def test_each_does_what_it_is_there_for(outputs: dict[int, str], place: Path) -> None:
    runs = place / "runs"
    adapters = [json.loads((runs / name / "export" / "adapter_config.json").read_text()) for name in ("lora", "qlora")]
    assert [(adapter["r"], adapter["lora_alpha"]) for adapter in adapters] == [(16, 32), (16, 32)]
    assert ", NF4" in outputs[1] or "4 bits" in outputs[1]
    evaluated = [record["step"] for record in metrics(runs / "chat") if "eval_loss" in record]
    assert evaluated == [2, 3]
    answers = json.loads((runs / "chat" / "answers.json").read_text())
    assert [answer["prompt"] for answer in answers] == ["What can you do?"]
    kept = {
        "full": ("use_lora", False),
        "chat": ("batching", "packed"),
        "pretrain": ("lr_scheduler", "wsd"),
        "mix": ("task", "mix"),
        "tensor-parallel": ("tensor_parallel_size", 2),
    }
    for name, (key, value) in kept.items():
        assert yaml.safe_load((runs / name / "config.yaml").read_text()).get(key, False) == value, name
    assert json.loads((runs / "zero3" / "deepspeed.json").read_text())["zero_optimization"]["stage"] == 3
    assert "resumed from" in outputs[1]
