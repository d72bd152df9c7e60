"""A chat template that comes with a model cannot loop for ever, fill the memory, or stop what is around it."""

from __future__ import annotations

import resource
import signal
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from panda.cli.main import main
from panda.data import rendering
from panda.data.conversations import Turn
from panda.data.templates import ChatTemplate
from panda.data.templates import with_template
from panda.registry import UserError
from panda.registry.location import resolve_path

SAMPLE = "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(str(resolve_path("panda:data/sample/tokenizer")), local_files_only=True)


def prompt(tokenizer: Any, more: str) -> str:
    return ChatTemplate(with_template(tokenizer, SAMPLE + more)).prompt([Turn("user", "a")])


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("{% for i in range(9999) %}{% for j in range(9999) %}{% endfor %}{% endfor %}", r"takes more than 0.2 s"),
        ("{{ lipsum(n=100000000) }}", r"takes more than 0.2 s"),
        ("{{ 'a' * 100000000000 }}", "takes more than 2 GiB of memory"),
        ("{{ 'a'|center(100000000000) }}", "takes more than 2 GiB of memory"),
        ("{% set a = messages|length %}\n{{ a * a }}", r"line 2 of the tokenizer's chat template has `\*`"),
        ("{% if false %}{{ 10 ** 2 }}{% endif %}", r"line 1 of the tokenizer's chat template has `\*\*`"),
        ("{% generation %}{{ 10 ** 2 }}{% endgeneration %}", r"line 1 of the tokenizer's chat template has `\*\*`"),
        ("a" * 10**6, "has 1,000,065 characters, and may have 1,000,000"),
    ],
)
def test_a_template_that_takes_too_much_is_refused(
    more: str, message: str, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rendering, "SECONDS", 0.2)
    before = resource.getrlimit(resource.RLIMIT_AS), signal.getsignal(signal.SIGVTALRM)
    with pytest.raises(UserError, match=f"template: .*{message}"):
        prompt(tokenizer, more)
    assert (resource.getrlimit(resource.RLIMIT_AS), signal.getsignal(signal.SIGVTALRM)) == before
    assert signal.getitimer(signal.ITIMER_VIRTUAL) == (0, 0)


def test_what_templates_do_is_left_alone(tokenizer: Any) -> None:
    """Among it a product with a constant, which indents."""
    assert prompt(tokenizer, "{{ '-' * 3 }}{% for i in range(2) %}{{ ' ' * 2 }}{% break %}{% endfor %}").endswith(
        "---  "
    )


def test_a_command_says_so_in_one_line(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(rendering, "SECONDS", 0.2)
    endless = "{% for i in range(9999) %}{% for j in range(9999) %}{% endfor %}{% endfor %}"
    with_template(tokenizer, SAMPLE + endless).save_pretrained(tmp_path / "tokenizer")
    argv = ["--task", "instruct", "--arch", "llama-tiny", "--instruction_tuning_data_dir", "panda:data/sample/instruct"]
    assert main(["prepare", *argv, "--tokenizer", str(tmp_path / "tokenizer"), "--template", "chat"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: template: the tokenizer's chat template takes more than 0.2 s")
    # `panda generate` and `panda chat` say the same, and have no option for the template.
    assert "Correct the tokenizer's chat template, in chat_template.jinja" in said
    assert "A run trains without it with `template: plain`." in said
