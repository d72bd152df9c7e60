"""What the end of a run says of the prompts that it answers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from panda.run.ending import _encoded


@pytest.mark.parametrize(
    ("max_seq_length", "most", "room", "said"),
    [
        (128, 128, 64, "of 128 (max_seq_length) 64 are kept for its answer"),
        (256, 100, 50, "of 100 (the model's positions) 50 are kept for its answer"),
    ],
)
def test_a_prompt_that_is_cut_is_named_with_the_reason(
    max_seq_length: int, most: int, room: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    task = SimpleNamespace(
        encode_prompt=lambda prompt: list(range(len(prompt))),
        encoder=SimpleNamespace(cut=lambda ids, length: ids[-length:]),
    )
    run: Any = SimpleNamespace(
        task=task, options=SimpleNamespace(max_seq_length=max_seq_length), processes=SimpleNamespace(rank=0)
    )
    short, long = "x" * room, "y" * 69
    written, encoded = _encoded(run, [short, long], most)
    assert written == [short, long]
    assert encoded == [list(range(room)), list(range(69 - room, 69))]
    note = f"note: the prompt '{long[:20]}'... is cut to its last {room} of 69 tokens: {said}\n"
    assert capsys.readouterr().out == note
