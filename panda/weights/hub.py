"""Models on the Hugging Face hub: what of one is in the hub's cache here, and what is fetched.

What describes a model (configuration, tokenizer, index) is fetched first, and weights only when tensors
are asked for: whatever else is wrong with a run is told before gigabytes have come. Files in folders
within the repository are other programs' and are left where they are.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Iterable
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from panda.registry import UserError
from panda.registry.errors import in_brief

_DESCRIPTION = ("*.json", "*.model", "*.jinja", "merges.txt")
_WITHIN = "*/*"


@dataclass(frozen=True)
class Repository:
    """A model on the hub, as it is in one commit; its description is fetched."""

    name: str
    folder: Path
    """Its snapshot in the hub's cache, named by the commit: what is fetched of it."""
    files: tuple[str, ...]
    """Names of the files that it has, whether fetched or not."""

    def fetch(self, names: Iterable[str]) -> None:
        """Have those of ``names`` that it has in its folder. Raises UserError where that does not succeed.

        Ranks of one machine that ask at once wait for each other, file by file, and fetch each once.
        """
        from huggingface_hub import snapshot_download

        absent = [name for name in names if name in self.files and not (self.folder / name).exists()]
        if absent:
            with _told(self.name):
                snapshot_download(self.name, revision=self.folder.name, allow_patterns=absent)


def is_name(location: str) -> bool:
    """Whether ``location`` can be the name of a model on the hub, OWNER/NAME; so can a path be, which comes before."""
    return re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", location) is not None


def cached(name: str, patterns: Iterable[str] = ()) -> Path | None:
    """The snapshot of ``name`` in the hub's cache; None where there is none.

    Files may be missing of it, but for those of these ``patterns``, as far as the cache knows what there is.
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
def described(name: str) -> Repository:
    """The model ``name`` as the hub has it now; asked once in a process. Raises UserError where it gives none."""
    from huggingface_hub import HfApi
    from huggingface_hub import snapshot_download

    with _told(name):
        folder = Path(snapshot_download(name, allow_patterns=list(_DESCRIPTION), ignore_patterns=[_WITHIN]))
        files = HfApi().list_repo_files(name, revision=folder.name)
    return Repository(name, folder, tuple(file for file in files if "/" not in file))


@contextmanager
def _told(name: str) -> Iterator[None]:
    """What keeps the hub from giving ``name`` as a UserError that says what to do."""
    try:
        yield
    except Exception as problem:  # the client raises what its transport raises
        raise UserError(_reason(name, problem)) from problem


def _reason(name: str, problem: Exception) -> str:
    from huggingface_hub.constants import ENDPOINT
    from huggingface_hub.constants import HF_HUB_CACHE
    from huggingface_hub.errors import GatedRepoError
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.errors import LocalEntryNotFoundError
    from huggingface_hub.errors import OfflineModeIsEnabled
    from huggingface_hub.errors import RepositoryNotFoundError

    if isinstance(problem, LocalEntryNotFoundError) and isinstance(problem.__cause__, Exception):
        problem = problem.__cause__  # the client looked in its cache once more, of which it tells then
    page = f"{ENDPOINT}/{name}"
    said = getattr(problem, "server_message", None)
    status = getattr(getattr(problem, "response", None), "status_code", None)
    if isinstance(problem, HFValidationError):
        return f"it is no name that the Hugging Face hub could have (OWNER/NAME): {problem}"
    if isinstance(problem, OfflineModeIsEnabled):
        return "the Hugging Face hub is not asked, since HF_HUB_OFFLINE is set. Unset it, or name a folder."
    if isinstance(problem, GatedRepoError):
        return (
            f"{page} is gated: {said or 'not everyone may have it'} Ask for access on that page, and log in with `hf"
            " auth login`, or put a token of that account into HF_TOKEN."
        )
    if isinstance(problem, RepositoryNotFoundError) or status == 401:  # which is said of what is not there, too
        return (
            f"there is no model at {page}, or none that you may see{f' ({said})' if said else ''}. Is the name right?"
            " For a private one log in with `hf auth login`, or put a token into HF_TOKEN."
        )
    if status:
        return f"{page} is not given: status {status}{f', {said}' if said else ''}. Try again later, or name a folder."
    if isinstance(problem, OSError) and problem.errno == errno.ENOSPC:
        return f"{page} does not fit on the disk of {HF_HUB_CACHE}. Make room, or set HF_HOME to a larger one."
    return (
        f"{page} could not be fetched: {type(problem).__name__}: {in_brief(problem)}. Is this machine"
        " connected (HTTPS_PROXY, HF_ENDPOINT)? Files that came whole are kept: the same command again fetches the"
        f" rest. Or have `hf download {name}` do it elsewhere, and name the folder."
    )
