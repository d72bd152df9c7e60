"""What decides which tokens a task makes, besides the content of the data: parts of an address in the token cache."""

from __future__ import annotations

import hashlib
import importlib.metadata
import inspect
import json
import sys
from collections.abc import Iterator
from contextlib import suppress
from importlib.machinery import all_suffixes
from pathlib import Path
from typing import Any
from uuid import uuid4

from panda.registry.offers import all_installed
from panda.registry.offers import maker


def code_of(made: object) -> list[Any]:
    """The code of a task or reader: panda's own by its name (see ``token_cache.VERSION``), others' by their files.

    These are the files of its package and of the other packages of its distribution that are imported, of base
    classes of yet others their own files. The version of its distribution is there, too.
    """
    cls, offer = type(made), maker(made)
    name = f"{cls.__module__}.{cls.__qualname__}"
    tops = {_top(cls.__module__), *([_top(offer.module)] if offer else [])} - {"panda"}
    if not tops:
        return [name]
    having = {(_top(each.module), each.distribution) for each in all_installed() if _top(each.module) in tops}
    distributions = sorted({distribution for _, distribution in having})
    beside = {known: file for top in tops - {top for top, _ in having} for known, file in _files_beside(top)}
    tops |= {top for each in distributions for top in _top_levels(each) if top in sys.modules} - {"panda"}
    files = beside | {known: file for top in tops for known, file in _files(top)}
    for base in cls.__mro__:
        if _top(base.__module__) not in {"panda", *sys.stdlib_module_names, *tops}:
            files[base.__module__] = Path(inspect.getsourcefile(base) or "")
    hashed = hashlib.sha256()
    for known in sorted(files):
        hashed.update(f"\0{known}\0".encode(errors="surrogateescape"))
        hashed.update(files[known].read_bytes())
    if any(not hasattr(sys.modules.get(top), "__file__") for top in tops):
        hashed.update(_unseen.encode())
    return [name, versions(*distributions), hashed.hexdigest()]


_unseen = uuid4().hex
"""Stands for code that is in no file, as in a notebook: what it made is not used again."""


def forget_unseen_code() -> None:
    """Take it that code which is in no file has changed."""
    global _unseen
    _unseen = uuid4().hex


def versions(*distributions: str) -> dict[str, str]:
    """The versions of those of ``distributions`` that are installed."""
    found = {}
    for name in distributions:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def tokenizer_ingredients(tokenizer: Any) -> list[Any]:
    """Everything in ``tokenizer`` that decides which ids it gives, and the versions of the code that does."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        content = backend.to_str()
        code = versions("tokenizers")
    else:
        model = getattr(tokenizer, "vocab_file", None)
        digest = hashlib.sha256(Path(model).read_bytes()).hexdigest() if model else ""
        content = json.dumps([sorted(tokenizer.get_vocab().items()), digest, repr(tokenizer)])
        code = versions("transformers", "sentencepiece", "tiktoken", "protobuf")
    if tokenizer.chat_template:
        code |= versions("transformers", "jinja2")
    cls = type(tokenizer)
    if _top(cls.__module__) != "transformers":  # code that came with a checkpoint
        content += Path(inspect.getsourcefile(cls) or "").read_text(encoding="utf-8")
    specials = [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.special_tokens_map]  # templates write them
    hashed = hashlib.sha256(f"{cls.__name__}\0{specials}\0{content}".encode(errors="replace"))
    return [hashed.hexdigest(), code]


def _top(module: str) -> str:
    return module.partition(".")[0]


def _top_levels(distribution: str) -> set[str]:
    """The importable names of ``distribution``."""
    try:
        found = importlib.metadata.distribution(distribution)
    except importlib.metadata.PackageNotFoundError:
        return set()
    files = [file.parts[0].removesuffix(".py") for file in found.files or () if file.suffix == ".py"]
    names = [*(found.read_text("top_level.txt") or "").split(), *files]
    return {name for name in names if not name.startswith("__editable__")}  # setuptools' finder, which has paths


def _files_beside(top: str) -> Iterator[tuple[str, Path]]:
    """The Python files beside that of an imported module which no distribution has: it may import them."""
    module = sys.modules.get(top)
    if (single := getattr(module, "__file__", None)) and not hasattr(module, "__path__"):
        for file in Path(single).parent.glob("*.py"):
            yield f"{top}/{file.name}", file


def _files(top: str) -> Iterator[tuple[str, Path]]:
    """The source files and extension modules of an imported module or package, by name, whether imported or not."""
    module = sys.modules.get(top)
    folders = [Path(folder) for folder in getattr(module, "__path__", ())]
    suffixes = tuple(suffix for suffix in all_suffixes() if suffix != ".pyc")
    for folder in folders:
        for file in folder.rglob("*"):
            if file.name.endswith(suffixes) and file.is_file():
                yield f"{top}/{file.relative_to(folder)}", file
    if not folders and (single := getattr(module, "__file__", None)):
        yield top, Path(single)
