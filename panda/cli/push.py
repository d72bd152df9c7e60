"""``panda push``: puts the export of a run, or any model in a folder, on the Hugging Face hub."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from panda.cli.command import run_command
from panda.cli.parser import Parser
from panda.cli.run_folders import run_of
from panda.files.activity import is_terminal
from panda.files.terminal import number_of
from panda.files.terminal import printable_line
from panda.hooks.metrics import read_evaluations
from panda.registry import UserError
from panda.registry.location import resolve_path
from panda.run.best_evaluation import best_checkpoint
from panda.run.best_evaluation import best_evaluation
from panda.run.best_evaluation import exported_step
from panda.weights.hub import is_name
from panda.weights.publishing import Place
from panda.weights.publishing import Upload
from panda.weights.publishing import place_of
from panda.weights.publishing import push
from panda.weights.publishing import upload_of
from panda.weights.run_folders import EXPORT
from panda.weights.run_folders import PROVENANCE


def main(argv: list[str] | None = None) -> int:
    """Entry point of ``panda push``."""
    return run_command(_push, argv)


def parser() -> Parser:
    """The flags of ``panda push``."""
    parser = Parser(
        prog="panda push",
        description="Put a model on the Hugging Face hub: the export of a run, or a folder with one. It is private,"
        " unless --public is given. Prints each file with its size first, and uploads nothing from a folder that holds"
        " secrets or states of training. An interrupted upload goes on if the command is run again.",
        epilog="example: panda push runs/instruct-llama-tiny me/spelling --dry_run",
    )
    parser.add_argument("folder", metavar="RUN|FOLDER", help="a run directory, whose export is meant, or a folder")
    parser.add_argument("name", metavar="OWNER/NAME", help="of the model on the hub; made if it is not there")
    seen = parser.add_mutually_exclusive_group()
    seen.add_argument("--public", action="store_true", help="let everybody see it")
    seen.add_argument("--private", action="store_true", help="let only you, or your organisation, see it: the default")
    parser.add_argument("--message", default="Upload by panda", help="of the commit; by default: %(default)s")
    parser.add_argument("--dry_run", "--dry-run", action="store_true", help="print what would be uploaded, and end")
    return parser


def _push(argv: list[str]) -> None:
    arguments = parser().parse_args(argv)
    if not is_name(arguments.name):
        raise UserError(f"{arguments.name!r}: expected OWNER/NAME, where the owner is you or an organisation of yours.")
    if arguments.private:
        print("note: --private: private is the default")
    folder = resolve_path(arguments.folder)
    run_of(folder)  # which refuses a later version's
    upload = upload_of(folder)
    for line in [*_described(upload), *_weights(upload)]:
        print(printable_line(line))
    if arguments.dry_run:
        print("nothing is uploaded (--dry_run)")
        return

    place = place_of(arguments.name, upload, public=arguments.public)
    print(_where(place), flush=True)
    if not is_terminal():
        from huggingface_hub.utils.tqdm import disable_progress_bars

        disable_progress_bars()
    print(f"pushed: {push(upload, place, arguments.message)}")


def _described(upload: Upload) -> list[str]:
    width = max(map(len, upload.sizes))
    lines = [f"  {name:{width}}  {_size(size):>9}" for name, size in upload.sizes.items()]
    lines = [f"{upload.folder}: {number_of(len(upload.sizes), 'file')}, {_size(sum(upload.sizes.values()))}", *lines]
    if upload.hidden:
        lines.append(f"note: hidden files stay here: {_some(upload.hidden)}")
    if not upload.has_card:
        lines.append("note: there is no model card (README.md), so the model's page will be empty")
    if base := _local_base(upload.folder):
        lines.append(
            f"note: adapter_config.json names its base {base!r}, a folder that others do not have: name one on the hub"
            " there, or push the merged model (`panda export --merge`)"
        )
    return lines


def _weights(upload: Upload) -> list[str]:
    """Of which step the weights of a run's export are, and whether its best evaluation is of another."""
    run = upload.folder.absolute().parent
    if upload.folder.name != EXPORT or not (run / PROVENANCE).is_file():
        return []
    step, best = exported_step(run), best_evaluation(run, read_evaluations(run))
    lines = [f"the weights after step {step:,}"] if step is not None else []
    if step is None or best is None or best.step == step:
        return lines
    kept = best_checkpoint(run, best)
    how = f"`panda export {kept} --output FOLDER`, and push FOLDER" if kept else "no checkpoint of it is known"
    return [*lines, f"note: the best evaluation was {best}: {how}"]


def _local_base(folder: Path) -> str | None:
    """The base of adapters in ``folder`` if it is no name on the hub."""
    try:
        base = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return base if isinstance(base, str) and base and (not is_name(base) or Path(base).exists()) else None


def _where(place: Place) -> str:
    seen = "public" if place.is_public else "private"
    line = f"to {place.url}: {seen}, {'new' if place.is_new else 'which is there'}"
    if place.others:
        line += (
            f"; {number_of(len(place.others), 'other file stays', 'other files stay')} there ({_some(place.others)})"
        )
    return line


def _some(names: tuple[str, ...]) -> str:
    return ", ".join(names[:3]) + ", ..." * (len(names) > 3)


def _size(count: float) -> str:
    for unit in ("bytes", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"


if __name__ == "__main__":
    sys.exit(main())
