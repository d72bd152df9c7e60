"""Finding a tokenizer, in a folder or on the Hugging Face hub, reading it and writing it. Imports no torch."""

from __future__ import annotations

import copy
import json
import logging
import re
import shutil
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from panda.registry import UserError
from panda.registry.errors import in_brief
from panda.registry.location import resolve_path
from panda.weights.git_lfs import pointer_problem
from panda.weights.hub import cached
from panda.weights.hub import is_name
from panda.weights.hub import repository_of

MODELS = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "tiktoken.model")
"""Tokenizers in the files of sentencepiece, or of tiktoken: Llama 3 has one of its own under the first name."""

TOKENIZER = ("tokenizer.json", "vocab.json", *MODELS)
"""A folder with one of these files has a tokenizer."""

PANIC = "PanicException"
"""What tokenizers (0.22, 2026-11) raises where its Rust code fails: no Exception, and not to be imported."""


def has_tokenizer(folder: Path) -> bool:
    """Whether ``folder`` has a tokenizer that transformers loads."""
    return any((folder / name).exists() for name in TOKENIZER)


def tokenizer_folder(location: str) -> Path:
    """The folder that the option ``tokenizer`` names, fetched first where it is on the hub, without any weights.

    Raises UserError where there is none.
    """
    folder = resolve_path(location)
    if folder.is_dir():
        if location and not has_tokenizer(folder) and not any(folder.glob("tokenizer*")):
            raise UserError(
                f"tokenizer: {location!r} has no tokenizer that transformers loads (none of {', '.join(TOKENIZER)})."
                " Name a folder that has one, such as that of a model."
            )
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

    lacking = _lacking(folder)
    # transformers (5.23, 2026-11) warns of the missing package, and advises to install others: the error says it.
    logger = logging.getLogger("transformers.tokenization_utils_tokenizers")
    logger.addFilter(is_shown := lambda record: not (lacking and "Falling back to TikToken" in record.getMessage()))
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
        tokenizer("a")  # values of tokenizer_config.json that make no sense are found at the first text
    except BaseException as problem:  # transformers lets the exceptions of its parsers through
        if not isinstance(problem, Exception) and type(problem).__name__ != PANIC:
            raise
        for file in (folder / name for name in (*TOKENIZER, TOKENIZER_CONFIG)):
            if file.is_file() and (pointer := pointer_problem(file)):
                raise UserError(f"{file}: {pointer}") from None
        what = f"{folder}: no tokenizer could be loaded from it"
        try:
            AutoConfig.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
        except Exception as other:
            if str(other) == str(problem):  # transformers reads the model's configuration first
                what = f"{folder / 'config.json'}: transformers cannot read it"
        raise UserError(f"{what}: {lacking or in_brief(problem)}.") from problem
    finally:
        logger.removeFilter(is_shown)
    _refuse_empty(tokenizer, folder)
    return tokenizer


def _refuse_empty(tokenizer: Any, folder: Path) -> None:
    """Raise UserError where ``tokenizer``, read from ``folder``, has no entries but special tokens.

    transformers (5.23, 2026-11) makes such a one of a folder whose files its class does not read: all text is `<unk>`.
    """
    if tokenizer.get_vocab().keys() - tokenizer.get_added_vocab().keys() - set(tokenizer.all_special_tokens):
        return
    found = ", ".join(name for name in TOKENIZER if (folder / name).exists()) or "none that is known"
    raise UserError(
        f"{folder}: no tokenizer could be loaded from it: {type(tokenizer).__name__}, the class that its configuration"
        f" names, finds no vocabulary in its files ({found}). Put a tokenizer.json beside them, or give the file the"
        " name that this class reads, such as tokenizer.model."
    )


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


SENTENCEPIECE = "tokenizer.model"
"""sentencepiece's own file, which tools other than transformers read."""

TOKENIZER_CONFIG = "tokenizer_config.json"


def write_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Write ``tokenizer`` to ``folder``, so that transformers 4.57 and 5, and tokenizers itself, read the same one.

    Where it was read from a folder with a sentencepiece model, that is copied.
    """
    tokenizer = copy.deepcopy(tokenizer)
    if tokenizer.is_fast:  # a length that an earlier program cut or padded texts to, which tokenizers would do
        tokenizer.backend_tokenizer.no_truncation()
        tokenizer.backend_tokenizer.no_padding()
    tokenizer.save_pretrained(folder)
    values = json.loads((folder / TOKENIZER_CONFIG).read_text(encoding="utf-8"))
    if tokenizer.is_fast:
        # The one class that takes tokenizer.json as it is in both versions. Classes of models build a pipeline of
        # their own from the vocabulary in version 5, and other ones in version 4.
        values |= {
            "tokenizer_class": "PreTrainedTokenizerFast",
            **_prefix_space(folder / "tokenizer.json"),
            # What the class that is no longer named has as its defaults.
            "clean_up_tokenization_spaces": tokenizer.clean_up_tokenization_spaces,
            "model_input_names": list(tokenizer.model_input_names),
            "padding_side": tokenizer.padding_side,
        }
    write_tokenizer_config(values, folder)
    source = Path(tokenizer.name_or_path) / SENTENCEPIECE
    if source.is_file() and not (folder / SENTENCEPIECE).exists():
        shutil.copy(source, folder / SENTENCEPIECE)


def write_tokenizer_config(values: Mapping[str, Any], folder: Path) -> None:
    """Write ``values``, those of a tokenizer_config.json, to ``folder``, under the names that 4.57 and 5 both read."""
    # Code that is not copied, and how the tokenizer was loaded.
    left_out = ("auto_map", "backend", "is_local", "local_files_only", "name_or_path", "files_loaded")
    written = {key: value for key, value in values.items() if key not in left_out}
    extra = written.get("extra_special_tokens")
    if isinstance(extra, list):  # as of 5.23 (2026-11); in 4.57 it is a dictionary, and a list is an error
        del written["extra_special_tokens"]
        if extra:
            written["additional_special_tokens"] = extra
    if written.get("tokenizer_class") == "TokenizersBackend":  # its name in 5, where the older one is an alias
        written["tokenizer_class"] = "PreTrainedTokenizerFast"
    text = json.dumps(written, indent=2, ensure_ascii=False, sort_keys=True)
    (folder / TOKENIZER_CONFIG).write_text(text + "\n", encoding="utf-8")


def _prefix_space(tokenizer_json: Path) -> dict[str, bool]:
    """What its pre-tokenizer says of a space before a text; 4.57 does what tokenizer_config.json says, by default no.

    Empty where it says nothing, as one that replaces spaces.
    """
    pre_tokenizer = json.loads(tokenizer_json.read_text(encoding="utf-8")).get("pre_tokenizer") or {}
    return {key: pre_tokenizer[key] for key in ("add_prefix_space",) if key in pre_tokenizer}
