"""Record what TRL's SFTTrainer trains on, for tests/data/test_trl.py: token ids, and which of them carry loss.

In an environment with torch, transformers, trl and datasets (pip install trl), which panda's own does not need:

    python tests/record_trl.py tests/data/trl.json

TRL reads where answers are from ``{% generation %}`` blocks, which the zoo's templates get as TRL's own patched
templates have them: around an answer with its end token and the line break after it.
"""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from tokenizer_zoo import TEMPLATES
from tokenizer_zoo import load

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "The weather of a city.",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    }
]


def _turns(*texts: str) -> list[dict[str, Any]]:
    roles = ("user", "assistant")
    return [{"role": roles[number % 2], "content": text} for number, text in enumerate(texts)]


_CALL = [{"type": "function", "function": {"name": "weather", "arguments": {"city": "Paris"}}}]
_THOUGHT = [
    {"role": "user", "content": "Is 3 < 5?"},
    {"role": "assistant", "content": "Yes.", "reasoning_content": "Easy."},
    {"role": "user", "content": "Is 5 < 3?"},
    {"role": "assistant", "content": "No.", "reasoning_content": "The other way."},
]

KINDS: dict[str, tuple[str | None, dict[str, Any], dict[str, Any]]] = {
    "one turn": ("chatml", {}, {"messages": _turns("What is the capital of France?", "Paris.")}),
    "several turns": ("chatml", {}, {"messages": _turns("Who waits?", "The heron.", "Where?", "In the reeds.")}),
    "prompt and completion": (None, {}, {"prompt": "The heron waits", "completion": " in the reeds."}),
    "prompt and completion that merge": (None, {}, {"prompt": "The her", "completion": "on waits."}),
    "prompt and completion of turns": (
        "chatml",
        {},
        {"prompt": _turns("Who waits?", "The heron.", "Where?"), "completion": _turns("", "In the reeds.")[1:]},
    ),
    "a system turn": (
        "chatml",
        {},
        {"messages": [{"role": "system", "content": "You are a pike."}, *_turns("Who waits?", "The heron.")]},
    ),
    "tools": (
        "hermes",
        {},
        {
            "messages": [
                {"role": "user", "content": "How is the weather in Paris?"},
                {"role": "assistant", "content": "", "tool_calls": _CALL},
                {"role": "tool", "content": '{"temperature": 21.5}'},
                {"role": "assistant", "content": "21.5 degrees."},
            ],
            "tools": TOOLS,
        },
    ),
    "reasoning": ("qwen3", {}, {"messages": _THOUGHT}),
    "reasoning of the first answer": ("qwen3", {}, {"messages": _THOUGHT[:2]}),
    "text": (None, {}, {"text": "The heron waits in the reeds.\n\nAnd the pike waits below it."}),
    "too long": (
        "chatml",
        {"max_length": 52},
        {"messages": _turns("Who waits?", "The heron.", "Where?", "In the reeds, " * 8)},
    ),
    "a prompt that is too long": ("chatml", {"max_length": 16}, {"messages": _turns("Who waits? " * 9, "The heron.")}),
    "a long prompt": ("chatml", {}, {"messages": _turns("Who waits? " * 9, "The heron.")}),
    "an answer that begins with space": ("chatml", {}, {"messages": _turns("Where?", "\n\n  In the reeds. \n")}),
    "characters": ("chatml", {}, {"messages": _turns("日本語 😀?", "👍🏽 é Größe ﬁ\t½")}),
}
"""Kinds of rows: the template (None for text), options of SFTConfig, and the row."""

TOKENIZERS = ("qwen", "llama3", "llama2-prepend", "llama2-metaspace", "gemma", "mistral")

ANSWERS = {
    "chatml": (
        "{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}",
        "{{ '<|im_start|>' + message.role + '\\n' }}{% if message.role == 'assistant' %}"
        "{% generation %}{{ message.content + '<|im_end|>' + '\\n' }}{% endgeneration %}"
        "{% else %}{{ message.content + '<|im_end|>' + '\\n' }}{% endif %}",
    ),
    "hermes": (
        "{{- '<|im_start|>assistant' }}{% if message.content %}{{ '\\n' + message.content }}{% endif %}",
        "{{- '<|im_start|>assistant' }}{% generation %}"
        "{% if message.content %}{{ '\\n' + message.content }}{% endif %}",
    ),
    "qwen3": ("{{- '<|im_start|>assistant\\n' }}\n", "{{- '<|im_start|>assistant\\n' }}{% generation %}\n"),
}
"""How templates get their blocks: a part of the text, and what replaces it."""


def marked(template: str) -> str:
    """The template with generation blocks."""
    text = TEMPLATES[template]
    part, replacement = ANSWERS[template]
    assert text.count(part) == 1
    text = text.replace(part, replacement)
    if template != "chatml":
        end = "{{- '<|im_end|>\\n' }}\n{%- endif %}" if template == "qwen3" else "{{- '<|im_end|>\\n' }}\n{%- elif"
        assert text.count(end) == 1, template
        text = text.replace(end, end.replace("' }}\n", "' }}{% endgeneration %}\n", 1))
    return text


def vocabulary(name: str) -> str:
    """A hash of the tokens and their ids, which a recording is good for."""
    return hashlib.sha256(repr(sorted(load(name).get_vocab().items())).encode()).hexdigest()[:16]


def record(name: str, kind: str, folder: str) -> dict[str, Any]:
    """What the trainer's data loader gives for one row."""
    from datasets import Dataset
    from transformers import LlamaConfig
    from transformers import LlamaForCausalLM
    from trl import SFTConfig
    from trl import SFTTrainer

    template, options, row = KINDS[kind]
    tokenizer = load(name)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    if template:
        tokenizer.chat_template = marked(template)
        if "messages" in row:
            rendered = [
                load(name, template).apply_chat_template(row["messages"], tools=row.get("tools"), tokenize=False),
                tokenizer.apply_chat_template(row["messages"], tools=row.get("tools"), tokenize=False),
            ]
            assert rendered[0] == rendered[1], rendered
    size = max(tokenizer.get_vocab().values()) + 1
    tiny = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    arguments = SFTConfig(
        output_dir=folder,
        assistant_only_loss="messages" in row,
        use_cpu=True,
        bf16=False,
        report_to=[],
        per_device_train_batch_size=1,
        disable_tqdm=True,
        **options,
    )
    trainer = SFTTrainer(
        LlamaForCausalLM(LlamaConfig(vocab_size=size, **tiny)),
        arguments,
        train_dataset=Dataset.from_list([row]),
        processing_class=tokenizer,
    )
    if not len(trainer.train_dataset):  # it leaves out rows of which nothing is left to learn
        return {"tokenizer": name, "kind": kind, "ids": [], "learnt": ""}
    [batch] = trainer.get_train_dataloader()
    learnt = "".join("01"[label != -100] for label in batch["labels"][0].tolist())
    return {"tokenizer": name, "kind": kind, "ids": batch["input_ids"][0].tolist(), "learnt": learnt}


def main() -> None:
    import transformers
    import trl

    with tempfile.TemporaryDirectory() as folder:
        rows = [record(name, kind, folder) for kind in KINDS for name in TOKENIZERS]
    recording = {
        "command": "python tests/record_trl.py tests/data/trl.json",
        "trl": trl.__version__,
        "transformers": transformers.__version__,
        "vocabularies": {name: vocabulary(name) for name in TOKENIZERS},
        "rows": "\n",
    }
    lines = ",\n".join(json.dumps(row) for row in rows)
    Path(sys.argv[1]).write_text(json.dumps(recording).replace('"\\n"}', f"[\n{lines}\n]}}\n"), encoding="utf-8")


if __name__ == "__main__":
    main()
