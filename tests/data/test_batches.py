"""Micro batches: padding and counts, and the same samples whoever prepares them."""

from __future__ import annotations

import errno
import gc
import os
import pickle
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from itertools import chain
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from token_batches import collate

from panda.data.batches import RowShape
from panda.data.batches import TokenBatch
from panda.data.batches import token_batch
from panda.data.loading import step_batches
from panda.data.order import BatchPlan
from panda.data.order import SampleOrder
from panda.data.packing import LAYOUTS
from panda.data.packing import Layout
from panda.data.token_cache import _mapped
from panda.data.token_dataset import Sample
from panda.data.token_dataset import SampleBlock
from panda.data.token_dataset import TokenDataset
from panda.data.workers import workers_standing
from panda.registry import UserError
from panda.registry.contexts import IGNORED_LABEL

PAD = 0
SAMPLES, SEED = 23, 5
THIS_PROCESS = os.getpid()


def sample(token_ids: list[int], unsupervised: int) -> tuple[Any, Any]:
    return np.array(token_ids, dtype=np.int32), np.arange(len(token_ids)) >= unsupervised


@pytest.fixture(scope="module")
def dataset() -> TokenDataset:
    """Sample i is i + 1 throughout, in lengths that differ."""
    block = SampleBlock()
    for index in range(SAMPLES):
        length, unsupervised = 2 + index % 5, 1 + index % 2 * (index % 5 > 0)
        block.add([index + 1] * length, bytes(unsupervised) + b"\1" * (length - unsupervised))
    return TokenDataset.of(block)


def plan_of(**changes: Any) -> BatchPlan:
    return BatchPlan(**({"samples": SAMPLES, "micro_batch": 2, "accumulation": 2, "ranks": 1, "epochs": 1.5} | changes))


def collated(rows: list[list[Sample]], shape: RowShape) -> TokenBatch:
    return token_batch([[(each["token_ids"], each["supervised"]) for each in row] for row in rows], PAD, shape)


def prepare(
    dataset: TokenDataset, plan: BatchPlan, rank: int = 0, workers: int = 0, batching: str = "padded"
) -> list[list[TokenBatch]]:
    layout = Layout(dataset, SampleOrder(dataset.sources, SEED), plan, batching, max_seq_length=9)
    return list(step_batches(layout, collated, rank=rank, num_workers=workers, prefetch_factor=2, pin_memory=False))


def who(batch: TokenBatch) -> list[int]:
    """The samples of a batch of ``dataset`` whose rows hold one each."""
    return [] if batch.idle else [int(row[0]) - 1 for row in batch.input_ids if row[0] != PAD]


def test_samples_are_padded_on_the_right_to_the_longest() -> None:
    batch = collate([[sample([5, 6, 7, 8], 2)], [sample([9, 3], 1)]], pad_token_id=1)
    assert batch.input_ids.tolist() == [[5, 6, 7, 8], [9, 3, 1, 1]]
    assert batch.labels.tolist() == [[-100, -100, 7, 8], [-100, 3, -100, -100]]
    assert (batch.tokens, batch.supervised_tokens) == (6, 3)
    assert batch.input_ids.dtype == batch.labels.dtype == torch.int64


def test_a_token_that_equals_the_padding_keeps_its_label_and_its_count() -> None:
    """Where padding is the end-of-sequence token, the end still has to be learned."""
    batch = collate([[sample([5, 2, 6, 2], 1)], [sample([7, 2], 1)]], pad_token_id=2)
    assert batch.labels.tolist() == [[-100, 2, 6, 2], [-100, 2, -100, -100]]
    assert (batch.tokens, batch.supervised_tokens) == (6, 4)


def test_no_samples_make_one_row_without_loss() -> None:
    batch = collate([], pad_token_id=3)
    assert batch.input_ids.tolist() == [[3, 3]]
    assert batch.labels.tolist() == [[IGNORED_LABEL] * 2]
    assert (batch.tokens, batch.supervised_tokens) == (0, 0)


def test_samples_of_a_row_lie_side_by_side_and_positions_begin_anew() -> None:
    rows = [[sample([5, 6, 7], 2), sample([8, 9], 1)], [sample([3, 4], 1)]]
    batch = collate(rows, pad_token_id=1, packed=True)
    assert batch.input_ids.tolist() == [[5, 6, 7, 8, 9], [3, 4, 1, 1, 1]]
    assert batch.labels.tolist() == [[-100, -100, 7, -100, 9], [-100, 4, -100, -100, -100]]
    assert batch.positions["position_ids"].tolist() == [[0, 1, 2, 0, 1], [0, 1, 0, 1, 2]]
    assert (batch.tokens, batch.supervised_tokens) == (7, 3)


def test_bounds_are_those_of_all_rows_one_after_the_other_and_of_padding() -> None:
    """In numbers of samples and of tokens that are powers of two, so that compiled code serves more batches."""
    rows = [[sample([5, 6, 7], 2), sample([8, 9], 1)], [sample([3, 4], 1)]]
    batch = collate(rows, pad_token_id=1, packed=True, bounded=True)
    assert batch.positions["sample_bounds"].tolist() == [0, 3, 5, 7, 10]
    assert batch.positions["longest_sample"] == 4
    longer = collate(rows, pad_token_id=1, packed=True, bounded=True, row_length=lambda tokens: tokens + 3)
    assert longer.input_ids.shape == (2, 8)
    assert longer.positions["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0, 1, 2], [0, 1, 0, 1, 2, 3, 4, 5]]
    assert longer.positions["sample_bounds"].tolist() == [0, 3, 5, 8, 10, 16, 16, 16, 16]
    assert longer.positions["longest_sample"] == 8
    assert longer.positions["sample_bounds"].dtype == torch.int32
    nothing = collate([], pad_token_id=1, packed=True, bounded=True)
    assert nothing.positions["sample_bounds"].tolist() == [0, 2]
    assert collate(rows, pad_token_id=1, bounded=True).positions == {}


def test_rows_are_padded_to_the_length_that_their_layout_says(dataset: TokenDataset) -> None:
    layout = Layout(dataset, SampleOrder(dataset.sources, SEED), plan_of(), "packed", 20, few_lengths=True)
    given: Any = {"collate": collated, "rank": 0, "num_workers": 0, "prefetch_factor": 2, "pin_memory": False}
    widths = {b.input_ids.shape[1] for step in step_batches(layout, bounds=True, **given) for b in step}
    assert widths <= {8, 16, 20}
    assert all(b.bounds is not None for step in step_batches(layout, bounds=True, **given) for b in step)
    assert all(b.bounds is None for step in step_batches(layout, **given) for b in step)


@pytest.mark.parametrize("batching", LAYOUTS)
def test_every_layout_carries_the_same_tokens_and_labels_in_a_step(dataset: TokenDataset, batching: str) -> None:
    def pairs(steps: list[list[TokenBatch]]) -> list[list[int]]:
        return [
            sorted(label for batch in step for label in batch.labels.flatten().tolist() if label > 0) for step in steps
        ]

    assert pairs(prepare(dataset, plan_of(), batching=batching)) == pairs(prepare(dataset, plan_of()))


def test_a_batch_moves_with_its_counts() -> None:
    rows = [[sample([5, 6], 1)], [sample([7, 8, 9], 1)]]
    batch = collate(rows, PAD, packed=True, bounded=True).to(torch.device("meta"))
    positions = batch.positions
    given = (batch.input_ids, batch.labels, positions["position_ids"], positions["sample_bounds"])
    assert {tensor.device.type for tensor in given} == {"meta"}
    assert (batch.tokens, batch.supervised_tokens) == (5, 3)


def test_a_batch_does_not_share_memory_with_the_data_set(dataset: TokenDataset) -> None:
    [[first, *_], *_] = prepare(dataset, plan_of())
    before = dataset.arrays["token_ids"].copy()
    first.input_ids.fill_(-1)
    assert np.array_equal(dataset.arrays["token_ids"], before)


@pytest.mark.parametrize("packed", [True, False])
def test_a_batch_comes_from_a_worker_as_it_was_and_without_shared_memory(packed: bool) -> None:
    row = [sample([5, 6, 7, 8], 2), sample([9, 3], 1)]
    batch = collate([row], pad_token_id=1, packed=packed, bounded=packed)
    came = pickle.loads(bytes(ForkingPickler.dumps(batch)))
    assert (came.tokens, came.supervised_tokens) == (6, 3)
    assert came.cells.dtype == torch.int64 and came.cells.equal(batch.cells)
    assert came.positions.keys() == ({"position_ids", "sample_bounds", "longest_sample"} if packed else set())
    if packed:
        assert came.bounds.dtype == torch.int32 and came.bounds.equal(batch.bounds) and came.longest == 4
    assert not came.cells.is_shared() and not batch.cells.is_shared()
    came.cells.zero_()  # it can be written to


def test_a_run_sees_the_samples_of_its_plan_in_order(dataset: TokenDataset) -> None:
    plan = plan_of()
    steps = prepare(dataset, plan)
    assert len(steps) == plan.total_steps
    seen = [index for step in steps for batch in step for index in who(batch)]
    assert seen == SampleOrder(dataset.sources, SEED).samples(range(plan.end_position)).tolist()
    for step in steps:
        for batch in step:
            rows = [dataset[index].values() for index in who(batch)]
            assert batch.tokens == sum(len(ids) for ids, _ in rows) == int((batch.input_ids != PAD).sum())
            assert batch.supervised_tokens == sum(mask.sum() for _, mask in rows)
            assert batch.supervised_tokens == int((batch.labels != IGNORED_LABEL).sum())


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize(("workers", "batching"), [(1, "padded"), (3, "grouped"), (3, "packed")])
def test_any_number_of_workers_prepares_the_same_batches(dataset: TokenDataset, workers: int, batching: str) -> None:
    alone = prepare(dataset, plan_of(), batching=batching)
    helped = prepare(dataset, plan_of(), workers=workers, batching=batching)
    assert [len(step) for step in alone] == [len(step) for step in helped]
    for mine, others in zip(chain.from_iterable(alone), chain.from_iterable(helped), strict=True):
        assert torch.equal(mine.input_ids, others.input_ids)
        assert mine.positions.keys() == others.positions.keys()
        assert all(torch.equal(mine.positions[name], others.positions[name]) for name in mine.positions)
        assert torch.equal(mine.labels, others.labels)
        assert (mine.tokens, mine.supervised_tokens) == (others.tokens, others.supervised_tokens)


def test_two_ranks_share_the_steps_of_one(dataset: TokenDataset) -> None:
    alone = [[index for batch in step for index in who(batch)] for step in prepare(dataset, plan_of())]
    plan = plan_of(ranks=2, accumulation=1)
    ranks = [prepare(dataset, plan, rank) for rank in range(2)]
    assert [len(step) for step in ranks[0]] == [len(step) for step in ranks[1]]
    together = [
        [index for both in zip(*steps, strict=True) for batch in both for index in who(batch)]
        for steps in zip(*ranks, strict=True)
    ]
    assert together == alone


def sequence(job: tuple[TokenDataset, BatchPlan, int, int, str]) -> list[list[list[bytes]]]:
    """What a rank is given, as ``[step][micro batch][row]``: ids, labels and positions without the padding."""
    dataset, plan, rank, workers, batching = job
    steps = prepare(dataset, plan, rank, workers, batching)
    return [[_row_bytes(batch) for batch in step] for step in steps]


def _row_bytes(batch: TokenBatch) -> list[bytes]:
    tensors = [batch.input_ids, *batch.positions.values(), batch.labels]
    filled = [int((row != PAD).sum()) for row in batch.input_ids]
    rows = [b"".join(tensor[n, :end].numpy().tobytes() for tensor in tensors) for n, end in enumerate(filled)]
    return [row for row in rows if row]


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_two_processes_of_three_workers_see_the_bytes_of_one_process_alone(dataset: TokenDataset) -> None:
    plan = plan_of(micro_batch=1, accumulation=2, ranks=2)
    program = (
        "import pickle, sys\nsys.path[:0] = sys.argv[1:]\nfrom test_batches import sequence\n"
        "pickle.dump([sequence(job) for job in pickle.load(sys.stdin.buffer)], sys.stdout.buffer)"
    )
    command = [sys.executable, "-W", "ignore", "-c", program, *map(str, Path(__file__).parents[:2])]
    ranks = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) for _ in range(2)]
    for rank, process in enumerate(ranks):
        assert process.stdin is not None
        pickle.dump([(dataset, plan, rank, 3, batching) for batching in LAYOUTS], process.stdin)
        process.stdin.close()
        process.stdin = None
    seen = [pickle.loads(process.communicate(timeout=900)[0]) for process in ranks]
    for number, batching in enumerate(LAYOUTS):
        alone = sequence((dataset, plan_of(micro_batch=2, accumulation=2), 0, 0, batching))
        together = [
            [row for micro in zip(*steps, strict=True) for of_rank in micro for row in of_rank]
            for steps in zip(*(of_rank[number] for of_rank in seen), strict=True)
        ]
        assert together == [[row for micro in step for row in micro] for step in alone]


def test_a_rank_that_the_last_step_leaves_without_samples_has_batches_without_loss(dataset: TokenDataset) -> None:
    plan = plan_of(ranks=3, micro_batch=4, accumulation=1, epochs=1)  # 23 = 12 + 4 + 4 + 3; 25 leaves ranks idle
    plan = BatchPlan(**{**plan.__dict__, "epochs": 25 / 23})
    last = [prepare(dataset, plan, rank)[-1] for rank in range(3)]
    assert [[len(who(batch)) for batch in step] for step in last] == [[1], [0], [0]]
    assert [(step[0].units, step[0].tokens, step[0].idle) for step in last[1:]] == [(0, 0, True)] * 2
    assert [int(step[0].real.sum()) for step in last] == [last[0][0].tokens, 0, 0]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_run_sees_the_rest(dataset: TokenDataset, workers: int) -> None:
    whole = prepare(dataset, plan_of())
    rest = prepare(dataset, plan_of(start_step=3, start_position=plan_of().step_end(3)), workers=workers)
    assert [[who(batch) for batch in step] for step in rest] == [[who(batch) for batch in step] for step in whole[3:]]


def test_preparing_batches_leaves_the_random_numbers_of_the_run_alone(dataset: TokenDataset) -> None:
    before = torch.get_rng_state()
    prepare(dataset, plan_of(), workers=1)
    assert torch.equal(torch.get_rng_state(), before)


class _NotHere(TokenDataset):
    """Is read in other processes alone."""

    def lengths(self, indices: np.ndarray) -> np.ndarray:
        assert os.getpid() != THIS_PROCESS
        return super().lengths(indices)


def test_workers_work_out_the_rows_of_a_step_too(dataset: TokenDataset) -> None:
    """Packing takes longer than to hand a batch over: in the training process, it would be what a GPU waits for."""
    steps = prepare(_NotHere(**vars(dataset)), plan_of(), workers=1, batching="packed")
    assert len(steps) == plan_of().total_steps


class _Rotten(TokenDataset):
    def __getitem__(self, index: int) -> Sample:
        if index == 7:
            raise ValueError("sample 7 is rotten")
        return super().__getitem__(index)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_worker_that_raises_surfaces_its_traceback(dataset: TokenDataset, workers: int) -> None:
    rotten = _Rotten(**vars(dataset))
    with pytest.raises(ValueError, match="sample 7 is rotten") as error:
        prepare(rotten, plan_of(), workers=workers)
    if workers:
        assert "in __getitem__" in str(error.value)
        assert "test_batches.py" in str(error.value)


class _Deadly(TokenDataset):
    def __getitem__(self, index: int) -> Sample:
        if index == 7:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(index)


def test_a_worker_that_is_killed_is_an_error_and_no_hang(dataset: TokenDataset) -> None:
    with pytest.raises(UserError, match="a process that prepares batches was killed from outside"):
        prepare(_Deadly(**vars(dataset)), plan_of(), workers=2)


class _Signalled(TokenDataset):
    heard = signal.SIGINT

    def __getitem__(self, index: int) -> Sample:
        if index == 7:  # by another process: as a scheduler, or a terminal
            subprocess.run(["kill", f"-{self.heard:d}", str(os.getpid())], check=True)
            time.sleep(0.2)
        return super().__getitem__(index)


class _Terminated(_Signalled):
    heard = signal.SIGTERM


@pytest.mark.parametrize("kind", [_Signalled, _Terminated])
def test_a_worker_goes_on_when_all_processes_of_a_run_are_signalled(
    dataset: TokenDataset, kind: type[TokenDataset]
) -> None:
    """The step of which it prepares batches is to be finished first."""
    prepared = prepare(kind(**vars(dataset)), plan_of(), workers=1)
    assert [[who(batch) for batch in step] for step in prepared] == [
        [who(batch) for batch in step] for step in prepare(dataset, plan_of())
    ]


@pytest.mark.parametrize(("before", "stopped"), [(False, False), (True, False), (False, True)])
def test_workers_end_with_their_process(tmp_path: Path, before: bool, stopped: bool) -> None:
    """One that waits for its batches to be taken does, too: the pipe is full, and it holds both ends.

    ``before``: the process ends before its workers have begun. ``stopped``: one was stopped, as by a debugger.
    """
    code = (
        f"BEFORE = {before}"
        """
import os
import time
import numpy as np
import torch
from functools import partial
from torch.utils.data import DataLoader
from panda.data.loading import _begin
from panda.data.workers import Workers

class Rows(torch.utils.data.Dataset):
    def __len__(self): return 10**6
    def __getitem__(self, number): return bytes(10**6)

PARENT = os.getpid()

def begin(workers, worker):
    while BEFORE and os.getppid() == PARENT:
        time.sleep(0.01)
    _begin(workers, worker)

batches = iter(DataLoader(Rows(), batch_size=None, num_workers=2, worker_init_fn=partial(begin, Workers(2))))
if not BEFORE:
    next(batches)
    time.sleep(1)
print(*(worker.pid for worker in batches._workers), flush=True)
time.sleep(600)
"""
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=tmp_path)
    assert process.stdout is not None
    pids = [int(word) for word in process.stdout.readline().split()]
    if stopped:
        os.kill(pids[0], signal.SIGSTOP)
    process.kill()
    process.wait()
    deadline = time.monotonic() + 30
    while alive := [pid for pid in pids if os.path.exists(f"/proc/{pid}")]:
        assert time.monotonic() < deadline, alive
        time.sleep(0.1)
    assert len(pids) == 2


def test_workers_for_which_there_is_no_room_are_one_error(
    dataset: TokenDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shared memory is full: torch's iterator is half made, and fails once more when it is collected."""

    def full(*given: Any, **named: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    unraisable: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", unraisable.append)
    monkeypatch.setattr("multiprocessing.queues.Queue.__init__", full)
    with pytest.raises(OSError, match="No space left"):
        prepare(dataset, plan_of(), workers=2)
    gc.collect()
    assert not unraisable


def test_a_worker_that_is_killed_in_a_step_is_an_error_where_batches_are_waited_for(dataset: TokenDataset) -> None:
    """Not wherever the training process is: in a plugin, or half way through a step."""
    layout = Layout(dataset, SampleOrder(dataset.sources, SEED), plan_of(epochs=90.0), "padded", max_seq_length=9)
    batches = step_batches(layout, collated, rank=0, num_workers=2, prefetch_factor=1, pin_memory=False)
    next(batches)
    [*_, words] = workers_standing().split("; ")
    os.kill(int(words.split()[2]), signal.SIGKILL)
    time.sleep(0.5)  # the step
    with pytest.raises(UserError, match=rf"killed from outside \(process {words.split()[2]}, SIGKILL\)"):
        list(batches)
    assert workers_standing() == ""


class _Reading(TokenDataset):
    def __getitem__(self, index: int) -> Sample:
        if index == 7:
            assert self.directory is not None
            with open(self.directory) as slow:
                slow.read()
        return super().__getitem__(index)


def test_a_worker_that_hangs_is_named_with_its_sample_its_place_and_its_file(
    dataset: TokenDataset, tmp_path: Path
) -> None:
    slow = tmp_path / "slow"
    said: set[str] = set()
    os.mkfifo(slow)
    reading = _Reading(**{**vars(dataset), "directory": slow})
    expected = rf"worker process \d+ reads sample 7 at .*test_batches.py:\d+ \(__getitem__\) with {slow} open"

    def ask() -> None:
        while not any(re.fullmatch(expected, text) for text in said) and writer.poll() is None:
            said.update(workers_standing().split("; "))  # the parts of one may be of different moments
            time.sleep(0.05)
        writer.kill()

    # Opened by another process, so that a worker comes to wait for what it writes.
    writer = subprocess.Popen(["sh", "-c", f"exec sleep 30 > {slow}"])
    asking = threading.Thread(target=ask)
    asking.start()
    assert len(prepare(reading, plan_of(epochs=1.0), workers=2)) == 6
    asking.join()
    writer.wait()
    assert any(re.fullmatch(expected, text) for text in said), said


def test_a_mapped_data_set_is_sent_to_a_process_by_its_place(dataset: TokenDataset, tmp_path: Path) -> None:
    """Pickling a million tokens for each worker would be a copy for each."""
    (tmp_path / "a.bin").write_bytes(bytes(1 << 20))
    arrays = {**dataset.arrays, "token_ids": _mapped(tmp_path / "a.bin", "int32")}
    mapped = replace(dataset, arrays=arrays, directory=tmp_path)
    assert len(pickle.dumps(mapped)) < 1000


def test_a_list_of_one_token_is_a_sequence_too() -> None:
    batch = collate([[([5, 6, 7], [0] * 3)], [([8], [0])]], pad_token_id=0)
    assert batch.input_ids.tolist() == [[5, 6, 7], [8, 0, 0]]
    assert batch.real is not None and (batch.real.sum(1) - 1).tolist() == [2, 0]
    assert bool((batch.labels == IGNORED_LABEL).all())
