"""``panda completion``: has bash, zsh or fish complete commands, flags, registered names and choices.

The shell asks for the candidates of each word, so they are those of what is installed.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import re
from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Sequence
from itertools import dropwhile
from pathlib import Path

from panda.cli.command import run_command
from panda.cli.help import chosen_components
from panda.cli.main import COMMANDS
from panda.cli.main import HELP
from panda.cli.parser import Parser
from panda.cli.parser import in_short
from panda.cli.parser import that_can_be_left_out
from panda.cli.tokenizer import USED
from panda.configuration.arguments import parse_arguments
from panda.configuration.arguments import words_of_flags
from panda.configuration.evaluation import TAKEN
from panda.configuration.options import RunOptions
from panda.configuration.user_code import catalog_of
from panda.registry import Component
from panda.registry import UserError
from panda.registry.catalog import catalog_with
from panda.registry.choosing import NAMING
from panda.registry.options import Option
from panda.registry.options import options_of

SCRIPTS = {
    "bash": """\
_panda() {
    local IFS=$'\\n'
    COMPREPLY=($(panda completion -- "${COMP_WORDS[@]:0:COMP_CWORD+1}" 2>/dev/null))
}
complete -o default -F _panda panda panda-train
""",
    "zsh": """\
_panda() {
    local -a found
    found=("${(@f)$(panda completion -- "${(@)words[1,CURRENT]}" 2>/dev/null)}")
    if [[ -n "$found" ]]; then compadd -a found; else _files; fi
}
compdef _panda panda panda-train
""",
    "fish": """\
function __panda_candidates
    set -l found (panda completion -- (commandline -opc) (commandline -ct) 2>/dev/null)
    if string length -q -- $found
        printf '%s\\n' $found
    else
        __fish_complete_path (commandline -ct)
    end
end
complete -c panda -f -a '(__panda_candidates)'
complete -c panda-train -f -a '(__panda_candidates)'
""",
}

USAGE = """\
usage: panda completion bash|zsh|fish

Print what has the shell complete commands, flags, registered names and
choices of `panda` and `panda-train`, with TAB; where there is nothing to
complete, it completes the names of files.

  bash: echo 'eval "$(panda completion bash)"' >> ~/.bashrc
  zsh:  echo 'eval "$(panda completion zsh)"' >> ~/.zshrc   (after compinit)
  fish: panda completion fish > ~/.config/fish/completions/panda.fish"""

CONFIGURED = ("train", "check", "estimate", "data", "prepare", "plot", "sweep", "eval", "replay", "tokenizer")
"""Commands that take keys of a run as flags."""
OWN_VALUES: dict[tuple[str, str], Callable[[], Iterable[str]]] = {
    ("estimate", "card"): lambda: importlib.import_module("panda.run.cards").CARDS,
}
"""What values of flags can be that these commands have besides."""
KINDS_OF = {"eval": ("task", "reader", "plugin", "metric"), "tokenizer": ("reader",)}
"""Kinds of the components whose options these commands take; others take those of all."""


def main(argv: list[str] | None = None) -> int:
    """Entry point of ``panda completion``."""
    return run_command(_completion, argv)


def _completion(argv: list[str]) -> None:
    if argv[:1] == ["--"]:
        print("\n".join(candidates(argv[1:])))
    elif argv[:1] in (["-h"], ["--help"]):
        print(USAGE)
    elif len(argv) == 1 and argv[0] in SCRIPTS:
        print(SCRIPTS[argv[0]], end="")
    else:
        raise UserError(f"expected the name of a shell: {', '.join(SCRIPTS)}.\n{in_short(USAGE)}")


def candidates(words: Sequence[str]) -> list[str]:
    """What the last of ``words``, of a command line that begins with the program, can be; nothing for a file."""
    program, *rest = words
    rest = [word for word in rest[:-1] if word != "="] + ["" if word == "=" else word for word in rest[-1:]]
    if Path(program).name == "panda-train":
        rest = ["train", *rest]
    flag, equals, begun = rest[-1].partition("=") if rest and rest[-1].startswith("--") else ("", "", "")
    if equals:  # bash breaks words at it
        return [f"{flag}={found}" for found in candidates([program, *rest[:-1], flag, begun])]
    if len(rest) < 2:
        return _beginning(rest[-1] if rest else "", [*COMMANDS, HELP])
    command, *before, word = rest
    if command == HELP and not before:
        return _beginning(word, COMMANDS)
    if command not in COMMANDS:
        return []
    with contextlib.suppress(UserError, OSError):
        module = importlib.import_module(f"panda.cli.{command}")
        if command in CONFIGURED and (command != "plot" or before[:1] == ["schedule"]):
            return _of_configured(command, before, word)
        if hasattr(module, "parser"):
            return _of_parser(module.parser(), before, word)
        if command == "completion" and not before:
            return _beginning(word, SCRIPTS)
    return []


def _beginning(word: str, found: Iterable[str]) -> list[str]:
    """Those of ``found`` that begin with ``word``, written with `-` or `_`, in any case."""
    begun = word.lower().replace("-", "_")
    return [each for each in dict.fromkeys(found) if each.lower().replace("-", "_").startswith(begun)]


def _of_parser(parser: Parser, before: Sequence[str], word: str) -> list[str]:
    """What ``word`` can be, of a command whose flags ``parser`` reads."""
    inner, arguments, can_be_flag = parser.next_word(before)
    if word.startswith("-") and can_be_flag:
        return _beginning(word, inner.flags())
    return [found for argument in arguments for found in _beginning(word, inner.values_of(argument, before))]


def _of_configured(command: str, before: Sequence[str], word: str) -> list[str]:
    """What ``word`` can be, of a command that takes keys of a run."""
    if before and before[-1] == "-p":
        return _beginning(word, that_can_be_left_out(before))
    keys = _keys(command, before)
    if word.startswith("-"):
        return _beginning(word, [*(f"--{key}" for key in keys), *_flags(command)])
    flags = [number for number, each in enumerate(before) if each.startswith("--")]
    if not flags:
        return []
    key, given = before[flags[-1]][2:].replace("-", "_"), len(before) - 1 - flags[-1]
    option = keys.get(key)
    if (command, key) in OWN_VALUES and not given:
        return _beginning(word, OWN_VALUES[command, key]())
    if option is None or (given and not option.is_list):
        return []
    if command != "sweep":
        return _beginning(word, _values(option))
    several, comma, last = word.rpartition(",")
    return [several + comma + found for found in _beginning(last, _values(option))]


def _keys(command: str, words: Sequence[str]) -> dict[str, Option]:
    """The keys that ``command`` takes, of the run that ``words`` describe as far as they do. Executes no files of the
    user."""
    keys = dict(options_of(RunOptions))
    given = [*dropwhile(lambda word: not word.startswith("-"), words)]
    if command in ("eval", "tokenizer"):
        keys = {key: keys[key] for key in (TAKEN if command == "eval" else USED)}
        given += ["--plugins", "eval_generate"] if command == "eval" else ["--task", "pretrain"]
    if any(".py" in word or "user" in word for word in words):
        return keys
    components: list[Component] = []
    with contextlib.suppress(UserError), contextlib.redirect_stderr(io.StringIO()):
        arguments = parse_arguments(_whole(given))
        components = chosen_components(catalog_of(arguments), arguments)
    for component in components:
        if component.kind in KINDS_OF.get(command, (component.kind,)):
            keys |= options_of(component.options)
    return keys


def _whole(words: Sequence[str]) -> list[str]:
    """``words`` without configuration files, which may name files of the user, and without flags that have no value."""
    found = [
        (flag, values) for flag, values in words_of_flags([*words]) if not flag.startswith(("--config", "--conf_"))
    ]
    return [word for flag, values in found if values for word in (flag, *values)]


def _values(option: Option) -> list[str]:
    """What the value of ``option`` can be."""
    kind = option.names or (("plugin" if option.key == "plugins" else option.key) if option.key in NAMING else None)
    if kind is None:
        return list(option.choices)
    return [offer.name for offer in catalog_with(None).offers(kind)]


def _flags(command: str) -> list[str]:
    """The flags in the help of ``command``, each in one spelling."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        importlib.import_module(f"panda.cli.{command}").main(["--help"])
    explained = printed.getvalue().partition("\nexample")[0]
    found = set(re.findall(r"(?<![\w`-])--[a-z][\w-]*", explained))
    return sorted(flag for flag in found if f"--{flag[2:].replace('-', '_')}" not in found - {flag})
