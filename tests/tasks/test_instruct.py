"""The instruct task: what carries loss, and what gives way where a sample is too long."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st

from panda.data.token_dataset import TokenDatasetBuilder
from panda.registry import UserError
from panda.tasks.instruct import Instruct

BOS, EOS = 1, 2


def ids(text: str) -> list[int]:
    """What the embedded tokenizer makes of text, by its definition."""
    return [byte + 3 for byte in text.encode()]


def samples(task: Any) -> list[tuple[list[int], list[int]]]:
    """Token ids and the supervised ones among them, of each sample."""
    dataset = task.dataset()
    return [
        (dataset[index][0].tolist(), dataset[index][0][dataset[index][1]].tolist()) for index in range(len(dataset))
    ]


def test_the_prompt_carries_no_loss_and_the_target_and_its_end_do(instruct: Any) -> None:
    [(tokens, supervised)] = samples(instruct([{"input": "Say é.", "target": "Ja."}]))
    assert tokens == [BOS, *ids("Say é."), *ids("\n"), *ids("Ja."), EOS]
    assert supervised == [*ids("Ja."), EOS]


def test_rows_become_samples_in_order(instruct: Any) -> None:
    rows = [{"input": f"in {number}", "target": f"out {number}"} for number in range(2500)]
    assert [tokens for tokens, _ in samples(instruct(rows))] == [
        [BOS, *ids(f"in {number}\nout {number}"), EOS] for number in range(2500)
    ]


def test_further_fields_change_nothing(instruct: Any) -> None:
    [(tokens, _)] = samples(instruct([{"id": 7, "target": "b", "input": "a", "source": None}]))
    assert tokens == [BOS, *ids("a\nb"), EOS]


def test_the_separator_can_be_chosen(instruct: Any) -> None:
    task = instruct([{"input": "a", "target": "b"}], separator=" => ")
    assert samples(task) == [([BOS, *ids("a => b"), EOS], [*ids("b"), EOS])]
    assert task.encode_prompt("x") == [BOS, *ids("x => ")]


def test_the_prompt_of_generation_is_the_prompt_of_training(instruct: Any) -> None:
    task = instruct([{"input": "Say é.", "target": "Ja."}])
    [(tokens, supervised)] = samples(task)
    assert task.encode_prompt("Say é.") == tokens[: -len(supervised)]
    assert task.example_prompts(5) == ["Say é."]


def test_a_sample_that_just_fits_is_whole(instruct: Any) -> None:
    task = instruct([{"input": "abc", "target": "xyz"}], max_seq_length=9)
    assert samples(task) == [([BOS, *ids("abc\nxyz"), EOS], [*ids("xyz"), EOS])]
    assert task.dataset().report.truncated == 0


def test_a_prompt_that_is_too_long_is_cut_from_the_left(instruct: Any) -> None:
    task = instruct([{"input": "abc", "target": "xyz"}], max_seq_length=8)
    assert samples(task) == [([BOS, *ids("bc\nxyz"), EOS], [*ids("xyz"), EOS])]
    assert task.dataset().report.truncated == 1


def test_a_target_that_is_too_long_is_cut_at_the_right(instruct: Any) -> None:
    task = instruct([{"input": "abc", "target": "vwxyz"}], max_seq_length=5)
    assert samples(task) == [([BOS, *ids("vwxy")], ids("vwxy"))]
    assert task.dataset().report.truncated == 1
    assert task.dataset().report.lines() == ["1 samples are longer than max_seq_length and were cut."]


def test_the_end_of_the_target_is_cut_before_the_start(instruct: Any) -> None:
    assert samples(instruct([{"input": "abc", "target": "xyz"}], max_seq_length=4)) == [
        ([BOS, *ids("xyz")], ids("xyz"))
    ]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text(max_size=12), st.text(min_size=1, max_size=12), st.integers(2, 20), st.booleans(), st.booleans())
def test_every_sample_fits_and_keeps_what_it_promises(
    instruct: Any, tokenizer: Any, prompt: str, target: str, limit: int, has_bos: bool, has_separator: bool
) -> None:
    tokenizer.bos_token = "<s>" if has_bos else None
    task = instruct(
        [{"input": prompt, "target": target}], max_seq_length=limit, separator="\n" if has_separator else ""
    )
    [(tokens, supervised)] = samples(task)
    answer = [*ids(target), EOS]
    whole = [*[BOS] * has_bos, *ids(prompt + "\n" * has_separator), *answer]
    assert 2 <= len(tokens) <= limit
    assert 1 <= len(supervised) < len(tokens)
    assert supervised == answer[: len(supervised)] == tokens[-len(supervised) :]
    assert len(supervised) >= min(len(answer), limit - 1), "the answer is cut before the prompt has given way"
    assert tokens.count(BOS) == has_bos
    if has_bos:
        assert tokens[0] == BOS
    if 2 <= len(whole) <= limit and len(whole) > len(answer):
        assert tokens == whole
    assert task.dataset().report.truncated == (len(tokens) < max(len(whole), len(answer) + 1))


def test_a_tokenizer_without_a_start_token_works(instruct: Any, tokenizer: Any) -> None:
    tokenizer.bos_token = None
    task = instruct([{"input": "abc", "target": "xyz"}])
    assert samples(task) == [([*ids("abc\nxyz"), EOS], [*ids("xyz"), EOS])]
    assert task.encode_prompt("abc") == ids("abc\n")


def test_without_a_start_token_and_room_the_last_of_the_prompt_comes_before_the_target(
    instruct: Any, tokenizer: Any
) -> None:
    tokenizer.bos_token = None
    task = instruct([{"input": "abc", "target": "xyz"}], max_seq_length=4)
    assert samples(task) == [([*ids("\nxyz")], ids("xyz"))]


def test_without_a_start_token_and_a_prompt_the_end_token_starts_a_sample(instruct: Any, tokenizer: Any) -> None:
    tokenizer.bos_token = None
    task = instruct([{"input": "", "target": "xyz"}], separator="")
    assert samples(task) == [([EOS, *ids("xyz"), EOS], [*ids("xyz"), EOS])]
    assert task.encode_prompt("") == [EOS]


def test_a_tokenizer_without_an_end_token_is_refused(instruct: Any, tokenizer: Any) -> None:
    tokenizer.eos_token = None
    with pytest.raises(UserError, match=r"tokenizer: .*no end-of-sequence token"):
        instruct([{"input": "a", "target": "b"}])


def test_an_empty_input_is_a_prompt_and_an_empty_target_a_bad_row(instruct: Any) -> None:
    task = instruct([{"input": "", "target": "b"}, {"input": "a", "target": ""}])
    assert samples(task) == [([BOS, *ids("\nb"), EOS], [*ids("b"), EOS])]
    [bad] = task.dataset().report.first_bad_rows
    assert str(bad).endswith("rows.json, row 2: field 'target' is empty")


def test_no_token_of_a_batch_is_lost_between_rows(instruct: Any) -> None:
    """What the task adds to a builder twice is there twice."""
    task = instruct([{"input": "a", "target": "b"}])
    assert isinstance(task, Instruct)
    builder = TokenDatasetBuilder()
    rows = list(task._good_rows(builder))
    task.add_samples(rows, builder)
    task.add_samples(rows, builder)
    assert len(builder.finish()) == 2
