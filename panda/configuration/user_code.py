"""The components that a configuration can name: installed ones, and those in files of the user that it names."""

from __future__ import annotations

import shlex
from pathlib import Path

from panda.configuration.arguments import Arguments
from panda.configuration.arguments import texts_of
from panda.configuration.options import RunOptions
from panda.registry import Catalog
from panda.registry import UserError
from panda.registry.choosing import NAMING
from panda.registry.location import resolve_path
from panda.registry.options import Given
from panda.registry.options import options_of
from panda.registry.resolve import Resolved
from panda.registry.user_files import named_file
from panda.registry.user_files import offers_in_folder
from panda.registry.user_files import offers_of_process


def catalog_of(arguments: Arguments) -> Catalog:
    """The components that ``arguments`` can name. Imports nothing.

    Raises UserError where a run recorded files of the user, and the command line does not name them again.
    """
    refuse_unrepeated(arguments)
    folder = _user_dir(arguments)
    offers, unread = offers_in_folder(folder, arguments.given["user_dir"].origin) if folder else ([], [])
    if arguments.in_process:
        of_process = offers_of_process(offers)
        there = {(offer.kind, offer.name.lower(), Path(offer.file).absolute()) for offer in of_process}
        # A script beside the files of its `user_dir` has been executed: what it declares is registered.
        offers = [each for each in offers if (each.kind, each.name.lower(), Path(each.file)) not in there]
        offers += of_process
    return Catalog(arguments.blocked, beside=offers, unread=unread, api=arguments.api)


def _user_dir(arguments: Arguments) -> Path | None:
    given = arguments.given.get("user_dir")
    folder = given and options_of(RunOptions)["user_dir"].convert(given)
    return resolve_path(folder).absolute() if folder else None


def flags_of_files(resolved: Resolved) -> str:
    """The flags that name the files of the user which ``resolved`` names, with a space before them; empty for none.

    With these a run starts again from its own config.yaml.
    """
    folder = resolved.core.user_dir
    named = {"user_dir": shlex.quote(str(resolve_path(folder).absolute()))} if folder else {}
    for key, value in resolved.lasting.items():
        texts = value if isinstance(value, tuple) else (value,)
        if any(named_file(text) for text in texts if text):
            named[key] = shlex.join(texts)
    return "".join(f" --{key} {value}" for key, value in named.items())


def refuse_unrepeated(arguments: Arguments) -> None:
    """Raise UserError where the recorded keys of ``arguments`` name files that the command line does not.

    Files in a ``user_dir`` that the command line repeats can be named.
    """
    folder = _user_dir(arguments)
    repeated = folder if "user_dir" not in arguments.recorded else None
    missing: dict[str, Given] = {}
    for key, given in arguments.recorded.items():
        files = [named[0] for text in texts_of(given) if (named := named_file(text))]
        names_components = key in NAMING or key not in options_of(RunOptions)
        if (key == "user_dir" and given.value) or (
            names_components and any(not (repeated and file.is_relative_to(repeated)) for file in files)
        ):
            missing[key] = given
    if missing:
        flags = " ".join(f"--{key} {shlex.join(texts_of(given))}" for key, given in missing.items())
        places = ", ".join(given.origin for given in missing.values())
        raise UserError(
            f"{places}: a run wrote this configuration, and executed files of the user that it names. They are executed"
            f" again only where the command line names them: add `{flags}`."
        )
