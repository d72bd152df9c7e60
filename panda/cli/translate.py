"""``panda translate``: what a file of LLaMA-Factory, axolotl, TRL or transformers means in panda's keys."""

from __future__ import annotations

import sys
from pathlib import Path

from panda.cli.command import run_command
from panda.cli.parser import Parser
from panda.configuration.translation.translate import TOOLS
from panda.configuration.translation.translate import remarks
from panda.configuration.translation.translate import translate
from panda.configuration.translation.translate import written
from panda.files.terminal import number_of
from panda.registry import UserError


def main(argv: list[str] | None = None) -> int:
    """Entry point of ``panda translate``."""
    return run_command(_translate, argv)


def parser() -> Parser:
    """The flags of ``panda translate``."""
    parser = Parser(
        prog="panda translate",
        description="Write the flat YAML that means the same as a configuration of another tool: each line with the key"
        " that it comes from, the other tool's defaults included, and at the end what has no counterpart, what means"
        " nearly the same, and what was left out. Reads YAML and JSON, nested keys included; loads no model or data.",
        epilog="examples:\n  panda translate qwen3_lora_sft.yaml\n"
        "  panda translate config.yml --from axolotl --output run.yaml",
    )
    parser.add_argument("file", type=Path, metavar="FILE", help="configuration of another tool")
    parser.add_argument("--from", dest="tool", metavar="TOOL", help="llama-factory, axolotl, trl or transformers")
    parser.add_argument("--output", type=Path, metavar="FILE", help="the file to write; must be new. By default stdout")
    parser.values["tool"] = lambda _: TOOLS
    return parser


def _translate(argv: list[str]) -> None:
    arguments = parser().parse_args(argv)

    found = translate(arguments.file, arguments.tool)
    text = written(found, arguments.file)
    if arguments.output is None:
        print(text, end="")
    else:
        try:
            with arguments.output.open("x", encoding="utf-8") as file:
                file.write(text)
        except FileExistsError:
            raise UserError(f"--output: {arguments.output} exists. Name a new file.") from None
        except OSError as problem:
            raise UserError(f"--output: {arguments.output}: {problem.strerror}.") from None
        print(f"{arguments.output}: {number_of(len(found.lines), 'key')}. Next: panda check {arguments.output}")
        print("\n".join(remarks(found)))
    if found.lost and arguments.output is None and not sys.stdout.isatty():
        print(
            f"note: keys without a counterpart: {len(found.lost)}. They are listed at the end of the file.",
            file=sys.stderr,
        )
