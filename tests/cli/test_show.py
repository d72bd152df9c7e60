from __future__ import annotations

import pytest
from distributions import Distributions

from panda.cli.main import main


def shown(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert main(["show", *argv]) == 0
    return capsys.readouterr().out


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert main(["show", *argv]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err


@pytest.mark.parametrize("kind", ["model", "models"])
def test_a_component_is_shown_with_source_and_options(capsys: pytest.CaptureFixture[str], kind: str) -> None:
    text = shown(capsys, kind, "LLAMA")
    assert text.startswith("model llama\n  LLaMA causal language model")
    assert "\n  from     panda-train " in text
    assert "\n  module   panda.models.llama\n" in text
    assert "panda/models/llama.py:" in text
    assert "\n  --hidden_size [4096]\n" in text
    assert "Width of the residual stream. (an integer >= 1" in text


def test_an_arch_is_shown_with_its_values_and_aliases(capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(capsys, "arch", "llama-30b")
    assert text.startswith("arch llama-33b\n")
    assert "\n  aliases  llama-30b\n" in text
    assert "\n  model    llama\n" in text
    assert "\n  num_layers: 60\n" in text


def test_a_default_is_shown_as_it_is_written(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--adam_betas [0.9, 0.99]\n" in shown(capsys, "optimizer", "adamw")
    assert "--separator ['\\n']\n" in shown(capsys, "task", "instruct")
    assert "no options" in shown(capsys, "reader", "json")


def test_an_option_that_has_to_be_given_says_so(
    distributions: Distributions, capsys: pytest.CaptureFixture[str]
) -> None:
    source = """
    @dataclass(frozen=True)
    class Options:
        size: int
        '''Its size.'''

    @register_model("tiny", options=Options)
    def build(options, context): ...
    """
    distributions.install("acme", {"models": {"tiny": "acme.tiny"}}, {"acme.tiny": source})
    assert "--size (required)\n" in shown(capsys, "model", "tiny")


def test_a_module_of_hooks_is_shown_by_its_docstring(
    distributions: Distributions, capsys: pytest.CaptureFixture[str]
) -> None:
    site = distributions.install("acme", {"plugins": {"watch": "acme.watch"}}, {"acme.watch": ""})
    module = '"""Watches."""\nfrom panda.registry import hookimpl\n@hookimpl\ndef panda_run_end(): ...\n'
    (site / "acme" / "watch.py").write_text(module)
    assert shown(capsys, "plugins", "watch") == (
        "plugin watch\n  Watches.\n\n  from     acme 1.0\n  module   acme.watch\n"
    )


def test_lines_fit_the_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for columns, longest in (("72", 72), ("400", 110)):
        monkeypatch.setenv("COLUMNS", columns)
        options = shown(capsys, "model", "llama").partition("options")[2]
        assert max(map(len, options.splitlines())) <= longest


@pytest.mark.parametrize("command", ["list metrics", "show metric rouge", "show plugin best_checkpoint"])
def test_descriptions_are_wrapped_at_words(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    assert main(command.split()) == 0
    described = [line for line in capsys.readouterr().out.splitlines() if "  source  " not in line]
    assert [line for line in described if len(line) > 79] == []


def test_unknown_names_and_kinds_are_explained(capsys: pytest.CaptureFixture[str]) -> None:
    assert refused(capsys, "model", "lama").startswith("error: unknown model 'lama'. Did you mean 'llama'")
    assert refused(capsys, "modle", "llama").startswith("error: unknown kind 'modle'. Did you mean 'models'")
    assert "There is arch 'llama-7b'." in refused(capsys, "model", "llama-7b")


def test_a_missing_argument_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show"]) == 2
    assert "kind, name" in capsys.readouterr().err


def test_a_hook_is_shown_with_what_to_write(capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("panda_epoch_end", "epoch_end"):
        assert main(["show", "hook", name]) == 0
        shown = capsys.readouterr().out
        assert shown.startswith("hook panda_epoch_end\n  The last sample of epoch ``epoch``")
        assert "\n  ranks      every rank\n" in shown
        assert shown.endswith("  @hookimpl\n  def panda_epoch_end(run, epoch): ...\n")
    assert main(["show", "hook", "epoch_ned"]) == 2
    assert "unknown hook 'epoch_ned'. Did you mean 'panda_epoch_end'" in capsys.readouterr().err
