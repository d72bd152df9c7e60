"""What panda trains on is what TRL's SFTTrainer trains on, but for the differences that are listed here.

``trl.json`` was recorded by ``record_trl.py``, which has the rows.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from typing import NamedTuple

import pytest
from record_trl import KINDS
from record_trl import vocabulary
from tokenizer_zoo import load

from panda.data.json_reader import JsonReader
from panda.registry import NoOptions
from panda.registry.contexts import ReaderContext
from panda.registry.contexts import TaskContext
from panda.tasks.instruct import Instruct
from panda.tasks.instruct import InstructOptions
from panda.tasks.pretrain import Pretrain
from panda.tasks.pretrain import PretrainOptions

RECORDING = json.loads((Path(__file__).parent / "trl.json").read_text(encoding="utf-8"))
RECORDED = RECORDING["rows"]

DIFFERENCES = {
    "line break": "TRL learns the line break that the template writes after an end token, as far as tokens of its block"
    " reach; generation has stopped before it, so panda does not.",
    "opening": "TRL's block of this template begins before the line break that ends the generation prompt; inference"
    " sends it, so panda does not learn it.",
    "border": "TRL encodes prompt and answer as one text. Where tokens merge over the border, it learns the merged"
    " token, after a prompt that inference does not send; panda keeps the ids of the prompt, and encodes the answer"
    " apart.",
    "thought": "The template drops the thought of an earlier answer. TRL learns that answer without it; panda makes a"
    " sample of each answer as it is asked for, and learns it there with its thought.",
    "cut": "TRL cuts a sample in the middle of a turn; panda leaves out an exchange that does not fit, and reports it.",
    "begin": "TRL begins a text without a template as the tokenizer does; panda's plain template writes the begin token"
    " in the text, as the export does, and after it some tokenizers write no space.",
    "dropped": "TRL drops a row whose prompt fills the sample; panda cuts the beginning of the prompt, and reports it.",
}

KNOWN: dict[str, tuple[str, ...]] = {
    "one turn": ("line break",),
    "several turns": ("line break",),
    "prompt and completion": ("begin",),
    "prompt and completion that merge": ("begin", "border"),
    "prompt and completion of turns": ("line break",),
    "a system turn": ("line break",),
    "tools": ("opening", "line break"),
    "reasoning": ("line break", "thought"),
    "reasoning of the first answer": ("line break",),
    "text": (),
    "too long": ("line break", "cut"),
    "a long prompt": ("line break",),
    "a prompt that is too long": ("dropped",),
    "an answer that begins with space": ("line break", "border"),
    "characters": ("line break",),
}
"""The differences of each kind of rows, in the order in which they are taken out of the recording."""


class Sample(NamedTuple):
    ids: list[int]
    learnt: list[bool]


def recorded(kind: str, name: str) -> Sample:
    [found] = [row for row in RECORDED if (row["kind"], row["tokenizer"]) == (kind, name)]
    learnt = [mark == "1" for mark in found["learnt"]]
    return Sample(found["ids"], [False, *learnt[1:]])  # nothing is before the first token that could predict it


def prompts(kind: str, name: str) -> list[list[int]]:
    """Ids that plain transformers sends for each answer."""
    template, _, row = KINDS[kind]
    tokenizer = load(name, template)
    if isinstance(row.get("prompt"), str):
        begin = tokenizer.bos_token or ""
        return [tokenizer(begin + row["prompt"], add_special_tokens=False)["input_ids"]]
    messages = row["messages"] if "messages" in row else row["prompt"] + row["completion"]
    first = len(row.get("prompt", ()))
    return [
        tokenizer.apply_chat_template(
            messages[:number], tools=row.get("tools"), add_generation_prompt=True, return_dict=True
        )["input_ids"]
        for number, message in enumerate(messages)
        if message["role"] == "assistant" and number >= first
    ]


def without(difference: str, kind: str, name: str, samples: list[Sample]) -> list[Sample]:
    """``samples`` of TRL with one difference taken out."""
    end = load(name).convert_tokens_to_ids("<|im_end|>")
    if difference == "line break":
        made = []
        for ids, learnt in samples:
            kept, inside = [], False
            for place, is_learnt in enumerate(learnt):
                inside = is_learnt and (inside or not learnt[place - 1])
                kept.append(inside)
                inside = inside and ids[place] != end
            last = max((place for place, is_learnt in enumerate(kept) if is_learnt), default=-1)
            made.append(Sample(ids[: last + 1], kept[: last + 1]))
        return made
    if difference == "opening":
        asked = [length - 1 for length in map(len, prompts(kind, name))]
        return [Sample(ids, [is_learnt and n not in asked for n, is_learnt in enumerate(m)]) for ids, m in samples]
    if difference == "thought":
        [last] = samples
        [first] = [*expected("reasoning of the first answer", name)]
        begins = len(prompts(kind, name)[-1])
        return [first, Sample(last.ids, [place >= begins for place in range(len(last.ids))])]
    if difference == "cut":
        [(ids, learnt)] = samples
        length = ids.index(end, len(prompts(kind, name)[0])) + 1
        return [Sample(ids[:length], learnt[:length])]
    if difference == "dropped":
        assert samples == [Sample([], [False])], "TRL keeps nothing"
        [(ids, learnt)] = expected("a long prompt", name)
        limit = KINDS[kind][1]["max_length"]
        return [Sample(ids[-limit:], learnt[-limit:])]
    return samples  # the begin and the border: compared apart


def expected(kind: str, name: str) -> list[Sample]:
    samples = [recorded(kind, name)]
    for difference in KNOWN[kind]:
        samples = without(difference, kind, name, samples)
    return samples


def trained(kind: str, name: str, folder: Path) -> list[Sample]:
    """What panda makes of the row."""
    template, options, row = KINDS[kind]
    file = folder / "rows.json"
    file.write_text(json.dumps([row]), encoding="utf-8")
    context = TaskContext(
        load(name, template), JsonReader(NoOptions(), ReaderContext()), max_seq_length=options.get("max_length", 4096)
    )
    task: Any
    if "text" in row:
        task = Pretrain(PretrainOptions(pretraining_data_dir=str(file)), context)
    elif template:
        task = Instruct(InstructOptions(instruction_tuning_data_dir=str(file), template="chat"), context)
    else:
        task = Instruct(InstructOptions(instruction_tuning_data_dir=str(file), template="plain", separator=""), context)
    data = task.dataset()
    return [
        Sample(ids.tolist(), learnt.tolist()) for ids, learnt in (data[number].values() for number in range(len(data)))
    ]


TOKENIZERS = sorted({row["tokenizer"] for row in RECORDED})


@pytest.mark.parametrize("name", TOKENIZERS)
def test_the_recording_is_of_these_tokenizers(name: str) -> None:
    assert vocabulary(name) == RECORDING["vocabularies"][name], f"record again: {RECORDING['command']}"


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("kind", KINDS)
def test_panda_trains_on_what_trl_trains_on(kind: str, name: str, tmp_path: Path) -> None:
    want, got = expected(kind, name), trained(kind, name, tmp_path)
    [prompt, *_] = prompts(kind, name) if {"begin", "border"} & {*KNOWN[kind]} else [[]]
    if want[0].ids[: len(prompt)] == prompt and True in want[0].learnt[len(prompt) :]:
        learnt = [is_learnt and place >= len(prompt) for place, is_learnt in enumerate(want[0].learnt)]
        want = [Sample(want[0].ids, learnt), *want[1:]]
    if want[0].ids[: len(prompt)] != prompt:
        tokenizer = load(name)
        [(ids, learnt)] = got
        assert ids[: learnt.index(True)] == prompt
        texts = [tokenizer.decode(each) for each in (ids, want[0].ids)]
        if begin := tokenizer.bos_token:
            texts = [text.replace(f"{begin} ", begin) for text in texts]
        assert texts[0] == texts[1]
        assert ids[-1] == want[0].ids[-1] and learnt[-1]
        return
    for mine, theirs in zip(got, want, strict=True):
        assert load(name).convert_ids_to_tokens(mine.ids) == load(name).convert_ids_to_tokens(theirs.ids)
        assert mine == theirs


@pytest.mark.parametrize("kind", KINDS)
def test_the_differences_are_there(kind: str) -> None:
    """A difference that no recording shows any more, in a newer TRL perhaps, is to be taken off the list."""
    for difference in KNOWN[kind]:
        assert difference in DIFFERENCES
        if difference in ("begin", "border"):
            assert any(
                recorded(kind, name).ids[: len(prompt)] != prompt
                for name in TOKENIZERS
                for prompt in prompts(kind, name)
            )
            continue
        changed = []
        for name in TOKENIZERS:
            samples = [recorded(kind, name)]
            for earlier in KNOWN[kind][: KNOWN[kind].index(difference)]:
                samples = without(earlier, kind, name, samples)
            changed.append(without(difference, kind, name, samples) != samples)
        assert all(changed), difference
