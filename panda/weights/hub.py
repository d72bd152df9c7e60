"""Models and data sets on the Hugging Face hub: which files are in the local cache, and fetching the others.

The files that describe a model (configuration, tokenizer, index) or a data set (its card) are fetched first, and
weights and data only when they are asked for: any other mistake in a run is reported before gigabytes are downloaded.
Files in subfolders of a model belong to other programs and are not fetched.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Iterable
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from functools import partial
from glob import escape
from pathlib import Path
from typing import Literal

from panda.registry import UserError
from panda.registry.errors import in_brief

_DESCRIPTION = ("*.json", "*.model", "*.jinja", "merges.txt")
_WITHIN = "*/*"
CARD = ("README.md", ".huggingface.yaml", "dataset_infos.json")
"""Files that describe a data set."""

Kind = Literal["model", "dataset"]
_NOUNS: dict[Kind, str] = {"model": "model", "dataset": "data set"}


@dataclass(frozen=True)
class Repository:
    """A model or data set on the hub at one commit; the files that describe it have been fetched."""

    name: str
    folder: Path
    """Its snapshot in the local cache, named by the commit, with the files that have been fetched."""
    files: tuple[str, ...]
    """Names of all its files, whether fetched or not."""
    kind: Kind = "model"
    is_listed: bool = True
    """Whether ``files`` are all that there are, and not only those of the local cache, which has no list of them."""
    not_asked: str | None = None
    """Why the hub did not say which commit is the current one; None if it did, or if the commit was given."""

    def fetch(self, names: Iterable[str]) -> None:
        """Fetch the files ``names`` that it has and that its folder lacks. Raises UserError where that fails.

        Ranks of one machine that do so at the same time wait for each other, and fetch each file once.
        """
        from huggingface_hub import snapshot_download

        absent = [name for name in names if name in self.files and not (self.folder / name).exists()]
        if absent:
            with _explained(self.name, self.kind):
                snapshot_download(
                    self.name,
                    repo_type=self.kind,
                    revision=self.folder.name,
                    allow_patterns=[escape(name) for name in absent],
                )


def is_name(location: str) -> bool:
    """Whether ``location`` can be a name on the hub, OWNER/NAME. A path of that form takes precedence."""
    return re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", location) is not None


def is_data_name(location: str) -> bool:
    """Whether ``location`` can be the name of a data set on the hub, and not that of a file (`data/train.jsonl`)."""
    return is_name(location) and _FILE.fullmatch(location) is None


_FILE = re.compile(
    r".*\.(jsonl?|ndjson|csv|tsv|parquet|arrow|feather|txt|md|rst|ya?ml|py|zip|gz|bz2|xz|zst)", re.IGNORECASE
)


def is_commit(revision: str | None) -> bool:
    """Whether ``revision`` is the hash of a commit, which always means the same files."""
    return revision is not None and re.fullmatch("[0-9a-f]{40}", revision) is not None


def cached(name: str, patterns: Iterable[str] = ()) -> Path | None:
    """The snapshot of ``name`` in the local cache; None where there is none.

    It may lack files, but none that match ``patterns``, as far as the cache knows which files the model has.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(name, local_files_only=True, allow_patterns=list(patterns), ignore_patterns=[_WITHIN])
        )
    except (HFValidationError, LocalEntryNotFoundError):
        return None


@cache
def repository_of(name: str) -> Repository:
    """The current model ``name`` on the hub, which is asked once in a process. Raises UserError where that fails."""
    from huggingface_hub import HfApi
    from huggingface_hub import snapshot_download

    with _explained(name):
        folder = Path(snapshot_download(name, allow_patterns=list(_DESCRIPTION), ignore_patterns=[_WITHIN]))
        files = HfApi().list_repo_files(name, revision=folder.name)
    return Repository(name, folder, tuple(file for file in files if "/" not in file))


@cache
def data_repository(name: str, revision: str | None) -> Repository:
    """The data set ``name`` on the hub at ``revision``, by default its main branch; the hub is asked once in a process.

    Where the hub does not answer, it is what the local cache has of that revision. Raises UserError if that is nothing.
    """
    from huggingface_hub import HfApi
    from huggingface_hub import constants
    from huggingface_hub import get_cached_repo_tree
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import CachedRepoTreeNotFoundError
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.errors import LocalEntryNotFoundError

    not_asked = None
    described = [*CARD, ".gitattributes"]  # which each has: the client warns of patterns that nothing matches
    card = partial(snapshot_download, name, repo_type="dataset", revision=revision, allow_patterns=described)
    try:
        with _explained(name, "dataset"):
            if not is_commit(revision):
                HfApi().dataset_info(name, revision=revision)  # else the client takes what is cached without a word
            folder = Path(card())
    except UserError as problem:
        not_asked = str(problem)
        try:
            folder = Path(card(local_files_only=True))
        except (HFValidationError, LocalEntryNotFoundError):
            absent = f"the data set {name!r} is not in the local cache, and " if constants.HF_HUB_OFFLINE else ""
            raise UserError(f"{absent}{problem}") from None
    try:
        files = [file.path for file in get_cached_repo_tree(name, repo_type="dataset", revision=folder.name)]
        is_listed = True
    except CachedRepoTreeNotFoundError:  # `datasets` by itself fetches files and keeps no list of the others
        files = [str(file.relative_to(folder)) for file in sorted(folder.rglob("*")) if file.is_file()]
        is_listed = False
    return Repository(name, folder, tuple(files), "dataset", is_listed, not_asked)


@contextmanager
def _explained(name: str, kind: Kind = "model") -> Iterator[None]:
    """Turns what fails while ``name`` is fetched into a UserError that says what to do."""
    try:
        yield
    except Exception as problem:  # the client lets the exceptions of its transport through
        raise UserError(_reason(name, problem, kind)) from problem


def _reason(name: str, problem: Exception, kind: Kind) -> str:
    from huggingface_hub.constants import ENDPOINT
    from huggingface_hub.constants import HF_HUB_CACHE
    from huggingface_hub.errors import GatedRepoError
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.errors import LocalEntryNotFoundError
    from huggingface_hub.errors import OfflineModeIsEnabled
    from huggingface_hub.errors import RepositoryNotFoundError
    from huggingface_hub.errors import RevisionNotFoundError

    if isinstance(problem, LocalEntryNotFoundError) and isinstance(problem.__cause__, Exception):
        problem = problem.__cause__  # the client then looked in its cache, and reports that
    page = f"{ENDPOINT}/{'datasets/' * (kind == 'dataset')}{name}"
    said = getattr(problem, "server_message", None)
    status = getattr(getattr(problem, "response", None), "status_code", None)
    if isinstance(problem, HFValidationError):
        return f"it is not a valid name on the Hugging Face hub (OWNER/NAME): {problem}"
    if isinstance(problem, OfflineModeIsEnabled):
        return "the Hugging Face hub is not asked, since HF_HUB_OFFLINE is set. Unset it, or name a folder."
    if isinstance(problem, GatedRepoError):
        return (
            f"{page} is gated: {said or 'access has to be granted.'} Ask for access on that page, and log in with `hf"
            " auth login`, or put a token of that account into HF_TOKEN."
        )
    if isinstance(problem, RevisionNotFoundError):
        return f"{page} has no such revision{f' ({said})' if said else ''}. It is a branch, a tag or a commit."
    if isinstance(problem, RepositoryNotFoundError) or status == 401:  # the hub's answer for missing models, too
        return (
            f"there is no {_NOUNS[kind]} at {page}, or you have no access to it{f' ({said})' if said else ''}. Is the"
            " name right? For a private one log in with `hf auth login`, or put a token into HF_TOKEN."
        )
    if status:
        return (
            f"{page} could not be fetched: status {status}{f', {said}' if said else ''}. Try later, or name a folder."
        )
    if isinstance(problem, OSError) and problem.errno == errno.ENOSPC:
        return f"{page} does not fit on the disk of {HF_HUB_CACHE}. Make room, or set HF_HOME to a larger one."
    return (
        f"{page} could not be fetched: {type(problem).__name__}: {in_brief(problem)}. Is this machine"
        " connected (HTTPS_PROXY, HF_ENDPOINT)? Complete files are kept: running the command again fetches"
        f" the rest. Or run `hf download {name}{' --repo-type dataset' * (kind == 'dataset')}` elsewhere, and name the"
        " folder."
    )
