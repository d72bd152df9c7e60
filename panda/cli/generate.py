"""``panda generate``: answers prompts with a trained model, and prints each token as it is generated."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from panda.cli.answering import RUN_HELP
from panda.cli.answering import Answered
from panda.cli.answering import add_base
from panda.cli.answering import add_sampling
from panda.cli.answering import answer
from panda.cli.answering import assistant_and_sampling
from panda.cli.answering import note
from panda.cli.answering import opening
from panda.cli.answering import problem_of
from panda.cli.answering import write
from panda.cli.command import run_command
from panda.cli.parser import Parser
from panda.registry import UserError

if TYPE_CHECKING:
    from panda.answers.assistant import Answer


def main(argv: list[str] | None = None) -> int:
    """Entry point of ``panda generate``."""
    return run_command(_generate, argv)


def parser() -> Parser:
    """The flags of ``panda generate``."""
    parser = Parser(
        prog="panda generate",
        description="Answer prompts, in the form in which the model saw them in training: in its chat template if it"
        " has one, and otherwise as the beginning of a text. stdout has the answers, each with a newline after it, and"
        " an empty line between two; all else is on stderr. With --json, stdout has an object for each prompt, a line"
        " each: prompt, answer, finish (why the answer ended: stop, length or time), prompt_tokens, answer_tokens.",
        epilog='example: panda generate runs/instruct-llama-tiny --prompt "Write panda in capitals."',
    )
    parser.add_argument("run", metavar="RUN", help=RUN_HELP)
    parser.add_argument("--prompt", nargs="+", required=True, help="one or more prompts")
    parser.add_argument("--json", action="store_true", help="print each answer when it is whole, as an object of JSON")
    add_base(parser)
    add_sampling(parser)
    return parser


def _generate(argv: list[str]) -> None:
    arguments = parser().parse_args(argv)
    for prompt in arguments.prompt:
        if problem := problem_of(prompt):
            raise UserError(f"--prompt: {problem}")
    assistant, sampling = assistant_and_sampling(arguments)
    # Encoded before the first answer, so that a prompt which cannot be given stops the command and not the rest.
    encoded = [
        assistant.encode([*opening(arguments), {"role": "user", "content": prompt}]) for prompt in arguments.prompt
    ]
    for number, (prompt, ids) in enumerate(zip(arguments.prompt, encoded, strict=True)):
        if arguments.json:
            print(_as_json(prompt, assistant.answer(ids, sampling, lambda text: None, note)), flush=True)
            continue
        if number:
            write("\n")
        if len(encoded) > 1:
            note(f"> {prompt}")
        answer(assistant, ids, sampling, Answered())


def _as_json(prompt: str, answer: Answer) -> str:
    return json.dumps(
        {
            "prompt": prompt,
            "answer": answer.text,
            "finish": answer.finish,
            "prompt_tokens": answer.prompt_tokens,
            "answer_tokens": answer.tokens,
        }
    )
