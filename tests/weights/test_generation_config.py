"""What is followed of a generation config: compared with plain transformers, key by key."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_files import llama
from checkpoint_files import save_hf
from transformers import AutoModelForCausalLM
from transformers import AutoTokenizer
from transformers import GenerationConfig

from panda.answers.assistant import Assistant
from panda.answers.assistant import Sampling
from panda.answers.generation import continuation
from panda.answers.generation import greedy
from panda.answers.loading import described_in
from panda.registry import UserError
from panda.weights.export import decoding_of
from panda.weights.export import describe_model
from panda.weights.finding import Source
from panda.weights.finding import pretrained_at
from panda.weights.generation_config import answer_ends
from panda.weights.generation_config import decoding

CPU = torch.device("cpu")
IDS = [1, 70, 80, 70, 80, 90]
ENDS = [2, 206]
"""With these, and no other wish, the answer to IDS is 158 122 26 64 197 197, or "\\x9bw\\x17=" and half a character."""
INFINITY = float("inf")

FOLLOWED: dict[str, list[Any]] = {
    "repetition_penalty": [1.8, 2, 0.5],
    "encoder_repetition_penalty": [1.7, 50.0],
    "no_repeat_ngram_size": [1, 2],
    "encoder_no_repeat_ngram_size": [1],
    "bad_words_ids": [[[122], [26, 64]]],
    "sequence_bias": [[[[122], -30.0], [[26, 64], -5.0]]],
    "min_length": [20],
    "min_new_tokens": [9],
    "forced_bos_token_id": [0],
    "forced_eos_token_id": [0, [0, 2], 90],
    "remove_invalid_values": [True],
    "exponential_decay_length_penalty": [[2, 1.5]],
    "suppress_tokens": [[64, 71]],
    "begin_suppress_tokens": [[158, 0]],
    "stop_strings": ["w", ["zz", "="]],
    "max_time": [1e6],
}
"""Values with which a key can change which tokens follow."""
AT_ODDS: dict[str, list[Any]] = {
    "num_beams": [4],
    "num_beam_groups": [2],
    "num_return_sequences": [3],
    "early_stopping": [True, "never"],
    "length_penalty": [0.5],
    "penalty_alpha": [0.6],
    "dola_layers": ["high"],
    "low_memory": [True],
    "constraints": [[1]],
    "force_words_ids": [[[70]]],
    "prompt_lookup_num_tokens": [3],
    "num_assistant_tokens_schedule": ["heuristic"],
    "is_assistant": [True],
    "cache_implementation": ["static", "hybrid", "quantized", "no such"],
    "cache_config": [{"backend": "quanto"}],
    "compile_config": [{"mode": "default"}],
    "watermarking_config": [{"greenlist_ratio": 0.5}],
    "guidance_scale": [1.5],
    "speculation_type": ["dflash"],
    "streamer": [True],
    "logits_processor": [[]],
    "user_token_id": [195],
    "temperature": [0.6, 0, -1.0, "hot", INFINITY],
    "top_k": [20, -3],
    "top_p": [0.9, 7.5],
    "typical_p": [5.0],
    "repetition_penalty": [0, -1.0, "high", INFINITY, [1]],
    "no_repeat_ngram_size": [-1, 2.5, "two"],
    "bad_words_ids": [[], [[]], [[999]], [["word"]], "word", [[-1]]],
    "suppress_tokens": [[9999], ["a"], 7, list(range(259))],
    "forced_bos_token_id": [9999, "a", -999],
    "forced_eos_token_id": [9999, "a"],
    "min_length": [-1, "long", 0.5],
    "stop_strings": [[""], 7, [7]],
    "max_time": [-1, "long"],
    "max_length": [3, -1, "long"],
    "max_new_tokens": [0, 2.5],
    "pad_token_id": [-1, "pad"],
    "exponential_decay_length_penalty": [3, [1], ["a", "b"]],
    "sequence_bias": [{"70": 1.0}, [[[70], "much"]], 3],
    "eos_token_id": [0, [0, 70], [], -1, [-1, 71], "end", None],
    "bos_token_id": [0, [1]],
}
"""Values that today, or in another version, would break ``generate``, or that nothing follows."""
PLAUSIBLE = [True, False, None, 0, 1, 2, 0.5, -1, INFINITY, "x", [], [0], [[70]], {}, {"a": 1}]
KEYS = sorted({*GenerationConfig().to_dict(), *FOLLOWED, *AT_ODDS, "no_such_key"})


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_hf(llama(4), tmp_path_factory.mktemp("generation") / "base")


@pytest.fixture(scope="module")
def model(base: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(base).eval()


@pytest.fixture(scope="module")
def tokenizer(base: Path) -> Any:
    return AutoTokenizer.from_pretrained(base)


def answered(model: Any, tokenizer: Any, values: dict[str, Any], folder: Path, sampling: Sampling) -> str:
    """What an assistant answers where ``values`` are the generation config."""
    folder.mkdir(exist_ok=True)
    (folder / "generation_config.json").write_text(json.dumps(values))
    return Assistant(model, tokenizer, CPU, folder).answer(IDS, sampling, lambda text: None, lambda note: None).text


def plainly(model: Any, tokenizer: Any, values: dict[str, Any]) -> list[int]:
    """What plain transformers continues with, the ends left out."""
    model.generation_config = GenerationConfig(**values)
    ids = torch.tensor([IDS])
    stops = {"tokenizer": tokenizer} if "stop_strings" in values else {}
    output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, **stops)
    answer: list[int] = output[0, len(IDS) :].tolist()
    ends = values["eos_token_id"] if isinstance(values["eos_token_id"], list) else [values["eos_token_id"]]
    return [token for token in answer if token not in ends]


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in FOLLOWED.items() for value in values])
def test_what_decides_a_token_is_followed_as_plain_transformers_does(
    model: Any, tokenizer: Any, tmp_path: Path, key: str, value: Any
) -> None:
    floats = ("repetition_penalty", "encoder_repetition_penalty")
    ends = _ends(key)
    said = {key: float(value) if key in floats else value, "eos_token_id": ends}
    expected = plainly(model, tokenizer, said)
    found = decoding({key: value}, ends, tokenizer, 259)
    assert not found.left_out
    criteria = found.criteria(tokenizer, timed=True)
    common: dict[str, Any] = {"max_new_tokens": 12, "end_tokens": ends, "processors": found.processors}
    common |= {"criteria": criteria, "device": CPU}
    assert greedy(model, [IDS], pad_token_id=0, **common) == [expected]
    assert list(continuation(model, IDS, temperature=0, top_p=1, **common)) == expected
    text = tokenizer.decode(expected, skip_special_tokens=True)
    assert answered(model, tokenizer, {key: value, "eos_token_id": ends}, tmp_path / "said", Sampling(12)) == text
    # The same, with the file of an export.
    (tmp_path / "generation_config.json").write_text(json.dumps(found.written()))
    read = GenerationConfig.from_pretrained(tmp_path).to_diff_dict()
    assert plainly(model, tokenizer, {"eos_token_id": ends} | read) == expected


def test_the_values_tried_do_change_tokens(model: Any, tokenizer: Any) -> None:
    without = {str(ends): plainly(model, tokenizer, {"eos_token_id": ends}) for ends in (ENDS, [2])}
    changing = {
        key
        for key, values in FOLLOWED.items()
        for value in values
        if key not in ("repetition_penalty", "encoder_repetition_penalty") or isinstance(value, float)
        if plainly(model, tokenizer, {key: value, "eos_token_id": _ends(key)}) != without[str(_ends(key))]
    }
    unchanged = set(FOLLOWED) - changing
    assert unchanged <= {"remove_invalid_values", "max_time", "forced_bos_token_id", "encoder_no_repeat_ngram_size"}


def _ends(key: str) -> list[int]:
    """A forced end is only seen in an answer that does not end before."""
    return [2] if key == "forced_eos_token_id" else ENDS


def test_whatever_a_generation_config_says_an_answer_comes_and_the_export_works(
    model: Any, tokenizer: Any, tmp_path: Path
) -> None:
    """Each key with many values; what comes to the same, for most of them without the key, is tried once."""
    tried = set()
    for key in KEYS:
        for value in [*FOLLOWED.get(key, []), *AT_ODDS.get(key, []), *PLAUSIBLE]:
            for beside in ({}, {"do_sample": True}):
                values = {"eos_token_id": 2, **beside, key: value}
                found = decoding(values, answer_ends([], tokenizer, values), tokenizer, 259)
                if value not in (None, False) and value not in ([], {}):
                    known = key in found.written() or key in found.left_out
                    assert known or key.startswith("_") or key == "transformers_version" or _is_default(key, value)
                written = json.dumps(found.written(), allow_nan=False)
                if written not in tried:
                    tried.add(written)
                    _assert_works(model, tokenizer, values, found, tmp_path)
    assert len(tried) > 60


def _assert_works(model: Any, tokenizer: Any, values: dict[str, Any], found: Any, folder: Path) -> None:
    for sampling in (Sampling(3), Sampling(3, 0.8, 0.9)):
        answered(model, tokenizer, values, folder / "said", sampling)
    (folder / "generation_config.json").write_text(json.dumps(found.written()))
    read = GenerationConfig.from_pretrained(folder)
    read.save_pretrained(folder / "again")
    GenerationConfig(**found.written()).save_pretrained(folder / "anew")
    model.generation_config = read
    ids = torch.tensor([IDS])
    model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, tokenizer=tokenizer)


def _is_default(key: str, value: Any) -> bool:
    return value in (True, 1, 0) or key == "eos_token_id"


def test_what_is_left_out_is_said_with_its_reason_in_one_line(tokenizer: Any) -> None:
    values = {"num_beams": 4, "length_penalty": 2.0, "output_scores": True, "chat_format": "chatml", "top_k": 3}
    note = decoding(values, [2], tokenizer, 259).note("base")
    assert note is not None and "\n" not in note
    assert "num_beams, length_penalty (beam search, but" in note and "chat_format (unknown to panda)" in note
    assert "output_scores (the form" in note and "top_k (only for sampling, and do_sample is not true)" in note
    nothing = {"num_beams": 1, "output_scores": False, "use_cache": True, "repetition_penalty": 1.0, "eos_token_id": 5}
    assert decoding(nothing, [2], tokenizer, 259).note("base") is None


def test_the_ends_are_those_of_both_files_the_tokenizer_and_training(tokenizer: Any) -> None:
    assert answer_ends([90, 2], tokenizer, {"eos_token_id": 0}, {"eos_token_id": [0, 7]}) == [0, 7, 2, 90]
    assert answer_ends([], tokenizer, {"eos_token_id": None}, {}) == [2]
    assert answer_ends([0], tokenizer, {"eos_token_id": [-1, True, "</s>", 2**63, 5]}) == [5, 2, 0]


@pytest.mark.parametrize("said", [None, {"eos_token_id": 70, "repetition_penalty": 1.3, "num_beams": 2}])
def test_an_export_and_its_configuration_name_the_same_ends(
    model: Any, tokenizer: Any, tmp_path: Path, said: dict[str, Any] | None
) -> None:
    base = save_hf(llama(4), tmp_path / "base")
    config = json.loads((base / "config.json").read_text()) | {"eos_token_id": None}
    del config["eos_token_id"]
    (base / "config.json").write_text(json.dumps(config))
    (base / "generation_config.json").unlink()
    if said is not None:
        (base / "generation_config.json").write_text(json.dumps(said))
    pretrained = pretrained_at(Source(str(base), "ckpt_path"))
    found = decoding_of(model, tokenizer, pretrained, [71])
    assert found.ends == ([70, 2, 71] if said else [2, 71])
    nothing: Any = None
    describe_model(
        tmp_path / "model", model, torch.float32, tokenizer, model=nothing, context=nothing,
        pretrained=pretrained, generation=found,
    )  # fmt: skip
    written = json.loads((tmp_path / "model" / "generation_config.json").read_text())
    assert written.get("repetition_penalty") == (said or {}).get("repetition_penalty") and "num_beams" not in written
    assert json.loads((tmp_path / "model" / "config.json").read_text())["eos_token_id"] == found.ends
    assert Assistant(None, tokenizer, CPU, tmp_path / "model").decoding.ends == found.ends


def test_a_configuration_names_ends_beside_the_generation_config(tokenizer: Any, model: Any, tmp_path: Path) -> None:
    base = save_hf(llama(4, eos_token_id=[72, 0]), tmp_path / "base")
    (base / "generation_config.json").write_text('{"eos_token_id": 0}')
    assert Assistant(None, tokenizer, CPU, base).decoding.ends == [0, 72, 2]
    assert decoding_of(model, tokenizer, pretrained_at(Source(str(base), "ckpt_path")), [2]).ends == [0, 72, 2]


def test_a_configuration_that_takes_one_end_only_names_the_first() -> None:
    from transformers import AutoConfig

    from panda.weights.export import _state_ends

    for kind, expected in (("nomic_bert", 5), ("llama", [5, 6])):
        config = AutoConfig.for_model(kind)
        _state_ends(config, [5, 6])
        assert config.eos_token_id == expected


def test_sampling_that_the_file_asks_for_is_said(base: Path, tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "generation_config.json").write_text('{"do_sample": true, "temperature": 0.6, "top_k": 20}')
    [note] = Assistant(None, tokenizer, CPU, tmp_path).notes
    assert "asks for sampling (temperature 0.6, top_k 20); panda takes the likeliest token" in note
    assert described_in(base).assistant(CPU).notes == []
    (tmp_path / "generation_config.json").write_text("[]")
    with pytest.raises(UserError, match="expected a JSON object"):
        Assistant(None, tokenizer, CPU, tmp_path)
