"""The report of runs that were trained: losses of tokens, answers before and after, and a model that is gone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from transformers import AutoTokenizer

from panda.cli import report
from panda.engine.checkpoints.in_use import remove_unless_read
from panda.report.gathering import SHOWN_TOKENS
from panda.report.gathering import Shown
from panda.report.gathering import shown
from panda.report.page import page
from panda.report.reported import Missing
from panda.report.reported import Reported
from panda.testing.runs import Trained
from panda.testing.runs import train

WORDS = ["red", "green", "blue", "white", "black", "grey"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Trained, Trained]:
    """A run, and another that began with its export."""
    folder = tmp_path_factory.mktemp("runs")
    rows = [{"input": f"say {word} {number}", "target": f"{word} \U0001f43c"} for number in range(4) for word in WORDS]
    (folder / "rows.json").write_text(json.dumps([*rows, {"input": "no target"}]))
    options = {
        "instruction_tuning_data_dir": folder / "rows.json",
        "eval_fraction": 0.1,
        "max_seq_length": 24,
        "max_steps": 3,
        "per_gpu_train_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "learning_rate": 3e-3,
        "warmup_steps": 0,
    }
    first = train(folder / "first", arch="llama-tiny", **options)
    return first, train(folder / "second", ckpt_path=first.export, **options)


def gathered(run: Trained, *flags: str) -> Reported:
    arguments = report.parser().parse_args([str(run.directory), *flags])
    return report._reported(run.directory, "run", arguments)


def losses_of(export: Path, texts: list[list[int]], supervised: list[list[bool]]) -> list[float]:
    """The mean loss of each sequence, by plain transformers."""
    model = AutoModelForCausalLM.from_pretrained(export)
    found = []
    for ids, carries in zip(texts, supervised, strict=True):
        labels = torch.tensor([[token if on else -100 for token, on in zip(ids, carries, strict=True)]])
        found.append(float(model(torch.tensor([ids]), labels=labels).loss.detach()))
    return found


def test_losses_are_those_of_the_evaluation_and_of_the_model_before(
    runs: tuple[Trained, Trained], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = runs
    sequences: list[Shown] = []
    from panda.report import gathering

    def kept(*given: Any) -> Any:
        found = gathering_chosen(*given)
        sequences.extend(found[0])
        return found

    gathering_chosen = gathering.chosen_samples
    monkeypatch.setattr(gathering, "chosen_samples", kept)
    found = gathered(second)
    assert not isinstance(found.samples, Missing) and found.which_samples.startswith("Held-out samples")
    assert len(found.samples) == 2 == second.evaluations[-1]["eval_supervised_tokens"] // sum(sequences[0].supervised)
    units = [sum(one.supervised) for one in sequences]
    means = [sample.loss for sample in found.samples]
    whole = sum(mean * unit for mean, unit in zip(means, units, strict=True) if mean is not None) / sum(units)
    assert whole == pytest.approx(second.evaluations[-1]["eval_loss"], rel=1e-4)
    given = [one.ids for one in sequences], [one.supervised for one in sequences]
    assert means == pytest.approx(losses_of(second.export, *given), rel=1e-4)
    assert [sample.before for sample in found.samples] == pytest.approx(losses_of(first.export, *given), rel=1e-4)
    # Each piece has the loss of its tokens; the panda takes four of them.
    for sample, one in zip(found.samples, sequences, strict=True):
        assert sum(piece.loss or 0 for piece in sample.pieces if piece.supervised) / sum(
            one.supervised
        ) == pytest.approx(sample.loss)
        assert any("\U0001f43c" in piece.text and piece.tokens == 4 for piece in sample.pieces)
        assert {piece.supervised for piece in sample.pieces} == {True, False}


def test_data_and_answers_are_gathered(runs: tuple[Trained, Trained]) -> None:
    first, second = runs
    found = gathered(second, "--samples", "0")
    assert not isinstance(found.data, Missing) and not isinstance(found.answers, Missing)
    assert found.data.counts["rows"] == "25" and found.data.counts["rows that cannot be used"] == "1"
    assert sum(count for _, _, count in found.data.lengths) == 22 and found.data.limit == 24
    assert any("no field 'target'" in line for line in found.data.remarks)
    assert isinstance(found.samples, Missing)
    recorded = json.loads((second.directory / "answers.json").read_text())
    before = json.loads((first.directory / "answers.json").read_text())
    assert [answer.answers["after training"] for answer in found.answers] == [one["answer"] for one in recorded]
    # The first run asked its model the same: the likeliest answers are the same, but for a mark where they were cut.
    assert [answer.answers["before training"].removesuffix(" …") for answer in found.answers] == [
        one["answer"] for one in before
    ]
    whole = gathered(first, "--samples", "0")
    assert "random weights" in whole.which_answers and not isinstance(whole.answers, Missing)


def test_the_weights_of_a_run_that_has_not_ended_are_named_by_their_step(
    runs: tuple[Trained, Trained], tmp_path: Path
) -> None:
    """One that trains, was killed, or has gone on since its end."""
    ended = gathered(runs[0], "--recorded_only")
    assert ended.weights.startswith("those after step 3") and not isinstance(ended.answers, Missing)
    run = tmp_path / "run"
    shutil.copytree(runs[0].directory, run)
    (run / "checkpoints/step-00000003").rename(run / "checkpoints/step-00000002")  # as if it were an earlier one
    (run / "checkpoints/best").write_text("step-00000002\n")
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    best = next(record for record in records if "eval_loss" in record)
    records.append(best | {"step": 1, "eval_loss": 0.5})
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    provenance = json.loads((run / "provenance.json").read_text())
    provenance["earlier_starts"] = [{"end": provenance.pop("end")}]
    (run / "provenance.json").write_text(json.dumps(provenance))
    killed = Trained(run, "")
    found = gathered(killed, "--samples", "0")
    assert found.weights == "those after step 2; the best evaluation was eval_loss 0.5000 at step 1"
    assert not isinstance(found.answers, Missing)
    assert {*found.answers[0].answers} == {"at the end of an earlier start, step 3"}
    described = (run / "provenance.json").read_text()
    (run / "provenance.json").write_text("{")  # what is damaged takes no other part of the page with it
    assert not isinstance(gathered(killed, "--recorded_only").answers, Missing)
    (run / "provenance.json").write_text(described)
    (run / "answers.json").unlink()
    found = gathered(killed, "--samples", "0")
    assert not isinstance(found.answers, Missing) and {*found.answers[0].answers} == {"after step 2"}
    assert "weights that answer below" in page([found])


def test_a_model_before_training_may_be_of_pickles(runs: tuple[Trained, Trained], tmp_path: Path) -> None:
    first, second = runs
    moved = tmp_path / "moved"
    shutil.copytree(first.export, moved)
    torch.save(load_file(moved / "model.safetensors"), moved / "pytorch_model.bin")
    (moved / "model.safetensors").unlink()
    where = ["--ckpt_path", str(moved), "--answers", "0"]
    refused = gathered(second, *where)
    assert isinstance(refused.samples, Missing) and "add `--allow_pickle`" in refused.samples.why
    found, expected = gathered(second, *where, "--allow_pickle"), gathered(second, "--answers", "0")
    assert not isinstance(found.samples, Missing) and not isinstance(expected.samples, Missing)
    assert [sample.before for sample in found.samples] == [sample.before for sample in expected.samples] != [None, None]


def test_the_model_is_loaded_only_where_it_is_asked(
    runs: tuple[Trained, Trained], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "assistant_and_sampling", lambda arguments: 1 / 0)
    found = gathered(runs[0], "--samples", "0", "--answers", "0")
    assert isinstance(found.answers, Missing) and found.answers.why == "none were asked for"
    assert not isinstance(found.data, Missing)
    found = gathered(runs[0], "--recorded_only")
    assert isinstance(found.data, Missing) and not isinstance(found.answers, Missing)  # those on record


def test_the_memory_of_a_run_on_gpus_is_estimated_by_part(runs: tuple[Trained, Trained], tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(runs[0].directory, run, ignore=shutil.ignore_patterns("export", "checkpoints"))
    provenance = json.loads((run / "provenance.json").read_text())
    (run / "provenance.json").write_text(json.dumps(provenance | {"device": "cuda:0", "ranks": 2}))
    found = gathered(Trained(run, ""), "--samples", "0", "--answers", "0")
    assert found.memory["weights"] * 2**30 == pytest.approx(4 * provenance["parameters"], rel=0.01)
    assert {"optimizer states", "gradients"} <= {*found.memory}
    config, deepspeed = (run / "config.yaml").read_text(), json.loads((run / "deepspeed.json").read_text())
    assert "zero_stage: null" in config
    (run / "config.yaml").write_text(config.replace("zero_stage: null", "zero_stage: 3"))
    least = gathered(Trained(run, ""), "--samples", "0", "--answers", "0").memory["buffers"]
    deepspeed["zero_optimization"]["stage3_max_live_parameters"] = 10**9
    (run / "deepspeed.json").write_text(json.dumps(deepspeed))
    with_all = gathered(Trained(run, ""), "--samples", "0", "--answers", "0").memory["buffers"]
    assert with_all > least > 0, "layers that stayed"
    assert gathered(runs[0], "--samples", "0", "--answers", "0").memory == {}


def test_what_is_gone_is_said_and_the_rest_is_there(
    runs: tuple[Trained, Trained], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(runs[0].directory, run)
    for part in ("export", "checkpoints"):
        shutil.rmtree(run / part)
    found = gathered(Trained(run, ""))
    assert not isinstance(found.samples, Missing) and "contains no model" in found.no_losses
    assert all(piece.loss is None for sample in found.samples for piece in sample.pieces)
    assert not isinstance(found.answers, Missing)  # those on record
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace("rows.json", "gone.json"))
    found = gathered(Trained(run, ""))
    assert isinstance(found.data, Missing) and "gone.json" in found.data.why
    assert "note: run: its configuration cannot be shown" in capsys.readouterr().err


def test_a_task_that_fails_takes_its_part_of_the_page_only(
    runs: tuple[Trained, Trained], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("panda.tasks.row_task.RowTask.parts", lambda self, sample: 1 / 0)
    found = gathered(runs[0])
    assert isinstance(found.samples, Missing) and found.samples.why == "ZeroDivisionError: division by zero"
    assert not isinstance(found.data, Missing) and not isinstance(found.answers, Missing)


def test_data_that_has_changed_since_is_said(runs: tuple[Trained, Trained], tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(runs[0].directory, run, ignore=shutil.ignore_patterns("export", "checkpoints"))
    provenance = json.loads((run / "provenance.json").read_text())
    (run / "provenance.json").write_text(json.dumps(provenance | {"samples": 99}))
    found = gathered(Trained(run, ""), "--samples", "0", "--answers", "0")
    assert not isinstance(found.data, Missing)
    assert found.data.remarks[0] == "The data has changed since the run, which had 99 samples."
    assert isinstance(found.answers, Missing)


def test_the_pieces_of_a_text_are_the_text(runs: tuple[Trained, Trained]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(runs[0].export)
    text = "a \U0001f43c\u200d\u2744\ufe0f b\n\n</script> é " * 3
    ids = tokenizer(text)["input_ids"]
    supervised = [number >= 5 for number in range(len(ids))]  # changes within a character
    sample = shown(tokenizer, Shown("x", ids, supervised), [float("nan"), *[0.5] * (len(ids) - 1)])
    assert sum(piece.tokens for piece in sample.pieces) == len(ids)
    assert "".join(piece.text for piece in sample.pieces[3:]).endswith("</script> é ")
    assert sample.loss == pytest.approx(0.5)
    long = shown(tokenizer, Shown("x", ids * 20, supervised * 20), None)
    assert long.left_out == len(ids) * 20 - SHOWN_TOKENS and long.loss is None


def test_a_run_that_saves_meanwhile_leaves_the_checkpoint_that_a_page_is_about(
    runs: tuple[Trained, Trained], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    shutil.copytree(runs[0].directory, run)
    (run / "answers.json").unlink()
    first, second = (run / "checkpoints" / f"step-0000000{step}" for step in (2, 3))
    second.rename(first)
    configured = report._configuration

    def saving(*given: Any) -> Any:
        shutil.copytree(first, second)
        assert not remove_unless_read(first)
        return configured(*given)

    monkeypatch.setattr(report, "_configuration", saving)
    found = gathered(Trained(run, ""), "--samples", "0")
    assert found.weights.startswith("those after step 2")
    assert not isinstance(found.answers, Missing) and {*found.answers[0].answers} == {"after step 2"}
    assert remove_unless_read(first)
