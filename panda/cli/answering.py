"""What ``panda generate`` and ``panda chat`` share: finding and loading the model, and the options of sampling."""

from __future__ import annotations

import argparse
import sys
from contextlib import redirect_stdout
from dataclasses import dataclass
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from panda.cli.parser import Parser
from panda.cli.parser import add_blocking
from panda.cli.passed_over import report_passed_over
from panda.cli.run_folders import run_of
from panda.files.activity import activity
from panda.files.terminal import fitted
from panda.files.terminal import printable
from panda.registry import UserError
from panda.run.adapter_run import CKPT_PATH_HELP
from panda.run.adapter_run import AdapterRun
from panda.run.adapter_run import adapter_run
from panda.run.adapter_run import trained_adapters
from panda.run.directory import EXPORT
from panda.run.directory import MODEL_FOLDER
from panda.run.first_look import let_threads_sleep
from panda.weights.formats import ADAPTERS
from panda.weights.formats import CONFIG
from panda.weights.formats import format_of

if TYPE_CHECKING:
    import torch

    from panda.answers.assistant import Assistant
    from panda.answers.assistant import Message
    from panda.answers.assistant import Sampling
    from panda.answers.loading import Answering
    from panda.weights.stored_tensor import Weights

RUN_HELP = "a run directory, an export, or any folder in Hugging Face's format"


def add_sampling(parser: Parser) -> None:
    """Add what precedes a dialogue, and the options of sampling."""
    parser.add_argument("--system", metavar="TEXT", help="a system turn before the dialogue, for the chat template")
    parser.add_argument(
        "--max_new_tokens", "--max-new-tokens", type=int, default=256, help="most tokens in an answer; default 256"
    )
    parser.add_argument(
        "--temperature", type=float, default=0.0, help="0, the default, always takes the most likely token"
    )
    parser.add_argument(
        "--top_p",
        "--top-p",
        type=float,
        default=1.0,
        help="with a --temperature: sample from the most likely tokens whose probabilities add up to this; default 1,"
        " from all",
    )
    parser.add_argument("--seed", type=int, help="seed of sampling, with a --temperature")


def add_base(parser: Parser) -> None:
    """Add the options that locate a base, and that allow pickles."""
    parser.add_argument("--ckpt_path", "--ckpt-path", help=CKPT_PATH_HELP)
    parser.add_argument("--base_path", "--base-path", help="for a delta: the model that it is added to")
    parser.add_argument("--allow_pickle", "--allow-pickle", action="store_true", help="also read weights from pickles")
    add_blocking(parser)


def assistant_and_sampling(arguments: argparse.Namespace, *, chats: bool = False) -> tuple[Assistant, Sampling]:
    """The model that ``arguments`` name, loaded, and how to sample from it. Raises UserError for values out of bounds.

    With ``chats``, a model without a chat template is an error, which is raised before the model is loaded.
    """
    if arguments.max_new_tokens < 1:
        raise UserError(f"--max_new_tokens: {arguments.max_new_tokens} is not an integer >= 1.")
    if not arguments.temperature >= 0:
        raise UserError(f"--temperature: {arguments.temperature} is not a number >= 0.")
    if not 0 < arguments.top_p <= 1:
        raise UserError(f"--top_p: {arguments.top_p} is not a number > 0 and <= 1.")
    unused = [f"--{key}" for key, usual in (("top_p", 1.0), ("seed", None)) if getattr(arguments, key) != usual]
    if unused and arguments.temperature == 0:
        raise UserError(
            f"{' and '.join(unused)}: without a temperature the likeliest token is always taken, and nothing is"
            f" sampled. Add one, such as `--temperature 0.7`, or leave {' and '.join(unused)} out."
        )
    with redirect_stdout(sys.stderr):  # stdout is for the answers; DeepSpeed writes its warnings there
        assistant = _loaded(arguments, chats=chats)
    for line in assistant.notes:
        note(line)

    import torch

    from panda.answers.assistant import Sampling

    if arguments.seed is not None:
        torch.manual_seed(arguments.seed)  # after loading, which may draw a base from its run's seed
    return assistant, Sampling(arguments.max_new_tokens, arguments.temperature, arguments.top_p)


def _loaded(arguments: argparse.Namespace, *, chats: bool) -> Assistant:
    let_threads_sleep()

    from panda.engine.checkpoints.in_use import being_read

    with being_read(Path(arguments.run)) as checkpoint:
        return _read(arguments, checkpoint, chats=chats)


def _read(arguments: argparse.Namespace, checkpoint: Path | None, *, chats: bool) -> Assistant:
    with activity("loading torch"):
        answering = find_answering(arguments, checkpoint)
    if chats:
        answering.require_chat_template()
    if arguments.system is not None and (problem := problem_of(arguments.system)):
        raise UserError(f"--system: {problem}")
    if arguments.system is not None and not answering.tokenizer.chat_template:
        raise UserError(
            f"--system: the tokenizer of {answering.folder} has no chat template, so a system turn is unknown to the"
            " model. Leave --system out."
        )
    with activity("reading the model"):
        import torch

        return answering.assistant(torch.device("cuda" if torch.cuda.is_available() else "cpu"))


def find_answering(arguments: argparse.Namespace, checkpoint: Path | None) -> Answering:
    """The model that ``arguments`` name; for a run, its newest checkpoint, or its export if there is no checkpoint.

    ``checkpoint`` is that which ``being_read`` has found there and holds. It is not looked for again: the run may have
    saved another since, and may remove that one while it is read.
    Adapters answer on the base that they were trained on, which is at ``--ckpt_path`` if it was moved.
    """
    from panda.engine.checkpoints.folders import named_in

    location, ckpt_path, base_path = arguments.run, arguments.ckpt_path, arguments.base_path
    folder = named_in(Path(location))
    if not folder.is_dir():
        raise UserError(f"{location!r} is not a folder. Name {RUN_HELP}.")
    run_of(folder)  # which refuses a later version's
    report_passed_over(folder)
    holds_adapters = (folder / ADAPTERS).exists()
    if base_path is not None and checkpoint:
        raise UserError(f"--base_path: {location!r} is a run, not a delta, and needs no base. Leave --base_path out.")
    if not checkpoint and not holds_adapters:
        folder = folder / EXPORT if (folder / EXPORT / CONFIG).exists() else folder
        if not (folder / CONFIG).exists():
            raise UserError(f"{location!r} contains no model: no complete checkpoint, no export, no config.json.")
        format_of(folder, [file.name for file in folder.iterdir()], "RUN")

    from transformers.utils import logging

    from panda.answers.loading import described_in
    from panda.answers.loading import found_at
    from panda.answers.loading import with_adapters
    from panda.engine.checkpoints.weights_copies import evaluated_weights
    from panda.weights.finding import Source

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    source = Source(location, "RUN", base_path, arguments.allow_pickle)
    if holds_adapters and not trained_adapters(folder.parent):
        return with_adapters(source, ckpt_path)
    run = checkpoint.parent.parent if checkpoint else folder.parent if holds_adapters else folder
    adapted = adapter_run(run, ckpt_path, arguments.p)
    if adapted and (checkpoint or holds_adapters):
        note(f"weights: {checkpoint or folder}")
        adapters = evaluated_weights(checkpoint)[0] if checkpoint else folder
        return described_in(run / MODEL_FOLDER, load=partial(_adapted_module, adapted, adapters))
    if checkpoint and (run / MODEL_FOLDER).is_dir():
        note(f"weights: {checkpoint}")
        return described_in(run / MODEL_FOLDER, evaluated_weights(checkpoint)[0], blocked=arguments.p)
    return found_at(replace(source, location=str(folder)), arguments.p)


def _adapted_module(adapted: AdapterRun, adapters: Weights | Path, device: torch.device) -> torch.nn.Module:
    """The base of ``adapted`` with ``adapters`` (tensors by name, or the folder of an export), on ``device``."""
    from panda.models.adapters.lora import add_adapters
    from panda.models.adapters.lora import load_adapters
    from panda.models.adapters.lora import put_adapters
    from panda.run.model import load_base

    model, weights = adapted.base()
    base = load_base(model, adapted.configuration.options, weights, device)
    if isinstance(adapters, Path):
        peft_model = load_adapters(base, adapters)
    else:
        peft_model = add_adapters(base, adapted.configuration.options)
        put_adapters(peft_model, adapters, device)
    module: torch.nn.Module = peft_model.eval().get_base_model()
    return module


def opening(arguments: argparse.Namespace) -> list[Message]:
    """The turn that ``--system`` gives, if it is given."""
    return [] if arguments.system is None else [{"role": "system", "content": arguments.system}]


def problem_of(text: str) -> str | None:
    """Why ``text`` of the command line or of stdin cannot be given to a model; None where it can."""
    if not text:
        return "it is empty. Write one."
    try:
        text.encode()
    except UnicodeEncodeError as problem:
        byte = ord(text[problem.start])
        what = f"the byte 0x{byte - 0xDC00:02x}" if 0xDC80 <= byte <= 0xDCFF else "half of a surrogate pair"
        return f"{what} after {problem.start} characters is not UTF-8. Write the text in UTF-8."
    return None


@dataclass
class Answered:
    """An answer, as far as it has come."""

    text: str = ""


def answer(assistant: Assistant, ids: list[int], sampling: Sampling, said: Answered) -> None:
    """Print the answer to ``ids`` as it comes, which is ``said``, then notes about it."""
    notes: list[str] = []  # printed when the line of the answer has ended

    def say(piece: str) -> None:
        write(piece)
        said.text += piece

    said.text = assistant.answer(ids, sampling, say, notes.append).text
    write("\n")
    for line in notes:
        note(line)


def write(text: str) -> None:
    """Print a piece of an answer, and flush it. A terminal must not obey the model: it is shown what it would obey."""
    print(printable(text) if sys.stdout.isatty() else text, end="", flush=True)


def note(text: str) -> None:
    """Print a line about an answer where it does not mix with it."""
    lines = printable(text).split("\n") if sys.stderr.isatty() else [text]
    for line in fitted(lines, 2, sys.stderr):
        print(line, file=sys.stderr, flush=True)
