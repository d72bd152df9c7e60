"""``panda completion``: has bash, zsh or fish complete commands, flags, registered names and choices.

The shell asks for the candidates of each word, so they are those of what is installed.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import re
from collections.abc import Mapping
from collections.abc import Sequence
from pathlib import Path

from panda.cli.command import run_command
from panda.cli.help import chosen_components
from panda.configuration.arguments import parse_arguments
from panda.configuration.options import RunOptions
from panda.configuration.user_code import catalog_of
from panda.registry import UserError
from panda.registry.catalog import catalog_with
from panda.registry.choosing import NAMING
from panda.registry.offers import kind_named
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
    panda completion -- (commandline -opc) (commandline -ct) 2>/dev/null
end
complete -c panda -a '(__panda_candidates)'
complete -c panda-train -a '(__panda_candidates)'
""",
}

USAGE = """\
usage: panda completion bash|zsh|fish

Print what has the shell complete commands, flags, registered names and choices of `panda` and
`panda-train`, with TAB; where there is nothing to complete, it completes the names of files.

  bash: echo 'eval "$(panda completion bash)"' >> ~/.bashrc
  zsh:  echo 'eval "$(panda completion zsh)"' >> ~/.zshrc   (after compinit)
  fish: panda completion fish > ~/.config/fish/completions/panda.fish"""

CONFIGURED = ("train", "check", "estimate", "data", "prepare", "plot", "sweep")
"""Commands that take the keys of a run as flags."""


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
        raise UserError(f"expected the name of a shell: {', '.join(SCRIPTS)}.\n{USAGE}")


def candidates(words: Sequence[str]) -> list[str]:
    """What the last of ``words``, of a command line that begins with the program, can be; nothing for a file."""
    from panda.cli.main import COMMANDS

    program, *rest = words
    if Path(program).name == "panda-train":
        rest = ["train", *rest]
    if len(rest) < 2:
        return _beginning(rest[-1] if rest else "", COMMANDS)
    command, *before, word = rest
    if command not in COMMANDS:
        return []
    keys = _keys(before) if command in CONFIGURED else {}
    previous = before[-1] if before else ""
    if word.startswith("-"):
        return _beginning(word, [f"--{key}" for key in keys] or _flags(command))
    if option := keys.get(previous.lstrip("-").replace("-", "_")) if previous.startswith("--") else None:
        return _beginning(word, _values(option))
    return _beginning(word, _arguments(command, before))


def _beginning(word: str, found: Sequence[str] | Mapping[str, object]) -> list[str]:
    """Those of ``found`` that begin with ``word``, written with `-` or `_`, in any case."""
    begun = word.lower().replace("-", "_")
    return [each for each in dict.fromkeys(found) if each.lower().replace("-", "_").startswith(begun)]


def _keys(words: Sequence[str]) -> dict[str, Option]:
    """The keys of the run that ``words`` describe, as far as they do. Executes no files of the user."""
    keys = dict(options_of(RunOptions))
    if any(".py" in word or "user" in word for word in words):
        return keys
    with contextlib.suppress(UserError), contextlib.redirect_stderr(io.StringIO()):
        given = [word for word in words if not word.endswith((".yaml", ".yml"))]
        if given and given[-1].startswith("-"):
            given.pop()  # the flag whose value is completed
        arguments = parse_arguments(given)
        for component in chosen_components(catalog_of(arguments), arguments):
            keys |= options_of(component.options)
    return keys


def _values(option: Option) -> list[str]:
    """What the value of ``option`` can be."""
    kind = option.names or (("plugin" if option.key == "plugins" else option.key) if option.key in NAMING else None)
    if kind is None:
        return list(option.choices)
    return [offer.name for offer in catalog_with(None).offers(kind)]


def _arguments(command: str, before: Sequence[str]) -> list[str]:
    """What a word of ``command`` that is no flag can be, after ``before``."""
    words = [word for word in before if not word.startswith("-")]
    catalog = catalog_with(None)
    if command == "list" and not words:
        return [*(kind.plural for kind in catalog.kinds.values()), "hooks"]
    if command == "show" and not words:
        return [*catalog.kinds, "hook"]
    if command == "show" and len(words) == 1:
        with contextlib.suppress(UserError):
            return [offer.name for offer in catalog.offers(kind_named(words[0], catalog.kinds).name)]
    if command == "plot" and not words:
        return ["schedule"]
    if command == "completion" and not words:
        return list(SCRIPTS)
    return []


def _flags(command: str) -> list[str]:
    """The flags in the help of ``command``, each in one spelling."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        importlib.import_module(f"panda.cli.{command}").main(["--help"])
    found = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", printed.getvalue()))
    return sorted(flag for flag in found if f"--{flag[2:].replace('-', '_')}" not in found - {flag})
