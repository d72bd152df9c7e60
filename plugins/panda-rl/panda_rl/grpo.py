"""The task ``grpo``: group relative policy optimisation (arXiv 2402.03300), and the losses that came after it.

In each optimizer step the model writes several completions of each prompt; rewards say what they are worth; and the
loss makes those more likely that are worth more than the others of their prompt.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import asdict
from dataclasses import dataclass
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING
from typing import Annotated
from typing import Any
from typing import Literal

from panda import Location
from panda import Meta
from panda import Names
from panda import UserError
from panda import hookimpl
from panda import register_task
from panda.data.conversations import Turn
from panda.data.conversations import UnusableRowError
from panda.data.fields import Field
from panda.data.reading import Row
from panda.registry.contexts import TaskContext
from panda.tasks.dialogue_task import DialogueTask
from panda.tasks.dialogue_task import InstructFormat
from panda.tasks.task import Better
from panda.tasks.task import Loss
from panda.tasks.task import Reference

from panda_rl.reward import Completion
from panda_rl.reward import Reward
from panda_rl.reward import RewardContext

if TYPE_CHECKING:
    import torch
    from panda.data.batches import Batch
    from panda.data.batches import RowShape
    from panda.data.batches import TokenBatch
    from panda.data.token_dataset import Sample
    from panda.data.token_dataset import SampleBlock
    from panda.runner import Run

    from panda_rl.prompt_batch import PromptBatch

PROMPT_FIELDS = ("prompt", "question", "instruction", "problem", "messages")
"""Fields that ask, of which the first is taken."""


@dataclass(frozen=True)
class GrpoOptions(InstructFormat):
    """Options of grpo."""

    prompt_data_dir: tuple[Annotated[str, Location(holds_data=True)], ...] = ("./dataset/prompts",)
    """Folder, read recursively, file, pattern of files, or data set on the hub (`OWNER/NAME:CONFIGURATION:SPLIT`), or a
    list of these; rows have a "prompt" (or "question", ...), a text or messages, and what rewards read."""
    prompt_field: str | None = None
    """Field that asks; by default the first of "prompt", "question", "instruction", "problem" and "messages"."""
    reward: Annotated[tuple[str, ...], Names("reward")] = ()
    """What a completion is worth: names of rewards, of which the weighted sum counts. See `panda list rewards`."""
    reward_weights: tuple[float, ...] = ()
    """A weight for each reward, in their order; by default 1."""
    num_generations: Annotated[int, Meta(ge=2)] = 8
    """Completions of each prompt, which are compared with each other. A micro batch has as many for each prompt."""
    max_completion_length: Annotated[int, Meta(ge=1)] = 256
    """Most tokens of a completion; a prompt has room for the rest of max_seq_length."""
    temperature: Annotated[float, Meta(gt=0)] = 1.0
    """Completions are drawn from probabilities whose logits are divided by it, and so is the loss computed."""
    top_p: Annotated[float, Meta(gt=0, le=1)] = 1.0
    """Draw only from the likeliest tokens that together have this probability."""
    loss_type: Literal["grpo", "bnpo", "dr_grpo", "dapo", "gspo"] = "dapo"
    """`grpo`: the mean over the tokens of a completion, then over completions; `dapo`, `bnpo`: over all tokens of the
    step; `dr_grpo`: the sum over a completion over max_completion_length; `gspo`: ratios of whole completions."""
    beta: Annotated[float, Meta(ge=0)] = 0.0
    """Weight of the KL divergence from the weights that the run starts from; 0 keeps no copy of them."""
    use_bias_correction_kl: bool = True
    """Weigh the KL by the ratio of probabilities, which makes its gradient unbiased (DeepSeek-V3.2)."""
    epsilon: Annotated[float, Meta(gt=0, lt=1)] = 0.2
    """A ratio of probabilities below 1 less this moves a completion no further."""
    epsilon_high: Annotated[float, Meta(gt=0)] | None = None
    """The same above 1; by default epsilon."""
    scale_rewards: Literal["group", "batch", "none"] = "group"
    """Divide the rewards, less the mean of their prompt, by their standard deviation: of the prompt, or of the step."""
    num_iterations: Annotated[int, Meta(ge=1)] = 1
    """Optimizer steps on the same completions. Only in the first of them prompts of the data are used; those that the
    order has for the others are passed over."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.input_field is not None:
            raise UserError("input_field: rows of grpo have a prompt and no target. Name the prompt with prompt_field.")
        if not self.reward:
            raise UserError("reward: name at least one. `panda list rewards` shows what is installed.")
        if self.reward_weights and len(self.reward_weights) != len(self.reward):
            raise UserError(
                f"reward_weights: it has {len(self.reward_weights)}, and `reward` has {len(self.reward)}:"
                f" {', '.join(self.reward)}. Give each reward its weight, in their order."
            )


@dataclass(frozen=True)
class Group:
    """The completions of a prompt, and what they are worth."""

    prompt: list[int]
    completions: list[list[int]]
    log_probs: list[list[float]]
    """Of each token, when it was drawn."""
    ended: list[bool]
    rewards: list[list[float]]
    """Of each completion, what each reward gives it."""


@register_task("grpo", options=GrpoOptions)
class Grpo(DialogueTask):
    """Answers that rewards judge: several are drawn to each prompt, and the better ones made likelier."""

    option = "prompt_data_dir"
    layouts = ("padded", "grouped")
    shown = ("reward", "completions/mean_length")
    fields = (Field("prompt", "tokens"), Field("row", "uint8"))

    def __new__(cls, options: GrpoOptions | None = None, context: TaskContext | None = None) -> Grpo:
        by_step = cls is Grpo and options is not None and options.scale_rewards == "batch"  # a copy has no options yet
        return super().__new__(_ScaledByStep if by_step else cls)

    def __init__(self, options: GrpoOptions, context: TaskContext) -> None:
        from panda_rl.losses import LOSS_TYPES

        super().__init__(options, options.prompt_data_dir, context)
        self.options = options
        self.room = context.max_seq_length - options.max_completion_length
        if self.room < 1:
            raise UserError(
                f"max_completion_length: with {options.max_completion_length} tokens, max_seq_length"
                f" {context.max_seq_length} leaves no room for a prompt. Raise max_seq_length, or lower it."
            )
        self.loss_type = LOSS_TYPES[options.loss_type]
        self.unit = self.loss_type.unit
        named = [chosen for chosen in context.named if chosen.component.kind == "reward"]
        made = RewardContext(context.tokenizer, options.max_completion_length)
        self.rewards: dict[str, Reward] = {chosen.name: chosen.build(made, Reward) for chosen in named}
        # Which rows can be used depends on them, and on their options.
        self._judged_by = [
            [chosen.name, type(chosen.options).__module__, repr(chosen.options)]
            for chosen in named
            if self.rewards[chosen.name].problem_of is not Reward.problem_of
        ]
        self.weights_of_rewards = list(options.reward_weights or [1.0] * len(self.rewards))
        self.read_fields = sorted({name for reward in self.rewards.values() for name in reward.fields})
        self._kept: list[list[Group]] = []
        """Of each micro batch, what further optimizer steps are on."""
        self._ranks = 1

    @property
    def metrics(self) -> Mapping[str, Better]:  # type: ignore[override]
        """Those that ``_metrics`` yields."""
        of_rewards: dict[str, Better] = {f"rewards/{name}/mean": "higher" for name in self.rewards}
        others = [
            "reward_std",
            "frac_reward_zero_std",
            "completions/mean_length",
            "completions/clipped_ratio",
            "entropy",
        ]
        others += ["kl"] * bool(self.options.beta)
        others += [f"clip_ratio/{which}_mean" for which in ("low", "high", "region")]
        return {"reward": "higher", **of_rewards, **dict.fromkeys(others), "generation/tokens_per_second": None}

    @classmethod
    def reference_of(cls, options: GrpoOptions) -> Reference | None:
        return Reference() if options.beta else None

    @classmethod
    def largest_sample(cls, options: GrpoOptions, max_seq_length: int) -> tuple[int, int]:
        return options.num_generations, max_seq_length

    # -- samples: prompts, and the fields of their rows that rewards read

    def describe(self) -> dict[str, Any]:
        ours = {"prompt_field": self.options.prompt_field, "read": self.read_fields, "room": self.room}
        return super().describe() | ours | {"judged": self._judged_by}

    def parse(self, row: Row) -> tuple[list[Turn], str]:
        """The turns that ask, and JSON of the fields that rewards read."""
        turns = self._turns(row.fields)
        if missing := [name for name in self.read_fields if row.fields.get(name) is None]:
            raise UnusableRowError(f"no field {missing[0]!r}, which a reward reads")
        read = {name: row.fields[name] for name in self.read_fields}
        for reward in self.rewards.values():
            if problem := reward.problem_of(read):
                raise UnusableRowError(problem)
        for number, turn in enumerate(turns):
            if turn.role == "system" and self.template.leaves_out(turns, number):
                raise UnusableRowError("the chat template leaves its system turn out")
        return turns, json.dumps(read, ensure_ascii=False, default=str)

    def _turns(self, fields: Mapping[str, Any]) -> list[Turn]:
        names = [self.options.prompt_field] if self.options.prompt_field else list(PROMPT_FIELDS)
        name = next((name for name in names if fields.get(name) is not None), None)
        if name is None:
            raise UnusableRowError(f"no field {' and no '.join(map(repr, names))}")
        asked = fields[name]
        if isinstance(asked, str):
            if not asked:
                raise UnusableRowError(f"field {name!r} is empty")
            return [Turn("user", asked)]
        messages = asked if isinstance(asked, list) else []
        if not messages or not all(isinstance(each, Mapping) and _is_message(each) for each in messages):
            raise UnusableRowError(f"field {name!r} is neither a text nor messages with a role and a content")
        if messages[-1]["role"] != "user":
            raise UnusableRowError(f"field {name!r} does not end with a turn of the user, which is to be answered")
        return [Turn(each["role"], each["content"]) for each in messages]

    def add_samples(self, parsed: list[Any], block: SampleBlock) -> None:
        import numpy as np

        texts = [self.template.prompt(turns) for turns, _ in parsed]
        for number, (ids, (_, row)) in enumerate(zip(self.template.encode(texts), parsed, strict=True)):
            block.begin(number)
            start = self.encoder.cut(ids, self.room) or ids[-1:] or [self.tokenizer.eos_token_id]
            block.report.truncated += len(start) < len(ids)
            block.add_arrays(prompt=start, row=np.frombuffer(row.encode(), dtype=np.uint8))

    def example_prompt(self, parsed: Any) -> str:
        text: str = parsed[0][-1].text
        return text

    def collate(self, rows: list[list[Sample]], shape: RowShape) -> PromptBatch:
        import numpy as np
        import torch

        from panda_rl.prompt_batch import PromptBatch

        samples = [sample for row in rows for sample in row]
        arrays: dict[str, Any] = {"index": torch.tensor([int(sample["index"]) for sample in samples])}
        for name in ("prompt", "row"):
            arrays[name] = torch.from_numpy(np.concatenate([sample[name] for sample in samples]).astype(np.int64))
            arrays[f"{name}_lengths"] = torch.tensor([len(sample[name]) for sample in samples])
        return PromptBatch(arrays, units=len(samples), tokens=len(arrays["prompt"]), shape=shape)

    # -- generation, in the loop

    def start(self, run: Run) -> None:
        super().start(run)
        self._ranks = run.processes.data_ranks
        if run.resumed_from is not None and run.step % self.options.num_iterations:
            self._kept = kept_in(run.resumed_from, run.processes.data_rank, self._ranks)
            if not self._kept and run.processes.rank == 0:
                print(
                    f"{run.resumed_from}: it lacks the completions that num_iterations has further steps on: new ones"
                    " are drawn",
                    flush=True,
                )

    def keep(self, folder: Path, rank: int) -> None:
        """Write what further optimizer steps are on, if they are, to ``folder``, a checkpoint."""
        if self._kept:
            written = [[asdict(group) for group in groups] for groups in self._kept]
            (folder / f"{KEPT}{rank:05}.json").write_text(json.dumps(written), encoding="utf-8")

    def rollout(self, batches: list[Any], step: int, *, training: bool) -> list[Batch]:
        """Completions of all prompts of the step on this rank, drawn together, and scored. ``batches``: PromptBatch."""
        shape: RowShape = batches[0].shape
        if training and (step - 1) % self.options.num_iterations and self._kept:
            return [self._batch(groups, (0, 0.0), shape) for groups in self._kept]
        prompts = [_prompts_of(batch) for batch in batches]
        groups, seconds = self._groups([each for of_batch in prompts for each in of_batch], step if training else 0)
        drawn = sum(len(ids) for group in groups for ids in group.completions)
        rates = [(drawn, seconds / self._ranks), *[(0, 0.0)] * len(batches)]
        found = iter(groups)
        of_batches = [[next(found) for _ in each] for each in prompts]
        if training:
            self._kept = of_batches if self.options.num_iterations > 1 else []
        return [self._batch(groups, rate, shape) for groups, rate in zip(of_batches, rates, strict=False)]

    def _groups(self, prompts: list[tuple[int, list[int], dict[str, Any]]], step: int) -> tuple[list[Group], float]:
        """The completions of ``prompts`` (index, token ids, fields), and the seconds that drawing them took."""
        count, options = self.options.num_generations, self.options
        assert self.generate is not None
        begun = time.perf_counter()
        generated = self.generate(
            [ids for _, ids, _ in prompts for _ in range(count)],
            keys=[(step, index, number) for index, _, _ in prompts for number in range(count)],
            max_new_tokens=options.max_completion_length,
            temperature=options.temperature,
            top_p=options.top_p,
        )
        seconds = time.perf_counter() - begun
        made = zip(*generated, strict=True)
        groups = []
        for _, ids, fields in prompts:
            completions, log_probs, ended = zip(*(next(made) for _ in range(count)), strict=True)
            scored = self._scored(ids, fields, completions, ended)
            groups.append(Group(ids, list(completions), list(log_probs), list(ended), scored))
        return groups, seconds

    def _scored(
        self, prompt: list[int], fields: dict[str, Any], completions: Sequence[list[int]], ended: Sequence[bool]
    ) -> list[list[float]]:
        """Of each completion, what each reward gives it."""
        asked = self._text(prompt, special=True)
        judged = [
            Completion(self._text(ids), tuple(ids), end, asked, fields)
            for ids, end in zip(completions, ended, strict=True)
        ]
        columns = []
        for name, reward in self.rewards.items():
            scores = [float(score) for score in reward.score(judged)]
            if len(scores) != len(judged) or not all(map(math.isfinite, scores)):
                raise UserError(
                    f"reward {name!r} gave {scores} for {len(judged)} completions; it has to give each a finite number."
                )
            columns.append(scores)
        return [list(row) for row in zip(*columns, strict=True)]

    def _text(self, ids: Sequence[int], *, special: bool = False) -> str:
        text: str = self.tokenizer.decode(
            list(ids), skip_special_tokens=not special, clean_up_tokenization_spaces=False
        )
        return text

    def _idle_group(self) -> Group:
        """What a rank without prompts runs the model on, so that it runs it as often as the others."""
        count, end = self.options.num_generations, self.tokenizer.eos_token_id
        return Group([end], [[end]] * count, [[0.0]] * count, [True] * count, [[0.0] * len(self.rewards)] * count)

    def _batch(self, groups: list[Group], rate: tuple[int, float], shape: RowShape | None = None) -> TokenBatch:
        """The completions of ``groups`` after their prompts, a row each; an idle batch if there are none.

        ``rate``: tokens that were drawn for the step, and the seconds that it took, to be counted with this batch.
        ``shape``: how the run wants rows.
        """
        import torch
        from panda.data.batches import RowShape
        from panda.data.batches import token_batch

        used = groups or [self._idle_group()]
        rows = [(group, number) for group in used for number in range(len(group.completions))]
        sequences = []
        for group, number in rows:
            completion = group.completions[number]
            supervised = bytes(len(group.prompt)) + b"\1" * len(completion)
            sequences.append([(group.prompt + completion, list(supervised))])
        arrays = {
            "rewards": torch.tensor([group.rewards[number] for group, number in rows], dtype=torch.float32),
            "ended": torch.tensor([float(group.ended[number]) for group, number in rows]),
            "generated": torch.tensor(rate, dtype=torch.float64),
        }
        tokens = sum(len(group.completions[number]) for group, number in rows)
        units = len(rows) if self.unit == "completions" else tokens
        batch = token_batch(sequences, self.pad_token_id, shape or RowShape(), units=units, arrays=arrays)
        if self.options.num_iterations > 1:
            old = torch.zeros(batch.labels[:, 1:].shape)
            for place, (group, number) in enumerate(rows):
                before = len(group.prompt) - 1
                old[place, before : before + len(group.completions[number])] = torch.tensor(group.log_probs[number])
            batch = replace(batch, arrays={**batch.arrays, "old_log_probs": old})
        return batch if groups else batch.as_idle()

    # -- the loss

    def loss(self, model: Any, batch: TokenBatch, statistics: Mapping[str, torch.Tensor] = {}) -> Loss:
        import torch
        from panda.tasks.scores import label_log_probs

        from panda_rl.losses import summed
        from panda_rl.losses import terms

        options = self.options
        log_probs = label_log_probs(model, batch, temperature=options.temperature)
        reference = None
        if options.beta:
            with torch.no_grad():
                reference = label_log_probs(self.reference, batch, temperature=options.temperature)
        mask = (batch.labels[:, 1:] >= 0).to(log_probs.dtype)
        found = terms(
            log_probs,
            batch["old_log_probs"] if "old_log_probs" in batch.arrays else log_probs.detach(),
            reference,
            self._advantages(batch, statistics),
            mask,
            level=self.loss_type.level,
            epsilon=options.epsilon,
            epsilon_high=options.epsilon if options.epsilon_high is None else options.epsilon_high,
            beta=options.beta,
            weighted_kl=options.use_bias_correction_kl,
        )
        total = summed(self.loss_type, found.loss, mask, options.max_completion_length)
        with torch.no_grad():
            return Loss(total, dict(self._metrics(batch, log_probs, mask, found)))

    def _rewards(self, batch: Batch) -> torch.Tensor:
        """The weighted sum of the rewards of each completion: [rows]."""
        rewards = batch["rewards"]
        return rewards @ rewards.new_tensor(self.weights_of_rewards)

    def _advantages(self, batch: Batch, statistics: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """What each completion is worth beside the others of its prompt: [rows]."""
        from panda_rl.losses import SMALLEST_SPREAD
        from panda_rl.losses import centred
        from panda_rl.losses import spread_of_all
        from panda_rl.losses import spread_of_groups

        grouped = self._rewards(batch).view(-1, self.options.num_generations)
        advantages = centred(grouped)
        if self.options.scale_rewards == "group":
            advantages = advantages / (spread_of_groups(grouped) + SMALLEST_SPREAD)
        elif self.options.scale_rewards == "batch":
            advantages = advantages / (spread_of_all(*statistics["rewards"]).float() + SMALLEST_SPREAD)
        return advantages.flatten()

    def _metrics(self, batch: Batch, log_probs: torch.Tensor, mask: torch.Tensor, found: Any) -> Iterator[Any]:
        """Names, numerators and denominators, with TRL's names where it has the same."""
        from panda_rl.losses import spread_of_groups

        rewards, count, tokens = self._rewards(batch), len(batch["ended"]), mask.sum()
        grouped = rewards.view(-1, self.options.num_generations)
        spread = spread_of_groups(grouped)
        yield "reward", (rewards.sum(), count)
        yield "reward_std", (spread.sum(), len(grouped))
        yield "frac_reward_zero_std", ((spread < 1e-8).float().sum(), len(grouped))
        for place, name in enumerate(self.rewards):
            yield f"rewards/{name}/mean", (batch["rewards"][:, place].sum(), count)
        yield "completions/mean_length", (tokens, count)
        yield "completions/clipped_ratio", (count - batch["ended"].sum(), count)
        yield "entropy", (-(log_probs * mask).sum(), tokens)
        if found.kl is not None:
            yield "kl", ((found.kl * mask).sum(), tokens)
        # Of a ratio for each token the share of tokens, of one for each completion the share of completions.
        by_token = self.loss_type.level == "token"
        counted, where = (tokens, mask) if by_token else (count, 1)
        low, high = (found.clipped_low * where).sum(), (found.clipped_high * where).sum()
        yield "clip_ratio/low_mean", (low, counted)
        yield "clip_ratio/high_mean", (high, counted)
        yield "clip_ratio/region_mean", (low + high, counted)
        yield "generation/tokens_per_second", (batch["generated"][0], batch["generated"][1])


KEPT = "grpo-completions-"
"""How the names of files begin, in a checkpoint between steps on the same completions, that have these."""


@hookimpl
def panda_checkpoint_saved(run: Run, path: Path) -> None:
    """Beside the state of the run, write the completions that steps after this one are on, too.

    A task in another module that is derived from ``Grpo`` has to import this hook there.
    """
    if isinstance(run.task, Grpo) and run.step % run.task.options.num_iterations:
        run.task.keep(path, run.processes.data_rank)


def kept_in(checkpoint: Path, rank: int, ranks: int) -> list[list[Group]]:
    """The completions in ``checkpoint`` for the micro batches of ``rank`` of ``ranks``; none where they are missing.

    To another number of ranks they are dealt out again: the step is the same, to rounding.
    """
    files = sorted(checkpoint.glob(f"{KEPT}*.json"))
    states = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    every = [[[Group(**group) for group in groups] for groups in state] for state in states]
    if len(every) == ranks:
        return every[rank]
    groups = [group for batches in zip(*every, strict=True) for batch in batches for group in batch]
    size = max((len(batch) for batches in every for batch in batches), default=1)
    count = -(-len(groups) // (size * ranks))
    starts = [(number * ranks + rank) * size for number in range(count)]
    return [groups[start : start + size] for start in starts]


class _ScaledByStep(Grpo):
    """With ``scale_rewards: batch``: the loss needs the spread of all rewards of the step.

    A class of its own, since a task with statistics reads the batches of an evaluation twice, and generates twice.
    """

    def statistics(self, model: Any, batch: Batch) -> Mapping[str, torch.Tensor]:
        """Of the rewards: how many there are, their sum, and that of their squares."""
        import torch

        rewards = self._rewards(batch).double()
        return {"rewards": torch.stack([torch.ones_like(rewards), rewards, rewards * rewards]).sum(dim=1)}


def _is_message(message: Mapping[str, Any]) -> bool:
    return isinstance(message.get("role"), str) and isinstance(message.get("content"), str)


def _prompts_of(batch: Batch) -> list[tuple[int, list[int], dict[str, Any]]]:
    """The index, the token ids and the row's fields of each prompt of a batch of ``collate``; none of an idle one."""
    if batch.idle:
        return []
    prompts = batch["prompt"].split(batch["prompt_lengths"].tolist())
    rows = batch["row"].split(batch["row_lengths"].tolist())
    fields = [json.loads(bytes(row.tolist())) for row in rows]
    return list(zip(batch["index"].tolist(), (prompt.tolist() for prompt in prompts), fields, strict=True))
