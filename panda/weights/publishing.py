"""Putting an export on the Hugging Face hub: which files, what is kept back, and how. Imports no torch."""

from __future__ import annotations

import codecs
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from glob import escape
from pathlib import Path

from panda.files.private import secret_in
from panda.registry import UserError
from panda.registry.errors import in_brief
from panda.weights.export_format import refuse_later_export
from panda.weights.run_folders import CHECKPOINTS
from panda.weights.run_folders import EXPORT
from panda.weights.run_folders import PROVENANCE
from panda.weights.run_folders import exported_model

SECRET_NAMES = (
    ".env*",
    ".netrc",
    "*.pem",
    "*.key",
    "*.p12",
    "id_rsa*",
    "id_ed25519*",
    "*credential*",
    "*secret*",
    "token",
    "*.token",
)
"""Names of files that hold what nobody else may know."""
TRAINING_STATES = (
    *("optimizer.*", "scheduler.*", "trainer_state.json", "training_args.bin", "rng_state*", "random-*.safetensors"),
    *("*_optim_states.pt", "*_model_states.pt", "*.distcp", "weights-of-plugins-*"),
)
"""Names of files from which only training goes on."""
DATA = (".jsonl", ".parquet", ".arrow")
"""Names of files that end so hold data, which no model needs."""
DESCRIPTIONS = ("config.json", "adapter_config.json", "params.json")
"""One of these makes a folder a model."""
WEIGHTS = (".safetensors", ".gguf", ".bin", ".pt", ".pth")


@dataclass(frozen=True)
class Upload:
    """What is going to be on the hub."""

    folder: Path
    sizes: dict[str, int]
    """Bytes of each file, by its path in the folder."""
    hidden: tuple[str, ...] = ()
    """Files that stay here, since their names begin with a dot, or those of their folders."""

    @property
    def has_card(self) -> bool:
        return "README.md" in self.sizes


def upload_of(location: Path) -> Upload:
    """The files of the export at ``location``, or of the run there.

    Raises UserError where there is none, and where a file must not leave this machine.
    """
    if (location / PROVENANCE).exists() and not (location / EXPORT).is_dir():
        raise UserError(f"{location}: this run has no export yet. `panda export {location}` writes it.")
    folder = exported_model(location)
    refuse_later_export(folder)
    if not folder.is_dir():
        raise UserError(
            f"{location}: there is no such folder. Name a run, or a folder that `panda export` has written."
        )
    if folder.parent.name == CHECKPOINTS:
        raise UserError(
            f"{folder}: it is a checkpoint, from which training goes on. `panda export {folder} --output FOLDER` writes"
            " its model."
        )
    paths = [path for path in sorted(folder.rglob("*")) if not path.is_dir()]
    _refuse(folder, paths)
    names = [str(path.relative_to(folder)) for path in paths]
    shown = {name: path.stat().st_size for name, path in zip(names, paths, strict=True) if not _is_hidden(name)}
    if not any(name in DESCRIPTIONS for name in shown) and not any(name.endswith(".gguf") for name in shown):
        raise UserError(f"{folder}: it holds no model: none of {', '.join(DESCRIPTIONS)}. Name a run, or an export.")
    if not any(name.endswith(WEIGHTS) for name in shown):
        raise UserError(f"{folder}: it holds no weights ({', '.join(WEIGHTS)}). Name a run, or an export.")
    return Upload(folder, shown, tuple(name for name in names if _is_hidden(name)))


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") for part in Path(name).parts) and name != ".gitattributes"


def _refuse(folder: Path, paths: list[Path]) -> None:
    """Raise UserError for what must not be uploaded; all at once."""
    inside = folder.resolve()
    problems = []
    for path in paths:
        name, shown = path.name, str(path.relative_to(folder))
        if path.is_symlink() and not Path(os.path.realpath(path)).is_relative_to(inside):
            problems.append(f"{shown}: it is a link to {os.readlink(path)}, outside of the folder")
        elif not path.is_file():
            problems.append(f"{shown}: {'it is a link to nothing' if path.is_symlink() else 'it is no file'}")
        elif any(fnmatch(name.lower(), pattern) for pattern in SECRET_NAMES):
            problems.append(f"{shown}: a file of this name holds secrets")
        elif any(fnmatch(name, pattern) for pattern in TRAINING_STATES):
            problems.append(f"{shown}: it is a state of training, of no use to others, and as large as several models")
        elif name.lower().endswith(DATA):
            problems.append(f"{shown}: it is data, maybe what the model was trained on, and no part of a model")
        elif problem := _problem_inside(path):
            problems.append(f"{shown}: {problem}")
    if problems:
        more = f"\n(and {len(problems) - 10} more)" if len(problems) > 10 else ""
        raise UserError(
            f"{folder}: nothing is uploaded, since it has what others must not get, or do not need. Move it away, or"
            " name a folder with the model only.\n" + "\n".join(problems[:10]) + more
        )


def _problem_inside(path: Path) -> str | None:
    """Why the file at ``path`` must not be uploaded for what it has; None where it may. Weights are not searched."""
    try:
        with path.open("rb") as file:
            first = file.read(_PART if not path.name.endswith(WEIGHTS) else 1)
        if path.name.endswith(WEIGHTS):
            return None
        is_wide = first.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        before = ""
        with path.open(encoding="utf-16" if is_wide else "utf-8", errors="replace") as text:
            while part := text.read(_PART):
                if problem := secret_in(before + part, is_binary=not is_wide and b"\0" in first):
                    return problem
                before = part[-_LONGEST:]
    except OSError as problem:
        return f"it cannot be read, and so not looked through ({in_brief(problem)})"
    return None


_PART = 2**22
"""Characters of a file that are looked through at a time."""
_LONGEST = 2**12
"""Characters of one part that are looked through with the next: a secret may be in both."""


@dataclass(frozen=True)
class Place:
    """A model on the hub, of this user."""

    name: str
    url: str
    is_new: bool
    is_public: bool
    others: tuple[str, ...] = ()
    """Files that it has and the upload has not: they stay."""


def place_of(name: str, upload: Upload, *, public: bool) -> Place:
    """Where ``upload`` goes: asks the hub. Raises UserError where it cannot, or more people would see it than asked."""
    from huggingface_hub import HfApi
    from huggingface_hub import get_token
    from huggingface_hub.constants import ENDPOINT
    from huggingface_hub.constants import HF_HUB_OFFLINE
    from huggingface_hub.errors import RepositoryNotFoundError

    if HF_HUB_OFFLINE:
        raise UserError("the Hugging Face hub is not asked, since HF_HUB_OFFLINE is set. Unset it.")
    if get_token() is None:
        raise UserError(
            f"pushing to {ENDPOINT} needs a token that may write: make one at {ENDPOINT}/settings/tokens, and log in"
            " with `hf auth login`, or put it into HF_TOKEN."
        )
    url = f"{ENDPOINT}/{name}"
    with _explained(name):
        HfApi().whoami()  # a repository that the token cannot see looks like one that is not there
        try:
            found = HfApi().model_info(name)
        except RepositoryNotFoundError:
            return Place(name, url, True, public)
    if public == bool(found.private):
        is_, flag = ("private", "leave --public out") if public else ("public", "add --public")
        raise UserError(
            f"{url} is there, and is {is_}: {flag}, or name another. `panda push` does not change who may see it;"
            " its settings do."
        )
    there = [each.rfilename for each in found.siblings or []]
    others = tuple(each for each in there if each not in upload.sizes and each != ".gitattributes")
    return Place(name, url, False, public, others)


def push(upload: Upload, place: Place, message: str) -> str:
    """Put ``upload`` at ``place``; returns the commit's address. What an interrupted one has sent is not sent again."""
    from huggingface_hub import HfApi

    with _explained(place.name):
        if place.is_new:
            HfApi().create_repo(place.name, private=not place.is_public)
        done = HfApi().upload_folder(
            repo_id=place.name,
            folder_path=upload.folder,
            allow_patterns=[escape(name) for name in upload.sizes],
            commit_message=message,
        )
    return str(done.commit_url)


@contextmanager
def _explained(name: str) -> Iterator[None]:
    """Turns what fails on the way to ``name`` into a UserError that says what to do."""
    try:
        yield
    except UserError:
        raise
    except Exception as problem:  # the client lets the exceptions of its transport through
        raise UserError(_reason(name, problem)) from problem


def _reason(name: str, problem: Exception) -> str:
    from huggingface_hub.constants import ENDPOINT
    from huggingface_hub.errors import HFValidationError

    status = getattr(getattr(problem, "response", None), "status_code", None)
    said = getattr(problem, "server_message", None)
    told = f" ({said})" if said else ""
    if isinstance(problem, HFValidationError):
        return f"{name!r} is not a valid name on the Hugging Face hub: {in_brief(problem)}"
    if status == 401:
        return f"{ENDPOINT} does not know the token{told}. Make one at {ENDPOINT}/settings/tokens: `hf auth login`."
    if status in (403, 404):
        return (
            f"the token may not write to {ENDPOINT}/{name}{told}. It needs the role `write`, and the owner has to be"
            " you or an organisation of yours: `hf auth whoami` says who you are."
        )
    what = f"status {status}{told}" if status else f"{type(problem).__name__}: {in_brief(problem)}"
    return f"{name} could not be pushed: {what}. What has arrived is kept there: run the command again for the rest."
