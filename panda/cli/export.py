"""``panda export``: writes a run's checkpoint as a folder that plain transformers loads."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from panda.cli.command import run_command
from panda.cli.parser import Parser
from panda.cli.parser import add_blocking
from panda.cli.passed_over import report_passed_over
from panda.cli.run_folders import run_of
from panda.files.activity import activity
from panda.files.own import refuse_links_out
from panda.files.whole import check_can_be_made
from panda.registry import UserError
from panda.run.adapter_run import CKPT_PATH_HELP
from panda.run.adapter_run import AdapterRun
from panda.run.adapter_run import adapter_run
from panda.run.directory import EXPORT
from panda.run.directory import MODEL_FOLDER
from panda.weights.gguf import SCRIPT
from panda.weights.gguf import TYPES
from panda.weights.gguf import script_in
from panda.weights.run_folders import newest_checkpoint

if TYPE_CHECKING:
    from panda.weights.stored_tensor import Weights


def main(argv: list[str] | None = None) -> int:
    """Entry point of ``panda export``."""
    return run_command(_export, argv)


def parser() -> Parser:
    """The flags of ``panda export``."""
    parser = Parser(
        prog="panda export",
        description="Write the newest checkpoint of a run, or the given one, as safetensors with configuration,"
        " tokenizer, chat template and generation config. From any ZeRO stage, in one process, one file at a time.",
        epilog="example: panda export runs/instruct-llama-tiny --output my-llama",
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="a run directory, or one of its checkpoints")
    parser.add_argument("--output", type=Path, help="the folder to create; by default RUN/export, which is replaced")
    parser.add_argument(
        "--merge",
        action="store_true",
        help="for adapters: merge them into their base and write the whole model, by default to RUN/merged. Without"
        " this, only the adapters are written, in peft's format",
    )
    parser.add_argument(
        "--trained",
        action="store_true",
        help="the trained weights, also where the run evaluates and exports others, such as the average of `ema`",
    )
    parser.add_argument("--ckpt_path", "--ckpt-path", help=CKPT_PATH_HELP)
    _add_gguf(parser)
    add_blocking(parser)
    return parser


def _export(argv: list[str]) -> None:
    arguments = parser().parse_args(argv)
    script = _script(arguments)

    from panda.engine.checkpoints.folders import named_in
    from panda.engine.checkpoints.in_use import being_read

    run = run_of(named_in(arguments.run))
    newest = newest_checkpoint(run) if run else None  # before one is chosen: the run may save another meanwhile
    with being_read(arguments.run) as checkpoint:
        _write(arguments, script, checkpoint, newest)


def _write(arguments: argparse.Namespace, script: Path | None, checkpoint: Path | None, newest: str | None) -> None:
    report_passed_over(arguments.run)
    if checkpoint is None:
        raise UserError(f"{arguments.run}: no complete checkpoint there. Name a run directory, or a `step-...` folder.")
    run = checkpoint.parent.parent
    if not (run / MODEL_FOLDER).is_dir():
        raise UserError(
            f"{run}: its folder {MODEL_FOLDER!r}, which describes the model of the weights in {checkpoint}, is missing."
        )
    adapted = adapter_run(run, arguments.ckpt_path, arguments.p)
    if arguments.merge and adapted is None:
        raise UserError(f"--merge: {run} trained a whole model, so there is nothing to merge. Leave --merge out.")
    if script and adapted and not arguments.merge:
        raise UserError(f"--gguf: {run} trained adapters. With --merge, they and their base become the model to write.")
    output = arguments.output or run / ("merged" if arguments.merge else EXPORT)
    if arguments.output and output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"--output: {str(output)!r} is not empty. Name a folder that does not exist.")
    if not arguments.output:
        refuse_links_out(run)
    check_can_be_made(output, "--output")

    from panda.engine.checkpoints.folders import complete_checkpoints
    from panda.engine.checkpoints.folders import step_of
    from panda.run.model_card import model_card

    last = next(reversed(complete_checkpoints(checkpoint.parent)), checkpoint)
    with activity("exporting the model"):
        card = model_card(run, step_of(checkpoint), adapters=adapted is not None and not arguments.merge)
        note = _exported(checkpoint, output, adapted, card, newest, merges=arguments.merge, trained=arguments.trained)
    note += f"; {last.name} is newer, and `panda export {run}` exports it" * (step_of(last) > step_of(checkpoint))
    print(f"{output}: {checkpoint.name} of {run}{note}")
    if script:
        from panda.weights.gguf import write_gguf

        write_gguf(output, arguments.gguf, script, arguments.gguf_type)
        print(f"{arguments.gguf}: the same, as GGUF ({arguments.gguf_type})")


def _exported(
    checkpoint: Path,
    output: Path,
    adapted: AdapterRun | None,
    card: str,
    newest: str | None,
    *,
    merges: bool,
    trained: bool,
) -> str:
    """Write the export of ``checkpoint``; what there is to say of it."""
    from panda.engine.checkpoints.weights import checkpoint_weights
    from panda.engine.checkpoints.weights_copies import evaluated_weights
    from panda.weights.export import export

    weights, others = (checkpoint_weights(checkpoint), False) if trained else evaluated_weights(checkpoint)
    note = "; the weights that it was evaluated with, an average or the like" if others else ""
    if adapted and not merges:
        _export_adapters(adapted, weights, output, card, newest)
    else:
        if adapted:
            weights, merged = _merged(adapted, weights)
            note += merged
        export(checkpoint.parent.parent / MODEL_FOLDER, weights, output, card, newest=newest)
    return note


def _add_gguf(parser: Parser) -> None:
    parser.add_argument(
        "--gguf",
        type=Path,
        metavar="FILE",
        help=f"also write the model as GGUF, by {SCRIPT} of the llama.cpp that --llama_cpp names",
    )
    parser.add_argument(
        "--llama_cpp", "--llama-cpp", type=Path, metavar="FOLDER", help="a clone of llama.cpp, whose script is run"
    )
    parser.add_argument(
        "--gguf_type", "--gguf-type", choices=TYPES, default="auto", help="by default that of the export"
    )


def _script(arguments: argparse.Namespace) -> Path | None:
    """llama.cpp's script, where a GGUF file is asked for. Raises UserError before anything is written."""
    if arguments.gguf is None:
        if arguments.llama_cpp or arguments.gguf_type != "auto":
            raise UserError("--llama_cpp and --gguf_type say how a GGUF file is written: name it with --gguf FILE.")
        return None
    if arguments.llama_cpp is None:
        raise UserError(
            "--gguf: panda has llama.cpp's own script write it. Name a clone of llama.cpp with --llama_cpp FOLDER: `git"
            " clone https://github.com/ggml-org/llama.cpp`."
        )
    if arguments.gguf.is_dir():
        raise UserError(f"--gguf: {str(arguments.gguf)!r} is a folder. Name a file, such as model.gguf.")
    check_can_be_made(arguments.gguf, "--gguf")
    return script_in(arguments.llama_cpp)


def _merged(adapted: AdapterRun, weights: Weights) -> tuple[Weights, str]:
    import torch

    from panda.models.adapters.merging import merged_weights

    # On a GPU if there is one, so that bitsandbytes rounds the base as it did in training.
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, base = adapted.base()
    merged, note = merged_weights(model, base, weights, adapted.configuration.options, device)
    return merged, f"; {note}"


def _export_adapters(adapted: AdapterRun, weights: Weights, output: Path, card: str, newest: str | None) -> None:
    from panda.models.adapters.lora import add_adapters
    from panda.models.adapters.lora import export_adapters
    from panda.models.adapters.lora import stand_in_for_parts
    from panda.run.assembly import load_tokenizer

    base, _ = adapted.base()
    stand_in_for_parts(base, weights)
    model = add_adapters(base, adapted.configuration.options)
    description = adapted.directory / MODEL_FOLDER
    tokenizer = load_tokenizer(str(description))
    read = {name: stored.read() for name, stored in weights.items()}
    export_adapters(model, read, output, description, tokenizer, card, newest=newest)
