"""Variables of a launcher that are left over in a shell: one line says which, or they do not matter."""

from __future__ import annotations

import os

import pytest

from panda.configuration.launcher import check_launcher
from panda.registry import UserError


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"WORLD_SIZE": "2"},
            "WORLD_SIZE=2 in the environment, and no RANK and MASTER_ADDR and MASTER_P",
        ),
        ({"RANK": "1"}, "RANK=1 in the environment, and no WORLD_SIZE and"),
        (
            {"WORLD_SIZE": "2", "RANK": "0"},
            "and no MASTER_ADDR and .*or for one process `unset RANK WORLD_SIZE`",
        ),
        ({"WORLD_SIZE": "x"}, "WORLD_SIZE is not a number of ranks"),
        ({"WORLD_SIZE": "-1"}, "WORLD_SIZE is not a number of ranks"),
        ({"WORLD_SIZE": "0", "RANK": "0"}, "ranks count from 0"),
        ({"WORLD_SIZE": "2", "RANK": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, "ranks count from 0"),
        ({"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, None),
        ({"WORLD_SIZE": "", "RANK": " ", "LOCAL_RANK": "", "MASTER_PORT": ""}, None),
        ({"HOME": ""}, None),
        ({"WORLD_SIZE": "1"}, None),
        ({}, None),
    ],
)
def test_what_is_left_over_is_named(
    given: dict[str, str], message: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    if message:
        with pytest.raises(UserError, match=message):
            check_launcher()
    else:
        check_launcher()
        assert all(os.environ[name] for name in given if name in os.environ)
        assert {name for name, value in given.items() if value.strip()} <= os.environ.keys()
