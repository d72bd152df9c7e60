"""``panda export``: a run's checkpoint as a folder that the whole ecosystem loads."""

from __future__ import annotations

import argparse
from pathlib import Path

from panda.cli.command import run_command
from panda.registry import UserError


def main(argv: list[str] | None = None) -> int:
    """Entry point of ``panda export``."""
    return run_command(_export, argv)


def _export(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="panda export",
        description="Write the newest checkpoint of a run, or the one that is named, as safetensors with configuration,"
        " tokenizer, chat template and generation config. From any ZeRO stage, in this one process, a file at a time.",
        epilog="example: panda export runs/instruct-llama-7b --output my-llama",
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="a run directory, or one of its checkpoints")
    parser.add_argument("--output", type=Path, help="a folder to make; by default RUN/export, which is replaced")
    arguments = parser.parse_args(argv)

    from panda.engine.checkpoint_folders import find_checkpoint
    from panda.engine.checkpoint_weights import checkpoint_weights
    from panda.models.export import DESCRIPTION
    from panda.models.export import export
    from panda.models.export import refuse_adapters

    checkpoint = find_checkpoint(arguments.run)
    if checkpoint is None:
        raise UserError(f"{arguments.run}: no complete checkpoint there. Name a run directory, or a `step-...` folder.")
    run = checkpoint.parent.parent
    refuse_adapters(run)
    if not (run / DESCRIPTION).is_dir():
        raise UserError(f"{run}: it has no folder {DESCRIPTION!r}, which says what the weights in {checkpoint} are of.")
    output = arguments.output or run / "export"
    if arguments.output and output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"--output: {str(output)!r} is not empty. Name a folder that does not exist.")
    export(run / DESCRIPTION, checkpoint_weights(checkpoint), output)
    print(f"{output}: {checkpoint.name} of {run}")
