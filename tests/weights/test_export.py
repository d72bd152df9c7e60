"""What a run leaves is what plain transformers loads, in a process that never imports panda."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_files import llama
from checkpoint_files import save_hf
from launching import run_code
from launching import train_many
from transformers import AutoTokenizer
from transformers import GenerationConfig

from panda.cli.main import main
from panda.files.locks import holder_of
from panda.models.llama import LlamaOptions
from panda.models.llama import build_llama
from panda.registry.contexts import ModelContext
from panda.weights.export import decoding_of
from panda.weights.export import describe_model
from panda.weights.export import exporting
from panda.weights.finding import Source
from panda.weights.finding import pretrained_at

SHAPE = {"num_layers": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "rms_norm_eps": 1e-5}
PLAIN = """
import json, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
for folder in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("Say panda twice.", return_tensors="pt", add_special_tokens=False)["input_ids"]
    answer = model.generate(ids, max_new_tokens=5, do_sample=False)
    print(json.dumps({
        "ids": ids.tolist(), "logits": model(ids).logits.tolist(), "class": type(model).__name__,
        "use_cache": model.config.use_cache, "answer": answer[0, ids.shape[1]:].tolist(), "eos": tokenizer.eos_token_id,
        "dtype": str(model.dtype),
    }))
assert not any(name.split(".")[0] == "panda" for name in sys.modules)
"""


RUNS = [(1, 0, "fp32"), (2, 3, "fp32"), (1, 1, "bf16"), (2, 3, "bf16")]
"""Ranks, ZeRO stage, precision."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export")
    flags = [word for key, value in SHAPE.items() for word in (f"--{key}", value)]
    for together in (1, 2):
        configurations: list[list[object]] = [
            [
                *("--arch", "llama-tiny", *flags, "--max_steps", 2, "--gradient_accumulation_steps", 1),
                *("--instruction_tuning_data_dir", "panda:data/sample/instruct", "--num_workers", 0),
                *("--zero_stage", stage, "--precision", precision, "--output_dir", folder / f"{ranks}-{precision}"),
            ]
            for ranks, stage, precision in RUNS
            if ranks == together
        ]
        train_many(configurations, ranks=together, cwd=folder)
    return folder


@pytest.fixture(params=RUNS, ids=str)
def run(request: pytest.FixtureRequest, runs: Path) -> Path:
    ranks, _, precision = request.param
    return runs / f"{ranks}-{precision}"


@pytest.fixture(scope="module")
def plainly(runs: Path) -> dict[Path, Any]:
    """What plain transformers says of each run's export."""
    folders = [runs / f"{ranks}-{precision}" for ranks, _, precision in RUNS]
    printed = run_code(PLAIN, *(folder / "export" for folder in folders), cwd=runs)
    return dict(zip(folders, map(json.loads, printed.splitlines()), strict=True))


def test_plain_transformers_gives_the_logits_of_the_trained_weights(run: Path, plainly: dict[Path, Any]) -> None:
    plain = plainly[run]
    assert plain["class"] == "LlamaForCausalLM" and plain["use_cache"] is True and plain["eos"] == 2

    # The weights as training left them: DeepSpeed's own file, or its own script's for a partitioned one.
    checkpoint = run / "checkpoints" / "step-00000002"
    model = build_llama(LlamaOptions(**SHAPE), ModelContext(259, 2048, 0, 1, 2))
    if list(checkpoint.glob("zero_pp_rank_*model_states.pt")):
        from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

        weights = get_fp32_state_dict_from_zero_checkpoint(str(checkpoint.parent), tag=checkpoint.name)
    else:
        weights = torch.load(checkpoint / "mp_rank_00_model_states.pt", weights_only=False)["module"]
    model.load_state_dict(weights)
    if plain["dtype"] == "torch.bfloat16":
        model = model.bfloat16()
    logits = model.eval()(torch.tensor(plain["ids"])).logits.float()
    assert torch.allclose(logits, torch.tensor(plain["logits"]), atol=1e-6, rtol=0)
    # The trained weights, not the initial ones.
    torch.manual_seed(42)
    untrained = build_llama(LlamaOptions(**SHAPE), ModelContext(259, 2048, 0, 1, 2)).eval()
    assert not torch.allclose(untrained(torch.tensor(plain["ids"])).logits, torch.tensor(plain["logits"]), atol=1e-6)


def test_panda_export_writes_the_same_from_the_checkpoint(run: Path, tmp_path: Path) -> None:
    """In one process, without the model: the same bits and types as training had in memory."""
    assert main(["export", str(run), "--output", str(tmp_path / "out")]) == 0
    at_the_end, found = (
        {file.name: file.read_bytes() for file in folder.iterdir()} for folder in (run / "export", tmp_path / "out")
    )
    assert json.loads(at_the_end["panda.json"])["newest_checkpoint"]
    assert b"library_name: transformers\n" in at_the_end["README.md"]
    assert found == at_the_end


def test_a_file_of_the_users_is_not_replaced(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Whatever its name: an export says which files it has. A card of the user's stays."""
    copied = shutil.copytree(run, tmp_path / "run")
    output = copied / "export"
    (output / "README.md").write_text("my card")
    assert main(["export", str(copied)]) == 0
    (output / "notes.txt").write_text("mine")
    assert main(["export", str(copied)]) == 2
    assert "an export would replace it, and it holds 'notes.txt'" in capsys.readouterr().err
    assert (output / "notes.txt").read_text() == "mine" and (output / "README.md").read_text() == "my card"


def test_an_export_of_an_earlier_checkpoint_says_that_there_is_a_later_one(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copied = shutil.copytree(run, tmp_path / "run")
    (first,) = (copied / "checkpoints").glob("step-*")
    assert main(["export", str(first)]) == 0 and "is newer" not in capsys.readouterr().out
    shutil.copytree(first, first.with_name("step-00000999"))
    assert main(["export", str(first)]) == 0
    assert f"; step-00000999 is newer, and `panda export {copied}` exports it" in capsys.readouterr().out


def test_a_full_disk_leaves_the_export_that_was_there(runs: Path, full_disk: Any, capsys: Any) -> None:
    run = runs / "1-fp32"
    before = {file: file.stat().st_mtime_ns for file in run.rglob("*")}
    for room in (10, 20_000):  # for the description, which is copied first, and for the weights
        with full_disk(room):
            assert main(["export", str(run)]) == 2
        assert f"{run}/export: the export cannot be written: the disk is full" in capsys.readouterr().err
    assert {file: file.stat().st_mtime_ns for file in run.rglob("*") if file != run} == {
        file: time for file, time in before.items() if file != run
    }


def test_greedy_answers_are_those_of_transformers(run: Path) -> None:
    from transformers import AutoModelForCausalLM

    from panda.answers.generation import greedy

    model = AutoModelForCausalLM.from_pretrained(run / "export").eval()
    prompts = [[1, 70, 80, 90], [1, 100], [1, 71, 72, 73, 74, 75, 76]]
    ours = greedy(model, prompts, max_new_tokens=6, pad_token_id=0, end_tokens=[2], device=torch.device("cpu"))
    for prompt, answer in zip(prompts, ours, strict=True):
        theirs = model.generate(torch.tensor([prompt]), max_new_tokens=6, do_sample=False, eos_token_id=2)[0]
        ended = [*theirs[len(prompt) :].tolist(), 2]
        assert answer == ended[: ended.index(2)]


@pytest.mark.parametrize(
    ("said", "ends"),
    [
        (None, 2),
        ({}, 2),
        ({"eos_token_id": 2}, 2),
        ({"eos_token_id": 70}, [70, 2]),
        ({"eos_token_id": [70, 71], "do_sample": True, "top_k": 3}, [70, 71, 2]),
        ({"eos_token_id": 0}, [0, 2]),
        ({"eos_token_id": [2, 70]}, [2, 70]),
    ],
    ids=str,
)
def test_an_answer_ends_at_the_token_that_training_taught_and_where_it_ended_before(
    tmp_path: Path, said: dict[str, Any] | None, ends: Any
) -> None:
    """``said``: the checkpoint's own generation config. None: there is no checkpoint, and a model that names no end."""
    model = llama(eos_token_id=None)
    folder = save_hf(model, tmp_path / "base")
    pretrained = None
    if said is not None:
        (folder / "generation_config.json").write_text(json.dumps(said))
        pretrained = pretrained_at(Source(str(folder), "ckpt_path"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.eos_token_id == 2
    nothing: Any = None  # of what describes models of other kinds
    describe_model(
        tmp_path / "model",
        model,
        torch.float32,
        tokenizer,
        model=nothing,
        context=nothing,
        pretrained=pretrained,
        generation=decoding_of(model, tokenizer, pretrained, [2]),
    )
    described = GenerationConfig.from_pretrained(tmp_path / "model")
    assert described.eos_token_id == ends
    assert described.top_k == (said or {}).get("top_k", GenerationConfig().top_k)


def test_one_process_at_a_time_makes_an_export(tmp_path: Path) -> None:
    lock = tmp_path / "made" / ".export.lock"
    with exporting(tmp_path / "made" / "export") as new:
        new.mkdir()
        assert holder_of(lock)
    assert not lock.exists()
