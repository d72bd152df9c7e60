"""``panda export --gguf``, with a stand-in for llama.cpp's script. ``bench/read_gguf.py`` compares a real file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from launching import train_many

from panda.cli.main import main as panda

SCRIPT = """\
import json, pathlib, sys
model, _, outfile, _, outtype = sys.argv[1:]
assert (pathlib.Path(model) / "model.safetensors").exists()
pathlib.Path(outfile).write_bytes(b"GGUF" + json.dumps([model, outtype]).encode())
"""
FAILING = """\
import pathlib, sys
pathlib.Path(sys.argv[3]).write_bytes(b"GGUF, in part")
raise NotImplementedError("BPE pre-tokenizer was not recognized")
"""
RUN = (
    *("--arch", "llama-tiny", "--num_layers", 1, "--hidden_size", 32, "--intermediate_size", 48, "--num_heads", 2),
    *("--instruction_tuning_data_dir", "panda:data/sample/instruct", "--max_seq_length", 48, "--num_workers", 0),
    *("--gradient_accumulation_steps", 1, "--max_steps", 1, "--prompts", "a", "-p", "no:plot"),
)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gguf")
    train_many([[*RUN, "--output_dir", "whole"], [*RUN, "--output_dir", "lora", "--use_lora"]], cwd=folder)
    return folder


@pytest.fixture
def llama_cpp(tmp_path: Path) -> Path:
    (tmp_path / "llama.cpp").mkdir()
    (tmp_path / "llama.cpp" / "convert_hf_to_gguf.py").write_text(SCRIPT)
    return tmp_path / "llama.cpp"


def export(run: Path, *flags: object) -> int:
    return panda(["export", str(run), *map(str, flags)])


def test_the_script_is_given_the_export_and_its_file_is_whole_or_absent(
    runs: Path, llama_cpp: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, by = tmp_path / "model.gguf", ("--llama_cpp", llama_cpp)
    assert export(runs / "whole", "--output", tmp_path / "out", "--gguf", file, *by, "--gguf_type", "bf16") == 0
    assert json.loads(file.read_bytes()[4:]) == [str(tmp_path / "out"), "bf16"]
    assert f"{file}: the same, as GGUF (bf16)" in capsys.readouterr().out
    (llama_cpp / "convert_hf_to_gguf.py").write_text(FAILING)
    before = file.read_bytes()
    assert export(runs / "whole", "--gguf", file, *by) == 2
    said = capsys.readouterr().err
    assert "ended with 1: NotImplementedError: BPE pre-tokenizer was not recognized" in said and "Traceback" not in said
    assert file.read_bytes() == before and sorted(each.name for each in tmp_path.iterdir()) == [
        "llama.cpp",
        "model.gguf",
        "out",
    ]
    (llama_cpp / "convert_hf_to_gguf.py").write_text("pass")
    assert export(runs / "whole", "--gguf", file, *by) == 2
    assert "ended with 0: it said nothing" in capsys.readouterr().err


def test_adapters_are_merged_first(
    runs: Path, llama_cpp: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "model.gguf"
    assert export(runs / "lora", "--gguf", file, "--llama_cpp", llama_cpp) == 2
    assert "trained adapters. With --merge" in capsys.readouterr().err and not file.exists()
    assert export(runs / "lora", "--merge", "--gguf", file, "--llama_cpp", llama_cpp) == 0
    assert json.loads(file.read_bytes()[4:])[0] == str(runs / "lora" / "merged")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--gguf", "model.gguf"), "Name a clone of llama.cpp with --llama_cpp FOLDER"),
        (("--gguf", "model.gguf", "--llama_cpp", "gone"), "--llama_cpp: 'gone' has no convert_hf_to_gguf.py"),
        (("--llama_cpp", "x"), "name it with --gguf FILE"),
        (("--gguf", "/tmp", "--llama_cpp", "x"), "--gguf: '/tmp' is a folder"),
    ],
)
def test_mistakes_are_said_before_anything_is_written(
    flags: tuple[str, ...], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert panda(["export", str(tmp_path), "--output", str(tmp_path / "out"), *flags]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()
