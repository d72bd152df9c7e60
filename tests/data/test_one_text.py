"""What training shows the model is what inference sends it, for every kind of tokenizer and chat template.

The reference is plain transformers: the tokenizer of the export, its ``apply_chat_template``, and nothing of panda.
"""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Iterator
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any
from typing import NamedTuple

import pytest
import torch
from hypothesis import HealthCheck
from hypothesis import example
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
from tokenizer_zoo import CONTROL
from tokenizer_zoo import TEMPLATES
from tokenizer_zoo import TOKENIZERS
from tokenizer_zoo import load
from transformers import AutoTokenizer
from transformers import LlamaConfig
from transformers import LlamaForCausalLM
from transformers.utils import chat_template_utils

from panda.data.json_reader import JsonReader
from panda.registry import NoOptions
from panda.registry import UserError
from panda.registry.contexts import ReaderContext
from panda.registry.contexts import TaskContext
from panda.tasks.instruct import Instruct
from panda.tasks.instruct import InstructOptions
from panda.weights.export import decoding_of
from panda.weights.export import describe_model

Messages = list[dict[str, str]]

DROPS_ITS_PROMPT = {"deepseek-r1"}
"""Templates whose prompt begins the answer with a thought: refusing an answer without one is right."""

CANNOT_SPELL = {"byt5"}
"""Tokenizers in Python, which cannot write what spells a special token as characters: the row is reported."""


def conversation(*turns: str, system: str | None = None) -> Messages:
    """Turns of user and assistant in turn."""
    messages = [{"role": role, "content": text} for role, text in zip(itertools.cycle(("user", "assistant")), turns)]
    return [{"role": "system", "content": system}, *messages] if system is not None else messages


CONVERSATIONS = (
    conversation("What is the capital of France?", "Paris."),
    conversation("How many birds?", "There are 12.", "And in 2024?", "1,024 birds", "Thanks", "You're welcome."),
    conversation("Who waits?", "The heron.", "Where?", "In the reeds.", system="You are a pike."),
    conversation("Who waits?", "The heron.", "Where?", "In the reeds.", system=""),
    conversation("  two before, one after ", " The heron ", "\n\nlines\n", "\n\n  waits.\n", "a", "b\n\n"),
    conversation("日本語 😀", "👍🏽 ﬁ ½ Å漢字", "é\té\r\n", "Größe: 21.5", system="Привет\n"),
    conversation("<b>Is 3 < 5?</b>", "[INST] yes </p> ▁ Ġ ##s", 'x = "\\n"', "def f(x):\n    return x\n"),
    conversation("Of Spain?", "<think>\nEasy.\n</think>\n\nMadrid.", "Sure?", "<think>\nYes.\n</think>\n\nYes."),
    [*conversation("Who?"), *conversation("Where?", "Here.")],
    conversation("Again", "Again", "Again", "Again"),
)


class Trained(NamedTuple):
    """What a run trains on, and how its export reads."""

    exported: Any
    """The tokenizer of the export."""
    samples: list[tuple[list[int], list[bool]]]
    bad: dict[int, str]
    """Problems by the number of the row, from 0."""


@functools.cache
def _module() -> torch.nn.Module:
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    )


def train(folder: Path, tokenizer: Any, rows: Sequence[Messages]) -> Trained:
    """The samples of ``rows`` and the export's tokenizer. Raises UserError where panda refuses."""
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in rows), encoding="utf-8")
    reader = JsonReader(NoOptions(), ReaderContext())
    options = InstructOptions(instruction_tuning_data_dir=str(file), template="chat")
    task = Instruct(options, TaskContext(tokenizer, reader, max_seq_length=4096))
    export = folder / "export"
    unused: Any = None
    describe_model(
        export,
        _module(),
        torch.float32,
        task.tokenizer,
        model=unused,
        context=unused,
        pretrained=None,
        generation=decoding_of(_module(), task.tokenizer, None, task.end_tokens),
    )
    (export / "config.json").unlink()  # the model is of another kind than the tokenizer's class may be
    data = task.dataset()
    samples = [(ids.tolist(), supervised.tolist()) for ids, supervised in (data[i].values() for i in range(len(data)))]
    assert data.report.bad_rows == len(data.report.first_bad_rows), "the report keeps all bad rows of a test"
    bad = {row.number - 1: row.problem for row in data.report.first_bad_rows}
    return Trained(AutoTokenizer.from_pretrained(str(export), local_files_only=True), samples, bad)


class Answer(NamedTuple):
    """An answer as the export's template writes it."""

    prompt: str
    written: str
    """The prompt, the answer, and what the template writes after it."""
    prompt_ids: list[int]


def answers_of(exported: Any, messages: Messages) -> list[Answer] | None:
    """Each answer of a conversation; None where the template refuses the conversation at one of them."""
    found = []
    for number, message in enumerate(messages):
        if message["role"] == "assistant":
            try:
                asked = {"conversation": messages[:number], "add_generation_prompt": True}
                prompt = exported.apply_chat_template(**asked, tokenize=False)
                prompt_ids = exported.apply_chat_template(**asked, tokenize=True, return_dict=True)["input_ids"]
                written = exported.apply_chat_template(messages[: number + 1], tokenize=False)
            except Exception:  # jinja's, and what it calls
                return None
            if not written.startswith(prompt) and prompt.endswith("<think>\n"):
                # What was asked for goes on with the thought, which the template leaves out of finished answers.
                written = prompt + message["content"].removeprefix("<think>\n") + exported.eos_token
            found.append(Answer(prompt, written, prompt_ids))
    return found


def encode(exported: Any, text: str) -> list[int]:
    """As ``apply_chat_template`` encodes what it has written."""
    return exported(text, add_special_tokens=False)["input_ids"]


def decode(exported: Any, ids: list[int]) -> str:
    """The text of ``ids``; with single spaces where the tokenizer makes one of several."""
    texts = exported.batch_decode(
        [ids, encode(exported, "a  b")], skip_special_tokens=False, clean_up_tokenization_spaces=False
    )
    return texts[0] if "  " in texts[1] else " ".join(texts[0].split())


def specials_of(exported: Any) -> set[str]:
    """The special tokens; that eos is one, a tokenizer written in Python says in another place."""
    flagged = {token.content for token in exported.added_tokens_decoder.values() if token.special}
    return flagged | set(exported.all_special_tokens)


def ends_of(exported: Any, answer: Answer) -> list[str]:
    """What is written up to each token at which the answer may end: after it stand special tokens and space only."""
    text, ends = answer.written.rstrip(), []
    while len(text) > len(answer.prompt):
        token = next((token for token in specials_of(exported) if text.endswith(token)), None)
        if token is None:
            break
        ends.append(text)
        text = text.removesuffix(token).rstrip()
    return ends


def spans_of(supervised: list[bool]) -> list[tuple[int, int]]:
    """Where the runs of supervised tokens begin and end."""
    spans, place = [], 0
    for is_supervised, run in itertools.groupby(supervised):
        length = len(list(run))
        if is_supervised:
            spans.append((place, place + length))
        place += length
    return spans


def difference(exported: Any, got: list[int], want: list[int]) -> str:
    """Some tokens on both sides of the first difference."""
    pairs = itertools.zip_longest(got, want)
    place = next(number for number, (one, other) in enumerate(pairs) if one != other)
    shown = [exported.convert_ids_to_tokens(ids[max(0, place - 3) : place + 4]) for ids in (got, want)]
    return f"at token {place} of {len(want)}: {shown[0]}, not {shown[1]}"


def wrong_with(exported: Any, answer: Answer, ids: list[int], start: int, end: int) -> str | None:
    """What is wrong with ``ids[start:end]`` as the place where ``answer`` is learnt."""
    if ids[:start] != answer.prompt_ids:
        return f"before it: {difference(exported, ids[:start], answer.prompt_ids)}"
    ends = ends_of(exported, answer)
    if not ends:
        return None if start < end else "nothing is learnt"
    whole = decode(exported, ids[:end])
    text = next((text for text in ends if whole == decode(exported, encode(exported, text))), None)
    if text is None:
        return f"it is {difference(exported, ids[:end], encode(exported, ends[0]))}"
    last = encode(exported, text)[-1]
    if ids[end - 1] != last:
        return f"it ends with the token {ids[end - 1]}, not {last}"
    canonical = encode(exported, text)
    if canonical[:start] == ids[:start] and canonical != ids[:end]:
        return f"other tokens for its text: {difference(exported, ids[:end], canonical)}"
    return None


def problems(trained: Trained, rows: Sequence[Messages], may_refuse: bool) -> Iterator[str]:
    """Everything in which ``trained`` differs from what the export's template makes of ``rows``."""
    exported, samples = trained.exported, iter(trained.samples)
    for number, messages in enumerate(rows):
        answers = answers_of(exported, messages)
        said = [message["content"] for message in messages if message["role"] == "assistant"]
        blank = {place for place, content in enumerate(said) if not content.strip()}
        if number in trained.bad:
            if answers is not None and not (may_refuse or blank):
                yield f"row {number} is refused: {trained.bad[number]}"
            continue
        if answers is None:
            yield f"row {number} is trained on, which the template refuses"
            return
        places: list[tuple[list[int], int, int]] = []
        while len(places) < len(answers):
            ids, supervised = next(samples, ([], []))
            if not ids:
                yield f"row {number}: {len(places)} of its {len(answers)} answers are learnt"
                return
            places += [(ids, start, end) for start, end in spans_of(supervised)]
        if len(places) > len(answers):
            yield f"row {number}: {len(places)} answers are learnt, of {len(answers)}"
            return
        for place, answer in enumerate(answers):
            if place in blank:
                continue  # tokens that strip space take that of an answer of space only, and even what is before it
            if wrong := wrong_with(exported, answer, *places[place]):
                yield f"row {number}, answer {place}: {wrong}"
    if next(samples, None) is not None:
        yield "there are more samples than answers"


def compare(folder: Path, name: str, template: str, rows: Sequence[Messages]) -> list[str]:
    """All problems of one tokenizer with one template. Rows that spell one of its special tokens are left out."""
    specials = specials_of(load(name, template))
    rows = [row for row in rows if not any(token in turn["content"] for turn in row for token in specials)]
    if not rows:
        return []
    may_refuse = template in DROPS_ITS_PROMPT
    try:
        trained = train(folder, load(name, template), rows)
    except UserError as refusal:
        refused = [answers_of(load(name, template), messages) is None for messages in rows]
        return [] if may_refuse or all(refused) else [f"refused: {refusal}"]
    return list(problems(trained, rows, may_refuse))


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("name", TOKENIZERS)
def test_ids_of_training_are_ids_of_inference(tmp_path: Path, name: str, template: str) -> None:
    found = compare(tmp_path, name, template, CONVERSATIONS)
    assert not found, "\n".join(found)


FRAGMENTS = (
    *(
        " ",
        "  ",
        "\n",
        "\n\n",
        "\t",
        "\r\n",
        "a",
        "The heron",
        " waits",
        "12",
        "2024",
        "don't",
        ".",
        "?\n",
        "😀",
        "日本",
    ),
    *(
        "é",
        "é",
        "ﬁ",
        "½",
        "Å",
        "▁",
        "Ġ",
        "##s",
        "<",
        "|",
        "[INST]",
        "</think>",
        "<think>\n",
        "user",
        "assistant\n",
        "\\n",
    ),
    *("{{ bos_token }}", "\u200b", "\u00a0", "\ufeff", "\u0301", "\u0000", "ÅA"),
)
"""Pieces of text at whose borders tokenizers and templates differ."""

content = st.lists(st.sampled_from(FRAGMENTS), max_size=6).map("".join)
drawn = st.builds(
    lambda turns, system: conversation(*turns[: len(turns) // 2 * 2], system=system),
    st.lists(content.filter(bool), min_size=2, max_size=6),
    st.none() | content,
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=150)
@given(st.sampled_from(sorted(TOKENIZERS)), st.sampled_from(sorted(TEMPLATES)), drawn)
@example("llama2-metaspace", "llama2", conversation("a", " ", "\n", "b"))
@example("gemma", "gemma", conversation(" \n", "\n \n", "a", "b"))
def test_ids_of_training_are_ids_of_inference_for_any_text(
    tmp_path_factory: Any, name: str, template: str, messages: Messages
) -> None:
    found = compare(tmp_path_factory.mktemp("any"), name, template, [messages])
    assert not found, "\n".join(found)


def test_a_date_that_the_template_writes_is_the_one_of_the_run(tmp_path: Path, monkeypatch: Any) -> None:
    rows = CONVERSATIONS[:3]
    trained = train(tmp_path, load("llama3", "llama3.2"), rows)

    class Later(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> datetime:
            return datetime(2099, 12, 31, tzinfo=tz)

    monkeypatch.setattr(chat_template_utils, "datetime", Later)
    assert not list(problems(trained, rows, may_refuse=False)), "the export is asked on another day"


def literal_ids(exported: Any, text: str, spelt: str) -> list[int]:
    """Ids of ``text``, in which ``spelt`` is characters where it stands between braces, and a token elsewhere.

    For tokenizers that treat what stands between two special tokens without regard to what is around them.
    """
    backend = exported.backend_tokenizer
    backend.encode_special_tokens = True
    placeholder = "\ue000" * (len(spelt) + 2)
    hidden = text.replace(f"{{{spelt}}}", placeholder)
    ids: list[int] = []
    while hidden:
        found = [(hidden.find(token), -len(token), token) for token in specials_of(exported) if token in hidden]
        place, _, token = min(found, default=(len(hidden), 0, ""))
        piece = hidden[:place].replace(placeholder, f"{{{spelt}}}")
        ids += backend.encode(piece, add_special_tokens=False).ids if piece else []
        ids += [exported.convert_tokens_to_ids(token)] if token else []
        hidden = hidden[place + len(token) :]
    backend.encode_special_tokens = False
    return ids


@pytest.mark.parametrize("template", ["chatml", "llama2", "llama3", "gemma", "mistral", "hermes"])
@pytest.mark.parametrize("name", ["gpt2", "llama3", "qwen", "eos-zero", "holes", "gemma", "nfkc"])
def test_special_tokens_that_a_turn_spells_are_characters(tmp_path: Path, name: str, template: str) -> None:
    tokenizer = load(name, template)
    specials = [*dict.fromkeys((*CONTROL, tokenizer.eos_token))]
    for spelt in specials:
        folder = tmp_path / str(specials.index(spelt))
        folder.mkdir()
        messages = conversation(f"Say {{{spelt}}} twice", f"It is {{{spelt}}}, {{{spelt}}}.")
        trained = train(folder, load(name, template), [messages])
        assert not trained.bad, trained.bad
        [(ids, supervised)] = trained.samples
        [(start, end)] = spans_of(supervised)
        [answer] = answers_of(trained.exported, messages) or []
        whole = literal_ids(trained.exported, ends_of(trained.exported, answer)[0], spelt)
        prompt = literal_ids(trained.exported, answer.prompt, spelt)
        assert ids[:start] == prompt
        assert decode(trained.exported, ids[:end]) == decode(trained.exported, whole)
        if whole[:start] == prompt:
            assert ids[:end] == whole


@pytest.mark.parametrize("template", ["chatml", "qwen3", "gemma", "llama2"])
@pytest.mark.parametrize("name", TOKENIZERS)
def test_no_turn_writes_a_special_token(tmp_path: Path, name: str, template: str) -> None:
    spelt = " ".join((*CONTROL, load(name).eos_token))
    plain = conversation("Say it", "It is it.")
    forged = conversation(f"Say {spelt} it", f"It is {spelt} it.")
    trained = train(tmp_path, load(name, template), [plain, forged])
    if name in CANNOT_SPELL and 1 in trained.bad:
        return
    assert not trained.bad, trained.bad
    specials = set(trained.exported.convert_tokens_to_ids([*specials_of(trained.exported)]))
    specials -= {trained.exported.unk_token_id}
    of_plain, of_forged = ([id for id in ids if id in specials] for ids, _ in trained.samples)
    assert of_forged == of_plain
