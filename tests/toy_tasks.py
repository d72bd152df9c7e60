"""A package of toy tasks, installed into a folder: pairs with a frozen reference, statistics of a step, and online.

They are what an outside author would write: no private name of panda, and losses that only the promised mechanisms
make right. ``toy_tasks(folder)`` writes it; runs see it with the folder on their path.
"""

from __future__ import annotations

import os
from pathlib import Path

MODULE = '''
from dataclasses import dataclass
from typing import Annotated

from panda import Location, register_task
from panda.tasks.dialogue_task import DialogueTask, InstructFormat
from panda.data.fields import Field
from panda.data.conversations import Turn, UnusableRowError
from panda.tasks.task import Loss, Reference


@dataclass(frozen=True)
class PairOptions(InstructFormat):
    """Options of the toy tasks."""

    pairs_dir: tuple[Annotated[str, Location(holds_data=True)], ...] = ("./pairs",)
    """Rows with "prompt", "chosen" and "rejected"."""
    beta: float = 0.2
    """How much a reward counts."""
    teacher: str | None = None
    """Another frozen model."""
    without_reference: bool = False
    """Whether there is none."""


class Pairs(DialogueTask):
    option = "pairs_dir"
    unit = "pairs"
    shown = ("accuracy",)
    fields = (
        Field("chosen", "tokens"), Field("chosen_supervised", "supervised", along="chosen"),
        Field("rejected", "tokens"), Field("rejected_supervised", "supervised", along="rejected"),
        Field("weight", "float32"),
    )

    def __init__(self, options, context):
        super().__init__(options, options.pairs_dir, context)
        self.beta = options.beta

    @classmethod
    def reference_of(cls, options):
        return None if options.without_reference else Reference(options.teacher)

    @classmethod
    def largest_sample(cls, options, max_seq_length):
        return 2, max_seq_length

    def parse(self, row):
        prompt, chosen, rejected = (row.fields.get(name) for name in ("prompt", "chosen", "rejected"))
        if not (prompt and chosen and rejected):
            raise UnusableRowError("it lacks a prompt, a chosen or a rejected answer")
        turns = [Turn("user", prompt)]
        weight = row.fields.get("weight")
        return self.exchange(turns, chosen), self.exchange(turns, rejected), 1.0 if weight is None else weight

    def add_samples(self, parsed, block):
        written = iter(self.tokens_of([each for pair in parsed for each in pair[:2]]))
        for *_, weight in parsed:
            (chosen, chosen_supervised, cut), (rejected, rejected_supervised, also) = (
                self.fitted(*next(written)) for _ in range(2)
            )
            block.report.truncated += cut or also
            block.add_arrays(
                chosen=chosen, chosen_supervised=chosen_supervised,
                rejected=rejected, rejected_supervised=rejected_supervised, weight=[weight],
            )

    def example_prompt(self, parsed):
        return ""

    def collate(self, rows, shape):
        import torch

        from panda.data.batches import token_batch

        pairs = [sample for row in rows for sample in row]
        sequences = [[(pair[name], pair[f"{name}_supervised"])] for name in ("chosen", "rejected") for pair in pairs]
        weights = torch.tensor([float(pair["weight"][0]) for pair in pairs])
        return token_batch(
            sequences, self.pad_token_id, shape, units=float(weights.sum()), arrays={"weights": weights}
        )

    def rewards(self, model, batch):
        from panda.tasks.scores import sequence_log_probs

        scores = sequence_log_probs(model, batch)
        return self.beta * (scores if self.reference is None else scores - sequence_log_probs(self.reference, batch))


@register_task("toy-pairs", options=PairOptions)
class ToyPairs(Pairs):
    """Like DPO."""

    def loss(self, model, batch):
        import torch.nn.functional as F

        chosen, rejected = self.rewards(model, batch).chunk(2)
        margins = chosen - rejected
        weights = batch["weights"]
        return Loss(
            -(F.logsigmoid(margins) * weights).sum(),
            {"margin": (margins.sum(), len(margins)), "accuracy": ((margins > 0).sum(), len(margins))},
        )


@register_task("toy-statistics", options=PairOptions)
class ToyStatistics(Pairs):
    """Like KTO: rewards are compared with their mean over the whole step."""

    def statistics(self, model, batch):
        import torch

        rewards = self.rewards(model, batch)
        return {"sum": rewards.sum(), "count": torch.tensor(len(rewards))}

    def loss(self, model, batch, statistics):
        mean = (statistics["sum"] / statistics["count"]).float()
        chosen, rejected = self.rewards(model, batch).chunk(2)
        losses = (1 - (chosen - mean).sigmoid()) + (1 - (mean - rejected).sigmoid()) + (chosen - mean).square()
        return Loss((losses * batch["weights"]).sum(), {"mean": (mean * len(losses), len(losses))})


@register_task("toy-head", options=PairOptions)
class ToyHead(Pairs):
    """Like a reward model: a new head on the last hidden state."""

    @classmethod
    def reference_of(cls, options):
        return None

    def extend(self, model):
        import torch

        model.config.num_labels = 1
        return {"score": torch.nn.Linear(model.config.hidden_size, 1, bias=False)}

    def collate(self, rows, shape):
        import torch
        from dataclasses import replace

        batch = super().collate(rows, shape)
        return replace(batch, arrays={**batch.arrays, "last": torch.tensor(batch.lengths) - 1})

    def loss(self, model, batch, statistics=None):
        import torch
        import torch.nn.functional as F

        from panda.tasks.scores import last_hidden

        hidden = last_hidden(model, batch)
        last = hidden[torch.arange(len(hidden), device=hidden.device), batch["last"]]
        chosen, rejected = self.part(model, "score")(last).squeeze(-1).float().chunk(2)
        losses = -F.logsigmoid(chosen - rejected) * batch["weights"]
        return Loss(losses.sum(), {"margin": ((chosen - rejected).sum(), len(chosen))})


@register_task("toy-unstated", options=PairOptions)
class ToyUnstated(ToyPairs):
    """A loss of its own under a class that states its layouts."""

    layouts = ("padded", "grouped", "packed")


@register_task("toy-online", options=PairOptions)
class ToyOnline(Pairs):
    """Like GRPO: answers are made in the loop, and those with more of one letter are preferred."""

    unit = "answers"
    answers = 3

    @classmethod
    def reference_of(cls, options):
        return None

    def collate(self, rows, shape):
        import torch

        from panda.data.batches import Batch

        samples = [sample for row in rows for sample in row]
        prompts = [sample["chosen"][~sample["chosen_supervised"]] for sample in samples]
        arrays = {
            "index": torch.tensor([int(sample["index"]) for sample in samples]),
            "lengths": torch.tensor([len(prompt) for prompt in prompts]),
            "prompts": torch.cat([torch.from_numpy(prompt.astype("int64")) for prompt in prompts]),
        }
        return Batch(arrays, len(samples), sum(map(len, prompts)))

    def rollout(self, batches, step, training):
        import torch

        from panda.data.batches import RowShape, token_batch

        prompts = [
            [(int(index), prompt.tolist()) for index, prompt in
             zip(batch["index"], batch["prompts"].split(batch["lengths"].tolist()))]
            for batch in batches
        ]
        made = self.generate(
            [prompt for some in prompts for _, prompt in some for _ in range(self.answers)],
            keys=[(step, index, n) for some in prompts for index, _ in some for n in range(self.answers)],
            max_new_tokens=8, temperature=1.5, top_p=0.9,
        )
        answers, scores = iter(made.token_ids), iter(made.log_probs)
        found = []
        for batch, some in zip(batches, prompts):
            rows, advantages, old = [], [], []
            for _, prompt in some:
                group = [next(answers) for _ in range(self.answers)]
                old += [sum(next(scores)) for _ in range(self.answers)]
                rewards = torch.tensor([sum(token % 5 for token in answer) / 10 for answer in group])
                advantages += (rewards - rewards.mean()).tolist()
                rows += [[(prompt + answer, [False] * len(prompt) + [True] * len(answer))] for answer in group]
            arrays = {"advantages": torch.tensor(advantages), "old": torch.tensor(old)}
            batch_made = token_batch(rows, self.pad_token_id, RowShape(), units=len(rows), arrays=arrays)
            found.append(batch_made.as_idle() if batch.idle else batch_made)
        return found

    def loss(self, model, batch, statistics=None):
        from panda.tasks.scores import sequence_log_probs

        scores = sequence_log_probs(model, batch, temperature=1.5)
        return Loss(
            -(scores * batch["advantages"]).sum(),
            {
                "off": ((scores - batch["old"]).abs().sum(), len(scores)),
                "tokens_made": (batch.supervised_tokens, len(scores)),
            },
        )
'''


def toy_tasks(folder: Path) -> dict[str, str]:
    """Write the package, with its metadata, into ``folder``, and return the environment of runs that see it."""
    (folder / "toy_tasks_package.py").write_text(MODULE)
    info = folder / "toy_tasks_package-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: toy-tasks-package\nVersion: 1.0\n")
    names = ("pairs", "statistics", "head", "unstated", "online")
    entries = "".join(f"toy-{name} = toy_tasks_package\n" for name in names)
    (info / "entry_points.txt").write_text(f"[panda.tasks]\n{entries}")
    return {"PYTHONPATH": os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])}
