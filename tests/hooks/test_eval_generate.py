"""Evaluation sets with names, and answers to their samples, in runs on one and on two ranks."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from panda.answers.metric import Answer
from panda.answers.metric import of_each
from panda.data import sample
from panda.hooks.eval_generate import FILE_NAME
from panda.hooks.eval_generate import EvalGenerate
from panda.hooks.eval_generate import EvalGenerateOptions
from panda.hooks.eval_generate import read_answers
from panda.registry import UserError
from panda.registry.contexts import PluginContext
from panda.run.questions import Question
from panda.run.questions import Questions
from panda.testing import Trained
from panda.testing import train
from panda.testing.runs import same_losses
from panda.testing.runs import zero3_at_once

OPTIONS: dict[str, Any] = {
    **{
        "arch": "llama-tiny",
        "vocab_size": 260,
        "max_seq_length": 64,
        "learning_rate": 0.002,
        "warmup_steps": 0,
        "max_steps": 4,
    },
    **{"eval_steps": 2, "eval_names": ["chat", "code"], "per_gpu_train_batch_size": 4, "num_workers": 0},
    **{"plugins": ["eval_generate", "best_checkpoint"], "best_metric": "eval_code_loss", "prompts": ["a"]},
    **{"eval_generate_rows": 3, "eval_generate_tokens": 6, "save_minutes": 0},
}
SETS = {"chat": slice(0, 7), "code": slice(7, 12)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows to train on, and two sets to evaluate on."""
    found = tmp_path_factory.mktemp("eval-generate")
    rows = json.loads((Path(sample.__file__).parent / "instruct/sample.json").read_text())
    for name, part in {**SETS, "rows": slice(12, 60)}.items():
        (found / f"{name}.json").write_text(json.dumps(rows[part]))
    return found


def trained(folder: Path, name: str, ranks: int = 1, **options: Any) -> Trained:
    data = {
        "instruction_tuning_data_dir": folder / "rows.json",
        "eval_data_dir": [folder / f"{name}.json" for name in SETS],
        "token_cache": folder / "cache",
    }
    return train(folder / name, ranks=ranks, **(OPTIONS | data | options))


@pytest.fixture(scope="module")
def whole(folder: Path) -> Trained:
    return trained(folder, "whole", save_steps=2, gradient_accumulation_steps=2)


def test_each_set_has_numbers_and_answers_of_its_own(whole: Trained) -> None:
    first, last = whole.evaluations
    assert (first["step"], last["step"]) == (2, 4)
    losses = {name: last[f"eval_{name}_loss"] for name in SETS}
    units = {name: last[f"eval_{name}_supervised_tokens"] for name in SETS}
    assert last["eval_supervised_tokens"] == sum(units.values()) and losses["chat"] != losses["code"]
    over_all = sum(losses[name] * units[name] for name in SETS) / sum(units.values())
    assert last["eval_loss"] == pytest.approx(over_all, rel=1e-12)
    answers = read_answers(whole.directory)
    assert [(each["step"], each["set"], each["sample"]) for each in answers] == [
        (step, name, number)
        for step in (0, 2, 4)
        for name, numbers in {"chat": (0, 2, 4), "code": (0, 1, 3)}.items()
        for number in numbers
    ]
    rows = json.loads((whole.directory.parent / "code.json").read_text())
    asked = answers[-1]
    assert asked["reference"] == rows[3]["target"] and asked["prompt"] == f"<s>{rows[3]['input']}\n"
    assert {*asked["scores"]} == {"exact_match", "rouge1", "rouge2", "rougeL"}
    for name in SETS:
        given = [each["scores"]["rougeL"] for each in answers if (each["step"], each["set"]) == (4, name)]
        assert last[f"eval_{name}_rougeL"] == pytest.approx(sum(given) / 3)
    assert last["eval_rougeL"] == pytest.approx((last["eval_chat_rougeL"] + last["eval_code_rougeL"]) / 2)
    best = min(whole.evaluations, key=lambda record: record["eval_code_loss"])
    assert (whole.directory / "checkpoints" / "best").read_text() == f"step-{best['step']:08d}\n"


@pytest.fixture
def asking(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A run before its first step, with two sets, of which one has no questions."""
    question = Question("chat", 0, [1], [2])
    monkeypatch.setattr("panda.run.questions.questions_of", lambda *_: Questions([question], []))
    monkeypatch.setattr("panda.run.questions.metrics_of", lambda *_: {"ours": METRIC})
    monkeypatch.setattr(EvalGenerate, "_longest_prompt", lambda *_: None)
    monkeypatch.setattr(EvalGenerate, "_answers", lambda *_: [Answer("p", "a", "r", True)])
    processes = SimpleNamespace(rank=0, from_rank_0=lambda make: make())
    return SimpleNamespace(
        directory=tmp_path,
        step=0,
        processes=processes,
        resolved=None,
        options=SimpleNamespace(task="t"),
        evaluations=dict.fromkeys(SETS, SimpleNamespace(dataset=[])),
        decoding=SimpleNamespace(ends=[]),
        task=SimpleNamespace(unit="pairs"),
        using_evaluated_weights=nullcontext,
        plan=SimpleNamespace(total_steps=4),
    )


METRIC = of_each(lambda _: {"one": 1.0, "two": 2.0, "three": 3.0})


def test_a_start_before_the_first_checkpoint_begins_the_answers_again(
    asking: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    old = [{"step": step, "prompt": "old", "answer": "of an earlier start"} for step in (0, 2)]
    (asking.directory / FILE_NAME).write_text("".join(json.dumps(line) + "\n" for line in old))
    plugin = EvalGenerate(EvalGenerateOptions(), PluginContext())
    plugin.panda_run_start(asking)
    plugin.panda_run_end()
    assert [(each["step"], each["prompt"]) for each in read_answers(asking.directory)] == [(0, "p")]
    assert "  1 answer  one 1  two 2  three 3  " in capsys.readouterr().out


def test_evaluations_say_of_which_scores_a_higher_one_is_better(asking: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    errors = of_each(lambda _: {"errors": 1.0}, higher_is_better=False)
    monkeypatch.setattr("panda.run.questions.metrics_of", lambda *_: {"ours": METRIC, "errors": errors})
    plugin, logged = EvalGenerate(EvalGenerateOptions(), PluginContext()), {}
    asking.log = lambda name, value, *, higher_is_better: logged.update({name: higher_is_better})
    plugin.panda_run_start(asking)
    plugin.panda_evaluation_start(asking)
    plugin.panda_run_end()
    found = {"one": True, "two": True, "three": True, "errors": False}
    assert logged == found | {f"chat_{name}": better for name, better in found.items()}


def test_scores_with_the_name_of_another_entry_are_refused_before_the_first_step(
    asking: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("panda.run.questions.metrics_of", lambda *_: {"ours": of_each(lambda _: {"code_loss": 1.0})})
    with pytest.raises(UserError, match="eval_metrics: a score is called 'code_loss', like another entry"):
        EvalGenerate(EvalGenerateOptions(), PluginContext()).panda_run_start(asking)


@pytest.mark.parametrize("how", ["zero3", "tensor"])
def test_two_ranks_answer_as_one(folder: Path, whole: Trained, how: str) -> None:
    split = {"tensor_parallel_size": 2, "gradient_accumulation_steps": 2}
    options = zero3_at_once(folder) | {"gradient_accumulation_steps": 1} if how == "zero3" else split
    found = trained(folder, how, ranks=2, **options)
    for here, there in zip(found.evaluations, whole.evaluations, strict=True):
        names = [name for name in there if "seconds" not in name]
        same, how_far = same_losses([here[name] for name in names], [there[name] for name in names])
        assert same, how_far
    assert read_answers(found.directory) == read_answers(whole.directory)


def test_a_resumed_run_goes_on_with_them(folder: Path, whole: Trained) -> None:
    """Each set, what is best of one, and answers, of which those before the first step are not asked again."""
    found = trained(
        folder,
        "resumed",
        resume=whole.directory / "checkpoints" / "step-00000002",
        save_steps=2,
        gradient_accumulation_steps=2,
    )
    (last,) = found.evaluations
    for name in (name for name in last if "seconds" not in name):
        assert last[name] == whole.evaluations[-1][name], name
    answers = [each for each in read_answers(whole.directory) if each["step"] == 4]
    assert read_answers(found.directory) == answers
    again = trained(folder, "resumed", resume="auto", prompts=["b"], gradient_accumulation_steps=2)
    assert len(again.evaluations) == 1, "it was evaluated once more, to the same numbers"
    assert read_answers(again.directory) == answers
