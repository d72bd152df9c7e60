"""Tests in every folder import the helpers in this one by name."""

from __future__ import annotations

import gc
import os
import resource
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

sys.path.insert(0, str(Path(__file__).parent))

from distributions import distributions as distributions
from distributions import hide_other_packages

# One thread a process, set before torch is imported: the models of tests are so small that a second thread only spins
# while it waits, and pytest runs as many processes as there are cores.
os.environ["OMP_NUM_THREADS"] = "1"
# Tests are for a CPU: models there are compared with those of one process, on as many ranks as they like. With
# PANDA_TESTS_ON_GPU=1 they have the GPUs of this machine, for those that need one (CONTRIBUTING.md).
HAS_GPU = os.path.exists("/dev/nvidiactl")
ON_GPU = bool(os.environ.get("PANDA_TESTS_ON_GPU"))
if not ON_GPU:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
# Tests have a token cache of their own, also in the processes that they start.
os.environ["PANDA_CACHE"] = tempfile.mkdtemp(prefix="panda-test-cache-")

# A shared machine is sometimes slow, which is no failure.
settings.register_profile("panda", deadline=None)
settings.load_profile("panda")


LONGEST = (
    "test_preference_plugin.py",
    "test_bench_gpu.py",
    "test_documents.py",
    "test_rl_plugin.py",
    "test_example_plugin.py",
    "test_any_loss.py",
    "test_tensor_parallel.py",
    "test_redistribution.py",
    "test_sharded_lamb.py",
    "test_gathering.py",
    "test_model_layers.py",
    "test_models.py",
    "test_runner.py",
    "test_adapters.py",
    "test_hub.py",
    "test_optimizers.py",
    "test_configs.py",
    "test_one_text.py",
    "test_resume.py",
    "test_acting.py",
    "test_tasks.py",
    "test_hub_data.py",
    "test_quantisation.py",
    "test_acting_plugins.py",
    "test_adapter_base.py",
    "test_starting_points.py",
    "test_crash.py",
    "test_training.py",
    "test_interruption.py",
    "test_failures.py",
    "test_eval_generate.py",
    "test_guard.py",
    "test_resume_matrix.py",
    "test_guides.py",
)
"""The files that take longest run first: at the end, one would keep one process busy while the other is idle."""


def pytest_report_header() -> list[str]:
    return ["GPUs are hidden from tests: PANDA_TESTS_ON_GPU=1 shows them"] * (HAS_GPU and not ON_GPU)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    begins = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: begins.get(item.path.name, len(LONGEST)))


def pytest_collection_finish() -> None:
    """What is imported by now stays: collecting garbage, which DeepSpeed and tests ask for, does not look at it."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def panda_alone() -> Iterator[None]:
    """Packages in plugins/ may be installed here for their own tests, and change no other test."""
    with pytest.MonkeyPatch.context() as patch:
        hide_other_packages(patch)
        yield


@pytest.fixture(scope="session")
def processes() -> Iterator[Any]:
    """This process as the only rank of a run, joined once a session. Commands that tests call do not leave the process
    group, since DeepSpeed would keep using the one that is gone."""
    from panda.engine import processes as room

    joined, leave = room.join_processes(), room.leave_processes
    gc.freeze()  # DeepSpeed collects garbage for each group of a BF16_Optimizer: half a second for imported objects
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(room, "leave_processes", lambda: None)
        yield joined
    leave()


@pytest.fixture
def nobodys_home(monkeypatch: pytest.MonkeyPatch) -> None:
    """The user has no name, and no home folder, as in a container with ``--user 12345``."""

    def unknown(number: int) -> None:
        raise KeyError(f"getpwuid(): uid not found: {number}")

    monkeypatch.delenv("HOME")
    monkeypatch.setattr("pwd.getpwuid", unknown)


@pytest.fixture
def full_disk() -> Any:
    """``with full_disk(bytes):`` no file may grow beyond that size, which the system reports like a full disk."""

    @contextmanager
    def limited(size: int) -> Iterator[None]:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    return limited


def pytest_unconfigure() -> None:
    shutil.rmtree(os.environ["PANDA_CACHE"], ignore_errors=True)
