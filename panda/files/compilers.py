"""Whether this machine can compile code for a device: what torch compiles, and Triton's kernels."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sysconfig
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def what_compiling_lacks(device: torch.device) -> str:
    """What this machine lacks to compile code for ``device``, and how to get it; empty where it lacks nothing."""
    if device.type == "cpu":
        compiler, named, package = os.environ.get("CXX", "g++"), "CXX", "g++"
        found = shutil.which(compiler)
    else:
        # Triton compiles what calls its kernels with the first of these, and with Python's headers.
        compiler, named, package = os.environ.get("CC", "gcc"), "CC", "gcc"
        found = shutil.which(compiler) or (None if "CC" in os.environ else shutil.which("clang"))
    if not found:
        return (
            f"torch needs a compiler for {'C++' if named == 'CXX' else 'C'}, and {compiler!r} was not found. Install"
            f" one (`apt-get install {package}`), or name one in the environment variable {named}"
        )
    if device.type != "cpu":
        import torch

        if find_spec("triton") is None:
            return "torch needs Triton, which is not installed (`pip install triton`)"
        if torch.cuda.get_device_capability(device) < (7, 0):
            return "Triton needs a GPU of compute capability 7.0 or later"
        headers = sysconfig.get_path("include")
        if not Path(headers, "Python.h").exists():
            return "Triton needs the headers of Python, which are not installed (`apt-get install python3-dev`)"
        if problem := _problem_of(found, headers):
            return (
                f"Triton needs a compiler for C that works, and {found} does not ({problem}). Are libc's headers there?"
            )
    return ""


@functools.cache
def _problem_of(compiler: str, headers: str) -> str:
    """What ``compiler`` says of a file that includes ``headers`` of Python, and those of C; empty where all is well."""
    call = [compiler, "-I", headers, "-fsyntax-only", "-x", "c", "-"]
    source = "#include <stdlib.h>\n#include <Python.h>\n"
    try:
        done = subprocess.run(call, input=source, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.SubprocessError) as problem:
        return str(problem)
    said = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines()
    return "" if done.returncode == 0 else next(iter(said), f"it ends with {done.returncode}")


@functools.cache
def can_compile(device: torch.device) -> bool:
    """Whether this machine has what it takes to compile code for ``device``, Triton's kernels for a GPU among it."""
    return not what_compiling_lacks(device)
