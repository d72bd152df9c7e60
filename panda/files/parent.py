"""Processes that end with the one that started them."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1
"""Of linux/prctl.h. It lasts after exec."""

_prctl = ctypes.CDLL(None).prctl if sys.platform.startswith("linux") else None
"""Found before a fork, after which a child of several threads may not wait for their locks."""


def end_with_parent(parent: int, by: signal.Signals) -> None:
    """In a child: be sent ``by`` where ``parent``, which started it, ends without a word, as by SIGKILL.

    SIGKILL ends a child that is stopped, too. Does nothing but on Linux.
    """
    if _prctl is None:
        return
    _prctl(PR_SET_PDEATHSIG, by)
    if os.getppid() != parent:  # it has ended already
        os._exit(1)
