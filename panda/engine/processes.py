"""The processes of a run: a group if a launcher started them, or this one only."""

from __future__ import annotations

import os
from collections.abc import Callable
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from typing import Literal
from typing import TypeVar

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore  # its public name has no type in torch 2.13
from torch._C._distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

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
        held: list[Any] = [self.together(lambda: decide() if self.rank == 0 else None)]
        dist.broadcast_object_list(held, src=0)
        result: Result = held[0]
        return result

    def together(self, do: Callable[[], Result]) -> Result:
        """What ``do()`` returns on this rank. If it fails on any rank, every rank raises. Waits for all of them.

        All raise the first UserError; a rank that fails in another way raises its own error.
        """
        failure: Exception | None = None
        told = None
        try:
            result = do()
        except Exception as error:
            failure = error
            told = str(error) if isinstance(error, UserError) else f"rank {self.rank} failed: {error!r}"
        everywhere = self.from_all(told)
        if failure is not None and not isinstance(failure, UserError):
            raise failure
        for text in everywhere:
            if text is not None:
                raise UserError(text) from failure
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


def _set_allocator(settings: str) -> None:
    # Neither name is public. The second is in every torch from 2.7 on, and warns where there is the first (2.13).
    current = getattr(torch._C, "_accelerator_setAllocatorSettings", None)
    (current or torch.cuda.memory._set_allocator_settings)(settings)


def join_processes(tensor_ranks: int = 1) -> Processes:
    """Join the processes that ``torchrun`` or ``deepspeed`` started, or be the only one.

    ``tensor_ranks`` must divide their number.
    """
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if torch.cuda.is_available():
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
        if not os.environ.keys() & {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"}:
            # Tensors of other sizes can then use the memory that those before them left: 5 GiB less are reserved in
            # full fine-tuning of a 7B (H200, torch 2.11, 2026-11-26). Can go when it is torch's default.
            _set_allocator("expandable_segments:True")
        backend = "cpu:gloo,cuda:nccl"
    else:
        device = torch.device("cpu")
        backend = "gloo"
        # DeepSpeed chooses this itself, but 0.19.8 first looks for other accelerators and warns that it found none.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if not dist.is_initialized():
        if world_size > 1:
            _join_group(backend, rank, world_size)
        else:
            # No port is opened, so any number of single-process runs share a machine. DeepSpeed 0.19.8 reads these
            # variables even when a process group exists; they can go when it asks the group.
            os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
            dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
    _join_deepspeed()
    if tensor_ranks == 1:
        return Processes(rank, world_size, device)
    from panda.engine.tensor_parallel import make_groups

    return Processes(rank, world_size, device, tensor_ranks, make_groups(tensor_ranks))


_joined = 0


def _join_group(backend: str, rank: int, world_size: int) -> None:
    """Join the group of the processes that a launcher started, for the first time or again."""
    global _joined
    _joined += 1
    if _joined == 1:
        dist.init_process_group(backend)
        return
    # The store at which ranks meet still has the addresses of the group that is gone, under the names that torch (2.13)
    # gives those of the next.
    store, _, _ = next(rendezvous("env://"))
    dist.init_process_group(backend, store=PrefixStore(f"{_joined}", store), rank=rank, world_size=world_size)


def leave_processes() -> None:
    """Destroy the process groups, so that no thread is left in a collective, and another run can join new ones."""
    if not dist.is_initialized():
        return
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

    logger.setLevel(logging.ERROR)
    # ZeRO-3 of DeepSpeed 0.19.8 calls two functions that torch 2.13 deprecates, and each call warns between the lines
    # of a run (2026-11-26). Can go when DeepSpeed calls `all_gather_single` and `reduce_scatter_single`.
    for name in ("all_gather_into_tensor", "reduce_scatter_tensor"):
        warnings.filterwarnings("ignore", rf"`torch\.distributed\.{name}` is deprecated", FutureWarning)
    # DeepSpeed 0.19.8 compiles a shared-memory all-reduce at the first start on a machine without a GPU: it needs
    # a C++ compiler and half a minute, and only inference uses the result. Can go when it is compiled on first use.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(verbose=False)
