"""Rows to prompts, and completions to batches, without a run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from making import context_with
from making import prompt_batch
from panda import UserError
from panda.data.batches import RowShape
from panda.registry.options import build
from panda.tasks.task import Generated

from panda_rl.grpo import Grpo
from panda_rl.grpo import GrpoOptions
from panda_rl.reward import Completion
from panda_rl.reward import Reward
from panda_rl.reward import RewardContext
from panda_rl.reward import of_each
from panda_rl.rewards import LastNumberOptions
from panda_rl.rewards import build_last_number

NUMBER = build_last_number(build(LastNumberOptions, {}), RewardContext(None, 4))
SMALL = {"num_generations": 2, "max_completion_length": 4, "separator": " "}

Make = Callable[..., Grpo]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """``make(rows, rewards, **options)``: a task over these rows."""

    def made(rows: list[dict[str, Any]], rewards: dict[str, Reward] | None = None, **options: Any) -> Grpo:
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        rewards = rewards or {"number": NUMBER}
        values = SMALL | {"prompt_data_dir": (str(tmp_path),), "reward": tuple(rewards)} | options
        return Grpo(build(GrpoOptions, values), context_with(rewards, max_seq_length=9))

    return made


GOOD = [
    {"prompt": "t5 t6", "answer": "#### 3"},
    {"question": "t7", "answer": 4},
    {"messages": [{"role": "user", "content": "t8 t9"}], "answer": "5"},
    {"prompt": None, "problem": "t10", "answer": "6", "level": "easy"},
]


def test_prompts_are_found_and_what_rewards_read_is_kept(make: Make) -> None:
    task = make(GOOD)
    samples = [task.dataset()[number] for number in range(4)]
    assert [sample["prompt"].tolist() for sample in samples] == [[5, 6], [7], [8, 9], [10]]
    assert [json.loads(bytes(sample["row"].tolist()))["answer"] for sample in samples] == ["#### 3", 4, "5", "6"]
    report = task.dataset().report
    assert report.bad_rows == 0 and report.truncated == 0
    assert "level" in report.unused and "answer" not in report.unused
    assert make(GOOD, prompt_field="question").dataset().report.bad_rows == 3


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"answer": "1"}, "no field 'prompt' and no 'question'"),
        ({"prompt": "t5"}, "no field 'answer', which a reward reads"),
        ({"prompt": "t5", "answer": "many"}, "has no number"),
        ({"prompt": "", "answer": "1"}, "field 'prompt' is empty"),
        ({"prompt": 7, "answer": "1"}, "neither a text nor messages"),
        ({"prompt": [{"role": "assistant", "content": "t5"}], "answer": "1"}, "does not end with a turn of the user"),
        ({"prompt": [{"role": "user"}], "answer": "1"}, "neither a text nor messages"),
    ],
)
def test_a_row_that_cannot_be_used_is_reported(make: Make, row: dict[str, Any], problem: str) -> None:
    report = make([*GOOD, row]).dataset().report
    assert report.bad_rows == 1
    assert problem in str(report.first_bad_rows[0])


def test_a_long_prompt_is_cut_at_its_beginning_and_counted(make: Make) -> None:
    task = make([{"prompt": "t2 t3 t4 t5 t6 t7 t8", "answer": "1"}])
    assert task.dataset()[0]["prompt"].tolist() == [4, 5, 6, 7, 8], "9 less 4 for the completion"
    assert task.dataset().report.truncated == 1
    with pytest.raises(UserError, match="leaves no room for a prompt"):
        make(GOOD, max_completion_length=9)


def echo(prompts: list[list[int]], *, keys: list[tuple[int, ...]], **_: Any) -> Generated:
    """Completions that say their key."""
    made = [[2 + part % 30 for part in key] + [1] * (key[-1] == 0) for key in keys]
    return Generated(made, [[-1.0] * len(ids) for ids in made], [ids[-1] == 1 for ids in made])


def test_a_batch_has_the_completions_of_its_prompts(make: Make) -> None:
    seen: list[Completion] = []
    lengths = of_each(lambda completion: float(seen.append(completion) or len(completion.token_ids)))
    task = make(GOOD, {"number": NUMBER, "length": lengths}, reward_weights=(2.0, 0.5), loss_type="grpo")
    task.generate = echo  # type: ignore[assignment]
    samples = [{**task.dataset()[number], "index": number} for number in range(3)]
    batches = [task.collate([[sample] for sample in part], RowShape()) for part in (samples[:2], samples[2:])]
    first, second = task.rollout(batches, step=3, training=True)
    assert first.input_ids.tolist() == [
        [5, 6, 5, 2, 2, 1],  # prompt 0 in step 3: key (3, 0, 0), and the end
        [5, 6, 5, 2, 3, 0],
        [7, 5, 3, 2, 1, 0],
        [7, 5, 3, 3, 0, 0],
    ]
    assert first.labels[1].tolist() == [-100, -100, 5, 2, 3, -100]
    assert (first.units, second.units) == (4, 2) and first["rewards"].shape == (4, 2)
    assert [each.text for each in seen[:2]] == ["t5", "t5 t3"], "t2 is special"
    assert first["rewards"][:, 1].tolist() == [4, 3, 4, 3] and first["ended"].tolist() == [1, 0, 1, 0]
    assert first["rewards"][:, 0].tolist() == [0, 0, 0, 0] and seen[0].prompt.strip() == "t5 t6"
    assert task._advantages(first, {}).tolist() == pytest.approx([0.7070, -0.7070, 0.7070, -0.7070], abs=1e-3)
    evaluated = task.rollout(batches, step=3, training=False)
    assert evaluated[0].input_ids[0].tolist() == [5, 6, 2, 2, 2, 1], "drawn as in every evaluation"


def test_tokens_are_the_units_of_a_loss_over_tokens(make: Make) -> None:
    task = make(GOOD)
    task.generate = echo  # type: ignore[assignment]
    (batch,) = task.rollout([prompt_batch([[5], [6]], [{"answer": "1"}] * 2)], step=1, training=True)
    assert task.unit == "completion_tokens" and batch.units == 4 + 3 + 4 + 3


def test_a_rank_without_prompts_has_an_idle_batch(make: Make) -> None:
    task = make(GOOD)
    task.generate = echo  # type: ignore[assignment]
    (batch,) = task.rollout([prompt_batch([[5]], [{"answer": "1"}]).as_idle()], step=1, training=True)
    assert batch.idle and len(batch.input_ids) == 2
    assert torch.isfinite(task._advantages(batch, {})).all()


def test_rows_of_completions_are_as_the_run_wants_them(make: Make) -> None:
    """Such as a model needs them whose positions are stretched by the length of a sample, and not of the batch."""
    task = make(GOOD)
    task.generate = echo  # type: ignore[assignment]
    samples = [{**task.dataset()[number], "index": number} for number in range(2)]
    prompts = task.collate([[sample] for sample in samples], RowShape(row_length=lambda tokens: 8, packed=True))
    (batch,) = task.rollout([prompts], step=1, training=True)
    assert batch.input_ids.shape[1] == 8
    assert batch.positions["position_ids"][3].tolist() == [0, 1, 2, 3, 0, 1, 2, 3], "padding is a sample of its own"


def test_rows_are_read_again_where_another_reward_judges_them(make: Make) -> None:
    """Both read the same field, and only one says that a row has no number."""
    plain = make(GOOD, {"number": Reward(lambda completions: [0.0] * len(completions), fields=("answer",))})
    assert plain.read_fields == make(GOOD).read_fields
    assert plain.describe() != make(GOOD).describe()


@pytest.mark.parametrize("scores", [[1.0], [1.0, float("nan")], [0.0, float("inf")]])
def test_a_reward_that_is_no_number_for_each_is_refused(make: Make, scores: list[float]) -> None:
    task = make(GOOD, {"odd": Reward(lambda completions: scores)})
    task.generate = echo  # type: ignore[assignment]
    with pytest.raises(UserError, match=r"reward 'odd' gave .* for 2 completions"):
        task.rollout([prompt_batch([[5]])], step=1, training=True)
