"""``panda completion``: what a shell completes, and that the shells can do it."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from panda.cli.completion import SCRIPTS
from panda.cli.completion import candidates
from panda.cli.completion import main
from panda.cli.main import COMMANDS
from panda.cli.parser import Parser
from panda.configuration.evaluation import TAKEN
from panda.configuration.options import RunOptions
from panda.registry import Offer
from panda.registry.catalog import catalog_with
from panda.registry.choosing import NAMING
from panda.registry.kinds import KINDS
from panda.registry.options import Option
from panda.registry.options import options_of

ONE_MATCH = [
    ("panda gen", ["generate"]),
    ("panda-train --optimizer nv", ["nvlamb"]),
    ("panda-train --optimizer NV", ["nvlamb"]),
    ("panda train --lr_scheduler wa", ["warmup"]),
    ("panda check run.yaml --precision b", ["bf16"]),
    ("panda-train --use_lora t", ["true"]),
    ("panda-train --gradient-acc", ["--gradient_accumulation_steps"]),
    ("panda-train --plugins early", ["early_stopping"]),
    ("panda show optimizer mu", ["muon"]),
    ("panda list opt", ["optimizers"]),
    ("panda generate runs/a --max", ["--max_new_tokens"]),
    ("panda export --mer", ["--merge"]),
    ("panda completion f", ["fish"]),
    ("panda help gen", ["generate"]),
    ("panda-train --optimizer=nv", ["--optimizer=nvlamb"]),
    ("panda-train --optimizer = nv", ["nvlamb"]),  # as bash breaks the word
    ("panda-train --plugins ema early", ["early_stopping"]),
    ("panda sweep run.yaml --pri", ["--print"]),
    ("panda sweep run.yaml --lau", ["--launch"]),
    ("panda sweep run.yaml --optimizer adamw,nv", ["adamw,nvlamb"]),
    ("panda sweep run.yaml --prec", ["--precision"]),
    ("panda estimate --card h2", ["h200"]),
    ("panda eval runs/a --task mi", ["mix"]),
    ("panda eval runs/a --eval_metrics exact_match rou", ["rouge"]),
    ("panda eval runs/a --harn", ["--harness"]),
    ("panda eval runs/a --optim", []),  # which it does not take
    ("panda tokenizer data --rea", ["--reader"]),
    ("panda plot --x to", ["tokens"]),
    ("panda plot --x s", ["steps"]),
    ("panda plot s", ["schedule"]),
    ("panda plot runs/a s", []),
    ("panda plot schedule --lr_scheduler wa", ["warmup"]),
    ("panda list --user_dir op", []),  # a folder, and no kind
    ("panda delta mak", ["make"]),
    ("panda delta apply --delt", ["--delta"]),
    ("panda translate --from ax", ["axolotl"]),
    ("panda new plugin herons --kind opt", ["optimizer"]),
    ("panda show hook panda_sa", ["panda_save_state"]),
    ("panda chat runs/a -p no:prog", ["no:progress"]),
    ("panda check run.yaml -p no:prog", ["no:progress"]),
]


@pytest.mark.parametrize(("line", "expected"), ONE_MATCH)
def test_candidates(line: str, expected: list[str]) -> None:
    found = candidates(line.split())
    assert [each for each in found if each not in SPELT_OTHERWISE] == expected


SPELT_OTHERWISE = ("--delta_model", "--delta-path")


def parsers() -> Iterator[tuple[list[str], Parser]]:
    """The commands whose flags argparse reads, with their parsers."""
    for command in COMMANDS:
        if make := getattr(importlib.import_module(f"panda.cli.{command}"), "parser", None):
            yield from below([command], make())


def below(words: list[str], parser: Parser) -> Iterator[tuple[list[str], Parser]]:
    yield words, parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, inner in action.choices.items():
                yield from below([*words, name], inner)


def test_every_choice_of_every_option_and_argument_is_completed() -> None:
    tried = set()
    for words, parser in parsers():
        for action in parser._actions:
            expected = [*map(str, action.choices or ())]
            if not expected:
                continue
            tried.add((*words, action.dest))
            line = [*words, action.option_strings[-1]] if action.option_strings else words
            found = candidates(["panda", *line, ""])
            assert found == expected, line
            if action.option_strings:  # after all else, too, where a positional argument is not meant
                assert candidates(["panda", *words, "runs/a", *line[len(words) :], expected[-1]]) == expected[-1:]
    assert {("runs", "sort"), ("report", "x"), ("plot", "x"), ("delta", "command"), ("export", "gguf_type")} <= tried


def test_every_flag_is_completed() -> None:
    for words, parser in parsers():
        expected = {flag for action in parser._actions for flag in action.option_strings if flag.startswith("--")}
        found = {each.replace("-", "_") for each in candidates(["panda", *words, "--"])}
        assert found == {flag.replace("-", "_") for flag in expected}, words


@pytest.mark.parametrize("command", ["train", "sweep", "eval"])
def test_every_key_with_a_closed_set_of_values_is_completed(command: str) -> None:
    of_components = [
        (kind, offer.name, option)
        for kind in KINDS
        if kind not in ("arch", "model") and not (command == "eval" and kind in ("optimizer", "lr_scheduler", "plugin"))
        for offer in catalog_with(None).offers(kind)
        if (component := catalog_with(None).load(offer)) is not None
        for option in options_of(component.options).values()
    ]
    of_runs = [("", "", option) for key, option in options_of(RunOptions).items() if command != "eval" or key in TAKEN]
    tried = set()
    for kind, name, option in [*of_runs, *of_components]:
        if option.key in NAMING or option.names or option.choices:
            tried.add(option.key)
            chosen = [f"--{'plugins' if kind == 'plugin' else kind}", name] if kind else []
            found = candidates(["panda", command, "place", *chosen, f"--{option.key}", ""])
            expected = option.choices or [each.name for each in offered(option)]
            assert found == [*expected], (command, option.key)
    assert {"task", "reader"} <= tried
    assert command == "eval" or {"precision", "optimizer", "plugins", "use_lora", "eval_metrics"} <= tried


def offered(option: Option) -> list[Offer]:
    kind = option.names or ("plugin" if option.key == "plugins" else option.key)
    return catalog_with(None).offers(kind)


def test_metrics_are_those_that_all_runs_have_on_record(tmp_path: Path) -> None:
    for name, more in (("first", {"eval_rouge1": 0.5}), ("second", {"eval_exact_match": 1.0, "note": "text"})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_text("task: instruct\n")
        record = {"step": 1, "loss": 2.0, "step_seconds": 0.1}
        lines = [record, {"step": 1, "eval_loss": 2.0, "seconds": 1.0, **more}]
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    first, second = str(tmp_path / "first"), str(tmp_path / "second")
    assert candidates(["panda", "plot", first, "--metric", "eval_"]) == ["eval_loss", "eval_rouge1"]
    assert candidates(["panda", "plot", first, second, "--metric", "eval_"]) == ["eval_loss"]
    assert candidates(["panda", "plot", "--metric", "gra"]) == ["grad_norm"]


def test_all_commands_and_all_keys() -> None:
    assert candidates(["panda", ""]) == [*COMMANDS, "help"]
    flags = candidates(["panda-train", "--"])
    assert {"--task", "--learning_rate", "--zero_stage"} <= {*flags} and "--nvlamb_eps" not in flags


def test_keys_of_what_is_chosen_join() -> None:
    assert "--num_layers" in candidates(["panda-train", "--arch", "llama-tiny", "--num_"])
    assert "--num_layers" not in candidates(["panda-train", "--num_"])
    assert candidates(["panda-train", "--plugins", "early_stopping", "--early_stopping_pat"]) == [
        "--early_stopping_patience"
    ]


@pytest.mark.parametrize(
    "line", ["panda unknown x", "panda-train --arch nothing --", "panda-train --output_dir ", "panda show nothing x"]
)
def test_what_is_wrong_or_a_file_is_no_error(line: str) -> None:
    words = line.split(" ")
    assert isinstance(candidates(words), list)


def test_files_of_the_user_are_not_executed(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("raise RuntimeError('executed')\n")
    assert "--learning_rate" in candidates(["panda-train", "--plugins", f"{tmp_path}/mine.py:x", "--"])
    assert "--learning_rate" in candidates(["panda-train", "--user_dir", str(tmp_path), "--"])


def test_it_is_explained(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0 and "~/.bashrc" in capsys.readouterr().out
    assert main(["tcsh"]) == 2
    assert "expected the name of a shell: bash, zsh, fish." in capsys.readouterr().err


IN_SHELLS = [
    (["panda-train", "--optimizer", "nv"], ["nvlamb"]),
    (["panda", "runs", "--sort", ""], ["age", "loss", "eval", "run"]),
    (["panda", "report", "a-ru"], {"bash": [], "zsh": ["files"], "fish": ["a-run/"]}),
]
"""Words, the last of which is completed, and what each shell has to offer."""
PREFIXED = {
    "bash": 'COMP_WORDS=({words}); COMP_CWORD={last}; _panda; printf "%s\\n" "${{COMPREPLY[@]}}"\n',
    "zsh": "words=({words}); CURRENT={place}; _panda\n",
    "fish": 'complete -C "{line}" | string replace --regex "\\t.*" ""\n',
}
"""What asks a shell for what it offers."""
BEFORE = {"zsh": 'compdef() {:}; compadd() { print -l -- "${(@P)2}" }; _files() { print files }\n'}


@pytest.mark.parametrize("shell", PREFIXED)
def test_shells_complete(shell: str, tmp_path: Path) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"no {shell}")
    script = BEFORE.get(shell, "") + SCRIPTS[shell]
    for words, _ in IN_SHELLS:
        quoted = shlex.join(words)
        script += PREFIXED[shell].format(words=quoted, line=" ".join(words), last=len(words) - 1, place=len(words))
        script += "echo .\n"
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    (tmp_path / "a-run").mkdir()
    environment = {**os.environ, "PATH": path, "HOME": str(tmp_path), "XDG_CONFIG_HOME": str(tmp_path)}
    done = subprocess.run(
        [shell, "-c", script], capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=120
    )
    assert done.stderr == ""
    found = [sorted(each.split()) for each in done.stdout.split("\n.\n")[:-1]]
    assert found == [sorted(each[shell] if isinstance(each, dict) else each) for _, each in IN_SHELLS]


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
def test_bash_is_told_of_both_programs() -> None:
    done = subprocess.run(
        ["bash", "-c", f"{SCRIPTS['bash']}complete -p panda panda-train"], capture_output=True, text=True
    )
    assert done.stdout.splitlines() == [
        "complete -o default -F _panda panda",
        "complete -o default -F _panda panda-train",
    ]


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_parse_their_script(shell: str) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"no {shell}")
    done = subprocess.run([shell, "-n", "/dev/stdin"], input=SCRIPTS[shell], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
