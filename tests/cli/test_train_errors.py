from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from distributions import Distributions

from panda.cli import command
from panda.cli.help import groups_of
from panda.cli.train import main
from panda.configuration.options import RunOptions
from panda.configuration.spellings import ACCEPTED_SPELLINGS
from panda.configuration.spellings import LAUNCHERS
from panda.configuration.spellings import RENAMED
from panda.registry import UserError
from panda.registry.options import options_of
from panda.registry.resolve import resolve

Refused = Callable[..., str]


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Refused:
    """``refused(*argv)``: what panda-train says on stderr when it refuses, with exit code 2."""

    def run(*argv: str) -> str:
        assert main(list(argv)) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert "Traceback" not in captured.err
        return captured.err

    return run


def test_unknown_unused_and_renamed_keys_are_three_messages_at_once(refused: Refused, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("arch: llama-tiny\nlr_scheduler: cosine\nwarmup_step: 3\npower: 2\nlr: 1e-3\n")
    lines = refused("--config", str(file)).splitlines()
    assert lines[0].startswith(f"error: {file}:3: unknown key 'warmup_step'. Did you mean 'warmup_steps'")
    assert lines[1].startswith(f"  {file}:4: 'power' is known, but nothing that this run chose uses it")
    assert lines[2] == f"  {file}:5: 'lr' is not one of panda's keys: write `learning_rate`."
    assert len(lines) == 3


def test_a_misspelt_arch_is_told_beside_the_missing_one(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("task: instruct\narhc: llama-tiny\n")
    message = refused("--config", str(tmp_path / "run.yaml"), "--num_layers", "2")
    assert "no model: name one with `arch`" in message
    assert f"{tmp_path / 'run.yaml'}:2: unknown key 'arhc'. Did you mean 'arch'?" in message
    assert "num_layers" not in message


def test_a_refusal_says_where_the_key_stands(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("arch: llama-tiny\nprecision: fp16\nzero_stage: 0\n")
    message = refused("--config", str(tmp_path / "run.yaml"))
    assert f"error: {tmp_path / 'run.yaml'}:2, {tmp_path / 'run.yaml'}:3: precision: fp16 with zero_stage: 0" in message


@pytest.mark.parametrize("name", ["a/b", "..", "", "zz/../yy"])
def test_a_run_name_is_one_folder(refused: Refused, name: str) -> None:
    assert f"run_name: {name!r} is not the name of a folder" in refused("--arch", "llama-tiny", "--run_name", name)


def test_an_unknown_component_is_told_the_nearest(refused: Refused) -> None:
    message = refused("--task", "instuct", "--arch", "lama-65b", "--optimizer", "adam")
    assert "error: --task: unknown task 'instuct'. Did you mean 'instruct'" in message
    assert "--arch: unknown arch 'lama-65b'. Did you mean 'llama-65b'" in message
    assert "--optimizer: unknown optimizer 'adam'. Did you mean 'adamw'" in message


def test_a_file_that_is_missing_or_wrong_is_named(refused: Refused, tmp_path: Path) -> None:
    assert "missing.yaml: no such configuration file" in refused("--conf_path", "missing.yaml")
    file = tmp_path / "run.yaml"
    file.write_text("arch: [\n")
    assert f"error: {file}:2: not valid YAML" in refused("--config", str(file))


def test_yes_and_no_are_explained(refused: Refused, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("arch: llama-tiny\nrun_name: no\n")
    assert refused("--config", str(file)) == (
        f"error: {file}:2: run_name: 'no' is not a text, or none."
        " YAML reads an unquoted no, off and false as false: put it in quotes if you mean the word.\n"
    )


def test_a_flag_without_its_value_is_explained(refused: Refused) -> None:
    assert refused("--arch", "--seed", "1") == "error: --arch: a value is missing: a text, or none.\n"
    told = "error: --max_steps: '-3' is not an integer >= -1 and <= 1000000000.\n"
    assert refused("--arch", "llama-tiny", "--max_steps", "-3") == told


def test_a_broken_plugin_is_explained_where_it_is_named_and_nowhere_else(
    refused: Refused, distributions: Distributions
) -> None:
    distributions.install("bad", {"optimizers": {"bad": "bad.o"}}, {"bad.o": "import not_there_at_all"})
    message = refused("--arch", "llama-tiny", "--optimizer", "bad")
    assert message.startswith("error: could not import bad.o, which bad 1.0 ")
    assert "\n  PANDA_TRACEBACK=1 shows the whole traceback.\n" in message
    assert "refused, since" in refused("--arch", "llama-tiny", "--max_steps", "0")


def test_the_traceback_is_there_for_who_asks(
    distributions: Distributions, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    distributions.install("bad", {"optimizers": {"bad": "bad.o"}}, {"bad.o": "1 / 0"})
    monkeypatch.setenv("PANDA_TRACEBACK", "1")
    assert main(["--arch", "llama-tiny", "--optimizer", "bad"]) == 2
    error = capsys.readouterr().err
    assert "Traceback" in error and "ZeroDivisionError" in error and error.count("error: could not import") == 1


def test_a_misspelt_block_is_a_warning(refused: Refused) -> None:
    message = refused("--arch", "llama-tiny", "-p", "no:tensorbord", "-p", "no:plot", "--max_steps", "0")
    warning = "warning: -p no:tensorbord: no installed distribution, module or plugin has that name.\n"
    assert message.startswith(warning + "error: max_steps: 0")


def test_only_what_the_user_can_put_right_is_printed_without_a_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def raises(error: BaseException) -> Callable[[list[str]], None]:
        def run(argv: list[str]) -> None:
            raise error

        return run

    assert command.run_command(raises(UserError("one\ntwo")), []) == 2
    assert capsys.readouterr().err == "error: one\n  two\n"
    monkeypatch.setenv("RANK", "3")
    assert command.run_command(raises(UserError("one")), []) == 2
    assert capsys.readouterr().err == "error on rank 3: one\n"
    assert command.run_command(raises(KeyboardInterrupt()), []) == 130
    with pytest.raises(ZeroDivisionError):
        command.run_command(raises(ZeroDivisionError()), [])


# -- help -------------------------------------------------------------------------------------


def help_text(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert main([*argv, "--help"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out


def flags(text: str) -> set[str]:
    return {line.split()[0].removeprefix("--") for line in text.splitlines() if line.startswith("  --")} - {"config"}


def test_help_shows_every_flag_of_what_is_chosen(capsys: pytest.CaptureFixture[str]) -> None:
    core = set(options_of(RunOptions))
    assert help_text(capsys).startswith("usage: panda-train [--config FILE]")
    plain = flags(help_text(capsys))
    assert core <= plain and "adam_epsilon" in plain and "hidden_size" not in plain and "power" not in plain
    chosen = flags(help_text(capsys, "--arch", "llama-7b", "--lr_scheduler", "poly", "--task", "pretrain"))
    assert chosen >= core | {"hidden_size", "power", "pretraining_data_dir"}
    assert "instruction_tuning_data_dir" not in chosen


def test_help_is_in_groups_and_shows_the_values_of_the_arch(capsys: pytest.CaptureFixture[str]) -> None:
    text = help_text(capsys, "--arch", "llama-7b")
    titles = [line.removeprefix("every run: ") for line in text.splitlines() if line.startswith("every run: ")]
    assert titles[:3] == ["what to train, by name", "where things are", "batches and length of the run"]
    grouped = [key for keys in groups_of(RunOptions).values() for key in keys]
    assert grouped == [*options_of(RunOptions)], "each key is in a group, in order"
    assert "\n  --hidden_size [4096, of llama-7b]\n" in text and "\n  --optimizer [AdamW]\n" in text
    assert "\n  --separator ['\\n']\n" in text
    assert "\n  --hidden_size [4096, of llama-7b]\n" in help_text(capsys, "--model", "llama-7b")


def test_help_follows_a_configuration_file_and_plugins(
    distributions: Distributions, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = """
    @dataclass(frozen=True)
    class Options:
        every: int = 1

    @register_plugin("watch", options=Options)
    class Watch:
        def __init__(self, options, context): ...
    """
    distributions.install("acme", {"plugins": {"watch": "acme.w"}}, {"acme.w": source})
    file = tmp_path / "run.yaml"
    file.write_text("model: llama-7b\nlr_scheduler: poly\nplugins: [watch]\nlearning_rate: wrong\n")
    assert {"hidden_size", "power", "every"} <= flags(help_text(capsys, "--config", str(file)))


def test_help_for_what_is_not_there_is_the_error_alone(refused: Refused) -> None:
    assert refused("--help", "--arch", "foo").startswith("error: --arch: unknown arch 'foo'.")
    assert refused("--help", "--model", "llama-7").startswith(
        "error: --model: unknown model or arch 'llama-7'. Did you"
    )


def test_help_fits_the_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    assert max(map(len, help_text(capsys, "--arch", "llama-tiny").splitlines())) <= 110
    monkeypatch.setenv("COLUMNS", "80")
    described = help_text(capsys, "--arch", "llama-tiny").partition("every run: what to train")[2]
    assert max(map(len, described.splitlines())) <= 80


# -- PandaLLM's document ----------------------------------------------------------------------

DOCUMENT = {
    "instruction_tuning_data_dir": ("./dataset/instruction_tuning",),
    "pretraining_data_dir": ("./dataset/pretraining",),
    "num_workers": 2,
    "prefetch_factor": 2,
    "max_seq_length": 2048,
    "ckpt_path": None,
    "per_gpu_train_batch_size": 1,
    "per_gpu_eval_batch_size": 2,
    "optimizer": "AdamW",
    "learning_rate": 0.001,
    "lr_scheduler": "warmup",
    "gradient_accumulation_steps": 64,
    "weight_decay": 0.0,
    "adam_epsilon": 1e-6,
    "adam_betas": (0.9, 0.99),
    "max_grad_norm": 0.3,
    "num_train_epochs": 1,
    "max_steps": -1,
    "warmup_proportion": 0,
    "warmup_steps": 50,
    "bit_training": False,
    "use_lora": False,
    "lora_r": 64,
    "lora_alpha": 16,
    "lora_dropout": 0.05,
    "use_quant": False,
}
"""Every flag that the document describes, with the default that it states."""


def settings(*argv: str) -> dict[str, Any]:
    from panda.configuration.arguments import parse_arguments
    from panda.registry import Catalog

    return {
        key: setting.value
        for key, setting in resolve(Catalog(), RunOptions, parse_arguments(list(argv)).given).settings.items()
    }


def test_every_flag_of_the_document_exists_with_its_default() -> None:
    found = settings("--model", "llama-7b", "--task", "pretrain") | settings("--model", "llama-7b")
    assert {key: found[key] for key in DOCUMENT} == DOCUMENT


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("llama-7b", (4096, 32, 32, 11008)),
        ("llama-13b", (5120, 40, 40, 13824)),
        ("llama-33b", (6656, 60, 52, 17920)),
        ("llama-65b", (8192, 80, 64, 22016)),
    ],
)
def test_every_architecture_of_the_document_exists(name: str, shape: tuple[int, ...]) -> None:
    found = settings("--model", name)
    assert tuple(found[key] for key in ("hidden_size", "num_layers", "num_heads", "intermediate_size")) == shape
    assert found["vocab_size"] == 32000


@pytest.mark.parametrize("name", ["linear", "cosine", "constant", "poly", "warmup"])
def test_every_schedule_of_the_document_exists(name: str) -> None:
    assert settings("--model", "llama-7b", "--lr_scheduler", name)["warmup_steps"] == 50


def test_every_flag_of_the_documents_examples_is_taken() -> None:
    found = settings(
        "--model", "llama-65b", "--use_lora", "--lora_r", "64", "--lora_alpha", "16", "--lora_dropout", "0.05"
    )
    assert found["use_lora"] is True
    assert settings("--model", "llama-65b", "--use_quant")["use_quant"] is True
    found = settings("--model", "llama-7b", "--ckpt_path", "a/b", "--learing_rate", "2e-3", "--num_train_epochs", "2")
    assert (found["learning_rate"], found["num_train_epochs"], found["ckpt_path"]) == (2e-3, 2, "a/b")


def test_no_spelling_that_is_redirected_is_a_key_itself() -> None:
    keys = set(settings("--model", "llama-7b")) | {"power", "lr_end", "pretraining_data_dir"}
    assert not keys & set(RENAMED | LAUNCHERS) and not keys & set(ACCEPTED_SPELLINGS)
    for said in RENAMED.values():
        named = said.split("`")[1].partition(":")[0]
        assert named in keys | {"warmup_proportion"}, said
