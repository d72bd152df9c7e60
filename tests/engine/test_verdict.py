"""Who is said to keep the others waiting, from the reports of all: a rank that works is not late."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from panda.engine.meeting import minutes
from panda.engine.meeting import spoken
from panda.engine.standing import Report
from panda.engine.verdict import Seen
from panda.engine.verdict import verdict

AT_WORK = Report(0, "step 3", "a.py:1 (f)", still=0.0, idle=0.0, waits="", data="", host="h", pid=9, beat=1)
WAITS = replace(AT_WORK, frame="processes.py:9 (any_)", still=40.0, idle=40.0, waits="ranks")
IDLE = replace(AT_WORK, frame="hook.py:7 (panda_step_start)", still=45.0, idle=45.0)
IN_C = replace(IDLE, idle=0.0)
"""In one call for long, and at work: compiling, tokenising, writing."""


def found(*seen: Seen | Report, world_size: int = 0) -> Any:
    every = {rank: each if isinstance(each, Seen) else Seen(each, 1.0) for rank, each in enumerate(seen)}
    return verdict(every, world_size or len(seen), stall=30.0, busy=300.0)


def test_a_rank_that_does_nothing_while_others_wait_is_late() -> None:
    said = found(WAITS, IDLE, WAITS)
    assert (said.kind, said.about) == ("late", (1,))
    assert said.line == (
        "rank 1 has not arrived for 45 s, without doing anything: step 3, hook.py:7 (panda_step_start);"
        " ranks 0 and 2 wait: step 3, processes.py:9 (any_)"
    )


@pytest.mark.parametrize(
    "healthy",
    [
        (AT_WORK, AT_WORK),
        (WAITS, AT_WORK),  # its frames change
        (WAITS, IN_C),
        (replace(WAITS, still=5.0), IDLE),  # nobody has waited for long
        (IDLE, IDLE),  # a hook that sleeps, everywhere: nobody waits
        (WAITS, replace(WAITS, waits="lock")),  # for another process, which tokenises
        (WAITS, replace(IDLE, done=True)),
        (WAITS, Seen(IDLE, 50.0, "works")),  # in a library that lets no thread report
    ],
)
def test_nothing_is_said_of_ranks_that_go_on(healthy: tuple[Any, ...]) -> None:
    assert found(*healthy) is None


def test_a_rank_that_works_for_long_is_only_noted() -> None:
    said = found(replace(WAITS, still=400.0, idle=400.0), IN_C)
    assert said.kind == "busy"
    assert said.line == "rank 0 waits for 7 min, since rank 1 is at work: step 3, hook.py:7 (panda_step_start)"


def test_a_rank_that_does_not_answer_is_late_and_one_that_is_gone_is_lost() -> None:
    silent = found(WAITS, Seen(AT_WORK, 50.0))
    assert (silent.kind, silent.about) == ("late", (1,)) and "for 50 s, without an answer: step 3" in silent.line
    stopped = found(AT_WORK, Seen(AT_WORK, 50.0, "stopped"))
    assert (stopped.kind, stopped.about) == ("late", (1,)) and "for 50 s, stopped by a signal" in stopped.line
    gone = found(WAITS, Seen(AT_WORK, 3.0, "gone"), IDLE)
    assert (gone.kind, gone.about, gone.words) == ("gone", (1,), "was killed")
    assert found(WAITS, Seen(replace(AT_WORK, done=True), 300.0, "gone")) is None


def test_ranks_that_all_wait_wait_in_vain_once_all_are_there() -> None:
    other = replace(WAITS, frame="engine.py:4 (evaluate)")
    said = found(WAITS, other)
    assert (said.kind, said.about) == ("late", (0, 1))
    assert "rank 0 at step 3, processes.py:9 (any_), rank 1 at step 3, engine.py:4 (evaluate)" in said.line
    assert found(WAITS, other, world_size=3) is None  # the third has not come yet: the meeting says so
    assert found(WAITS, replace(other, idle=1.0)) is None  # it sends


def test_a_rank_that_waits_for_its_batches_is_late_also_alone() -> None:
    data = replace(IDLE, data="worker process 7 reads sample 3 with /data/a open")
    said = found(data)
    assert (said.kind, said.about) == ("late", (0,))
    assert said.line.endswith("without batches: step 3, hook.py:7 (panda_step_start): " + data.data)
    assert found(IDLE) is None


def test_ranks_and_seconds_are_spoken() -> None:
    assert [spoken([3]), spoken([1, 0]), spoken([7, 2, 3, 4])] == ["rank 3", "ranks 0 and 1", "ranks 2 to 4 and 7"]
    assert [minutes(119), minutes(1800)] == ["119 s", "30 min"]
