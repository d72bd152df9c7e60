"""`panda eval`: a run and its export, against plain transformers in float64."""

from __future__ import annotations

import argparse
import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from panda.answers.assistant import Sampling
from panda.answers.exact_match import ExactMatchOptions
from panda.answers.loading import described_in
from panda.cli import eval as evaluating
from panda.cli import report as reporting
from panda.cli.harness import model_arguments
from panda.configuration.arguments import parse_arguments
from panda.data import sample
from panda.files.activity import activity
from panda.hooks.eval_generate import read_answers
from panda.registry import UserError
from panda.testing import Trained
from panda.testing import train

SETS = {"chat": slice(0, 7), "code": slice(7, 12)}
TOKENS = 6


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """A run on rows that are gone since, evaluated on two sets of rows."""
    folder = tmp_path_factory.mktemp("eval")
    rows = json.loads((Path(sample.__file__).parent / "instruct/sample.json").read_text())
    for name, part in {**SETS, "rows": slice(12, 60)}.items():
        (folder / f"{name}.json").write_text(json.dumps(rows[part]))
    found = train(
        folder / "run",
        arch="llama-tiny",
        max_seq_length=64,
        learning_rate=0.01,
        warmup_steps=0,
        max_steps=30,
        gradient_accumulation_steps=8,
        instruction_tuning_data_dir=folder / "rows.json",
        data_weights=0.5,
        eval_data_dir=[folder / f"{name}.json" for name in SETS],
        eval_names=[*SETS],
        plugins="eval_generate",
        eval_generate_rows=3,
        eval_generate_tokens=TOKENS,
        eval_metrics=["exact_match", "rouge"],
        ignore_case=True,
        token_cache=folder / "cache",
    )
    (folder / "rows.json").unlink()
    return found


def evaluated(tmp_path: Path, *argv: object) -> dict[str, Any]:
    file = tmp_path / "numbers.json"
    assert evaluating.main([*map(str, argv), "--output", str(file)]) == 0
    found: dict[str, Any] = json.loads(file.read_text())
    return found


def test_a_run_has_the_numbers_of_its_last_evaluation(
    run: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """On its own evaluation data, by its own configuration, and without the data that it was trained on."""
    found = evaluated(tmp_path, run.directory)
    (record,) = run.evaluations
    for name, prefix in {"all": "eval_", "chat": "eval_chat_", "code": "eval_code_"}.items():
        numbers = found["all"] if name == "all" else found["sets"][name]
        for key in ("loss", "tokens", "supervised_tokens", "exact_match", "rouge1", "rouge2", "rougeL"):
            assert numbers[key] == pytest.approx(record[prefix + key], rel=1e-6), (name, key)
        assert numbers["perplexity"] == pytest.approx(math.exp(numbers["loss"]))
    last = [each for each in read_answers(run.directory) if each["step"] == 30]
    assert [{"step": 30, **each} for each in found["answers"]] == last
    printed = capsys.readouterr()
    assert printed.out.splitlines()[:2] == [
        f"{'':17}    chat    code     all",
        f"{'samples':17}       7       5      12",
    ]
    assert f"{'loss':17}" in printed.out and "step-00000030" in printed.err
    of_run = evaluating._configured(str(run.directory), parse_arguments([]), None).resolved
    assert of_run.named[0].options == ExactMatchOptions(ignore_case=True)


def test_an_export_has_the_loss_of_plain_transformers(run: Trained, tmp_path: Path) -> None:
    """Per token in float64, on the ids that its chat template makes; answers are those of `panda generate`."""
    import transformers

    data = run.directory.parent / "chat.json"
    found = evaluated(tmp_path, run.export, "--data", data, "--eval_generate_rows", 7)
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(run.export)
    loading: Any = transformers.AutoModelForCausalLM
    model = loading.from_pretrained(run.export, dtype=torch.float64).eval()
    assistant = described_in(run.export).assistant(torch.device("cpu"))
    total, count, right = 0.0, 0, 0
    rows = json.loads(data.read_text())
    for row, answer in zip(rows, found["answers"], strict=True):
        messages = [{"role": "user", "content": row["input"]}, {"role": "assistant", "content": row["target"]}]
        prompt = tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True, return_dict=False)
        ids = tokenizer.apply_chat_template(messages, return_dict=False)
        with torch.no_grad():
            scores = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        for place in range(len(prompt), len(ids)):
            total -= float(scores[place - 1, ids[place]])
            count += 1
            right += int(scores[place - 1].argmax()) == ids[place]
        said = assistant.answer(prompt, Sampling(TOKENS), lambda text: None, lambda text: None).text
        assert answer["answer"] == said and answer["reference"] == row["target"]
    assert len({answer["answer"] for answer in found["answers"]}) > 1
    numbers = found["all"]
    assert numbers["supervised_tokens"] == count and numbers["token_accuracy"] == right / count
    assert numbers["loss"] == pytest.approx(total / count, rel=1e-6)
    assert found["sets"] == {} and numbers["data"] == [str(data)]


def test_json_is_all_that_stdout_has(run: Trained, capsys: pytest.CaptureFixture[str]) -> None:
    code = run.directory.parent / "code.json"
    assert evaluating.main([str(run.export), "--data", str(code), "--json", "-p", "no:eval_generate"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["answers"] == [] and found["all"]["samples"] == 5 and "exact_match" not in found["all"]


def test_text_has_no_answers(run: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.txt").write_text("A panda eats bamboo.")
    found = evaluated(tmp_path, run.export, "--data", tmp_path / "text.txt", "--task", "pretrain")
    assert found["all"]["answers"] == 0 and found["all"]["supervised_tokens"] > 10
    assert "eval_generate: 1 of 1 sample has no prompt with an answer" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--data nowhere.json", "--data: 'nowhere.json' does not exist"),
        ("--data {rows} --learning_rate 3", "--learning_rate: `panda eval` has no use for this key. It takes task,"),
        ("--data {rows} --eval_metrics bleu", "unknown metric 'bleu'"),
        ("--data {rows} --eval_names a b", "eval_names: 2 names (a, b) are given for the 1 path: {rows} of"),
        ("--data {rows} --eval_names a/b", "eval_names: 'a/b' cannot be part of the name of a metric."),
        ("--data {rows} --eval_names all", "eval_names: 'all' is the word for all sets together."),
        ("--data {rows} --output {folder}", "--output: expected the path of a file, which is written."),
        ("--data {rows} --output no/file.json", "--output: there is no folder 'no' to write 'file.json' to."),
        ("--data {rows} --inputfield a", "unknown key 'inputfield'"),
        ("--dta {rows}", "--dta: unknown key 'dta'. Did you mean 'data'"),
        ("--data {rows} --output {folder}/gone", "--output: cannot make '{folder}/gone': "),
        ("--data {rows} --allow_pickle maybe", "--allow_pickle: 'maybe' is not true or false."),
        ("--data {rows} --json 3", "--json: '3' is not true or false."),
        ("", "--data: name the data to evaluate on, a file, a folder or a data set."),
        ("-- --limit 3", "--: flags after it are those of lm_eval, which `--harness TASK,...` runs."),
        ("--harness hellaswag --limit 3", "--limit: not with `--harness`"),
        ("--harness", "--harness: name its tasks"),
    ],
)
def test_mistakes(tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: str, said: str) -> None:
    rows = tmp_path / "rows.json"
    rows.write_text('[{"input": "a", "target": "b"}]')
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "gone").symlink_to("nowhere")
    words = flags.format(rows=rows, folder=tmp_path).split()
    assert evaluating.main([str(tmp_path), *words]) == 2
    assert said.format(rows=rows, folder=tmp_path) in capsys.readouterr().err


def test_the_harness_is_not_given_older_weights(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    export, newest = tmp_path / "run/export", tmp_path / "run/checkpoints/step-00000002"
    for folder in (export, newest):
        folder.mkdir(parents=True)
    (tmp_path / "run/provenance.json").write_text("{}")
    (export / "config.json").write_text("{}")
    (newest / "manifest.json").write_text("{}")
    os.utime(newest / "manifest.json", (0, 0))
    assert model_arguments(str(tmp_path / "run"), None) == f"pretrained={export},dtype=auto"
    os.utime(export / "config.json", (0, 0))
    os.utime(newest / "manifest.json", (9, 9))
    assert evaluating.main([str(tmp_path / "run"), "--harness", "hellaswag"]) == 2
    said = capsys.readouterr().err
    assert "the export of this run is older than its newest checkpoint, step-00000002. `panda export" in said
    assert model_arguments(str(export), None) == f"pretrained={export},dtype=auto", "where it is named"


def test_what_a_file_says_of_a_run_is_no_flag_of_the_command(
    run: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[argparse.Namespace] = []

    def find(arguments: argparse.Namespace, checkpoint: Path | None) -> None:
        found.append(arguments)
        raise UserError("enough")

    monkeypatch.setattr(evaluating, "find_answering", find)
    file, code = tmp_path / "train.yaml", run.directory.parent / "code.json"
    file.write_text("ckpt_path: elsewhere\nallow_pickle: true\nlearning_rate: 0.1\n")
    for words, allowed in {"": False, "--allow_pickle false": False, "--allow-pickle": True}.items():
        argv = [str(run.export), "--data", str(code), "--config", str(file), *words.split()]
        assert evaluating.main(argv) == 2
        assert (found[-1].ckpt_path, found[-1].allow_pickle) == (None, allowed), words
    assert len(found) == 3


def test_a_named_checkpoint_is_evaluated_by_its_run_and_shown_before_it_is_written(
    run: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (run.directory / "checkpoints/best").write_text("step-00000030\n")
    shown: list[str] = []

    def noted(what: str, *rest: Any, **more: Any) -> Any:
        shown.append(what)
        return activity(what, *rest, **more)

    def full(path: Path, text: str) -> None:
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(evaluating, "activity", noted)
    monkeypatch.setattr(evaluating, "write_whole", full)
    best, file = run.directory / "checkpoints/best", tmp_path / "numbers.json"
    assert evaluating.main([str(best), "-p", "no:eval_generate", "--json", "false", "--output", str(file)]) != 0
    printed = capsys.readouterr()
    assert printed.out.splitlines()[0].split() == ["chat", "code", "all"] and "error: the disk is full" in printed.err
    expected = ["loading torch", "loading the tokenizer", "reading the data", "reading the model", "evaluating"]
    assert shown == expected


def test_the_fraction_that_a_run_held_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows, file = json.loads((Path(sample.__file__).parent / "instruct/sample.json").read_text()), tmp_path / "rows.json"
    file.write_text(json.dumps(rows[:40]))
    run = train(
        tmp_path / "run",
        arch="llama-tiny",
        max_seq_length=64,
        max_steps=2,
        eval_steps=2,
        instruction_tuning_data_dir=file,
        max_samples=30,
        eval_fraction=0.2,
        seed=5,
        token_cache=tmp_path / "cache",
    )
    found = evaluated(tmp_path, run.directory, "-p", "no:eval_generate")["all"]
    last = run.evaluations[-1]
    assert (found["samples"], found["data"]) == (6, [str(file)])
    assert found["loss"] == pytest.approx(last["eval_loss"], rel=1e-6)
    assert found["supervised_tokens"] == last["eval_supervised_tokens"]

    code = tmp_path / "code.json"
    code.write_text(json.dumps(rows[40:43]))
    assert evaluated(tmp_path, run.directory, "-p", "no:eval_generate", "--data", code)["all"]["samples"] == 3
    file.write_text(json.dumps(rows[1:41]))
    capsys.readouterr()
    assert evaluating.main([str(run.directory), "-p", "no:eval_generate"]) == 2
    assert "has changed since (tokens: " in (said := capsys.readouterr().err) and "name it with `--data`" in said
    file.unlink()
    assert evaluating.main([str(run.directory)]) == 2
    assert "does not exist" in (said := capsys.readouterr().err) and "name it with `--data`" in said


EXECUTED = "from pathlib import Path\nPath(__file__).with_suffix('.executed').touch()\n"


@pytest.mark.parametrize(
    "lines", ["user_dir: {folder}\ntask: mine", "task: {file}:mine", "eval_metrics: [{file}:mine]"]
)
@pytest.mark.parametrize("stated", ["", "recorded_by: 0.1.0\n"])
def test_files_that_only_a_run_names_are_not_executed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], lines: str, stated: str
) -> None:
    """Whoever made the run may have left out that panda recorded its configuration."""
    folder, run, rows = tmp_path / "mine", tmp_path / "run", tmp_path / "rows.json"
    folder.mkdir()
    run.mkdir()
    file = folder / "mine.py"
    file.write_text(EXECUTED + "from panda import register_task\nregister_task('mine')(None)\n")
    lines = lines.format(folder=folder, file=file)
    (run / "config.yaml").write_text(f"{stated}arch: llama-tiny\n{lines}\n")
    (run / "provenance.json").write_text("{}")
    rows.write_text('[{"input": "a", "target": "b"}]')
    assert evaluating.main([str(run), "--data", str(rows)]) == 2
    said = "executed files of the user that it names. They are executed again only where the command line names them"
    assert said in capsys.readouterr().err
    if "user_dir" in lines or "task" in lines:
        assert reporting.main([str(run), "--out", str(tmp_path / "report.html")]) == 0
        assert said in capsys.readouterr().err
    assert not file.with_suffix(".executed").exists()


def test_what_is_no_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluating.main([str(tmp_path / "none"), "--data", "x"]) == 2
    assert "is not a folder. Name a run directory, an export" in capsys.readouterr().err
    assert evaluating.main(["--data", "x"]) == 2
    assert "--data: name the model first: `panda eval MODEL --data ...`." in capsys.readouterr().err
    rows = tmp_path / "rows.json"
    rows.write_text('[{"input": "a", "target": "b"}]')
    assert evaluating.main([str(tmp_path), "--data", str(rows)]) == 2
    assert "contains no model: no complete checkpoint, no export, no config.json" in capsys.readouterr().err


def test_sets_that_do_not_fit_the_width_follow_below() -> None:
    columns = {name: {"samples": "1,000", "loss": "1.2345"} for name in ("first", "second", "third")}
    assert evaluating.table(columns, 24) == [
        "          first  second",
        "samples   1,000   1,000",
        "loss     1.2345  1.2345",
        "",
        "          third",
        "samples   1,000",
        "loss     1.2345",
    ]
