"""Limits on what a chat template may do: it comes with the model, and can loop for ever or fill the memory.

transformers renders it in a sandbox of jinja's, from which it reaches no files and no code. The sandbox bounds `range`
only.
"""

from __future__ import annotations

import os
import resource
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

from panda.registry import UserError

SECONDS = 5
"""CPU time of a process for one conversation. Templates in use take milliseconds."""
BYTES = 2 * 2**30
"""Memory that rendering one conversation may add."""
CHARACTERS = 10**6
"""Of a template. The longest in use have some 20,000."""

INSTEAD = (
    "Correct the tokenizer's chat template, in chat_template.jinja or tokenizer_config.json beside tokenizer.json. A"
    " run trains without it with `template: plain`."
)
"""What to do about a template: also where a model is asked, which has no option for it."""
_PAGE = resource.getpagesize()


@lru_cache
def check_template(template: str) -> None:
    """Raise UserError where ``template`` could compute with numbers of any size.

    The one thing that no limit of time interrupts: a product of long numbers is one instruction of Python's.
    """
    from jinja2 import Environment
    from jinja2 import TemplateSyntaxError
    from jinja2 import nodes
    from jinja2.ext import Extension
    from jinja2.ext import loopcontrols

    class Generation(Extension):
        """The block of transformers, of which only the content is of interest here."""

        tags = {"generation"}  # noqa: RUF012 - jinja's

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    if len(template) > CHARACTERS:
        raise UserError(
            f"template: the tokenizer's chat template has {len(template):,} characters, and may have {CHARACTERS:,}."
            f" {INSTEAD}"
        )
    try:
        tree = Environment(extensions=[loopcontrols, Generation], autoescape=False).parse(template)
        products = [*tree.find_all(nodes.Pow), *tree.find_all(nodes.Mul)]
    except (TemplateSyntaxError, RecursionError):  # which rendering reports
        return
    for found in products:
        constant = any(isinstance(side, nodes.Const) for side in (found.left, found.right))
        if isinstance(found, nodes.Pow) or not constant:
            sign = "**" if isinstance(found, nodes.Pow) else "*"
            raise UserError(
                f"template: line {found.lineno} of the tokenizer's chat template has `{sign}`, by which a template can"
                f" compute numbers of any size; panda takes only products with a constant. {INSTEAD}"
            )


class _OutOfTime(BaseException):
    pass


@contextmanager
def limited() -> Iterator[None]:
    """Goes around rendering a template. Raises UserError where it takes too long or too much memory.

    In other threads than the main one there is no limit of time, since only that one can be interrupted.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    in_use = _address_space()
    most = None if in_use is None else in_use + BYTES
    narrows = most is not None and (soft == resource.RLIM_INFINITY or most < soft)
    timed = threading.current_thread() is threading.main_thread()
    before: Any = None
    try:
        if narrows and most is not None:
            resource.setrlimit(resource.RLIMIT_AS, (most, hard))
        if timed:
            before = signal.signal(signal.SIGVTALRM, _out_of_time)
            signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS, 1)  # again, if something has caught the first
        yield
    except _OutOfTime:
        raise _too_much(f"more than {SECONDS:g} s of CPU time") from None
    except MemoryError:
        raise _too_much(f"more than {BYTES // 2**30} GiB of memory") from None
    finally:
        if timed:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
            signal.signal(signal.SIGVTALRM, before)
        if narrows:
            resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _address_space() -> int | None:
    """The bytes of this process's address space; None where the system does not say."""
    try:
        descriptor = os.open("/proc/self/statm", os.O_RDONLY)
    except OSError:
        return None
    try:
        return int(os.read(descriptor, 100).split()[0]) * _PAGE
    finally:
        os.close(descriptor)


def _out_of_time(signal_number: int, frame: object) -> None:
    raise _OutOfTime


def _too_much(what: str) -> UserError:
    return UserError(f"template: the tokenizer's chat template takes {what} for one conversation. {INSTEAD}")
