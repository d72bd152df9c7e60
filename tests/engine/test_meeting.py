"""Where ranks meet: who has not arrived, and where they are waited for, is said, and after `timeout` it is an error."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator

import pytest

from panda.engine import meeting
from panda.registry import UserError


@pytest.fixture
def port(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """A free port, at which two ranks are to meet."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        number = int(free.getsockname()[1])
    for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(number), "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    monkeypatch.setattr(meeting, "_hosted", {})
    yield number


def test_a_wrong_address_is_said_and_then_an_error(port: int, capsys: pytest.CaptureFixture[str]) -> None:
    at = f"127.0.0.1:{port} (MASTER_ADDR and MASTER_PORT)"
    with pytest.raises(
        UserError, match=r"rank 1 does not reach rank 0 at .*: Connection refused. It has tried for 1 s"
    ):
        meeting.reach(1, 1.0)
    assert capsys.readouterr().err == f"waiting: rank 1 does not reach rank 0 at {at}: Connection refused\n"


def test_another_program_at_the_address_is_no_rank(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meeting, "ANSWER_SECONDS", 0.3)
    with socket.create_server(("127.0.0.1", port)):
        with pytest.raises(UserError, match="it does not answer as ranks do"):
            meeting.reach(1, 0.5)
        with pytest.raises(UserError, match=rf"rank 0 cannot open port {port} \(MASTER_PORT\).*another process"):
            meeting.reach(0, 0.5)


def test_ranks_that_are_missing_are_named(port: int, capsys: pytest.CaptureFixture[str]) -> None:
    store = meeting.own_part(meeting.reach(0, 1.0)[0], "a")
    with pytest.raises(UserError, match=r"ranks 1 to 3 have not arrived at 127.* within 1 s \(`timeout`\); 1 of 4"):
        meeting.wait_for_all(store, 0, 4, 1.0)
    at = f"127.0.0.1:{port} (MASTER_ADDR and MASTER_PORT)"
    assert capsys.readouterr().err == f"waiting: ranks 1 to 3 have not arrived at {at}: 1 of 4 are here (WORLD_SIZE)\n"


def test_a_rank_that_prepares_is_waited_for(port: int) -> None:
    store = meeting.own_part(meeting.reach(0, 5.0)[0], "a")
    other = meeting.own_part(meeting.reach(1, 5.0)[0], "a")
    comes = threading.Timer(0.8, meeting.wait_for_all, (other, 1, 2, 5.0))
    comes.start()
    meeting.wait_for_all(store, 0, 2, 0.3, prepares=lambda rank: rank == 1)  # longer than `timeout`
    comes.join(10)
    assert not comes.is_alive()
