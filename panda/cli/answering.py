"""What ``panda generate`` and ``panda chat`` share: where the model is, and how it answers."""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from panda.cli.passed_over import tell_passed_over
from panda.registry import UserError
from panda.run.adapter_run import CKPT_PATH_HELP
from panda.run.adapter_run import AdapterRun
from panda.run.adapter_run import adapter_run
from panda.run.adapter_run import trained_adapters
from panda.run.directory import EXPORT
from panda.weights.formats import ADAPTERS
from panda.weights.formats import CONFIG

if TYPE_CHECKING:
    import torch

    from panda.answers.assistant import Assistant
    from panda.answers.assistant import Sampling
    from panda.weights.stored_tensor import Weights

RUN_HELP = "a run directory, an export, or any folder in Hugging Face's format"


def add_sampling(parser: argparse.ArgumentParser) -> None:
    """The options of how an answer is chosen."""
    parser.add_argument("--max_new_tokens", "--max-new-tokens", type=int, default=256, help="at most; default 256")
    parser.add_argument("--temperature", type=float, default=0.0, help="0, the default, takes the likeliest token")
    parser.add_argument("--top_p", "--top-p", type=float, default=1.0, help="probability of what is drawn from")
    parser.add_argument("--seed", type=int, help="of what is drawn")


def add_base(parser: argparse.ArgumentParser) -> None:
    """The option of where a base is."""
    parser.add_argument("--ckpt_path", "--ckpt-path", help=CKPT_PATH_HELP)
    parser.add_argument("--base_path", "--base-path", help="of a delta: the whole model that it is added to")
    parser.add_argument("--allow_pickle", "--allow-pickle", action="store_true", help="read weights from pickles too")


def assistant_and_sampling(arguments: argparse.Namespace, *, chats: bool = False) -> tuple[Assistant, Sampling]:
    """What was asked for: the model that answers, and how. Raises UserError for values out of bounds."""
    import torch

    from panda.answers.assistant import Sampling

    if arguments.max_new_tokens < 1 or arguments.temperature < 0 or not 0 < arguments.top_p <= 1:
        raise UserError("expected --max_new_tokens >= 1, --temperature >= 0 and 0 < --top_p <= 1.")
    assistant = _load_assistant(arguments, chats)
    if arguments.seed is not None:
        torch.manual_seed(arguments.seed)  # after a base has been drawn, by the seed of its run
    return assistant, Sampling(arguments.max_new_tokens, arguments.temperature, arguments.top_p)


def _load_assistant(arguments: argparse.Namespace, chats: bool) -> Assistant:
    """The model that ``arguments`` name; of a run its newest checkpoint, and its export where there is none.

    Adapters answer on the base that they were trained on, which is at ``--ckpt_path`` if not where it was.
    One that ``chats`` needs a chat template, and is not loaded without.
    """
    import torch
    from transformers.utils import logging

    from panda.answers.loading import assistant_in
    from panda.answers.loading import assistant_of
    from panda.answers.loading import assistant_with_adapters
    from panda.engine.checkpoints.folders import find_checkpoint
    from panda.engine.checkpoints.weights import checkpoint_weights
    from panda.weights.export import DESCRIPTION

    location, ckpt_path, base_path = arguments.run, arguments.ckpt_path, arguments.base_path
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    folder = Path(location)
    if not folder.is_dir():
        raise UserError(f"{location!r} is not a folder. Name {RUN_HELP}.")
    checkpoint = find_checkpoint(folder)
    tell_passed_over(folder)
    are_exported = (folder / ADAPTERS).exists()
    if base_path is not None and checkpoint:
        raise UserError(f"--base_path: {location!r} is a run and no delta, so nothing is added to it. Leave it out.")
    if are_exported and not trained_adapters(folder.parent):
        options = ckpt_path, base_path, device
        return assistant_with_adapters(folder, *options, allow_pickle=arguments.allow_pickle, chats=chats)
    run = checkpoint.parent.parent if checkpoint else folder.parent if are_exported else folder
    adapted = adapter_run(run, ckpt_path)
    if adapted and (checkpoint or are_exported):
        print(f"{checkpoint or folder}", file=sys.stderr)
        adapters = checkpoint_weights(checkpoint) if checkpoint else folder
        load = partial(_adapted_module, adapted, adapters, device)
        return assistant_of(run / DESCRIPTION, None, device, load, chats=chats)
    if checkpoint and (checkpoint.parent.parent / DESCRIPTION).is_dir():
        print(f"{checkpoint}", file=sys.stderr)
        return assistant_of(checkpoint.parent.parent / DESCRIPTION, checkpoint_weights(checkpoint), device, chats=chats)
    folder = folder / EXPORT if (folder / EXPORT / CONFIG).exists() else folder
    if not (folder / CONFIG).exists():
        raise UserError(f"{location!r} holds no model: no complete checkpoint, no export, no config.json.")
    return assistant_in(folder, base_path, device, allow_pickle=arguments.allow_pickle, chats=chats)


def _adapted_module(adapted: AdapterRun, adapters: Weights | Path, device: torch.device) -> torch.nn.Module:
    """The base of ``adapted`` with ``adapters``, by name, or in the folder of an export."""
    from panda.models.adapters.lora import add_adapters
    from panda.models.adapters.lora import load_adapters
    from panda.models.adapters.lora import put_adapters
    from panda.run.assembly import load_base

    model, weights = adapted.base()
    base = load_base(model, adapted.options, weights, device)
    if isinstance(adapters, Path):
        peft_model = load_adapters(base, adapters)
    else:
        peft_model = add_adapters(base, adapted.options)
        put_adapters(peft_model, adapters, device)
    module: torch.nn.Module = peft_model.eval().get_base_model()
    return module


def write(text: str) -> None:
    """Print a piece of an answer at once."""
    print(text, end="", flush=True)
