"""Nothing in a file runs by being read: each kind of file with code in it, before each command that reads such a file.

The code makes a folder. What a command says of the file is tested where that is read.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoint_files import llama
from checkpoint_files import save_hf
from launching import train_many

from panda.cli.main import main
from panda.cli.train import main as train
from panda.engine.checkpoints import folders
from panda.engine.checkpoints import weights

PICKLES = (
    *("pytorch_model.bin", "model-00001-of-00001.bin", "adapter_model.bin", "training_args.bin", "optimizer.pt"),
    *("scheduler.pt", "rng_state.pth", "consolidated.00.pth", "adapter_model.pt", "tokenizer.pkl", "vocab.pkl"),
)
"""Files of training and of weights that lie in folders of models."""
CODE = ("modeling_x.py", "configuration_x.py", "tokenization_x.py", "custom_generate/generate.py", "handler.py")


class Marking:
    """Makes a folder when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.marker),)


def in_forms(marker: Path) -> list[Callable[[Path], object]]:
    """Writers of a pickle that makes ``marker``, in each format of such files, alone and among tensors."""
    holding = {"module": {"weight": torch.zeros(2)}, "optimizer_state_dict": Marking(marker)}
    return [
        lambda file: file.write_bytes(pickle.dumps(Marking(marker))),
        lambda file: torch.save(Marking(marker), file),
        lambda file: torch.save(holding, file),
        lambda file: torch.save(holding, file, _use_new_zipfile_serialization=False),
    ]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs that trained a whole model and adapters, under ZeRO-3 and without it, and their base."""
    folder = tmp_path_factory.mktemp("made")
    save_hf(llama(4), folder / "base")
    common = ["--model", "llama", "--ckpt_path", "base", "--max_seq_length", 64, "--max_steps", 1, "--num_workers", 0]
    common += ["--gradient_accumulation_steps", 1, "-p", "no:tensorboard", "-p", "no:plot"]
    common += ["--instruction_tuning_data_dir", "panda:data/sample/instruct"]
    runs = {"whole": [], "zero-3": ["--zero_stage", 3], "adapters": ["--use_lora", "--zero_stage", 1]}
    train_many([[*common, *more, "--output_dir", name] for name, more in runs.items()], cwd=folder)
    return folder


@pytest.fixture
def marker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What code would make. Sizes and checksums that a checkpoint states would be the sender's, too."""
    monkeypatch.setattr(folders, "damage", lambda checkpoint: None)
    monkeypatch.setattr(weights, "check_contents", lambda checkpoint, files: None)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "it-ran"


def commands(folder: Path, monkeypatch: pytest.MonkeyPatch, *flags: str) -> list[int]:
    """The exit codes of the commands that read a model, each of which is answered `y` if it asks anything."""
    codes = []
    for argv in (
        ["generate", str(folder), "--prompt", "x", "--max_new_tokens", "1", *flags],
        ["chat", str(folder), "--max_new_tokens", "1", *flags],
        ["export", str(folder), "--output", f"{folder}-exported"],
    ):
        monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 5))
        codes.append(main(argv))
        shutil.rmtree(f"{folder}-exported", ignore_errors=True)
    return codes


@pytest.mark.parametrize("name", ["whole", "zero-3", "adapters"])
def test_files_of_a_checkpoint(name: str, made: Path, marker: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = sorted((made / name / "checkpoints").rglob("*.pt"))
    assert files
    for number, file in enumerate(files):
        for form, write in enumerate(in_forms(marker)):
            run = marker.parent / f"{number}-{form}"
            shutil.copytree(made / name, run)
            write(run / file.relative_to(made / name))
            is_read = "optim_states" not in file.name or name == "zero-3"
            assert commands(run, monkeypatch) == [2 if is_read else 0] * 3
            assert not marker.exists(), file
            shutil.rmtree(run)


def test_a_run_that_is_resumed(made: Path, marker: Path, monkeypatch: pytest.MonkeyPatch, processes: object) -> None:
    from panda.engine.checkpoints import writing

    monkeypatch.setattr(writing, "check_contents", lambda checkpoint, files: None)
    run = marker.parent / "run"
    shutil.copytree(made / "adapters", run)
    [checkpoint] = (run / "checkpoints").glob("step-*")
    state = next(checkpoint.glob("random-*"))
    for file in [*sorted(checkpoint.glob("*.pt")), state.with_suffix(".pt")]:
        before = file.read_bytes() if file.exists() else None
        if before is None:
            state.unlink()  # then the one of an older version is read
        in_forms(marker)[1 if before is None else 2](file)
        # A file that is made for it would not be so different from what belongs there that something else fails first.
        argv = ["--config", f"{run}/config.yaml", "--output_dir", str(run), "--resume", "auto", "--max_steps", "2"]
        assert train([*argv, "--ckpt_path", str(made / "base")]) == 2, file
        assert not marker.exists(), file
        if before is not None:
            file.write_bytes(before)


def test_files_beside_a_model(made: Path, marker: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for source in (made / "base", made / "adapters/export", made / "whole/export"):
        folder = marker.parent / "model"
        shutil.copytree(source, folder)
        for name in PICKLES:
            for write in in_forms(marker)[:2]:
                write(folder / name)
                commands(folder, monkeypatch, "--allow_pickle", "--ckpt_path", str(made / "base"))
                assert not marker.exists(), name
            (folder / name).unlink()
        shutil.rmtree(folder)


def test_pickles_of_weights(made: Path, marker: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = marker.parent / "model"
    shutil.copytree(made / "base", folder, ignore=shutil.ignore_patterns("*.safetensors*"))
    for write in in_forms(marker):
        write(folder / "pytorch_model.bin")
        assert commands(folder, monkeypatch) == commands(folder, monkeypatch, "--allow_pickle") == [2] * 3
        argv = ["--task", "instruct", "--model", "llama", "--instruction_tuning_data_dir", "panda:data/sample/instruct"]
        assert train([*argv, "--ckpt_path", str(folder), "--allow_pickle"]) == 2
        assert not marker.exists()


@pytest.mark.parametrize("known", [True, False], ids=["a type that transformers has", "another"])
def test_code_of_a_model(known: bool, made: Path, marker: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not where a configuration names it, nor where the user would say yes if asked."""
    folder = marker.parent / "model"
    shutil.copytree(made / "base", folder)
    for name in CODE:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(f"import os\nos.mkdir({str(marker)!r})\nclass X: pass\ndef generate(): pass\n")
    for name, change in {
        "config.json": {
            "auto_map": {
                "AutoConfig": "configuration_x.X",
                "AutoModel": "modeling_x.X",
                "AutoModelForCausalLM": "modeling_x.X",
                "AutoTokenizer": ["tokenization_x.X", "tokenization_x.X"],
            },
            **({} if known else {"model_type": "x", "architectures": ["X"]}),
        },
        "tokenizer_config.json": {
            "auto_map": {"AutoTokenizer": ["tokenization_x.X", "tokenization_x.X"]},
            **({} if known else {"tokenizer_class": "X"}),
        },
        "generation_config.json": {"custom_generate": str(folder), "trust_remote_code": True},
    }.items():
        file = folder / name
        before = json.loads(file.read_text()) if file.exists() else {}
        file.write_text(json.dumps(before | change))
    assert commands(folder, monkeypatch)[0] == (0 if known else 2)
    assert not marker.exists()


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation", "experts_implementation"])
def test_a_kernel_on_the_hub(
    key: str, made: Path, marker: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = marker.parent / "model"
    shutil.copytree(made / "base", folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {key: "someone/kernel:function"}))
    assert commands(folder, monkeypatch)[0] == 2
    assert (
        "'someone/kernel:function', code on the Hugging Face hub, which panda does not run" in capsys.readouterr().err
    )


def test_components_that_a_run_names(made: Path, marker: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """config.yaml of a run that someone sent names a file in it, and says or does not say that panda wrote it."""
    run = marker.parent / "run"
    shutil.copytree(made / "adapters", run)
    (run / "own.py").write_text(f"import os\nos.mkdir({str(marker)!r})\n")
    config = (run / "config.yaml").read_text()
    for said in (
        config,
        "\n".join(line for line in config.splitlines() if ":" in line and "panda_version" not in line),
    ):
        for key in ("model", "task", "optimizer"):
            lines = [line for line in said.splitlines() if not line.startswith(f"{key}:")]
            (run / "config.yaml").write_text("\n".join([*lines, f"{key}: {run}/own.py:x"]))
            commands(run, monkeypatch)
            assert not marker.exists(), key
        (run / "config.yaml").write_text(f"{said}\nuser_dir: {run}\n")
        commands(run, monkeypatch)
        assert not marker.exists()
