"""Finding a tokenizer, in a folder or on the Hugging Face hub, and reading it. Imports no torch."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from panda.registry import UserError
from panda.registry.errors import in_brief
from panda.registry.location import resolve_path
from panda.weights.hub import cached
from panda.weights.hub import is_name
from panda.weights.hub import repository_of

MODELS = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "tiktoken.model")
"""Tokenizers in the files of sentencepiece, or of tiktoken: Llama 3 has one of its own under the first name."""

TOKENIZER = ("tokenizer.json", "vocab.json", *MODELS)
"""A folder with one of these files has a tokenizer."""


def has_tokenizer(folder: Path) -> bool:
    """Whether ``folder`` has a tokenizer that transformers loads."""
    return any((folder / name).exists() for name in TOKENIZER)


def tokenizer_folder(location: str) -> Path:
    """The folder that the option ``tokenizer`` names, fetched first where it is on the hub, without any weights.

    Raises UserError where there is none.
    """
    folder = resolve_path(location)
    if folder.is_dir():
        return folder
    if not is_name(location):
        raise UserError(
            f"tokenizer: {location!r} is not a folder (looked in {Path.cwd()}). Give one that holds a Hugging Face"
            " tokenizer (tokenizer.json or tokenizer.model, and tokenizer_config.json), or its name on the Hugging Face"
            " hub, OWNER/NAME."
        )
    snapshot = cached(location)
    if snapshot is None or not has_tokenizer(snapshot):
        try:
            snapshot = repository_of(location).folder
        except UserError as problem:
            raise UserError(
                f"tokenizer: {location!r} is neither a folder ({folder.absolute()}) nor in the cache of the Hugging"
                f" Face hub; {problem}"
            ) from problem
        if not has_tokenizer(snapshot):
            raise UserError(
                f"tokenizer: {location!r} on the Hugging Face hub has no tokenizer that transformers loads (none of"
                f" {', '.join(TOKENIZER)})."
            )
    return snapshot


def rows_needed(tokenizer: Any) -> int:
    """The rows of an embedding that ``tokenizer`` needs: its highest id and one more.

    More than ``len(tokenizer)``, which counts entries, where ids have holes.
    """
    highest: int = max(tokenizer.get_vocab().values())
    return highest + 1


def read_tokenizer(folder: Path) -> Any:
    """The Hugging Face tokenizer in ``folder``. Raises UserError where transformers cannot load one."""
    from transformers import AutoConfig
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except Exception as problem:  # transformers lets the exceptions of its parsers through
        what = f"{folder}: no tokenizer could be loaded from it"
        try:
            AutoConfig.from_pretrained(str(folder), local_files_only=True)
        except Exception as other:
            if str(other) == str(problem):  # transformers reads the model's configuration first
                what = f"{folder / 'config.json'}: transformers cannot read it"
        raise UserError(f"{what}: {_lacking(folder) or in_brief(problem)}.") from problem


def _lacking(folder: Path) -> str:
    """What has to be installed to read the tokenizer in ``folder``; empty where nothing is known to be missing.

    transformers (5.23, 2026-11) takes a model of sentencepiece that it cannot read for one of tiktoken, and advises to
    install that.
    """
    file = next((folder / name for name in MODELS if (folder / name).exists()), None)
    if file is None or (folder / "tokenizer.json").exists():
        return ""
    of_tiktoken = re.match(rb"[A-Za-z0-9+/]+=* \d+\s", file.read_bytes()[:200]) is not None
    kind, extra = ("tiktoken", "tiktoken") if of_tiktoken else ("SentencePiece", "sentencepiece")
    needed = {"sentencepiece": "sentencepiece", "google.protobuf": "protobuf"}
    if of_tiktoken:
        needed = {"tiktoken": "tiktoken"}
    missing = [package for module, package in needed.items() if not _is_installed(module)]
    if not missing:
        return ""
    return (
        f"it is only a model of {kind} ({file.name}), which {' and '.join(missing)} would read:"
        f" `pip install 'panda-train[{extra}]'`, or put a tokenizer.json beside it"
    )


def _is_installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # the package that it would be in
        return False
