"""The stages of saving and loading a checkpoint, and an exception in one of them on some of the ranks."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Stage:
    """A function that every rank calls while it saves or loads, or only rank 0."""

    name: str
    place: str
    """``MODULE:NAME``, or ``MODULE:CLASS.NAME``, by which it is called."""
    on_rank_0: bool = False
    redistributes: bool = False
    """Whether ranks come to it only where they are other ones than those that saved."""

    SAID = "the disk of this rank fails"

    def failing_on(self, ranks: Collection[int]) -> Callable[[int], None]:
        """What a rank does first to fail here, if it is one of ``ranks``."""

        def prepare(rank: int) -> None:
            if rank not in ranks:
                return
            module, _, name = self.place.partition(":")
            owner: Any = importlib.import_module(module)
            *above, last = name.split(".")
            for each in above:
                owner = getattr(owner, each)

            def fail(*_: Any, **__: Any) -> None:
                raise ValueError(self.SAID)

            setattr(owner, last, fail)

        return prepare


_WRITING = "panda.engine.checkpoints.writing"
_FILES = "panda.engine.checkpoints.deepspeed_files"
SAVING = (
    Stage("looking", f"{_WRITING}:complete_checkpoints"),
    Stage("DeepSpeed's files", "panda.engine.checkpoints.hashing:HashedFiles.save"),
    Stage("state of the engine", f"{_FILES}:split_dimensions"),
    Stage("random state", f"{_WRITING}:write_random_state"),
    Stage("layout", f"{_WRITING}:describe_layout"),
    Stage("state of plugins", "panda.run.loop:write_state"),
    Stage("hashes", "panda.engine.checkpoints.hashing:HashedFiles.add"),
    Stage("manifest", f"{_WRITING}:write_manifest", on_rank_0=True),
    Stage("renaming", f"{_WRITING}:put", on_rank_0=True),
    Stage("removing", f"{_WRITING}:_remove_older", on_rank_0=True),
)
LOADING = (
    Stage("finding", "panda.run.continuation:hold_continued", on_rank_0=True),
    Stage("comparing", f"{_WRITING}:check_contents"),
    Stage("progress", "panda.run.continuation:read_progress"),
    Stage("layouts", f"{_WRITING}:layout_file"),
    Stage("DeepSpeed's loading", f"{_FILES}:load_trained_state"),
    Stage("random state", f"{_WRITING}:load_random_state"),
    Stage("weights again", f"{_WRITING}:train_again"),
    Stage("other ranks", f"{_WRITING}:redistribute", redistributes=True),
    Stage("state of plugins", "panda.runner:load_state"),
)
