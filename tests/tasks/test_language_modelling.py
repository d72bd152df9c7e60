"""What every language-modelling task shares: checked rows, a report of the others, and the loss."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from token_batches import collate

from panda.data.batches import TokenBatch
from panda.registry import UserError
from panda.registry.contexts import TaskContext
from panda.tasks.language_modelling import LanguageModelling
from panda.tasks.scores import next_token_loss

GOOD = {"input": "a", "target": "b"}
VOCABULARY = 11


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ("text", "expected an object, {...}, found a string"),
        ([GOOD], "expected an object, {...}, found an array"),
        ({"input": "a", "reply": "b"}, "no field 'target' (nor instruction/input/output, "),
        ({"input": "a", "reply": "b"}, "; its fields are: 'input', 'reply'"),
        ({"text": "a"}, "no field 'input' and no 'target' (nor "),
        ({}, "; its fields are: none"),
        ({"input": "a", "target": 7}, "field 'target' is a number, not text"),
        ({"input": None, "target": "b"}, "field 'input' is null, not text"),
        ({"input": ["a"], "target": "b"}, "field 'input' is an array, not text"),
        ({"input": "a", "target": ""}, "field 'target' is empty"),
        ({"input": "half an emoji: \ud83d", "target": "b"}, "field 'input' has half a surrogate pair, '\\ud83d'"),
    ],
)
def test_a_row_that_cannot_be_used_is_reported_with_its_place_and_counted(
    instruct: Any, row: Any, problem: str
) -> None:
    task = instruct([GOOD, row, GOOD])
    dataset = task.dataset()
    assert len(dataset) == 2
    assert (dataset.report.files, dataset.report.rows, dataset.report.bad_rows) == (1, 3, 1)
    [bad] = dataset.report.first_bad_rows
    assert (bad.number, bad.file.name) == (2, "rows.json")
    assert problem in bad.problem


def test_a_broken_line_is_reported_and_counted_with_the_others(instruct: Any) -> None:
    lines = [json.dumps(GOOD), '{"input": "a", "target"', json.dumps({"input": "a"}), json.dumps(GOOD)]
    report = instruct("\n".join(lines)).dataset().report
    assert (report.rows, report.bad_rows) == (4, 2)
    assert [bad.number for bad in report.first_bad_rows] == [2, 3]


def test_rows_are_numbered_from_one_in_each_file(tmp_path: Any, instruct: Any) -> None:
    task = instruct([GOOD])
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "valid.json").write_text('[{"input": 1, "target": "b"}]')
    (tmp_path / "test" / "wrong.jsonl").write_text('{"input": "a", "target": "b"}\n7\n')
    report = task.reading(str(tmp_path), "instruction_tuning_data_dir").dataset().report
    assert (report.files, report.rows) == (3, 4)
    assert [(bad.file.name, bad.number) for bad in report.first_bad_rows] == [("valid.json", 1), ("wrong.jsonl", 2)]


def test_data_without_one_good_row_is_an_error_that_names_the_reasons(instruct: Any) -> None:
    rows = [{"input": "a"}, {"input": 1, "target": "b"}, {"input": "a", "target": ""}, 7]
    with pytest.raises(UserError) as error:
        instruct(rows).dataset()
    text = str(error.value)
    assert text.startswith("instruction_tuning_data_dir: ")
    assert "has no row that can be trained on." in text
    for reason in ("no field 'target'", "'input' is a number", "'target' is empty", "found a number", "4 of 4 rows"):
        assert reason in text


def test_an_empty_array_is_an_error(instruct: Any) -> None:
    with pytest.raises(UserError, match="has no row that can be trained on"):
        instruct([]).dataset()


def test_a_truncated_file_is_an_error_although_its_first_rows_are_good(instruct: Any) -> None:
    with pytest.raises(UserError, match=r"rows\.json:1:\d+: not valid JSON, in row 2"):
        instruct(json.dumps([GOOD, GOOD])[:-5]).dataset()


def test_special_tokens_spelt_out_in_a_text_are_text(instruct: Any) -> None:
    """A page of HTML with <s>struck-out</s> words does not end a sequence."""
    text = "<s>no</s><pad>"
    task = instruct([{"input": text, "target": text}])
    token_ids, _ = task.dataset()[0].values()
    written = [byte + 3 for byte in text.encode()]
    assert token_ids.tolist() == [1, *written, ord("\n") + 3, *written, 2]
    assert task.encode_prompt(text) == [1, *written, ord("\n") + 3]


class Table(torch.nn.Module):
    """Logits that depend on a token alone: a model that can be written in one line elsewhere too."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.table = torch.nn.Parameter(torch.randn(VOCABULARY, VOCABULARY, generator=generator).to(dtype) * 3)

    def forward(self, input_ids: torch.Tensor) -> Any:
        return SimpleNamespace(logits=self.table[input_ids])


def cross_entropy(table: torch.Tensor, samples: list[tuple[list[int], list[bool]]]) -> float:
    """The same in float64, token by token."""
    total = 0.0
    for token_ids, supervised in samples:
        for place in range(1, len(token_ids)):
            if supervised[place]:
                logits = table[token_ids[place - 1]].tolist()
                top = max(logits)
                normaliser = top + math.log(sum(math.exp(value - top) for value in logits))
                total += normaliser - logits[token_ids[place]]
    return total


def batch_of(samples: list[tuple[list[int], list[bool]]], pad: int = 0) -> TokenBatch:
    return collate([[(torch.tensor(ids).numpy(), torch.tensor(mask).numpy())] for ids, mask in samples], pad)


rows = st.lists(
    st.lists(st.tuples(st.integers(0, VOCABULARY - 1), st.booleans()), min_size=2, max_size=9).map(
        lambda pairs: ([token for token, _ in pairs], [False] + [mask for _, mask in pairs[1:]])
    ),
    min_size=1,
    max_size=5,
)


@pytest.fixture(scope="module")
def loss() -> Any:
    return next_token_loss


@given(rows)
def test_the_loss_is_the_summed_cross_entropy_of_the_supervised_tokens(loss: Any, samples: Any) -> None:
    model = Table()
    expected = cross_entropy(model.table, samples)
    found = loss(model, batch_of(samples))
    assert found.shape == ()
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(expected, rel=1e-5, abs=1e-5)


@given(rows, st.integers(0, VOCABULARY - 1))
def test_padding_changes_nothing_whatever_the_padding_token(loss: Any, samples: Any, pad: int) -> None:
    model = Table()
    alone = sum(loss(model, batch_of([sample])).item() for sample in samples)
    assert loss(model, batch_of(samples, pad)).item() == pytest.approx(alone, rel=1e-5, abs=1e-5)


def test_padding_carries_no_gradient(loss: Any) -> None:
    """Token 9 is the padding and nothing else: its row of the table stays as it is."""
    model = Table()
    loss(model, batch_of([([1, 2, 3, 4, 5], [False] + [True] * 4), ([1, 2], [False, True])], pad=9)).backward()
    assert model.table.grad is not None
    assert model.table.grad[9].abs().max() == 0
    assert model.table.grad[1].abs().max() > 0


def test_a_batch_without_a_supervised_token_has_loss_zero_and_gradients_zero(loss: Any) -> None:
    model = Table()
    found = loss(model, batch_of([]))
    assert found.item() == 0
    found.backward()
    assert model.table.grad is not None
    assert torch.equal(model.table.grad, torch.zeros_like(model.table))


def test_the_loss_of_a_half_precision_model_is_summed_in_float32(loss: Any) -> None:
    model = Table(torch.bfloat16)
    samples = [([token % VOCABULARY for token in range(400)], [False] + [True] * 399)] * 20
    found = loss(model, batch_of(samples))
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(cross_entropy(model.table, samples), rel=1e-5)


def test_a_model_may_return_bare_logits(loss: Any) -> None:
    model = Table()
    batch = batch_of([([1, 2, 3], [False, True, True])])
    assert loss(lambda input_ids: model(input_ids).logits, batch).item() == loss(model, batch).item()


def test_a_model_that_sums_its_loss_is_given_labels_and_their_count(loss: Any) -> None:
    class Summing(Table):
        sums_loss = True

        def forward(self, input_ids: Any, labels: Any = None, supervised_tokens: Any = None) -> Any:
            assert labels is not None and supervised_tokens == int((labels != -100).sum())
            return self.table[labels[labels != -100]].sum()

    model = Summing()
    batch = batch_of([([1, 2, 3], [False, True, True]), ([4, 5], [False, True])])
    assert loss(model, batch).item() == pytest.approx(model.table[[2, 3, 5]].sum().item())


def test_a_task_that_reads_no_other_data_says_so(tokenizer: Any) -> None:
    class Fixed(LanguageModelling):
        def dataset(self) -> Any: ...
        def example_prompts(self, count: int) -> list[str]: ...

    with pytest.raises(UserError, match="eval_data_dir: the task Fixed reads only its own data"):
        Fixed(TaskContext(tokenizer, None, 10)).reading("anywhere", "eval_data_dir")
