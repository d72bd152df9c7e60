"""``panda tokenizer``: a folder that transformers reads, from any data that readers read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from panda.cli import prepare
from panda.cli import tokenizer
from panda.data.tokenizer_training import trained_tokenizer

SAMPLE = "panda:data/sample/pretrain"


@pytest.fixture(autouse=True)
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PANDA_CACHE", str(tmp_path / "cache"))


def test_it_trains_one_that_transformers_reads_and_a_run_uses(capsys: pytest.CaptureFixture[str]) -> None:
    assert tokenizer.main([SAMPLE, "--vocab_size", "400", "--output", "new"]) == 0
    assert "new: 400 entries, from 800 rows" in capsys.readouterr().out
    made = AutoTokenizer.from_pretrained("new")
    assert len(made) == 400
    assert (made.pad_token_id, made.bos_token_id, made.eos_token_id) == (0, 1, 2)
    text = "Mei counts berries.\n\n\tनमस्ते 世界 12345 <s>é\u0301 🐼"
    assert made.decode(made(text.replace("<s>", ""))["input_ids"], skip_special_tokens=True) == text.replace("<s>", "")
    assert made("bamboo")["input_ids"][0] == made.bos_token_id
    flags = ["--task", "pretrain", "--arch", "llama-tiny", "--pretraining_data_dir", SAMPLE]
    counts = []
    for more in ([], ["--tokenizer", "new"]):
        assert prepare.main([*flags, *more]) == 0
        counts.append(int(capsys.readouterr().out.split(" samples, ")[1].split()[0].replace(",", "")))
    assert 0 < counts[1] < counts[0] / 2


@given(st.text())
def test_any_text_survives(text: str) -> None:
    made = trained_tokenizer(["the panda eats bamboo " * 10], 300)
    assert made.decode(made.encode(text, add_special_tokens=False).ids, skip_special_tokens=False) == text


def test_tokens_do_not_cross_words_or_three_digits() -> None:
    made = trained_tokenizer(["of the 123456, of the 123456,"] * 9, 300)
    tokens = [made.decode([number]) for number in range(259, made.get_vocab_size())]
    assert "123" in tokens and " the" in tokens
    assert not [token for token in tokens if "of the" in token or "1234" in token]


def test_rows_of_every_kind_are_read_and_others_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.jsonl").write_text(
        "".join(
            json.dumps(row) + "\n"
            for row in (
                {"text": "zebra zebra zebra"},
                {"messages": [{"role": "user", "content": "quokka"}, {"role": "assistant", "content": "quokka"}]},
                {"input": "wombat", "target": "wombat"},
                {"other": 1},
                {"input_ids": [1, 2]},
            )
        )
    )
    (tmp_path / "b.csv").write_text("text\ndingo dingo\n")
    assert tokenizer.main(["a.jsonl", "*.csv", "--vocab_size", "1000"]) == 0
    out = capsys.readouterr().out
    vocabulary = AutoTokenizer.from_pretrained("tokenizer").get_vocab()
    assert {"zebra", "quokka", "wombat", "dingo"} <= {token.removeprefix("Ġ") for token in vocabulary}
    assert "bad row: a.jsonl, rows 4" in out or "bad row: a.jsonl, row 4: no field 'content' and no 'text'" in out
    assert "2 of 6 rows cannot be used" in out
    assert f"the data has no more pairs that repeat: {len(vocabulary):,} entries, not 1,000" in out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "no data is given"),
        ([SAMPLE], "--vocab_size is not given"),
        ([SAMPLE, "--vocab_size", "many"], "--vocab_size: 'many' is not an integer"),
        ([SAMPLE, "--vocab_size", "258"], "256 bytes and 3 special tokens are 259"),
        ([SAMPLE, "--vocab_size", "300", "--output", "full"], "--output: 'full' exists"),
        ([SAMPLE, "--vocab_size", "300", "--learning_rate", "1"], "learning_rate is not used to train a tokenizer"),
        (["nowhere", "--vocab_size", "300"], "'nowhere' does not exist"),
        (["full", "--vocab_size", "300"], "the data has no row with text"),
    ],
)
def test_what_cannot_work_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a.json").write_text('[{"other": 1}]')
    assert tokenizer.main(words) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "tokenizer").exists()
