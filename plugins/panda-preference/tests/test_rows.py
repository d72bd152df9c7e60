"""What rows of preference data mean, in each layout that is published; and what is said of those that mean nothing."""

from __future__ import annotations

from typing import Any

import pytest
from panda.data.conversations import Conversation
from panda.data.reading import Fields
from panda.tasks.text_task import UnusableRowError

from panda_preference.rows import Answer
from panda_preference.rows import FieldNames
from panda_preference.rows import labelled_of
from panda_preference.rows import pair_of

ASKED = {"role": "user", "content": "Who waits?"}
HERON = {"role": "assistant", "content": "A heron."}
FROG = {"role": "assistant", "content": "A frog."}
SYSTEM = {"role": "system", "content": "Be brief."}
EARLIER = [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": "Good day."}]
BRIEF = [("system", "Be brief.", True)]
QUESTION = [("user", "Who waits?", True)]


def turns(answer: Answer) -> list[tuple[str, str, bool]]:
    """Role, text, and, for an answer, whether it carries loss."""
    assert isinstance(answer.text, Conversation)
    return [(turn.role, turn.text, turn.supervised) for turn in answer.text.turns]


def pair(row: dict[str, Any], **names: str) -> tuple[Any, Any, list[str]]:
    """Both answers, and the fields of ``row`` that nothing used."""
    fields = Fields(row)
    found = pair_of(fields, FieldNames(**names))
    both = (each.text if isinstance(each.text, str) else turns(each) for each in (found.chosen, found.rejected))
    return *both, fields.unused()


TEXTS = {"chosen": "A heron.", "rejected": "A frog."}
MESSAGES = {"chosen": [HERON], "rejected": [FROG]}
WHOLE = {"chosen": [ASKED, HERON], "rejected": [ASKED, FROG]}
LAYOUTS: dict[str, tuple[dict[str, Any], list[tuple[str, str, bool]]]] = {
    "TRL, text": ({"prompt": "Who waits?", **TEXTS}, QUESTION),
    "TRL, messages": ({"prompt": [ASKED], **MESSAGES}, QUESTION),
    "TRL, messages with a system prompt": ({"prompt": [SYSTEM, ASKED], **MESSAGES}, [*BRIEF, *QUESTION]),
    "TRL, implicit prompt": (WHOLE, QUESTION),
    "ultrafeedback_binarized": ({"prompt": "Who waits?", **WHOLE}, QUESTION),
    "a prompt and text in messages": ({"prompt": "Who waits?", **MESSAGES}, QUESTION),
    "orca_dpo_pairs": ({"system": "Be brief.", "question": "Who waits?", **TEXTS}, [*BRIEF, *QUESTION]),
    "system beside messages": ({"system": "Be brief.", **WHOLE}, [*BRIEF, *QUESTION]),
    "Argilla": (
        {"instruction": "Who waits?", "chosen_response": "A heron.", "rejected_response": "A frog."},
        QUESTION,
    ),
    "LLaMA-Factory, Alpaca": (
        {"instruction": "Who", "input": "waits?", "history": [["Hello.", "Good day."]], **TEXTS},
        [("user", "Hello.", True), ("assistant", "Good day.", False), ("user", "Who\nwaits?", True)],
    ),
    "LLaMA-Factory, ShareGPT": (
        {
            "conversations": [{"from": "human", "value": "Who waits?"}],
            "chosen": {"from": "gpt", "value": "A heron."},
            "rejected": {"from": "gpt", "value": "A frog."},
        },
        QUESTION,
    ),
    "messages and texts": ({"messages": [*EARLIER, ASKED], **TEXTS}, None),  # type: ignore[dict-item]
    "OpenAI": (
        {"input": {"messages": [ASKED]}, "preferred_output": [HERON], "non_preferred_output": [FROG]},
        QUESTION,
    ),
    "several turns before": (
        {"chosen": [*EARLIER, ASKED, HERON], "rejected": [*EARLIER, ASKED, FROG]},
        None,  # type: ignore[dict-item]
    ),
}
AFTER_EARLIER = [("user", "Hello.", True), ("assistant", "Good day.", False), *QUESTION]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout(layout: str) -> None:
    row, before = LAYOUTS[layout]
    chosen, rejected, unused = pair(row)
    before = before or AFTER_EARLIER
    assert chosen == [*before, ("assistant", "A heron.", True)]
    assert rejected == [*before, ("assistant", "A frog.", True)]
    assert unused == []


def test_fields_can_be_named() -> None:
    row = {"q": "Who waits?", "best": "A heron.", "worst": "A frog.", "chosen": "x"}
    chosen, rejected, unused = pair(row, prompt="q", chosen="best", rejected="worst")
    assert chosen == [*QUESTION, ("assistant", "A heron.", True)]
    assert rejected == [*QUESTION, ("assistant", "A frog.", True)]
    assert unused == ["chosen"]
    chosen, rejected, _ = pair(
        {"q": [SYSTEM, ASKED], "best": [HERON], "worst": [FROG]}, prompt="q", chosen="best", rejected="worst"
    )
    assert chosen == [*BRIEF, *QUESTION, ("assistant", "A heron.", True)]


def test_texts_without_a_prompt_stay_as_they_are() -> None:
    """As in hh-rlhf: a text has the whole dialogue in it, and what both begin with is the prompt."""
    row = {name: f"\n\nHuman: Who waits?\n\nAssistant: {text}" for name, text in TEXTS.items()}
    assert pair(row) == (row["chosen"], row["rejected"], [])


def test_an_answer_may_have_several_turns() -> None:
    more = [HERON, {"role": "user", "content": "Where?"}, {"role": "assistant", "content": "In the reeds."}]
    chosen, _, _ = pair({"prompt": "Who waits?", "chosen": more, "rejected": [FROG]})
    assert [supervised for role, _, supervised in chosen if role == "assistant"] == [True, True]


def test_tools_and_reasoning_are_kept() -> None:
    tools = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}]
    thinking = {**HERON, "reasoning_content": "It is a bird."}
    found = pair_of(Fields({"tools": tools, "chosen": [ASKED, thinking], "rejected": [ASKED, FROG]}), FieldNames())
    assert isinstance(found.chosen.text, Conversation)
    assert found.chosen.text.tools is not None and found.chosen.text.tools[0]["function"]["name"] == "look"
    assert found.chosen.text.turns[-1].extras == {"reasoning_content": "It is a bird."}


def test_what_is_not_used_is_said() -> None:
    assert sorted(pair({"prompt": "Who waits?", **TEXTS, "score": 3, "margin": 1.0})[2]) == ["margin", "score"]
    scored = {"chosen": [ASKED, {**HERON, "score": 3}], "rejected": [ASKED, FROG], "messages": [ASKED, HERON]}
    assert sorted(pair(scored)[2]) == ["chosen[].score", "messages"]
    other = {"system": "Be long.", "chosen": [SYSTEM, ASKED, HERON], "rejected": [SYSTEM, ASKED, FROG]}
    assert pair(other)[2] == ["system"]


def test_a_margin_is_read_where_it_is_used() -> None:
    row = {"prompt": "Who waits?", **TEXTS, "margin": 2}
    fields = Fields(row)
    assert pair_of(fields, FieldNames(), has_margin=True).margin == 2.0
    assert fields.unused() == []
    for wrong in ("2", True, float("nan")):
        with pytest.raises(UnusableRowError, match=r"'margin' is .*not a number"):
            pair_of(Fields(row | {"margin": wrong}), FieldNames(), has_margin=True)


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"prompt": "Who waits?", "chosen": "A heron."}, "no field 'rejected' (chosen_field and rejected_field"),
        ({"prompt": "Who waits?", "answer": "A heron."}, "no field 'chosen' and no 'rejected'"),
        ({"prompt": "Who waits?", "chosen": "A heron.", "rejected": None}, "no field 'rejected'"),
        ({"prompt": "Who waits?", "chosen": "Same.", "rejected": "Same."}, "are the same"),
        ({"chosen": [ASKED, HERON], "rejected": [ASKED, HERON]}, "are the same"),
        ({"prompt": "Who waits?", "chosen": "A heron.", "rejected": [FROG]}, "one of 'chosen' and 'rejected' is text"),
        ({"prompt": "Who waits?", "chosen": "A heron.", "rejected": ""}, "field 'rejected' is empty"),
        ({"chosen": "A heron.", "rejected": ""}, "field 'rejected' is empty"),
        ({"prompt": "Who waits?", "chosen": 3, "rejected": 4}, "field 'chosen' is neither text nor messages"),
        ({"prompt": "Where?", **WHOLE}, "'chosen' begins with a prompt of its own, which is not the row's 'prompt'"),
        ({"prompt": [SYSTEM, ASKED], **WHOLE}, "begins with a prompt of its own"),
        ({"chosen": [ASKED, {"role": "bird", "content": "x"}], "rejected": [ASKED, FROG]}, "has the role 'bird'"),
        ({"prompt": 5, **TEXTS}, "field 'prompt' is a number"),
        ({"prompt": "Who waits?", **TEXTS, "weight": 0}, "its weight is 0"),
        ({"chosen": [ASKED, HERON], "rejected": [ASKED]}, "no turn of the assistant"),
        (MESSAGES, "no prompt, neither in a field nor before the answers in 'chosen'"),
    ],
)
def test_a_bad_row_says_what_is_wrong(row: dict[str, Any], problem: str) -> None:
    with pytest.raises(UnusableRowError) as error:
        pair_of(Fields(row), FieldNames())
    assert problem in str(error.value)


# -- labelled answers ----------------------------------------------------------------------------


def labelled(row: dict[str, Any], **names: str) -> tuple[list[tuple[Any, bool]], list[str]]:
    fields = Fields(row)
    found = labelled_of(fields, FieldNames(**names))
    return [(turns(each.answer), each.desirable) for each in found], fields.unused()


GOOD = [*QUESTION, ("assistant", "A heron.", True)]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Who waits?", "completion": "A heron.", "label": True},
        {"prompt": [ASKED], "completion": [HERON], "label": 1},
        {"messages": [ASKED, HERON], "label": True},
        {"messages": [ASKED, HERON], "kto_tag": True},
        {"prompt": "Who waits?", "completion": "A heron.", "label": "True"},
        {"prompt": "Who waits?", "completion": "A heron.", "label": "desirable"},
        {"instruction": "Who waits?", "output": "A heron.", "kto_tag": True},
    ],
)
def test_labelled_layout(row: dict[str, Any]) -> None:
    assert labelled(row) == ([(GOOD, True)], [])


def test_a_pair_is_two_labelled_answers() -> None:
    bad = [*QUESTION, ("assistant", "A frog.", True)]
    assert labelled({"prompt": "Who waits?", **TEXTS}) == ([(GOOD, True), (bad, False)], [])


def test_the_label_is_of_the_last_answer() -> None:
    found, _ = labelled({"messages": [*EARLIER, ASKED, HERON], "label": "Undesirable"})
    assert found == [([*AFTER_EARLIER, ("assistant", "A heron.", True)], False)]


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"prompt": "Who waits?", "completion": "A heron."}, "no field 'label' and no 'kto_tag'"),
        ({"prompt": "Who waits?", "completion": "A heron.", "label": "yes"}, "field 'label' is 'yes', not true or"),
        ({"prompt": "Who waits?", "completion": "A heron.", "label": 0.5}, "field 'label' is 0.5, not true or false"),
        ({"messages": [ASKED, HERON, ASKED], "label": True}, "does not end with an answer"),
        ({"prompt": "Who waits?", "label": True}, "no 'target'"),
    ],
)
def test_a_bad_labelled_row_says_what_is_wrong(row: dict[str, Any], problem: str) -> None:
    with pytest.raises(UnusableRowError) as error:
        labelled_of(Fields(row), FieldNames())
    assert problem in str(error.value)
