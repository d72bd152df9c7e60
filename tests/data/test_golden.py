"""The tokens that panda makes of fixed data, recorded: the token cache takes them as the same while VERSION is.

Where a test here fails, panda makes other tokens than before of the same data. Where that is meant: raise ``VERSION``
in panda/data/token_cache.py, so that no run uses tokens from an older cache, and record what the failure prints.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import feather
from pyarrow import parquet
from transformers import AutoTokenizer

from panda.data.auto_reader import AutoOptions
from panda.data.auto_reader import AutoReader
from panda.data.token_cache import VERSION
from panda.registry.contexts import ReaderContext
from panda.registry.contexts import TaskContext
from panda.registry.location import resolve_path
from panda.tasks.instruct import Instruct
from panda.tasks.instruct import InstructOptions
from panda.tasks.mix import Mix
from panda.tasks.mix import MixOptions
from panda.tasks.pretrain import Pretrain
from panda.tasks.pretrain import PretrainOptions

GOLDEN = {
    "version": "5",
    "pretrain a.json": "0668013881e3b226",
    "instruct a.json": "1e81df160cf6f2da",
    "pretrain a.jsonl.gz": "0668013881e3b226",
    "instruct a.jsonl.gz": "1e81df160cf6f2da",
    "pretrain a.csv": "0668013881e3b226",
    "instruct a.csv": "d183acfc12e0b7ea",
    "pretrain a.tsv": "0668013881e3b226",
    "instruct a.tsv": "d183acfc12e0b7ea",
    "pretrain a.txt": "b0d599d8920c0c17",
    "pretrain a.parquet": "0668013881e3b226",
    "instruct a.parquet": "1e81df160cf6f2da",
    "pretrain a.arrow": "0668013881e3b226",
    "instruct a.arrow": "1e81df160cf6f2da",
    "instruct dialogues, plain": "020976cb40865140",
    "instruct dialogues, chat": "421200c7e02fb162",
    "mix": "b9dc0ad4f718cb06",
    "pretrain lines": "056f8a3af719c4fe",
}

TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Say </s> and 🐼."},
    {"role": "assistant", "content": "  </s>\n🐼 ", "weight": 1},
    {"role": "user", "content": "Again"},
    {"role": "assistant", "content": "no", "train": True},
]
ROWS = [
    {"input": "What is a heron?", "target": "A bird.\nIt waits.", "text": "The heron\twaits.", "title": "Heron"},
    {
        "input": "Spell: né",
        "target": "n-é",
        "text": "\ufeffA second document, which is longer than the others are. " * 3,
    },
    {"input": "", "target": "x", "text": "<s> is characters here"},
    {"input": "lost", "target": "", "text": ""},
]
DIALOGUES = [
    {"messages": TURNS},
    {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}], "system": "S"},
    {"instruction": "Add.", "input": "1+1", "output": "2", "history": [["a", "b"]]},
    {"prompt": TURNS[:2], "completion": [{"role": "assistant", "content": "", "reasoning_content": "why"}]},
    {"question": "q", "context": "c", "answers": {"text": ["first", "second"], "answer_start": [0, 1]}},
    {"input_ids": [4, 5, 6, 7], "labels": [-100, 5, -100, 7]},
]
CHAT = (
    "{% for message in messages %}{{ '<s>' + message['role'] + '\n' + message['content'] | trim + '</s>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<s>assistant\n' }}{% endif %}"
)


def as_json(file: Path, rows: list[dict[str, Any]]) -> None:
    file.write_text(json.dumps(rows, ensure_ascii=False, indent=1))


def as_lines(file: Path, rows: list[dict[str, Any]]) -> None:
    file.write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode()))


def as_csv(file: Path, rows: list[dict[str, Any]]) -> None:
    with file.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]), dialect="excel-tab" if file.suffix == ".tsv" else "excel")
        writer.writeheader()
        writer.writerows(rows)


def as_text(file: Path, rows: list[dict[str, Any]]) -> None:
    file.write_text("\r\n".join(row["text"] for row in rows))


def as_parquet(file: Path, rows: list[dict[str, Any]]) -> None:
    parquet.write_table(pyarrow.Table.from_pylist(rows), file)


def as_arrow(file: Path, rows: list[dict[str, Any]]) -> None:
    feather.write_feather(pyarrow.Table.from_pylist(rows), file)


FILES: dict[str, Callable[[Path, list[dict[str, Any]]], None]] = {
    "a.json": as_json,
    "a.jsonl.gz": as_lines,
    "a.csv": as_csv,
    "a.tsv": as_csv,
    "a.txt": as_text,
    "a.parquet": as_parquet,
    "a.arrow": as_arrow,
}


def fingerprints(folder: Path, tokenizer: Any) -> dict[str, str]:
    """Hashes of the samples that each task makes of each kind of file, and of layouts of conversations."""
    (folder / "dialogues.jsonl").write_text("\n".join(map(json.dumps, DIALOGUES)))
    context = TaskContext(tokenizer, AutoReader(AutoOptions(), ReaderContext()), 40)
    found = {}

    def note(name: str, task: Any) -> None:
        dataset = task.dataset()
        counted = [dataset.report.rows, dataset.report.bad_rows, dataset.report.truncated, len(dataset)]
        found[name] = hashlib.sha256(f"{dataset.fingerprint} {counted}".encode()).hexdigest()[:16]

    for name, write in FILES.items():
        write(folder / name, ROWS)
        note(f"pretrain {name}", Pretrain(PretrainOptions(pretraining_data_dir=str(folder / name)), context))
        if write != as_text:
            options = InstructOptions(instruction_tuning_data_dir=str(folder / name))
            note(f"instruct {name}", Instruct(options, context))
    dialogues = str(folder / "dialogues.jsonl")
    note("instruct dialogues, plain", Instruct(InstructOptions(instruction_tuning_data_dir=dialogues), context))
    tokenizer.chat_template = CHAT
    note("instruct dialogues, chat", Instruct(InstructOptions(instruction_tuning_data_dir=dialogues), context))
    of_both = MixOptions(instruction_tuning_data_dir=dialogues, pretraining_data_dir=str(folder / "a.json"))
    note("mix", Mix(of_both, context))
    line = AutoReader(AutoOptions(text_document="line"), ReaderContext(max_row_bytes=60))
    lines = TaskContext(tokenizer, line, 40)
    note("pretrain lines", Pretrain(PretrainOptions(pretraining_data_dir=str(folder / "a.txt")), lines))
    return found


def test_panda_makes_the_recorded_tokens_of_the_recorded_data(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(str(resolve_path("panda:data/sample/tokenizer")), local_files_only=True)
    found = fingerprints(tmp_path, tokenizer)
    found = {"version": str(VERSION)} | found
    changed = [name for name in found if GOLDEN.get(name) != found[name]]
    if found != GOLDEN:
        pytest.fail(
            f"panda makes other tokens of: {', '.join(changed)}. If that is meant, raise VERSION in"
            f" panda/data/token_cache.py where it has not been raised, and write here: GOLDEN = {json.dumps(found)}"
        )
