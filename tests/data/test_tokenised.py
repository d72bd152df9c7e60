"""Rows of tokens: which carry loss, and what is wrong with one."""

from __future__ import annotations

from typing import Any

import pytest

from panda.data.conversations import UnusableRowError
from panda.data.reading import Fields
from panda.data.tokenised import Tokenised
from panda.data.tokenised import tokenised_of

IDS = [5, 6, 7, 8]


def tokenised(row: dict[str, Any], all_carry_loss: bool = True) -> tuple[list[int], list[int]]:
    found = tokenised_of(row, 10, all_carry_loss=all_carry_loss)
    assert isinstance(found, Tokenised)
    return found.token_ids, list(found.supervised)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({}, [0, 1, 1, 1]),
        ({"labels": None, "loss_mask": None}, [0, 1, 1, 1]),
        ({"labels": [-100, -100, 7, 8]}, [0, 0, 1, 1]),
        ({"labels": IDS}, [0, 1, 1, 1]),
        ({"loss_mask": [0, 1, 0, 1]}, [0, 1, 0, 1]),
        ({"loss_mask": [False, 1.0, 0, True]}, [0, 1, 0, 1]),
        ({"completion_mask": [1, 0, 1, 1], "assistant_masks": [1, 1, 0, 1]}, [0, 0, 0, 1]),
        ({"labels": [5, 6, -100, 8], "loss_mask": [0, 0, 1, 1]}, [0, 0, 0, 1]),
    ],
)
def test_what_carries_loss(row: dict[str, Any], expected: list[int]) -> None:
    assert tokenised({"input_ids": IDS} | row) == (IDS, expected)


@pytest.mark.parametrize(("before", "after"), [(0, 2), (2, 0), (1, 1)])
def test_padding_is_left_out_at_either_end(before: int, after: int) -> None:
    def padded(values: list[int], by: int) -> list[int]:
        return [by] * before + values + [by] * after

    row = {
        "input_ids": padded(IDS, 0),
        "attention_mask": padded([1] * 4, 0),
        "labels": padded([-100, 6, 7, -100], -100),
    }
    assert tokenised(row) == (IDS, [0, 1, 1, 0])
    assert tokenised({"input_ids": padded(IDS, 0), "attention_mask": padded([1] * 4, 0)}) == (IDS, [0, 1, 1, 1])


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"input_ids": "5 6"}, "field 'input_ids' is a string, not an array of whole numbers"),
        ({"input_ids": [[5, 6]]}, "has an array in it"),
        ({"input_ids": [5, 6.0]}, "has a number in it, and not only whole"),
        ({"input_ids": [5, True]}, "has a boolean in it"),
        ({"input_ids": [5, 10]}, "has the token 10, and the tokenizer has 10, from 0 on"),
        ({"input_ids": [5, -1]}, "has the token -1"),
        ({"input_ids": []}, "none of its tokens carries loss"),
        ({"input_ids": [5]}, "none of its tokens carries loss"),
        ({"input_ids": IDS, "labels": [5, -100, -100, -100]}, "none of its tokens carries loss after the first"),
        ({"input_ids": IDS, "labels": [5, 6, 7]}, "field 'labels' has 3 values for 4 of 'input_ids'"),
        (
            {"input_ids": IDS, "labels": [6, 7, 8, -100]},
            r"labels\[0\] is 6 and input_ids\[0\] 5: a label is the token at",
        ),
        ({"input_ids": IDS, "loss_mask": [1, 1]}, "field 'loss_mask' has 2 values for 4"),
        ({"input_ids": IDS, "loss_mask": [1, 1, 1, 0.5]}, "field 'loss_mask' is not an array of 0 and 1"),
        ({"input_ids": IDS, "attention_mask": 1}, "field 'attention_mask' is not an array of 0 and 1"),
        ({"input_ids": IDS, "attention_mask": [1, 0, 1, 1]}, "leaves tokens out between others"),
        ({"input_ids": IDS, "attention_mask": [0] * 4}, "none of its tokens carries loss"),
        ({"input_ids": IDS, "weight": 0}, "its weight is 0"),
        ({"input_ids": IDS, "position_ids": [0, 1, 0, 1]}, "documents that share a row would see each other"),
        ({"input_ids": IDS, "position_ids": [1, 2, 3, 4]}, "does not count from 0 on"),
        ({"input_ids": IDS, "position_ids": [0, 1, 2]}, "field 'position_ids' has 3 values for 4"),
    ],
)
def test_a_row_that_is_wrong_says_how(row: dict[str, Any], problem: str) -> None:
    with pytest.raises(UnusableRowError, match=problem):
        tokenised(row)


def test_where_only_answers_carry_loss_the_row_has_to_say_which_tokens_do() -> None:
    with pytest.raises(UnusableRowError, match="neither 'labels' nor 'loss_mask' to say what carries loss"):
        tokenised({"input_ids": IDS}, all_carry_loss=False)
    assert tokenised({"input_ids": IDS, "labels": [-100, 6, 7, 8]}, all_carry_loss=False) == (IDS, [0, 1, 1, 1])


def test_a_row_of_text_is_none_and_what_is_not_used_is_noted() -> None:
    assert tokenised_of({"text": "a", "input_ids": None}, 10, all_carry_loss=True) is None
    fields = Fields({"input_ids": IDS, "labels": IDS, "text": "abcd", "length": 4})
    tokenised(fields)
    assert fields.unused() == ["text", "length"]


def test_a_cut_leaves_a_token_with_loss() -> None:
    row = tokenised_of({"input_ids": IDS, "labels": [-100, -100, 7, 8]}, 10, all_carry_loss=False)
    assert row is not None and row.cut_to(4) is row
    assert row.cut_to(3) == Tokenised([5, 6, 7], b"\0\0\1", cut=True)
    with pytest.raises(UnusableRowError, match="none of its first 2 tokens carries loss"):
        row.cut_to(2)


def test_positions_of_one_document_say_nothing_else_and_those_of_padding_count_for_nothing() -> None:
    fields = Fields({"input_ids": IDS, "position_ids": [1, 0, 1, 2], "attention_mask": [0, 1, 1, 1]})
    assert tokenised(fields) == (IDS[1:], [0, 1, 1])
    assert fields.unused() == []
