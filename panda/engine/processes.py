"""The processes of a run: a group if a launcher started them, or this one only."""

from __future__ import annotations

import os
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any
from typing import Literal
from typing import TypeVar

import torch
import torch.distributed as dist
from packaging.version import Version
from torch._C._distributed_c10d import HashStore  # its public name has no type in torch 2.13
from torch._C._distributed_c10d import PrefixStore
from torch.distributed import distributed_c10d

from panda.configuration.launcher import AnotherRankError
from panda.configuration.launcher import processes_here
from panda.engine.meeting import own_part
from panda.engine.meeting import reach
from panda.engine.meeting import spoken
from panda.engine.meeting import wait_for_all
from panda.engine.watchdog import Watchdog
from panda.engine.watchdog import watching
from panda.files.library_warnings import are_kept_aside
from panda.files.terminal import number_of
from panda.registry import UserError

Result = TypeVar("Result")


@dataclass(frozen=True)
class Processes:
    """This process and the others of the run."""

    rank: int
    world_size: int
    device: torch.device
    tensor_ranks: int = 1
    """Neighbouring ranks that hold one copy of the model together."""
    mpu: Any = None
    """The groups of those ranks, and of the ranks that hold the same part, in DeepSpeed's form; None for 1."""

    @property
    def tensor_rank(self) -> int:
        """The part of the model that this rank holds."""
        return self.rank % self.tensor_ranks

    @property
    def data_rank(self) -> int:
        """The copy of the model that this rank holds, and so the data that it gets."""
        return self.rank // self.tensor_ranks

    @property
    def data_ranks(self) -> int:
        """The number of copies of the model."""
        return self.world_size // self.tensor_ranks

    def barrier(self) -> None:
        dist.barrier()

    def from_rank_0(self, decide: Callable[[], Result]) -> Result:
        """What ``decide()`` returns on rank 0, on every rank. If it fails, every rank raises, as in ``together``."""
        held: list[Any] = [self._together(lambda: decide() if self.rank == 0 else None, alike=True)]
        dist.broadcast_object_list(held, src=0)
        result: Result = held[0]
        return result

    def together(self, do: Callable[[], Result]) -> Result:
        """What ``do()`` returns on this rank. If it fails on any rank, every rank raises. Waits for all of them.

        All raise one UserError, which names the ranks that failed unless all failed alike. A rank that failed by
        another error raises that, with a note that names them, and then the others raise AnotherRankError. ``do`` must
        not wait for others once it may have failed.
        """
        return self._together(do, alike=False)

    def _together(self, do: Callable[[], Result], *, alike: bool) -> Result:
        """``alike``: a UserError of one rank is of the run, and names none."""
        failure: Exception | None = None
        told = None
        try:
            result = do()
        except Exception as error:
            failure = error
            told = (True, str(error)) if isinstance(error, UserError) else (False, repr(error))
        everywhere = self.from_all(told)
        said = _who_failed(everywhere, alike=alike)
        if failure is not None and not isinstance(failure, UserError):
            if self.world_size > 1:
                failure.add_note(said)
            raise failure
        if not all(is_users for is_users, _ in filter(None, everywhere)):
            raise AnotherRankError(said) from failure
        if said:
            common = UserError(said)
            common.is_everywhere, common.is_said = True, self.rank > 0
            raise common from failure
        return result

    def all_(self, here: bool) -> bool:
        """Whether ``here`` is true on every rank. Waits for all of them."""
        return all(self.from_all(here))

    def any_(self, here: bool) -> bool:
        """Whether ``here`` is true on any rank. Processes wait for each other, and for no GPU."""
        if self.world_size == 1:
            return here
        flag = torch.tensor([here], dtype=torch.uint8)  # on the CPU: by gloo
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        return bool(flag.item())

    def most(self, here: Sequence[float]) -> list[float]:
        """The largest of each number in ``here`` on any rank. Processes wait for each other, and for no GPU."""
        numbers = torch.tensor(here, dtype=torch.float64)  # on the CPU: by gloo
        if self.world_size > 1:
            dist.all_reduce(numbers, dist.ReduceOp.MAX)
        found: list[float] = numbers.tolist()
        return found

    def from_all(self, here: Any) -> list[Any]:
        """``here`` of every rank, in their order. Waits for all of them."""
        everywhere: list[Any] = [None] * self.world_size
        dist.all_gather_object(everywhere, here)
        return everywhere

    def sum_(self, tensor: torch.Tensor, over: Literal["data", "tensor", "all"] = "data") -> torch.Tensor:
        """Sum ``tensor`` over data-parallel ranks, tensor-parallel ones, or all, in place. Does not wait for a GPU."""
        if self.mpu is None or over == "all":
            if self.world_size > 1 and over != "tensor":
                dist.all_reduce(tensor)
            return tensor
        group = self.mpu.get_data_parallel_group() if over == "data" else self.mpu.get_model_parallel_group()
        dist.all_reduce(tensor, group=group)
        return tensor


def _who_failed(everywhere: Sequence[tuple[bool, str] | None], *, alike: bool) -> str:
    """The errors of all ranks, each with the ranks that had it; ``(False, text)`` is no UserError. Empty for none."""
    ranks_of: dict[tuple[bool, str], list[int]] = {}
    for rank, told in enumerate(everywhere):
        if told is not None:
            ranks_of.setdefault(told, []).append(rank)
    lines = []
    for (is_user_error, text), ranks in ranks_of.items():
        if is_user_error:
            lines.append(text if alike or len(ranks) == len(everywhere) else f"{spoken(ranks)}: {text}")
        else:
            lines.append(f"{spoken(ranks)} failed: {text}")
    return "\n".join(lines)


def _set_allocator(settings: str) -> None:
    # Neither name is public. The second is in every torch from 2.7 on, and warns where there is the first (2.13).
    current = getattr(torch._C, "_accelerator_setAllocatorSettings", None)
    (current or torch.cuda.memory._set_allocator_settings)(settings)


@dataclass(frozen=True)
class Meeting:
    """Where the ranks of a run meet, before they join a group."""

    rank: int
    world_size: int
    timeout: float
    """Seconds for which ranks wait for each other."""
    store: Any = None
    """The part of the store that they share for this run; None for one rank, or in a group of the caller's."""
    watchdog: Watchdog | None = None


TIMEOUT = 1800.0
"""Seconds for which ranks wait that nobody watches, as in tests of parts of a run."""

_met = 0


@contextmanager
def meeting(timeout: float) -> Iterator[Meeting]:
    """Meet the ranks that ``torchrun`` or ``deepspeed`` started, and watch in the meantime whether they go on.

    Waits for rank 0, not for the others, which may still prepare. Raises UserError after ``timeout`` seconds.
    """
    global _met
    _met += 1
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    stores = (None, None)
    if world_size > 1:
        stores = reach(rank, timeout) if not dist.is_initialized() else (None, _connection_of_group())
    own, watched = (store and own_part(store, f"{_met}") for store in stores)
    with watching(rank, world_size, timeout, watched) as watchdog:
        yield Meeting(rank, world_size, timeout, own, watchdog)


def _connection_of_group() -> Any:
    """A connection to the store of the group that this process has joined; None if that is of another kind."""
    store = distributed_c10d._get_default_store()
    while isinstance(store, PrefixStore):
        store = store.underlying_store
    return store.clone() if isinstance(store, dist.TCPStore) else None  # type: ignore[attr-defined]


def own_device() -> torch.device:
    """What this process trains on: the GPU of its place on this machine, or the CPU where there is none.

    Raises UserError if a launcher started more processes here than there are GPUs.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    place, gpus = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    here = max(place + 1, processes_here())
    if here > gpus:
        raise UserError(
            f"{here} processes were started on this machine, each for a GPU of its own, and"
            f" {number_of(gpus, 'GPU')} can be seen. Start {gpus} (`torchrun --nproc_per_node {gpus}`), or"
            " set CUDA_VISIBLE_DEVICES: to more GPUs, or to nothing to train on the CPU. Each process has to see all of"
            " this machine's (with Slurm `--gpus-per-node`, and no `--gpus-per-task`)."
        )
    return torch.device("cuda", place)


def _begin_alone(backend: str) -> None:
    """Make the group of the only process."""
    try:
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
    except RuntimeError as problem:
        if "Unable to find interface" not in str(problem):
            raise
        raise UserError(
            "this machine has no network interface, which torch wants for one process, too. In a sandbox, switch the"
            " loopback on (`ip link set lo up`)."
        ) from problem


def join_processes(tensor_ranks: int = 1, met: Meeting | None = None) -> Processes:
    """Join the processes that ``torchrun`` or ``deepspeed`` started, or be the only one.

    ``tensor_ranks`` must divide their number. ``met``: where they have met; by default they do so now.
    """
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = own_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
        if not os.environ.keys() & {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"}:
            # Tensors of other sizes can then use the memory that those before them left: 5 GiB less are reserved in
            # full fine-tuning of a 7B (H200, torch 2.11, 2026-11-26). Can go when it is torch's default.
            _set_allocator("expandable_segments:True")
        backend = "cpu:gloo,cuda:nccl"
        _record_collectives()
    else:
        backend = "gloo"
        # DeepSpeed chooses this itself, but 0.19.8 first looks for other accelerators and warns that it found none.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if not dist.is_initialized():
        if world_size > 1:
            _join_group(backend, met or _meet(rank, world_size))
        else:
            # No port is opened, so any number of single-process runs share a machine. DeepSpeed 0.19.8 reads these
            # variables even when a process group exists; they can go when it asks the group.
            os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
            _begin_alone(backend)
    _join_deepspeed()
    if tensor_ranks == 1:
        return Processes(rank, world_size, device)
    from panda.engine.tensor_parallel import make_groups

    return Processes(rank, world_size, device, tensor_ranks, make_groups(tensor_ranks))


def _record_collectives() -> None:
    """Have torch's flight recorder keep the last collectives, in a few hundred KB."""
    if not os.environ.keys() & {"TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE"}:
        # torch 2.11 warns of the old name (two H100s, 2026-11-26), and 2.7 and 2.8 may know no other.
        old = Version(torch.__version__) < Version("2.9")
        os.environ["TORCH_NCCL_TRACE_BUFFER_SIZE" if old else "TORCH_FR_BUFFER_SIZE"] = "1000"
    os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")


def dump_collectives_in(folder: Path) -> None:
    """Where NCCL gives up after `timeout`, have it write what each rank had called to ``folder/nccl-rank-N``."""
    names = ("TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE")  # torch 2.13 and before
    if torch.cuda.is_available() and not os.environ.keys() & set(names):
        os.environ |= dict.fromkeys(names, str(folder.absolute() / "nccl-rank-"))


def _meet(rank: int, world_size: int) -> Meeting:
    global _met
    _met += 1
    return Meeting(rank, world_size, TIMEOUT, own_part(reach(rank, TIMEOUT)[0], f"{_met}"))


def _join_group(backend: str, met: Meeting) -> None:
    """Join the group of the ranks that have ``met``, once all have."""
    prepares = met.watchdog.prepares if met.watchdog is not None else (lambda rank: False)
    wait_for_all(PrefixStore("meeting", met.store), met.rank, met.world_size, met.timeout, prepares)
    timeout = timedelta(seconds=met.timeout)
    met.store.set_timeout(timeout)  # for what comes later: NCCL exchanges addresses by it in the first step
    _set_default_timeouts(timeout, timeout)
    dist.init_process_group(
        backend,
        store=PrefixStore("group", met.store),
        rank=met.rank,
        world_size=met.world_size,
        timeout=timeout,
    )


def _set_default_timeouts(general: Any, of_nccl: Any) -> None:
    """Have groups that are made of some of the ranks, by DeepSpeed and FairScale, use these time limits.

    They give none (DeepSpeed 0.19.8, FairScale 0.4.13), and torch (2.7 to 2.13) then takes these two names. Can go when
    a group of some ranks has the limit of the group of all.
    """
    distributed_c10d.default_pg_timeout = general
    distributed_c10d.default_pg_nccl_timeout = of_nccl  # type: ignore[attr-defined]


_TORCHS_TIMEOUTS = [getattr(distributed_c10d, name) for name in ("default_pg_timeout", "default_pg_nccl_timeout")]


def leave_processes() -> None:
    """Destroy the process groups, so that no thread is left in a collective, and another run can join new ones."""
    if not dist.is_initialized():
        return
    _set_default_timeouts(*_TORCHS_TIMEOUTS)
    from deepspeed.comm import comm

    if comm.cdb is None:
        dist.destroy_process_group()
        return
    comm.destroy_process_group()  # DeepSpeed's own, which forgets the groups that it keeps in globals, too


def _join_deepspeed() -> None:
    import logging
    import warnings

    import deepspeed
    from deepspeed.utils import logger

    logger.setLevel(logging.WARNING if are_kept_aside() else logging.ERROR)  # it writes to stdout
    # ZeRO-3 of DeepSpeed 0.19.8 calls two functions that torch 2.13 deprecates, and each call warns between the lines
    # of a run (2026-11-26). Can go when DeepSpeed calls `all_gather_single` and `reduce_scatter_single`.
    for name in ("all_gather_into_tensor", "reduce_scatter_tensor"):
        warnings.filterwarnings("ignore", rf"`torch\.distributed\.{name}` is deprecated", FutureWarning)
    # DeepSpeed 0.19.8 compiles a shared-memory all-reduce at the first start on a machine without a GPU: it needs
    # a C++ compiler and half a minute, and only inference uses the result. Can go when it is compiled on first use.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(verbose=False)
