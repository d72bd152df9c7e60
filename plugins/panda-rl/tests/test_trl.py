"""The losses of 10 optimizer steps against those that TRL's GRPOTrainer computed (``record_trl.py`` says with what)."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from making import context_with
from making import prompt_batch
from panda.registry.options import build
from panda.tasks.scores import label_log_probs

from panda_rl.grpo import Grpo
from panda_rl.grpo import GrpoOptions
from panda_rl.reward import Reward

RECORDED = json.loads((Path(__file__).parent / "trl.json").read_text())


def task_of(options: dict[str, Any], rollouts: list[dict[str, Any]]) -> Grpo:
    """A task whose rewards are those recorded, each in turn."""

    def rewards(place: int) -> Reward:
        turns = itertools.cycle(range(0, tiny.PROMPTS * tiny.GENERATIONS, tiny.GENERATIONS))

        def score(completions: Any) -> list[float]:
            start = next(turns)
            for number, completion in enumerate(completions, start):
                assert list(completion.token_ids) == rollouts[0]["completions"][number]
            return rollouts[0]["rewards"][place][start : start + len(completions)]

        return Reward(score)

    values = {
        "reward": ("first", "second"),
        "reward_weights": tiny.REWARD_WEIGHTS,
        "num_generations": tiny.GENERATIONS,
        "num_iterations": tiny.ITERATIONS,
        "max_completion_length": tiny.MAX_COMPLETION_LENGTH,
        "temperature": tiny.TEMPERATURE,
        "prompt_data_dir": (str(Path(__file__).parents[1] / "panda_rl" / "sample" / "sums"),),
    }
    context = context_with({"first": rewards(0), "second": rewards(1)}, max_seq_length=32)
    return Grpo(build(GrpoOptions, values | options), context)


def drawn_by(task: Grpo, model: Any, rollouts: list[dict[str, Any]]) -> Any:
    """In place of ``Task.generate``: the fixed completions, with what the model gives them now."""

    def generate(prompts: list[list[int]], **_: Any) -> Any:
        completions = rollouts[0]["completions"]
        groups = [
            SimpleNamespace(
                prompt=prompt, completions=[ids], log_probs=[[0.0] * len(ids)], ended=[True], rewards=[[0, 0]]
            )
            for prompt, ids in zip(prompts, completions, strict=True)
        ]
        batch = task._batch(groups, (0, 0.0))
        with torch.no_grad():
            log_probs = label_log_probs(model, batch, temperature=tiny.TEMPERATURE)
        lengths = [(len(prompt) - 1, len(ids)) for prompt, ids in zip(prompts, completions, strict=True)]
        found = [row[start : start + n].tolist() for row, (start, n) in zip(log_probs, lengths, strict=True)]
        return completions, found, [ids[-1] == 1 for ids in completions]

    return generate


@pytest.mark.parametrize("name", RECORDED["cases"])
def test_ten_steps_equal_those_of_trl(name: str) -> None:
    recorded = RECORDED["cases"][name]
    assert recorded["options"] == tiny.CASES[name], "record again"
    rollouts = tiny.fixed_rollouts()
    task, model, reference = task_of(recorded["options"], rollouts), tiny.tiny_llama(), tiny.tiny_llama()
    task.reference, task.generate = reference, drawn_by(task, model, rollouts)
    optimizer = torch.optim.AdamW(model.parameters(), lr=tiny.LEARNING_RATE, weight_decay=0.0)
    losses, sums = [], {}
    for step in range(1, tiny.STEPS + 1):
        prompts = [list(prompt) for prompt in rollouts[0]["prompts"]]
        (batch,) = task.rollout([prompt_batch(prompts)], step, training=True)
        statistics = task.statistics(model, batch)
        got = task.loss(model, batch, statistics)
        loss = got.sum / batch.units
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % tiny.ITERATIONS == 0:
            rollouts.pop(0)
        for key, (numerator, denominator) in got.metrics.items():
            sums.setdefault(key, []).append(float(numerator) / max(1e-9, float(denominator)))
    assert losses == pytest.approx(recorded["losses"], rel=0, abs=1e-5)
    for key, value in recorded["means"].items():
        assert sum(sums[key]) / len(sums[key]) == pytest.approx(value, rel=0, abs=1e-4), key
