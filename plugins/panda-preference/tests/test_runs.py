"""Runs by name: what is refused and reported, that they resume to the bit, and that adapters learn."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from panda.hooks.metrics import read_evaluations
from panda.hooks.metrics import read_metrics
from runs import Train
from runs import rows_file
from safetensors.torch import load_file
from tiny import LABELLED
from tiny import PAIRS
from tiny import VOCABULARY
from transformers import AutoModelForCausalLM
from transformers import AutoModelForSequenceClassification
from transformers import AutoTokenizer
from transformers import BertConfig
from transformers import MambaConfig


def rows_of(task: str) -> list[dict[str, Any]]:
    if task == "distill":
        return [{"input": pair["prompt"], "target": pair["chosen"]} for pair in PAIRS]
    return LABELLED if task == "kto" else PAIRS


def options_of(task: str, tiny: Path, rows: Path, **more: Any) -> dict[str, Any]:
    data: dict[str, Any] = {"preference_data_dir": rows}
    if task == "distill":
        data = {"instruction_tuning_data_dir": rows, "teacher_path": tiny / "teacher"}
    return {
        "task": task,
        "ckpt_path": tiny / "model",
        "tokenizer": tiny / "model",
        **data,
        "max_seq_length": 64,
        "max_steps": 4,
        "per_gpu_train_batch_size": 2,
        "gradient_accumulation_steps": 1,
        "optimizer": "adamw",
        "learning_rate": 1e-3,
        "warmup_steps": 0,
        "num_workers": 0,
        **more,
    }


@pytest.mark.parametrize("task", ["dpo", "kto", "reward", "distill"])
def test_a_resumed_run_ends_as_one_that_was_not_interrupted(
    task: str, train: Train, tiny: Path, tmp_path: Path
) -> None:
    """To the bit, its evaluations too. The reference is that of the beginning, not the resumed model."""
    rows = rows_file(tmp_path / "rows", rows_of(task))
    more = {"save_steps": 2, "eval_data_dir": rows, "eval_steps": 1}
    train(tmp_path / "whole", **options_of(task, tiny, rows, **more))
    train(
        tmp_path / "resumed",
        **options_of(task, tiny, rows, **more),
        resume=tmp_path / "whole/checkpoints/step-00000002",
    )
    for read in (read_metrics, read_evaluations):
        found, expected = (without_times(read(tmp_path / name)) for name in ("resumed", "whole"))
        assert len(expected) == 4 and found == expected[2:]
    weights = [load_file(tmp_path / name / "export" / "model.safetensors") for name in ("resumed", "whole")]
    assert weights[0].keys() == weights[1].keys()
    assert all(weights[0][name].equal(weights[1][name]) for name in weights[0])


def without_times(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    timed = ("seconds", "tokens_per_second", "data_wait", "memory_gib")
    return [{name: value for name, value in each.items() if not name.endswith(timed)} for each in records]


@pytest.mark.parametrize("task", ["dpo", "kto", "orpo", "simpo", "reward"])
def test_packed_rows_are_refused(task: str, train: Train, tiny: Path, tmp_path: Path) -> None:
    rows = rows_file(tmp_path / "rows", rows_of(task))
    printed = train(tmp_path / "run", **options_of(task, tiny, rows, batching="packed"), fails=True)
    assert "packed" in printed and "Traceback" not in printed
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_distillation_is_the_same_packed(train: Train, tiny: Path, tmp_path: Path) -> None:
    rows = rows_file(tmp_path / "rows", rows_of("distill"))
    found = []
    for batching in ("packed", "padded"):
        more = {"batching": batching, "per_gpu_train_batch_size": 4, "max_steps": 1}
        train(tmp_path / batching, **options_of("distill", tiny, rows, **more))
        found.append(read_metrics(tmp_path / batching)[0])
    assert found[0]["supervised_tokens"] == found[1]["supervised_tokens"] > 10
    for name in ("loss", "cross_entropy", "agreement"):
        assert found[0][name] == pytest.approx(found[1][name], abs=1e-6)


def test_a_teacher_whose_positions_stretch_is_right_in_any_rows(train: Train, tiny: Path, tmp_path: Path) -> None:
    """Its RoPE goes by the length of a sample, which rows do not tell unless somebody wants to know, as the student
    does not: with padding a sample would be as long as the longest."""
    teacher = shutil.copytree(tiny / "teacher", tmp_path / "teacher")
    config = json.loads((teacher / "config.json").read_text()) | {"max_position_embeddings": 4}
    config["rope_parameters"] = {"rope_type": "dynamic", "factor": 16.0, "rope_theta": 10000.0}
    (teacher / "config.json").write_text(json.dumps(config))
    rows = rows_file(tmp_path / "rows", rows_of("distill"))
    losses = []
    for batching, batch in (("padded", 1), ("padded", 4), ("packed", 4)):
        more = {"batching": batching, "per_gpu_train_batch_size": batch, "gradient_accumulation_steps": 4 // batch}
        options = options_of("distill", tiny, rows, **more, max_steps=1, teacher_path=teacher)
        train(tmp_path / f"{batching}-{batch}", **options)
        losses.append(read_metrics(tmp_path / f"{batching}-{batch}")[0]["loss"])
    assert losses[1:] == pytest.approx([losses[0]] * 2, rel=1e-6)


@pytest.mark.parametrize(
    ("config", "batching", "refused"),
    [
        (
            MambaConfig(state_size=4, num_hidden_layers=2, time_step_rank=4),
            "packed",
            "sees the one before it in its row",
        ),
        (BertConfig(num_hidden_layers=1, num_attention_heads=2, intermediate_size=24), "padded", "looks ahead"),
    ],
)
def test_a_teacher_is_tried_as_the_student_is(
    config: Any, batching: str, refused: str, train: Train, tiny: Path, tmp_path: Path
) -> None:
    """Neither has a tokenizer, for which transformers would make ones without tokens."""
    config.update({"vocab_size": len(VOCABULARY), "hidden_size": 16})
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "teacher")
    rows = rows_file(tmp_path / "rows", rows_of("distill"))
    options = options_of("distill", tiny, rows, teacher_path=tmp_path / "teacher", batching=batching)
    printed = train(tmp_path / "run", **options, fails=True)
    assert refused in printed and "teacher" in printed and "Traceback" not in printed


@pytest.mark.parametrize("task", ["dpo", "kto", "reward"])
def test_adapters_are_compared_with_the_model_without_them(task: str, train: Train, tiny: Path, tmp_path: Path) -> None:
    rows = rows_file(tmp_path / "rows", rows_of(task))
    lora = {"use_lora": "true", "lora_r": 4, "lora_dropout": 0, "learning_rate": 1e-2, "beta": 0.5}
    if task == "reward":
        del lora["beta"]
    printed = train(tmp_path / "run", **options_of(task, tiny, rows, **lora))
    records = read_metrics(tmp_path / "run")
    if task != "reward":
        assert records[0]["rewards/margins"] == pytest.approx(0, abs=1e-6), "adapters begin as nothing"
        assert "frozen copy" not in printed
    assert records[-1]["rewards/margins"] > records[0]["rewards/margins"]
    assert (tmp_path / "run" / "export" / "adapter_config.json").exists()
    if task == "dpo":  # from there on the base is not where a run starts
        options = options_of(task, tiny, rows, **lora) | {"ckpt_path": tmp_path / "run" / "export"}
        printed = train(tmp_path / "again", **options, fails=True)
        assert "ckpt_path: the run starts from the adapters in" in printed and "Traceback" not in printed
        named = {"reference_path": tiny / "model", "max_steps": 1}
        train(tmp_path / "again", **options | named)
        assert abs(read_metrics(tmp_path / "again")[0]["loss"] - 0.693147) > 1e-3, "that of the base, as is said"


def test_dpo_begins_at_the_logarithm_of_two_and_without_reference_does_not(
    train: Train, tiny: Path, tmp_path: Path
) -> None:
    rows = rows_file(tmp_path / "rows", PAIRS)
    train(tmp_path / "with", **options_of("dpo", tiny, rows, max_steps=1))
    assert read_metrics(tmp_path / "with")[0]["loss"] == pytest.approx(0.693147, abs=1e-5)
    printed = train(tmp_path / "without", **options_of("dpo", tiny, rows, max_steps=1, reference_free="true"))
    [record] = read_metrics(tmp_path / "without")
    assert abs(record["loss"] - 0.693147) > 1e-3 and "frozen" not in printed
    assert record["rewards/chosen"] == pytest.approx(0.1 * record["logps/chosen"], rel=1e-5)


def test_another_reference_is_another_loss(train: Train, tiny: Path, tmp_path: Path) -> None:
    rows = rows_file(tmp_path / "rows", PAIRS)
    train(tmp_path / "run", **options_of("dpo", tiny, rows, max_steps=1, reference_path=tiny / "teacher"))
    assert abs(read_metrics(tmp_path / "run")[0]["loss"] - 0.693147) > 1e-3


def test_bad_rows_cut_rows_and_unused_fields_are_reported(train: Train, tiny: Path, tmp_path: Path) -> None:
    long = {"prompt": "what " * 70, "chosen": "the heron", "rejected": "a frog"}
    same = {"prompt": "what", "chosen": "the  heron", "rejected": "the heron"}  # the tokenizer makes them the same
    rows = [*PAIRS, {"prompt": "what"}, long, same, {**PAIRS[0], "source": "here", "margin": 1}]
    printed = train(tmp_path / "run", **options_of("dpo", tiny, rows_file(tmp_path / "rows", rows), max_steps=1))
    assert "rows.jsonl, row 5: no field 'chosen' and no 'rejected'" in printed
    assert "rows.jsonl, row 7: both answers are the same tokens" in printed
    assert "2 of 8 rows cannot be used and are left out" in printed
    assert "1 of 6 samples (16.7%) is cut to 64 tokens" in printed
    assert "the field 'source' is not used (1 row)" in printed
    assert "the field 'margin' is not used (1 row)" in printed
    assert "6 samples of 8 rows" in printed


def test_a_reward_model_uses_margins(train: Train, tiny: Path, tmp_path: Path) -> None:
    losses = []
    for name, margin in (("without", 0), ("with", 2)):
        rows = rows_file(tmp_path / f"{name}-rows", [{**pair, "margin": margin} for pair in PAIRS])
        printed = train(tmp_path / name, **options_of("reward", tiny, rows, max_steps=1))
        assert "margin" not in printed
        losses.append(read_metrics(tmp_path / name)[0]["loss"])
    assert losses[1] > losses[0] + 1


def command(name: str, *words: str) -> str:
    """What ``name``, a command of panda's, prints."""
    program = str(Path(sys.executable).with_name(name))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([program, *words], env=environment, capture_output=True, text=True, timeout=900)
    return done.stdout + done.stderr


def typed(directory: Path, options: dict[str, Any]) -> str:
    """What ``panda-train`` prints with all its plugins."""
    words = [word for key, value in options.items() for word in (f"--{key}", str(value))]
    return command("panda-train", *words, "--output_dir", str(directory))


def test_a_reward_model_answers_no_prompts(train: Train, tiny: Path, tmp_path: Path) -> None:
    """It is not offered to be asked; its evaluation on other data is that of a run that takes no step."""
    rows = rows_file(tmp_path / "rows", PAIRS)
    run, other = tmp_path / "run", rows_file(tmp_path / "other", PAIRS[:2])
    printed = typed(run, options_of("reward", tiny, rows, max_steps=1, eval_data_dir=other))
    assert "panda report" in printed and "panda generate" not in printed and not (run / "answers.json").exists()
    assert "panda generate" in typed(tmp_path / "dpo", options_of("dpo", tiny, rows, max_steps=1))
    said = re.search("`panda-train ([^`]*)`", command("panda", "eval", str(run), "--data", str(other)))
    assert said is not None and said[1] == f"--resume {run} --eval_data_dir DATA --output_dir NEW"
    train(tmp_path / "again", resume=run, eval_data_dir=other)
    before, after = ({**read_evaluations(each)[-1], "eval_seconds": 0} for each in (run, tmp_path / "again"))
    assert before == after and before["step"] == 1


@pytest.mark.parametrize("pads_with", ["<pad>", "</s>"])
def test_transformers_gives_an_exported_reward_models_rewards(
    pads_with: str, train: Train, tiny: Path, tmp_path: Path
) -> None:
    """It reads before the padding, to which a last token belongs that is the same one."""
    start = shutil.copytree(tiny / "model", tmp_path / "start")
    for name, key, value in (
        ("config.json", "pad_token_id", VOCABULARY.index(pads_with)),
        ("tokenizer_config.json", "pad_token", pads_with),
    ):
        (start / name).write_text(json.dumps(json.loads((start / name).read_text()) | {key: value}))
    rows = rows_file(tmp_path / "rows", PAIRS)
    of_start = {"ckpt_path": start, "tokenizer": start, "template": "plain", "separator": ""}
    train(tmp_path / "run", **options_of("reward", tiny, rows, eval_data_dir=rows, **of_start))
    export = tmp_path / "run" / "export"
    model = AutoModelForSequenceClassification.from_pretrained(export)
    tokenizer = AutoTokenizer.from_pretrained(export)
    last = read_evaluations(tmp_path / "run")[-1]
    with torch.no_grad():
        for side in ("chosen", "rejected"):
            texts = [pair["prompt"] + pair[side] + tokenizer.eos_token for pair in PAIRS]
            rewards = [model(**tokenizer(text, return_tensors="pt")).logits.item() for text in texts]
            assert last[f"eval_rewards/{side}"] == pytest.approx(sum(rewards) / len(rewards), abs=1e-5)
    # Its own weights are where another run starts, the head among them.
    options = options_of("reward", tiny, rows, max_steps=1, **of_start) | {"ckpt_path": export}
    train(tmp_path / "again", **options | {"per_gpu_train_batch_size": 4})
    assert read_metrics(tmp_path / "again")[0]["loss"] == pytest.approx(last["eval_loss"], abs=1e-5)


@pytest.mark.parametrize(
    ("task", "changes", "more", "refused"),
    [
        ("dpo", {"tokenizer.json": {"waits": "in", "in": "waits"}}, {}, "has another tokenizer than the run: '"),
        ("kto", {"tokenizer.json": {"waits": "in", "in": "waits"}}, {}, "has another tokenizer than the run: '"),
        ("dpo", {"config.json": {"max_position_embeddings": 8}}, {}, "max_seq_length: 64, but reference_path "),
        ("dpo", {}, {"tensor_parallel_size": 2, "ranks": 2}, "tensor_parallel_size: the frozen model at reference_pa"),
    ],
)
def test_a_reference_that_cannot_be_one_is_refused(
    task: str, changes: dict[str, Any], more: dict[str, Any], refused: str, train: Train, tiny: Path, tmp_path: Path
) -> None:
    """Before anything is built. Words that have changed places are other tokens, as many as before."""
    reference = shutil.copytree(tiny / "teacher", tmp_path / "reference")
    for name, new in changes.items():
        content = json.loads((reference / name).read_text())
        if name == "tokenizer.json":
            words = content["model"]["vocab"]
            content["model"]["vocab"] = {new.get(word, word): number for word, number in words.items()}
        else:
            content |= new
        (reference / name).write_text(json.dumps(content))
    rows = rows_file(tmp_path / "rows", rows_of(task))
    options = options_of(task, tiny, rows, reference_path=reference) | more
    printed = train(tmp_path / "run", **options, fails=True)
    assert refused in printed and str(reference) in printed and "Traceback" not in printed


@pytest.mark.parametrize("named", [True, False])
def test_a_resumed_run_refuses_another_reference(named: bool, train: Train, tiny: Path, tmp_path: Path) -> None:
    """One that is named, and one that is the start of the run, whose weights have changed since."""
    start = shutil.copytree(tiny / "model", tmp_path / "start")
    other = shutil.copytree(tiny / "teacher", tmp_path / "other")
    rows = rows_file(tmp_path / "rows", PAIRS)
    options = options_of("dpo", tiny, rows, save_steps=2, ckpt_path=start) | (
        {"reference_path": other} if named else {}
    )
    train(tmp_path / "run", **options)
    shutil.copy((tiny / ("model" if named else "teacher")) / "model.safetensors", other if named else start)
    printed = train(tmp_path / "run", **options | {"max_steps": 5}, resume="auto", fails=True)
    assert "the weights of the frozen model were others" in printed and "Traceback" not in printed


def test_a_model_without_positions_learns_from_a_teacher_that_wants_them(
    train: Train, tiny: Path, tmp_path: Path
) -> None:
    teacher = shutil.copytree(tiny / "teacher", tmp_path / "teacher")
    config = json.loads((teacher / "config.json").read_text()) | {"max_position_embeddings": 4}
    config["rope_parameters"] = {"rope_type": "dynamic", "factor": 16.0, "rope_theta": 10000.0}
    (teacher / "config.json").write_text(json.dumps(config))
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "recurrent.py").write_text(RECURRENT)
    rows, losses = rows_file(tmp_path / "rows", rows_of("distill")), []
    for batch in (1, 4):
        more = {"per_gpu_train_batch_size": batch, "gradient_accumulation_steps": 4 // batch, "max_steps": 1}
        options = options_of("distill", tiny, rows, teacher_path=teacher, **more)
        del options["ckpt_path"]
        train(tmp_path / f"run-{batch}", **options, model="recurrent", user_dir=tmp_path / "own")
        losses.append(read_metrics(tmp_path / f"run-{batch}")[0]["loss"])
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)


RECURRENT = '''
"""A model of a user, whose forward takes token ids only."""

import torch

from panda import register_model


class Recurrent(torch.nn.Module):
    def __init__(self, entries):
        super().__init__()
        self.embedding = torch.nn.Embedding(entries, 16)
        self.cell = torch.nn.GRU(16, 16, batch_first=True)
        self.head = torch.nn.Linear(16, entries)

    def forward(self, input_ids):
        return self.head(self.cell(self.embedding(input_ids))[0])


@register_model("recurrent")
def build(options, context):
    return Recurrent(context.vocab_size)
'''


def test_a_teacher_with_other_tokens_is_refused(train: Train, tiny: Path, tmp_path: Path) -> None:
    rows = rows_file(tmp_path / "rows", rows_of("distill"))
    options = options_of("distill", tiny, rows, teacher_path="panda_preference:sample/model")  # which has more rows
    printed = train(tmp_path / "run", **options, fails=True)
    assert "teacher_path: 'panda_preference:sample/model' has another tokenizer than the run" in printed


def test_options_that_contradict_each_other_are_refused(train: Train, tiny: Path, tmp_path: Path) -> None:
    rows = rows_file(tmp_path / "rows", PAIRS)
    for more, problem in (
        (
            {"reference_free": "true", "reference_path": tiny / "teacher"},
            "reference_free: the run has a refer",
        ),
        ({"chosen_field": "best"}, "chosen_field and rejected_field are given together"),
        ({"data_weights": "1,2"}, "data_weights: 2 weights are given for 1 paths"),
        ({"beta": 0}, "beta"),
        ({"reference_path": "nowhere"}, "reference_path: 'nowhere' was not found. Looked for the folder"),
    ):
        assert problem in train(tmp_path / "run", **options_of("dpo", tiny, rows, **more), fails=True)


def test_distillation_weighs_tokens_and_smooths_no_labels(train: Train, tiny: Path, tmp_path: Path) -> None:
    losses = []
    for name, weight in (("all", 1.0), ("half", 0.5)):
        turns = [
            [{"role": "user", "content": pair["prompt"]}, {"role": "assistant", "content": pair["chosen"]}]
            for pair in PAIRS
        ]
        turns[0][1]["weight"] = weight  # type: ignore[assignment]
        rows = rows_file(tmp_path / f"{name}-rows", [{"messages": each} for each in turns])
        more = {"max_steps": 1, "per_gpu_train_batch_size": 4}
        train(tmp_path / name, **options_of("distill", tiny, rows, **more))
        losses.append(read_metrics(tmp_path / name)[0]["loss"])
    assert abs(losses[0] - losses[1]) > 1e-3
    printed = train(tmp_path / "run", **options_of("distill", tiny, rows, label_smoothing=0.1), fails=True)
    assert "label_smoothing: distillation has no labels to smooth" in printed


def test_provenance_names_the_package(train: Train, tiny: Path, tmp_path: Path) -> None:
    rows = rows_file(tmp_path / "rows", PAIRS)
    train(tmp_path / "run", **options_of("simpo", tiny, rows, max_steps=1))
    component = json.loads((tmp_path / "run" / "provenance.json").read_text())["components"]["task simpo"]
    assert (component["distribution"], component["module"]) == ("panda-preference", "panda_preference.simpo")
