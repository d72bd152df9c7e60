"""The data: real text where the repository has some, and generated chats.

`windows` (task pretrain): the repository's own sources and pages, the files of a folder as one document, so that
    few of its windows are short.
`answers` (task instruct): the same text in pieces of one row each; the first words of a piece are its prompt.
`chats` (task instruct): generated word problems with worked answers. The repository has no such text, so it is
    drawn: the lengths in bytes of question and answer are log-normal, with the means, spreads and correlation of
    GSM8K's training split (measured 2026-11: medians 218 and 256, sigma 0.38 and 0.49, correlation 0.53).

With panda's own tokenizer, which the cases use, a token is a byte.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
SOURCES = ("panda/**/*.py", "tests/**/*.py", "plugins/**/*.py", "docs/*.md", "*.md")
REFUSED = "PandaSpecialToken"
"""A name that panda keeps for itself: it leaves out a document that spells it."""
CHATS, ANSWERS = 8000, 4000
"""Rows, at most."""
PROMPT_BYTES = 64
SPECIAL_TOKENS = 8
"""Room in a row for the tokens around prompt and answer."""

QUESTION, ANSWER, CORRELATION = (5.385, 0.382), (5.545, 0.487), 0.534
NAMES = ("Bao", "Mei", "Lin", "Tao", "Kim", "Ana", "Leo", "Zoe", "Natalia", "Weng")
THINGS = ("apples", "clips", "books", "plums", "tickets", "letters", "stickers", "marbles")
PLACES = ("at the market", "after school", "in the garden", "on Monday", "in the morning", "for a friend")


def write_rows(kind: str, length: int, file: Path) -> None:
    """Write the rows of ``kind`` for rows of ``length`` tokens to ``file``, as a JSON array, unless they are there."""
    rows = {"windows": windows, "answers": lambda: answers(length), "chats": chats}[kind]()
    text = json.dumps(list(rows), ensure_ascii=False)
    if not file.exists() or file.read_text(encoding="utf-8") != text:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")


def windows() -> Iterator[dict[str, str]]:
    """A document for each folder of the repository: its files, one after another."""
    folders: dict[Path, list[str]] = {}
    for file in sorted({file for pattern in SOURCES for file in ROOT.glob(pattern)}):
        text = file.read_text(encoding="utf-8").replace(REFUSED, "SpecialToken")
        folders.setdefault(file.parent, []).append(text)
    for folder, texts in folders.items():
        yield {"title": str(folder.relative_to(ROOT)), "content": "\n".join(texts)}


def answers(length: int) -> Iterator[dict[str, str]]:
    """Pieces of the repository's text that fill a row each."""
    text = "\n".join(row["content"] for row in windows()).encode()
    piece = length - SPECIAL_TOKENS
    prompt = min(PROMPT_BYTES, piece // 4)
    for start in range(0, len(text) - piece, piece)[:ANSWERS]:
        first, rest = text[start : start + prompt], text[start + prompt : start + piece]
        yield {"input": first.decode(errors="ignore"), "target": rest.decode(errors="ignore")}


def chats() -> Iterator[dict[str, str]]:
    """Word problems and their worked answers, the same at each call."""
    draw = random.Random(0)
    for _ in range(CHATS):
        shared = draw.gauss(0, 1)
        other = CORRELATION * shared + math.sqrt(1 - CORRELATION**2) * draw.gauss(0, 1)
        question = math.exp(QUESTION[0] + QUESTION[1] * shared)
        answer = math.exp(ANSWER[0] + ANSWER[1] * other)
        yield {"input": _question(draw, int(question)), "target": _answer(draw, int(answer))}


def _question(draw: random.Random, size: int) -> str:
    name, thing = draw.choice(NAMES), draw.choice(THINGS)
    ask = f"How many {thing} does {name} have now?"
    text = ""
    while len(text) + len(ask) < size - 18:  # half a sentence
        text += f"{name} gets {draw.randint(2, 90)} {thing} {draw.choice(PLACES)}. "
    return text + ask


def _answer(draw: random.Random, size: int) -> str:
    name, thing, have = draw.choice(NAMES), draw.choice(THINGS), draw.randint(2, 90)
    text = ""
    while len(text) < size - 32:
        more = draw.randint(2, 90)
        text += f"{name} has {have}+{more} = <<{have}+{more}={have + more}>>{have + more} {thing}.\n"
        have += more
    return text + f"#### {have}"
