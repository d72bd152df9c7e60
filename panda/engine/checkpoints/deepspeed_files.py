"""The files that DeepSpeed writes to a checkpoint, of trained weights and optimizer: hashed, and read as plain data."""

from __future__ import annotations

import io
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from panda.engine.checkpoints.hashing import HashedFiles
from panda.engine.checkpoints.reading import plain_only
from panda.engine.checkpoints.weights import SPLIT_DIMENSIONS
from panda.engine.engine import Engine
from panda.engine.evaluated_weights import evaluated_weights
from panda.engine.tensor_parallel import split_dimensions
from panda.engine.trained_state import load_trained_state
from panda.registry import UserError


def write_deepspeed_files(engine: Engine, checkpoint: Path, files: HashedFiles) -> None:
    """Write the trained parameters and the optimizer to ``checkpoint``, by ``files``. Every rank must call this.

    If writing fails on this rank, raises that error when DeepSpeed has finished on all ranks.
    """
    # In DeepSpeed 0.19.8 ranks wait for each other between the files of a checkpoint, so a rank that raises
    # leaves the others waiting. Can go when `save_checkpoint` reports a failed write on all ranks.
    problems: list[Exception] = []

    def going_on(write: Callable[..., Any]) -> Callable[..., Any]:
        def tried(*arguments: Any, **keywords: Any) -> Any:
            try:
                return write(*arguments, **keywords)
            except Exception as problem:
                problems.append(problem)

        return tried

    def save(state_dict: Any, path: str) -> None:
        files.save(state_dict, Path(path), _use_new_zipfile_serialization=writer.zipfile_serialization)

    writer = engine.deepspeed.checkpoint_engine
    if type(writer).__name__ != "TorchCheckpointEngine":
        raise UserError(
            f"deepspeed_config: DeepSpeed writes checkpoints by {type(writer).__name__}, whose files panda cannot hash."
            " Remove the key that asks for it."
        )
    split = going_on(split_dimensions)(engine.module)
    writers = (
        (writer, "save", save),
        (engine.deepspeed, "_copy_recovery_script", engine.deepspeed._copy_recovery_script),
    )
    for owner, name, write in writers:
        setattr(owner, name, going_on(write))
    try:
        with evaluated_weights(engine):
            engine.deepspeed.save_checkpoint(
                str(checkpoint.parent),
                tag=checkpoint.name,
                client_state={SPLIT_DIMENSIONS: split},
                save_latest=False,
                exclude_frozen_parameters=True,
            )
    finally:
        for owner, name, _ in writers:
            delattr(owner, name)
    if problems:
        raise problems[0]


def load_deepspeed_files(engine: Engine, checkpoint: Path) -> None:
    """Load what ``write_deepspeed_files`` wrote to ``checkpoint``. Every rank must call this.

    Raises UserError where nothing is there, or for a file that has more than data.
    """
    with plain_only(), redirect_stdout(io.StringIO()):  # DeepSpeed 0.19.8 prints the names of its internal formats
        loaded, _ = engine.deepspeed.load_checkpoint(
            str(checkpoint.parent), tag=checkpoint.name, custom_load_fn=load_trained_state
        )
    if loaded is None:
        raise UserError(f"{checkpoint}: DeepSpeed finds no checkpoint there.")
