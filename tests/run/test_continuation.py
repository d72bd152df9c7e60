"""A run that cannot be continued says what has changed since, and not that two hashes differ."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import toy_tasks
from checkpoint_files import add_tokenizer
from checkpoint_files import llama
from checkpoint_files import save_hf
from tokenizer_zoo import folder_of
from transformers import AutoModelForCausalLM

from panda.configuration.arguments import parse_arguments
from panda.configuration.configure import configure
from panda.data import origin
from panda.engine.checkpoints.agreement import refuse_differing
from panda.registry import UserError
from panda.run.continuation import agreement_of
from panda.run.preparation import Preparation

TINY = "--arch llama-tiny --num_layers 1 --hidden_size 16 --intermediate_size 16 --num_heads 1"
FIRST = Path("run/checkpoints/step-00000001")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows").mkdir()
    for name in ("a", "b"):
        write(tmp_path / "rows" / f"{name}.json", [name, "c", "d"])
    shutil.copytree(folder_of("llama3", "llama3.2"), tmp_path / "tokenizer")
    return tmp_path


def write(file: Path, letters: list[str]) -> None:
    file.write_text(json.dumps([{"input": letter, "target": letter} for letter in letters]))


def agreement(*flags: str) -> dict[str, Any]:
    """As a checkpoint has it, of a run that is not trained."""
    given = {key.lstrip("-"): value for key, value in zip(flags[::2], flags[1::2], strict=True)}
    data = {} if "pairs_dir" in given else {"instruction_tuning_data_dir": "rows"}
    given = data | {"template_date": "2026-01-02", "max_seq_length": "256"} | given
    words = [word for key, value in given.items() for word in (f"--{key}", value)]
    model = [] if "ckpt_path" in given else [*TINY.split(), "--tokenizer", "tokenizer"]
    prepared = Preparation(configure(parse_arguments([*model, *words])))
    found: dict[str, Any] = json.loads(
        json.dumps(agreement_of(prepared.resolved, prepared.pretrained, prepared.dataset))
    )
    return found


def refused(before: dict[str, Any], now: dict[str, Any]) -> str:
    with pytest.raises(UserError) as caught:
        refuse_differing(FIRST, before, now)
    text = str(caught.value)
    assert not re.search("[0-9a-f]{32}", text), "no hash says anything"
    return text


def one_byte_changed() -> None:
    file = Path("rows/a.json")
    file.write_text(file.read_text().replace('"a"', '"e"'))


def tokenizer_with(change: Callable[[dict[str, Any]], Any]) -> None:
    file = Path("tokenizer/tokenizer.json")
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def other_template() -> None:
    file = Path("tokenizer/chat_template.jinja")
    file.write_text("{{ 'More' }}" + file.read_text())


@pytest.mark.parametrize("whole", [False, True], ids=["as given", "whole paths"])
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda: write(Path("rows/a.json"), ["a", "c"]), ["rows/a.json had 93 bytes, and has 62", "6 rows, and has 5"]),
        (one_byte_changed, ["rows/a.json has another content, of the same 93 bytes"]),
        (lambda: Path("rows/b.json").unlink(), ["rows/b.json (93 bytes) was read, and is not now"]),
        (lambda: write(Path("rows/c.json"), ["f"]), ["rows/c.json (31 bytes) is read, and was not"]),
        (other_template, ["the task, chat_template was ", "More"]),
        (
            lambda: tokenizer_with(lambda content: content["model"]["merges"].clear()),
            ["the content of the tokenizer is another"],
        ),
    ],
    ids=["a file cut", "a byte", "a file less", "a file more", "template", "tokenizer"],
)
def test_what_the_data_was_made_of_is_compared(
    folder: Path, change: Callable[[], None], said: list[str], whole: bool
) -> None:
    """A run that goes on from its config.yaml has whole paths."""
    before = agreement()
    change()
    text = refused(before, agreement("--instruction_tuning_data_dir", str(folder / "rows" if whole else "rows")))
    assert "the data differs: " in text
    assert [part for part in said if part not in text] == [], text
    assert ("is read, and was not" in text) == any("was not" in part for part in said)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--max_samples", "2"], "max_samples was None, and is 2"),
        (["--eval_fraction", "0.5"], "eval_fraction was 0.0, and is 0.5"),
        (["--template_date", "2026-01-03"], "02 Jan 2026"),
        (["--max_seq_length", "16"], "the max_seq_length was 256, and is 16"),
    ],
)
def test_keys_that_decide_the_data_are_named_with_both_values(folder: Path, flags: list[str], said: str) -> None:
    assert said in refused(agreement(), agreement(*flags))


def test_data_that_was_moved_is_the_same(folder: Path) -> None:
    before = agreement()
    (folder / "rows").rename(folder / "moved")
    refuse_differing(FIRST, before, agreement("--instruction_tuning_data_dir", "moved"))


def test_of_very_many_files_their_number_is_said(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(origin, "MOST_FILES", 1)
    before = agreement()
    write(folder / "rows" / "c.json", ["f"])
    assert "rows had 2 files, and has 3; rows had 186 bytes, and has 217" in refused(before, agreement())


def test_a_checkpoint_of_before_says_that_it_did_not_record_it(folder: Path) -> None:
    before = agreement()
    before.pop("made_of")
    before["data"] = "another"
    assert "that run did not record which files, template and tokenizer it had" in refused(before, agreement())
    for broken in ({"data_sets": 7}, {"data_sets": [{"files": 1}]}, {"data_sets": [{"files": [[1]]}]}):
        assert "has another form" in refused(before | {"made_of": broken}, agreement())


def test_the_base_of_adapters_is_named(folder: Path) -> None:
    before = agreement() | {"base_weights": "tensors-sha256:12", "made_of": {"base": "base/a (a folder)"}}
    now = agreement() | {"base_weights": "tensors-sha256:34", "made_of": {"base": "base/b (a folder)"}}
    assert "the base was base/a (a folder) (tensors-sha256:12), and is base/b (a folder)" in refused(before, now)
    same = now | {"made_of": before["made_of"]}
    assert "the weights of the base have changed since then, at base/a (a folder)" in refused(before, same)


HF = ("--model", "hf", "--max_seq_length", "64", "--ckpt_path")
WRITTEN = {
    "rope_parameters": None,  # as transformers 4.57 writes it
    "rope_theta": 500000.0,
    "rope_scaling": {"type": "linear", "factor": 2.0},
}


def checkpoint(name: str, **changes: Any) -> str:
    """A checkpoint whose config.json has other values; None for a key that it lacks."""
    file = save_hf(llama(), Path(name), shards=False) / "config.json"
    written = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in written.items() if value is not None}))
    return name


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 4},
            ["head_dim was 8 and is 4", "num_attention_heads was 4 and is 8", "num_key_value_heads was 2 and is 4"],
        ),
        ({"rms_norm_eps": 1e-3}, ["rms_norm_eps was 1e-05 and is 0.001"]),
        ({"hidden_act": "gelu"}, ["hidden_act was 'silu' and is 'gelu'"]),
        (WRITTEN | {"rope_scaling": None}, ["rope_parameters.rope_theta was 10000.0 and is 500000.0"]),
        (
            WRITTEN,
            [
                "rope_parameters.rope_theta was 10000.0 and is 500000.0",
                "rope_parameters.rope_type was 'default' and is 'linear'",
            ],
        ),
    ],
    ids=["heads", "epsilon", "activation", "theta", "scaling"],
)
def test_the_same_weights_in_another_model_are_refused(folder: Path, changes: dict[str, Any], said: list[str]) -> None:
    text = refused(agreement(*HF, checkpoint("base")), agreement(*HF, checkpoint("other", **changes)))
    assert sorted(re.findall(r"ckpt_path\.(.*?)(?:;|\. Give)", text)) == said


def test_the_same_weights_in_another_frozen_model_are_refused(folder: Path) -> None:
    Path("code").mkdir()
    Path("code/tasks.py").write_text(toy_tasks.MODULE)
    Path("pairs.json").write_text(json.dumps([{"prompt": "a", "chosen": "b", "rejected": "c"}]))
    task = (
        "--user_dir",
        "code",
        "--task",
        "toy-pairs",
        "--pairs_dir",
        "pairs.json",
        *HF,
        checkpoint("base"),
        "--teacher",
    )
    before = agreement(*task, checkpoint("teacher"))
    refuse_differing(FIRST, before, agreement(*task, checkpoint("teacher", torch_dtype="bfloat16")))
    now = agreement(*task, checkpoint("teacher", rms_norm_eps=1e-3))
    assert "reference.rms_norm_eps was 1e-05 and is 0.001. Give" in refused(before, now)


def test_a_checkpoint_that_was_moved_or_saved_again_is_the_same(folder: Path) -> None:
    before = agreement(*HF, checkpoint("written", **WRITTEN, torch_dtype="float32", dtype=None))
    AutoModelForCausalLM.from_pretrained("written", dtype=torch.bfloat16).save_pretrained("saved")
    add_tokenizer(Path("saved"))
    config = json.loads(Path("saved/config.json").read_text())
    assert "rope_theta" not in config, "this version of transformers writes it elsewhere"
    generation = {"temperature": 0.5, "use_cache": False, "eos_token_id": 3, "pad_token_id": 0, "_name_or_path": "x"}
    Path("saved/config.json").write_text(json.dumps(config | generation | {"transformers_version": "6.0.0"}))
    refuse_differing(FIRST, before, agreement(*HF, "saved"))


def test_checkpoints_of_before_do_not_say_which_model_they_are_of(folder: Path) -> None:
    before = {key: value for key, value in agreement(*HF, checkpoint("base")).items() if "ckpt_path." not in key}
    refuse_differing(FIRST, before, agreement(*HF, checkpoint("other", rms_norm_eps=1e-3)))
