"""``check_task`` accepts tasks that keep the promises, and rejects each of those that break one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from distributions import Distributions

from panda.testing import check_task

TOY = '''
from panda import Location, register_task
from panda.data.conversations import Turn
from panda.data.fields import Field
from panda.tasks.dialogue_task import DialogueTask, InstructFormat
from panda.tasks.task import Loss


@dataclass(frozen=True)
class ToyOptions(InstructFormat):
    """Options of the toy."""

    toy_dir: tuple[Annotated[str, Location(holds_data=True)], ...] = ("./toys",)
    """Rows with "prompt" and "answer"."""
    defect: str = ""
    """What is wrong with it."""


@register_task("toy", options=ToyOptions)
class Toy(DialogueTask):
    """Likes answers, each as much as the others."""

    option = "toy_dir"
    unit = "answers"
    fields = (Field("text", "tokens"), Field("supervised", "supervised", along="text"))

    def __init__(self, options, context):
        super().__init__(options, options.toy_dir, context)
        self.defect, self.calls = options.defect, 0

    def parse(self, row):
        return self.exchange([Turn("user", row.fields["prompt"])], row.fields["answer"])

    def add_samples(self, parsed, block):
        for token_ids, supervised, cut in (self.fitted(*each) for each in self.tokens_of(list(parsed))):
            block.report.truncated += cut
            block.add_arrays(text=token_ids, supervised=supervised)

    def example_prompt(self, parsed):
        return ""

    def collate(self, rows, shape):
        import torch
        from panda.data.batches import token_batch

        samples = [sample for row in rows for sample in row]
        texts = [[(each["text"], each["supervised"])] for each in samples]
        units = 1 if self.defect == "units of rows" else len(samples)
        arrays = {"noise": torch.rand(len(samples))} if self.defect == "draws" else {}
        return token_batch(texts, self.pad_token_id, shape, units=units, arrays=arrays)

    def loss(self, model, batch):
        from panda.tasks.scores import sequence_log_probs

        if self.defect == "raises":
            raise RuntimeError("out of luck")
        scores = sequence_log_probs(model, batch)
        self.calls += 1
        total = -scores.sum()
        if self.defect == "mean":
            total = total / len(scores)
        if self.defect == "remembers":
            total = total * self.calls
        if self.defect == "padding":
            total = total / batch.input_ids.shape[1]
        metrics = {"score": (scores.sum(), len(scores))}
        if self.defect == "metric without number":
            metrics["nothing"] = (scores.sum(), 0)
        if self.defect == "metric of means":
            metrics["score"] = (scores.mean(), 1)
        return Loss(total, metrics)
'''

DEFECTS = {
    "draws": "batches: a batch of 4 samples, made twice, is another",
    "raises": "training: AssertionError: panda-train(?s:.*)RuntimeError: out of luck",
    "mean": "micro batches of 1: 4 records, apart by at most",
    "units of rows": "micro batches of 1: 4 records, apart by at most",
    "padding": "micro batches of 1: 4 records, apart by at most",
    "remembers": "resuming: from step 2, records are others",
    "metric without number": "metrics: not finite: nothing",
    "metric of means": r"ZeRO-2, two ranks: 4 records, apart by at most .* \((eval_)?score at step 3",
}
"""What is wrong with the toy, and what is said of it."""


@pytest.fixture
def toy(distributions: Distributions, tmp_path: Path) -> dict[str, object]:
    """Options of the task; it is installed."""
    distributions.install("acme-toys", {"tasks": {"toy": "acme_toys.toy"}}, {"acme_toys.toy": TOY})
    rows = [
        {"prompt": f"say {word}", "answer": word * 2}
        for word in ["a", "cat", "saw", "nine", "green", "herons", "fly", "over", "there"]
    ]
    for name, some in (("rows", rows), ("held-out", rows[:3])):
        (tmp_path / f"{name}.json").write_text(json.dumps(some).replace("say", name))
    return {"toy_dir": tmp_path / "rows.json", "eval_data_dir": tmp_path / "held-out.json"}


def test_a_task_that_keeps_all_promises(toy: dict[str, object], capsys: pytest.CaptureFixture[str]) -> None:
    check_task("toy", **toy)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "check_task toy: task toy of acme-toys 1.0 (entry point panda.tasks: toy = acme_toys.toy)"
    kept = [line.split(":")[0].split(maxsplit=1)[1] for line in lines[1:] if line.startswith("  ok ")]
    assert kept[:6] == ["samples", "batches", "units", "metrics", "resuming", "micro batches of 1"]
    assert kept[6:] == ["grouped rows, micro batches of 2", *(f"ZeRO-{stage}, two ranks" for stage in range(4))]
    assert [line for line in lines[1:] if not line.startswith("  ok ")] == [
        "  note    names: the task does not state its `metrics`: a misspelt `best_metric` is found late",
        "  note    packed rows: not among the task's `layouts`: `batching: packed` is refused for it",
    ]


@pytest.mark.parametrize("defect", DEFECTS)
def test_a_task_that_breaks_a_promise(toy: dict[str, object], defect: str) -> None:
    with pytest.raises(AssertionError, match=f"- {DEFECTS[defect]}") as caught:
        check_task("toy", **toy, defect=defect)
    assert str(caught.value).startswith("check_task toy: task toy of acme-toys 1.0")


def test_too_little_data_is_said(toy: dict[str, object], tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text('[{"prompt": "a", "answer": "b"}]')
    with pytest.raises(AssertionError, match=r"- samples: 1 sample\n *Give data with at least 5 rows"):
        check_task("toy", **toy)
