"""What the tests of this package make: contexts and batches without a run."""

from __future__ import annotations

import json
from collections.abc import Iterator
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from panda.data.reading import Row
from panda.registry.contexts import TaskContext
from tokenizers import Tokenizer
from tokenizers import models
from tokenizers import pre_tokenizers
from transformers import PreTrainedTokenizerFast

from panda_rl.prompt_batch import PromptBatch
from panda_rl.reward import Reward


def words_tokenizer(size: int = 41) -> Any:
    """A tokenizer of the words t0, t1, ...; t0 pads and t1 ends."""
    made = Tokenizer(models.WordLevel({f"t{number}": number for number in range(size)}, unk_token="t2"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="t0", eos_token="t1", unk_token="t2")


def context_with(rewards: Mapping[str, Reward], *, max_seq_length: int, tokenizer: Any = None) -> TaskContext:
    """A context in which the options have named ``rewards``."""
    named = [
        SimpleNamespace(
            name=name,
            component=SimpleNamespace(kind="reward"),
            options=None,
            build=lambda _, expected, made=made: made,
        )
        for name, made in rewards.items()
    ]
    return TaskContext(tokenizer or words_tokenizer(), Lines(), max_seq_length, named=named)  # type: ignore[arg-type]


class Lines:
    """A reader of rows in JSON, one a line."""

    suffixes = (".jsonl",)

    def read(self, file: Path) -> Iterator[Row]:
        for number, line in enumerate(file.read_text().splitlines(), 1):
            yield Row(json.loads(line), file, number)


def prompt_batch(prompts: list[list[int]], fields: list[dict[str, Any]] | None = None, first: int = 0) -> PromptBatch:
    """A batch as ``Grpo.collate`` makes it."""
    rows = [json.dumps(each).encode() for each in fields or [{}] * len(prompts)]
    arrays = {
        "index": torch.arange(first, first + len(prompts)),
        "prompt": torch.tensor([token for prompt in prompts for token in prompt]),
        "prompt_lengths": torch.tensor([len(prompt) for prompt in prompts]),
        "row": torch.tensor([byte for row in rows for byte in row]),
        "row_lengths": torch.tensor([len(row) for row in rows]),
    }
    return PromptBatch(arrays, units=len(prompts), tokens=sum(map(len, prompts)))


GIVEN = '''
"""The task grpo with completions that are given: drawn from the key of each, and not by the model."""

import random

from panda import register_task
from panda.tasks.task import Generated
from panda_rl.grpo import Grpo
from panda_rl.grpo import GrpoOptions
from panda_rl.grpo import _ScaledByStep
from panda_rl.grpo import panda_checkpoint_saved as panda_checkpoint_saved  # hooks are live in the task's own module


def generate(prompts, *, keys, max_new_tokens, **_):
    made = Generated([], [], [])
    for prompt, key in zip(prompts, keys, strict=True):
        draws = random.Random(repr(key))
        length = draws.randint(1, max_new_tokens)
        ids = [draws.choice((51, 52, 53, 54, 35)) for _ in range(length)]  # 0 to 3, and a space, as bytes
        ended = length < max_new_tokens
        made.token_ids.append(ids + [2] * ended)
        made.log_probs.append([-1.0 - draws.random() for _ in made.token_ids[-1]])
        made.ended.append(ended)
    return made


@register_task("grpo-given", options=GrpoOptions)
class Given(Grpo):
    """Completions that are given."""

    statistics = _ScaledByStep.statistics

    def start(self, run):
        super().start(run)
        self.generate = generate
'''


def install_given(site: Path) -> Path:
    """``site``, a folder for PYTHONPATH, with a package that has the task ``grpo-given``."""
    info = site / "given-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: given\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[panda.tasks]\ngrpo-given = given_completions\n")
    (site / "given_completions.py").write_text(GIVEN)
    return site
