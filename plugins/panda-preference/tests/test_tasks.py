"""How rows become samples, and samples batches."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from panda.data.batches import RowShape
from panda.data.reading import Row
from panda.registry.contexts import IGNORED_LABEL
from panda.registry.contexts import TaskContext
from panda.registry.options import build
from transformers import AutoTokenizer

import panda_preference
from panda_preference.dpo import Dpo
from panda_preference.dpo import DpoOptions
from panda_preference.kto import Kto
from panda_preference.kto import KtoOptions
from panda_preference.orpo import Orpo
from panda_preference.orpo import OrpoOptions
from panda_preference.reward import RewardModel
from panda_preference.reward import RewardOptions

CHAT = (
    "{{ bos_token }}{% for message in messages %}<{{ message['role'] }}>"
    "{{ message['content'] }}{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
OPTIONS = {Dpo: DpoOptions, Kto: KtoOptions, Orpo: OrpoOptions, RewardModel: RewardOptions}


class GivenRows:
    """A reader of one file that has rows by numbers."""

    suffixes = (".rows",)

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.rows = rows

    def read(self, file: Path) -> Iterator[Row]:
        for number, fields in enumerate(self.rows, 1):
            yield Row(fields, file, number)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """Tokens that are bytes."""
    return AutoTokenizer.from_pretrained(Path(panda_preference.__file__).parent / "sample" / "model")


def task_of(kind: Any, rows: list[dict[str, Any]], tokenizer: Any, folder: Path, limit: int, **options: Any) -> Any:
    (folder / "x.rows").touch()
    values = {"preference_data_dir": (str(folder / "x.rows"),), "template": "plain", "separator": "|"} | options
    context = TaskContext(tokenizer=tokenizer, reader=GivenRows(rows), max_seq_length=limit)  # type: ignore[arg-type]
    return kind(build(OPTIONS[kind], values), context)


@pytest.fixture
def samples(tokenizer: Any, tmp_path: Path) -> Any:
    """``samples(kind, rows, limit=..., chat=..., **options)``: of each sample its texts, split where answers begin."""

    def made(kind: Any, rows: list[dict[str, Any]], limit: int = 512, chat: bool = False, **options: Any) -> Any:
        mine = copy.copy(tokenizer)
        if chat:
            mine.chat_template, options["template"] = CHAT, "chat"
        dataset = task_of(kind, rows, mine, tmp_path, limit, **options).dataset()
        found = []
        for number in range(len(dataset)):
            sample = dataset[number]
            texts = {}
            for name in ("chosen", "rejected", "answer", "mismatched"):
                if name in sample:
                    learned = np.asarray(sample[f"{name}_supervised"], dtype=bool)
                    parts = np.split(sample[name], np.flatnonzero(np.diff(learned)) + 1)
                    texts[name] = [tokenizer.decode(part) for part in parts]
            found.append(texts)
        return found, dataset.report

    return made


PAIR = {"prompt": "Who?", "chosen": "A heron.", "rejected": "A frog."}


def test_a_pair_is_written_plainly(samples: Any) -> None:
    [sample], _ = samples(Dpo, [PAIR])
    assert sample == {"chosen": ["<s>Who?|", "A heron.</s>"], "rejected": ["<s>Who?|", "A frog.</s>"]}


def test_a_pair_is_written_by_the_chat_template(samples: Any) -> None:
    messages = {
        "chosen": [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "A heron."}],
        "rejected": [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "A frog."}],
    }
    found, _ = samples(Dpo, [PAIR, messages], chat=True)
    expected = {
        "chosen": ["<s><user>Who?<assistant>", "A heron.</s>"],
        "rejected": ["<s><user>Who?<assistant>", "A frog.</s>"],
    }
    assert found == [expected, expected], "a prompt is a user's turn however it is given"


def test_a_text_with_its_prompt_is_written_as_it_stands(samples: Any) -> None:
    row = {"chosen": "Human: Who? Bird: A heron.", "rejected": "Human: Who? Bird: A frog."}
    longer = {"chosen": "Yes, indeed", "rejected": "Yes"}
    other = {"chosen": "Yes", "rejected": "No"}
    found, _ = samples(Dpo, [row, longer, other], chat=True)
    assert found[0] == {
        "chosen": ["<s>Human: Who? Bird: A ", "heron.</s>"],
        "rejected": ["<s>Human: Who? Bird: A ", "frog.</s>"],
    }
    assert found[1] == {"chosen": ["<s>Yes", ", indeed</s>"], "rejected": ["<s>Yes", "</s>"]}
    assert found[2] == {"chosen": ["<s>", "Yes</s>"], "rejected": ["<s>", "No</s>"]}


def test_only_what_the_assistant_says_counts(samples: Any) -> None:
    more = [
        {"role": "assistant", "content": "A heron."},
        {"role": "user", "content": "Where?"},
        {"role": "assistant", "content": "There."},
    ]
    row = {"prompt": "Who?", "chosen": more, "rejected": [{"role": "assistant", "content": "A frog."}]}
    [sample], _ = samples(Dpo, [row], chat=True)
    assert sample["chosen"] == ["<s><user>Who?<assistant>", "A heron.</s>", "<user>Where?<assistant>", "There.</s>"]


def test_special_tokens_in_content_are_characters(samples: Any, tokenizer: Any, tmp_path: Path) -> None:
    row = {"prompt": "Who</s>?", "chosen": "A </s>heron.", "rejected": "A frog."}
    for rows in ([row], [{"chosen": "Is it </s>1?", "rejected": "Is it </s>2?"}]):
        dataset = task_of(Dpo, rows, tokenizer, tmp_path, 512).dataset()
        assert (dataset[0]["chosen"] == tokenizer.eos_token_id).sum() == 1


def test_both_answers_lose_the_same_beginning_of_their_prompt(samples: Any) -> None:
    row = {"prompt": "0123456789", "chosen": "yes", "rejected": "nobody"}  # 1 + 11 + 7 tokens
    [sample], report = samples(Dpo, [row], limit=15)
    assert sample == {"chosen": ["<s>456789|", "yes</s>"], "rejected": ["<s>456789|", "nobody</s>"]}
    assert report.truncated == 1
    [sample], report = samples(Dpo, [row], limit=19)
    assert sample["rejected"] == ["<s>0123456789|", "nobody</s>"] and report.truncated == 0
    [sample], report = samples(Dpo, [row], limit=6)
    assert sample == {"chosen": ["<s>", "yes</s>"], "rejected": ["<s>", "nobod"]}


def test_answers_that_are_cut_to_the_same_are_a_bad_row(samples: Any) -> None:
    found, report = samples(Dpo, [{"prompt": "x", "chosen": "the same 1", "rejected": "the same 2"}, PAIR], limit=6)
    assert len(found) == 1
    assert report.bad_rows == 1 and "as far as max_seq_length" in report.first_bad_rows[0].problem


def test_kto_takes_the_answer_of_the_row_before(samples: Any) -> None:
    rows = [{"prompt": prompt, "completion": f"to {prompt}", "label": prompt != "b"} for prompt in "abc"]
    found, _ = samples(Kto, rows)
    assert [sample["answer"] for sample in found] == [[f"<s>{each}|", f"to {each}</s>"] for each in "abc"]
    assert [sample["mismatched"] for sample in found] == [
        ["<s>a|", "to c</s>"],
        ["<s>b|", "to a</s>"],
        ["<s>c|", "to b</s>"],
    ]


def test_kto_takes_no_answer_to_the_same_prompt_of_a_pair(samples: Any) -> None:
    pairs, _ = samples(Kto, [PAIR, {"prompt": "Where?", "chosen": "There.", "rejected": "Nowhere."}])
    assert [(sample["answer"][1], sample["mismatched"]) for sample in pairs] == [
        ("A heron.</s>", ["<s>Who?|", "Nowhere.</s>"]),
        ("There.</s>", ["<s>Where?|", "A heron.</s>"]),
        ("A frog.</s>", ["<s>Who?|", "There.</s>"]),
        ("Nowhere.</s>", ["<s>Where?|", "A frog.</s>"]),
    ]


def batch_of(kind: Any, rows: list[dict[str, Any]], tokenizer: Any, folder: Path, **options: Any) -> Any:
    task = task_of(kind, rows, tokenizer, folder, 512, **options)
    dataset = task.dataset()
    return task.collate([[dataset[number]] for number in range(len(dataset))], RowShape())


def labels(batch: Any, tokenizer: Any) -> list[str]:
    return [tokenizer.decode(row[row != IGNORED_LABEL]) for row in batch.labels]


ANOTHER = {"prompt": "Where?", "chosen": "There.", "rejected": "Nowhere, perhaps.", "margin": 2}


def test_a_batch_has_all_preferred_answers_first(tokenizer: Any, tmp_path: Path) -> None:
    batch = batch_of(Dpo, [PAIR, ANOTHER], tokenizer, tmp_path)
    assert labels(batch, tokenizer) == ["A heron.</s>", "There.</s>", "A frog.</s>", "Nowhere, perhaps.</s>"]
    assert batch.units == 2


def test_orpo_learns_prompts_of_preferred_answers_too(tokenizer: Any, tmp_path: Path) -> None:
    batch = batch_of(Orpo, [PAIR, ANOTHER], tokenizer, tmp_path)
    expected = ["Who?|A heron.</s>", "Where?|There.</s>", "A frog.</s>", "Nowhere, perhaps.</s>"]
    assert labels(batch, tokenizer) == expected
    width = batch["of_answers"].shape[1]
    of_answers = [
        tokenizer.decode(row[mask]) for row, mask in zip(batch.labels[:, :width], batch["of_answers"], strict=True)
    ]
    assert of_answers == ["A heron.</s>", "There.</s>", "A frog.</s>", "Nowhere, perhaps.</s>"]


def test_a_reward_is_read_at_the_last_token(tokenizer: Any, tmp_path: Path) -> None:
    batch = batch_of(RewardModel, [PAIR, ANOTHER], tokenizer, tmp_path)
    assert (batch.input_ids[torch.arange(4), batch["last"]] == tokenizer.eos_token_id).all()
    assert batch["margin"].tolist() == [0.0, 2.0]


def test_a_kto_batch_goes_to_a_device_and_through_a_pipe_whole(tokenizer: Any, tmp_path: Path) -> None:
    import pickle

    rows = [{"prompt": prompt, "completion": f"to {prompt}", "label": prompt != "b"} for prompt in "abc"]
    batch = pickle.loads(pickle.dumps(batch_of(Kto, rows, tokenizer, tmp_path)))
    assert labels(batch, tokenizer) == ["to a</s>", "to b</s>", "to c</s>"]
    assert labels(batch.mismatched, tokenizer) == ["to c</s>", "to a</s>", "to b</s>"]
    assert batch["desirable"].tolist() == [True, False, True]
    moved = batch.to(torch.device("meta"))
    assert moved.input_ids.is_meta and moved.mismatched.input_ids.is_meta and moved["desirable"].is_meta
    assert moved.as_idle().idle


def test_declaring_imports_no_torch(tmp_path: Path) -> None:
    import subprocess
    import sys

    names = ", ".join(f"panda_preference.{name}" for name in ("distill", "dpo", "kto", "orpo", "reward", "simpo"))
    code = f"import sys, {names}; sys.exit(bool({{'torch', 'numpy', 'transformers'}} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_weights_of_turns_are_all_or_nothing(samples: Any) -> None:
    half = [{"role": "assistant", "content": "A frog.", "weight": 0.5}]
    row = {"prompt": "Who?", "chosen": half, "rejected": [{"role": "assistant", "content": "No."}]}
    _, report = samples(Dpo, [PAIR, row])
    assert report.bad_rows == 1 and "the weight of its answer is 0.5" in report.first_bad_rows[0].problem


def test_the_sequences_of_a_sample_can_be_shown(tokenizer: Any, tmp_path: Path) -> None:
    task = task_of(Kto, [{"prompt": "a", "completion": "b", "label": True}], tokenizer, tmp_path, 512)
    shown = task.parts(task.dataset()[0])
    assert [part.name for part in shown] == ["answer, labelled good", "mismatched"]
    assert tokenizer.decode(shown[0].token_ids) == "<s>a|b</s>" and shown[0].supervised == [False] * 3 + [True] * 2


def test_a_labelled_answer_is_shown_with_its_label(tokenizer: Any, tmp_path: Path) -> None:
    rows = [{"prompt": "a", "completion": "b", "label": label} for label in (True, False)]
    task = task_of(Kto, rows, tokenizer, tmp_path, 32)
    shown = [[part.name for part in task.parts(task.dataset()[number])] for number in (0, 1)]
    assert shown == [["answer, labelled good", "mismatched"], ["answer, labelled bad", "mismatched"]]
