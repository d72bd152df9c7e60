"""Writes the sample: pairs of a right and a wrong answer, and answers labelled right or wrong; of each, some held out.

Run it as ``python -m panda_preference.sample.generate [DIR]``; DIR is this folder unless told otherwise. Everything is
drawn from a seeded generator, so that a second run writes the same bytes. The words are made up, so that a model has to
learn what makes an answer right, and not which words are: held-out words are in no row to train on.

``model`` is one of 37,216 parameters that knows panda's own sample; it is what a run of the flags MODEL left,
in bfloat16 (``--model RUN/export`` writes it again).
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable
from collections.abc import Iterable
from pathlib import Path
from typing import Any

MODEL = (
    "--task instruct --arch llama-tiny --hidden_size 32 --num_layers 2 --num_heads 4 --intermediate_size 64"
    " --instruction_tuning_data_dir panda:data/sample/instruct --max_seq_length 128 --optimizer adamw"
    " --learning_rate 4e-3 --lr_scheduler cosine --warmup_steps 50 --max_grad_norm 1.0"
    " --per_gpu_train_batch_size 32 --gradient_accumulation_steps 1 --num_train_epochs 8"
)

SEED = 14
WORDS = 160
HELD_OUT = 32
"""Words; each is asked about once a task."""

ONSETS = "bcdfghjklmnprstvwyz"
VOWELS = "aeiou"
CODAS = ("", "", "n", "m", "r", "l", "s")

TASKS: tuple[tuple[str, Callable[[str], str], Callable[[str], str]], ...] = (
    ("Write {} in capitals.", str.upper, str.title),
    ("Spell {}.", "-".join, " ".join),
    ("Say {} twice.", lambda word: f"{word} {word}", lambda word: f"{word} {word} {word}"),
)
"""What is asked of a word, how it is answered right, and how not."""


def make_word(rng: random.Random) -> str:
    return "".join(rng.choice(ONSETS) + rng.choice(VOWELS) + rng.choice(CODAS) for _ in range(2))


def pairs(words: list[str], rng: random.Random) -> list[dict[str, Any]]:
    """A row for each task and word, half of them as text, half as messages: panda-preference reads both."""
    rows: list[dict[str, Any]] = []
    for word in words:
        for asked, right, wrong in TASKS:
            prompt, chosen, rejected = asked.format(word), right(word), wrong(word)
            if rng.random() < 0.5:
                rows.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
            else:
                begun = {"role": "user", "content": prompt}
                said = ({"role": "assistant", "content": text} for text in (chosen, rejected))
                rows.append(dict(zip(("chosen", "rejected"), ([begun, answer] for answer in said), strict=True)))
    rng.shuffle(rows)
    return rows


def labelled(words: list[str], rng: random.Random) -> list[dict[str, Any]]:
    """A row for each task and word with one answer, right or wrong."""
    rows = []
    for word in words:
        for asked, right, wrong in TASKS:
            is_right = rng.random() < 0.5
            answer = right(word) if is_right else wrong(word)
            rows.append({"prompt": asked.format(word), "completion": answer, "label": is_right})
    rng.shuffle(rows)
    return rows


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def generate(directory: Path) -> None:
    rng = random.Random(SEED)
    words: dict[str, None] = {}
    while len(words) < WORDS + HELD_OUT:
        words[make_word(rng)] = None
    train, held_out = list(words)[:WORDS], list(words)[WORDS:]
    for name, make in (("pairs", pairs), ("labelled", labelled)):
        write_rows(directory / name / "train.jsonl", make(train, random.Random(SEED)))
        write_rows(directory / name / "held-out.jsonl", make(held_out, random.Random(SEED + 1)))


def write_model(export: Path, directory: Path) -> None:
    """Copy the model at ``export``, its weights in bfloat16."""
    import torch
    from safetensors.torch import load_file
    from safetensors.torch import save_file

    directory.mkdir(parents=True, exist_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (directory / name).write_bytes((export / name).read_bytes())
    described = json.loads((export / "config.json").read_text()) | {"dtype": "bfloat16"}
    (directory / "config.json").write_text(json.dumps(described, indent=2) + "\n")
    weights = {name: tensor.to(torch.bfloat16) for name, tensor in load_file(export / "model.safetensors").items()}
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "model.safetensors").chmod(0o644)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", nargs="?", type=Path, default=Path(__file__).parent, help="default: beside this")
    parser.add_argument("--model", type=Path, help="write the model too, from this export")
    arguments = parser.parse_args()
    generate(arguments.directory)
    if arguments.model:
        write_model(arguments.model, arguments.directory / "model")
