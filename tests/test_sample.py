"""The sample data in the package: it is what its generator writes, and its tokenizer takes any text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import example
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from panda.data.sample.generate import HELD_OUT_WORDS
from panda.data.sample.generate import generate
from panda.registry.location import resolve_path

SAMPLE = resolve_path("panda:data/sample")
CONFIGS = Path(__file__).parents[1] / "configs"


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(str(SAMPLE / "tokenizer"), local_files_only=True)


def rows(data: str) -> list[dict[str, str]]:
    loaded: list[dict[str, str]] = json.loads((SAMPLE / data / "sample.json").read_text(encoding="utf-8"))
    return loaded


def test_the_generator_writes_the_files_of_the_package_byte_for_byte(tmp_path: Path) -> None:
    generate(tmp_path)
    written = {file.relative_to(tmp_path): file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    packaged = {file.relative_to(SAMPLE): file.read_bytes() for file in SAMPLE.rglob("*.json")}
    assert sorted(written) == sorted(packaged)
    assert [name for name in written if written[name] != packaged[name]] == []


@given(st.text())
@example("  two spaces, \t tab,\r\n newlines \n\n")
@example("don't , stop . 日本語 🐼 e\u0301 \u200b \x00 \ufeff")
def test_any_text_survives_the_tokenizer(tokenizer: Any, text: str) -> None:
    ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert ids == [byte + 3 for byte in text.encode()]
    assert tokenizer.decode(ids) == text


def test_the_tokenizer_begins_a_text_as_the_tasks_do_and_has_each_special_token(tokenizer: Any) -> None:
    assert tokenizer("a")["input_ids"] == [1, ord("a") + 3]
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    assert len(tokenizer) == 259


def test_special_tokens_can_be_left_out_of_what_is_decoded(tokenizer: Any) -> None:
    assert tokenizer.decode([1, ord("a") + 3, 2, 0], skip_special_tokens=True) == "a"


def test_the_rows_have_the_documented_fields_and_none_is_twice() -> None:
    for data, fields in (("instruct", {"input", "target"}), ("pretrain", {"title", "content"})):
        loaded = rows(data)
        assert len(loaded) >= 800
        assert all(set(row) == fields and all(row.values()) for row in loaded)
    prompts = [row["input"] for row in rows("instruct")]
    assert len(set(prompts)) == len(prompts)


def test_held_out_words_are_in_no_row() -> None:
    words = {word for row in rows("instruct") for text in row.values() for word in text.lower().strip(".").split()}
    assert not words & HELD_OUT_WORDS


@pytest.mark.parametrize("config", sorted(CONFIGS.glob("instruct*.yaml")), ids=lambda path: path.name)
def test_the_prompts_of_a_config_on_the_sample_are_not_in_its_data(config: Path) -> None:
    options = yaml.safe_load(config.read_text(encoding="utf-8"))
    if options["instruction_tuning_data_dir"] != "panda:data/sample/instruct":
        pytest.skip("another data set")
    prompts = set(options.get("prompts", []))
    assert prompts
    assert not prompts & {row["input"] for row in rows("instruct")}
    asked = {word.strip(".") for prompt in prompts for word in prompt.split()}
    assert asked & HELD_OUT_WORDS, "a prompt is about a held-out word"
