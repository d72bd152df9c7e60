"""Text that is kept or sent on: without passwords, keys and tokens, and without the name of the user's folder."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

HIDDEN = "***"
"""What stands in the place of a secret."""

_NAMES = re.compile(
    r"(?:^|[_-])(?:TOKEN|KEY|SECRET|PASSWORD|PASSWD|PASSPHRASE|CREDENTIALS?|AUTH|COOKIE|DSN|PAT)(?:$|[_-])", re.I
)
"""Names of variables and flags whose values are secrets, as a word of the name: `HF_TOKEN`, `--api-key`."""
_NO_SECRETS = re.compile(r"(?:^|[_-])(?:FILE|PATH|DIR|SOCK|ID|TYPE|NAME)$|tokens$|tokenizer|_token_id", re.I)
_SHORTEST = 8
"""Characters of a value that is hidden in texts: a shorter one could be any word."""
_SURE = 16
"""Characters of a value for which a file is refused: `MY_KEY=tokenizer` is no reason to refuse tokenizer.json."""

_FORMS = re.compile(
    r"(?P<user>(?<=://)[^/\s@'\"]+(?=@))"  # https://USER:PASSWORD@host
    r"|(?P<query>(?<=[?&])(?P<key>[\w.-]*(?:token|key|secret|signature|sig|password|credential)[\w.-]*=)[^&\s'\"#]+)"
    r"|\b(?:hf_[A-Za-z0-9]{20,}|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|sk-[\w-]{20,}|glpat-[\w-]{20,}"
    r"|xox[abprs]-[\w-]{10,}|AKIA[A-Z0-9]{16}|ey[\w-]{10,}\.ey[\w-]{10,}\.[\w-]{10,})"
    r"|(?P<named>aws_secret_access_key['\"]?\s{0,9}[:=]\s{0,9}['\"]?)[A-Za-z0-9/+]{40}"
    r"|-----BEGIN [A-Z ]{0,30}PRIVATE KEY-----(?:[\s\S]{0,20000}?-----END [A-Z ]{0,30}PRIVATE KEY-----)?",
    re.I,
)


def without_secrets(text: str) -> str:
    """``text`` with ``***`` for each secret that is known by its form, or is the value of an environment variable."""
    return _without(_of_environment(), text)


def _without(secrets: list[str], text: str) -> str:
    for secret in secrets:
        text = text.replace(secret, HIDDEN)
    return _FORMS.sub(lambda found: f"{found['key'] or found['named'] or ''}{HIDDEN}", text)


def secret_in(text: str, *, is_binary: bool = False) -> str | None:
    """What secret ``text`` has, in words that do not tell it; None where it has none that is known.

    ``is_binary``: forms that random bytes may have are passed over.
    """
    for name, value in os.environ.items():
        if len(value) >= _SURE and _is_secret(name) and value in text:
            return f"it has the value of the environment variable {name}"
    if any(not (is_binary and (found["user"] or found["query"])) for found in _FORMS.finditer(text)):
        return "it has a text of the form of a secret: a key, a token, or a password in an address"
    return None


def private(content: Any) -> Any:
    """``content``, as of JSON, with ``without_secrets`` of each text in it, and ``~`` for the user's folder."""
    secrets, home = _of_environment(), _home()  # once: a configuration has hundreds of texts
    folder = re.compile(rf"(?<![\w.~-]){re.escape(home)}(?=/|$|[\s'\",:])") if home else None

    def hidden(part: Any) -> Any:
        if isinstance(part, str):
            text = _without(secrets, part)
            return folder.sub("~", text) if folder else text
        if isinstance(part, dict):
            return {hidden(key): hidden(value) for key, value in part.items()}
        return [hidden(each) for each in part] if isinstance(part, (list, tuple)) else part

    return hidden(content)


def private_command(argv: list[str]) -> list[str]:
    """The words of a command line, without the values of flags whose names say that they are secrets."""
    words: list[str] = []
    hides = False
    for word in argv:
        name, equals, _ = word.partition("=")
        is_flag = word.startswith("-")
        if hides and not is_flag:
            words.append(HIDDEN)
            hides = False
            continue
        is_secret = is_flag and _is_secret(name.lstrip("-"))
        words.append(f"{name}={HIDDEN}" if is_secret and equals else word)
        hides = is_secret and not equals
    found: list[str] = private(words)
    return found


def _is_secret(name: str) -> bool:
    return _NAMES.search(name) is not None and _NO_SECRETS.search(name) is None


def _of_environment() -> list[str]:
    """The secrets among the environment variables, the longest first, since it may have another in it."""
    found = {value for name, value in os.environ.items() if len(value) >= _SHORTEST and _is_secret(name)}
    return sorted(found, key=len, reverse=True)


def _home() -> str | None:
    """The user's folder; None where there is none, or it is the root of the file system."""
    try:
        home = str(Path.home())
    except (RuntimeError, KeyError):
        return None
    return home if len(home) > 1 else None
