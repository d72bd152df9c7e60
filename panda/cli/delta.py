"""``panda delta``: make or apply the difference between a fine-tune and its base."""

from __future__ import annotations

from pathlib import Path

from panda.cli.command import run_command
from panda.cli.parser import Parser


def main(argv: list[str] | None = None) -> int:
    """Entry point of ``panda delta``."""
    return run_command(_delta, argv)


def parser() -> Parser:
    """The flags of ``panda delta``."""
    parser = Parser(
        prog="panda delta",
        description="Make a delta, or apply one. Tensors are subtracted or added in float32, one at a time; a delta"
        " contains the embedding and the output head whole, so that the vocabularies may differ.",
        epilog="examples:\n  panda delta make --target my-llama --base llama-7b --output my-llama-delta\n"
        "  panda delta apply --delta my-llama-delta --base llama-7b --output my-llama",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    make = commands.add_parser("make", help="target - base")
    apply = commands.add_parser("apply", help="base + delta: a whole model, which plain transformers loads")
    # The other spellings are those of PandaLLM's documentation and of its scripts.
    make.add_argument("--target", "--target_model", "--target-model-path", required=True, help="the fine-tuned model")
    apply.add_argument("--delta", "--delta_model", "--delta-path", required=True, help="the delta")
    for command in (make, apply):
        command.add_argument(
            "--base", "--base_model", "--base-model-path", required=True, help="the model that was fine-tuned"
        )
        command.add_argument("--output", required=True, type=Path, help="the folder to write; must be new or empty")
        command.add_argument("--allow_pickle", action="store_true", help="also read weights from pickles")
    return parser


def _delta(argv: list[str]) -> None:
    arguments = parser().parse_args(argv)

    from panda.files.whole import check_can_be_made
    from panda.registry import UserError
    from panda.weights.delta import is_delta
    from panda.weights.delta import write_applied
    from panda.weights.delta import write_delta
    from panda.weights.finding import Source
    from panda.weights.finding import added_to
    from panda.weights.finding import pretrained_at

    check_can_be_made(arguments.output, "--output")
    base_source = Source(arguments.base, "--base", allow_pickle=arguments.allow_pickle)
    if arguments.command == "make":
        base = pretrained_at(base_source)
        target = pretrained_at(Source(arguments.target, "--target", allow_pickle=arguments.allow_pickle))
        print(f"target: {target.describe()}\nbase: {base.describe()}")
        differs = write_delta(target, base, arguments.output)
        print(f"{arguments.output}: a delta. Applied to the base, it restores each weight to within {differs:.3g}.")
    else:
        delta = pretrained_at(Source(arguments.delta, "--delta", allow_pickle=arguments.allow_pickle))
        if not is_delta(delta.folder, arguments.delta):
            raise UserError(
                f"--delta: {arguments.delta!r} is not a delta, and its sum with a base would not be a model. A delta"
                " contains panda's delta.json or has a name that ends in `-delta`: if this is one, rename its folder."
            )
        merged = added_to(delta, base_source)
        print(f"delta: {merged.describe()}")
        write_applied(merged, arguments.output)
        print(f"{arguments.output}: the whole model.")
