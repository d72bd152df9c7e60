"""Writes the embedded sample: a byte-level tokenizer, an instruct and a pretrain data set.

Run it as ``python -m panda.data.sample.generate [DIR]``; DIR is this folder unless told otherwise. Everything is
drawn from a seeded generator, so that a second run writes the same bytes, and so made that a LLaMA of about a million
parameters learns it on two CPU cores within a minute.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable
from collections.abc import Iterable
from pathlib import Path

SEED = 42
NUM_INSTRUCT_WORDS = 1800
NUM_PRETRAIN_DOCUMENTS = 800

SPECIAL_TOKENS = ("<pad>", "<s>", "</s>")

# Words to try a trained model with: no row of the instruct data has them.
HELD_OUT_WORDS = frozenset({"panda", "bamboo", "lemur", "kimono", "sardine", "tomato"})

ONSETS = "bcdfghjklmnprstvwyz"
VOWELS = ("a", "e", "i", "o", "u", "a", "e", "i", "o", "u", "oo", "ee")
CODAS = ("", "", "", "", "n", "m", "r", "l", "s")

# An instruction with a place for a word, and what answers it.
TASKS: tuple[tuple[str, Callable[[str], str]], ...] = (
    ("Write {} in capitals.", str.upper),
    ("Spell {}.", "-".join),
    ("Say {} twice.", lambda word: f"{word} {word}"),
)

NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
NAMES = ("Bao", "Mei", "Lin", "Tao", "Kim", "Ana", "Leo", "Zoe")
ANIMALS = ("panda", "tiger", "monkey", "rabbit", "otter", "heron", "turtle", "fox")
FOODS = ("bamboo", "apples", "berries", "nuts", "plums", "leaves")
PLACES = ("forest", "garden", "valley", "meadow", "village")


def write_tokenizer(directory: Path) -> None:
    """Writes a tokenizer whose tokens are the 256 bytes, after three special ones: any text has an encoding.

    It adds no special token itself, since that is up to panda's data sets.
    """
    from tokenizers import Tokenizer
    from tokenizers import decoders
    from tokenizers import models
    from tokenizers import pre_tokenizers
    from tokenizers import processors

    # The alphabet stands for a byte by the character of that number, or, where it cannot be printed, by one past 255.
    # In the order of the bytes, the id of a byte is the byte plus the number of special tokens.
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    stand_ins = (character for character in alphabet if ord(character) > 255)
    byte_tokens = [chr(byte) if chr(byte) in alphabet else next(stand_ins) for byte in range(256)]
    tokens = [*SPECIAL_TOKENS, *byte_tokens]
    tokenizer = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    # As LLaMA's: who loads an exported model and encodes a prompt gets what the model saw in training.
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", SPECIAL_TOKENS.index("<s>"))]
    )

    pad, bos, eos = SPECIAL_TOKENS
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": pad,
        "bos_token": bos,
        "eos_token": eos,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 1_000_000,
    }
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def make_word(rng: random.Random) -> str:
    """Makes a word of two or three syllables up, one that can be said but seldom means anything."""
    return "".join(rng.choice(ONSETS) + rng.choice(VOWELS) + rng.choice(CODAS) for _ in range(rng.randint(2, 3)))


def instruct_rows(rng: random.Random) -> list[dict[str, str]]:
    """Gives each made-up word to each task.

    All tasks copy the word letter by letter, which a small model learns as a rule, not row by row: so it also answers
    for the words that it has never seen.
    """
    words: set[str] = set()
    while len(words) < NUM_INSTRUCT_WORDS:
        word = make_word(rng)
        if word not in HELD_OUT_WORDS:
            words.add(word)
    rows = [
        {"input": instruction.format(word), "target": answer(word)}
        for word in sorted(words)
        for instruction, answer in TASKS
    ]
    rng.shuffle(rows)
    return rows


def make_document(rng: random.Random) -> dict[str, str]:
    """Tells how an animal counts its food and shares it: the names, the food and the numbers come back as they must.

    So there is more to learn than spelling: to go on with a story, a model has to look up what it told before.
    """
    animal, friend = rng.sample(ANIMALS, 2)
    name, other = rng.sample(NAMES, 2)
    food = rng.choice(FOODS)
    count = rng.randint(2, 9)
    numbers = ", ".join(NUMBERS[:count])
    left = "one is" if count == 2 else f"{NUMBERS[count - 2]} are"
    return {
        "title": f"{name} the {animal}",
        "content": (
            f"{name} the {animal} lives in the {rng.choice(PLACES)}. {name} counts {food}: {numbers}. "
            f"Now {other} the {friend} comes along. {name} gives one to {other}, and {left} left."
        ),
    }


def write_rows(path: Path, rows: Iterable[dict[str, str]]) -> None:
    """Writes the rows as a JSON array with one row a line, so that a change of the data reads well in a diff."""
    lines = ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"[\n{lines}\n]\n", encoding="utf-8")


def generate(directory: Path) -> None:
    """Writes the whole sample into the folder; each data set has its own generator, so that one can change alone."""
    write_tokenizer(directory / "tokenizer")
    write_rows(directory / "instruct" / "sample.json", instruct_rows(random.Random(SEED)))
    rng = random.Random(SEED)
    documents = [make_document(rng) for _ in range(NUM_PRETRAIN_DOCUMENTS)]
    write_rows(directory / "pretrain" / "sample.json", documents)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", nargs="?", type=Path, default=Path(__file__).parent, help="default: beside this")
    generate(parser.parse_args().directory)
