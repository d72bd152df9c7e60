"""What exports say, under the names that transformers 4.57 and 5 read; both read them in bench/exports.py."""

from __future__ import annotations

import copy
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig
from transformers import AutoTokenizer
from transformers import Mamba2Config
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))

import exports
import read_export

from panda.configuration.options import RunOptions
from panda.models.adapters.lora import add_adapters
from panda.models.adapters.lora import export_adapters
from panda.models.causal_lm import build_causal_lm
from panda.models.llama import LlamaOptions
from panda.models.llama import build_llama
from panda.registry.contexts import ModelContext
from panda.weights.delta import write_delta
from panda.weights.export import decoding_of
from panda.weights.export import describe_model
from panda.weights.finding import Source
from panda.weights.finding import pretrained_at
from panda.weights.json_object import special_float
from panda.weights.model_config import architecture_of
from panda.weights.model_config import model_config
from panda.weights.tokenizers import read_tokenizer
from panda.weights.tokenizers import write_tokenizer


def exported(kind: str, folder: Path) -> Path:
    """The files of an export of ``kind`` except its weights, as a run of one step writes them."""
    pretrained = pretrained_at(Source(str(exports.make_base(kind, folder / "base")), "ckpt_path"))
    tokenizer = read_tokenizer(pretrained.folder)
    if exports.KINDS[kind][2].get("model") == "llama":
        options = LlamaOptions(**LlamaOptions.of_checkpoint(pretrained.config))
        model: Any = build_llama(options, ModelContext(len(tokenizer), 200, None, 1, 2, pretrained.config))
    else:
        model = build_causal_lm(pretrained.config, kind, dtype=torch.float32, use_cache=False)
    dtype = torch.bfloat16 if exports.KINDS[kind][2].get("precision") == "bf16" else torch.float32
    nothing: Any = None  # of what describes models of other kinds
    describe_model(
        folder / "export",
        model,
        dtype,
        tokenizer,
        model=nothing,
        context=nothing,
        pretrained=pretrained,
        generation=decoding_of(model, tokenizer, pretrained, [tokenizer.eos_token_id]),
    )
    if kind == "adapters":
        adapted = add_adapters(model, RunOptions(use_lora=True, ckpt_path=str(pretrained.folder)))
        trained = {name: each for name, each in adapted.state_dict().items() if "lora_" in name}
        export_adapters(adapted, trained, folder / "adapters", folder / "export", read_tokenizer(folder / "export"))
        return folder / "adapters"
    return folder / "export"


@pytest.fixture(scope="module", params=exports.KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def export(kind: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported(kind, tmp_path_factory.mktemp("kind"))


def test_the_keys_are_those_that_both_versions_were_seen_to_read(kind: str, export: Path) -> None:
    """Other keys? `python bench/exports.py` reads the exports with both, and records the keys if all is the same."""
    assert exports.keys_of(export) == json.loads(exports.RECORD.read_text())[kind]


def test_an_export_says_what_its_base_says_in_the_same_words(kind: str, export: Path) -> None:
    if kind == "adapters":
        return
    base = json.loads((export.parent / "base" / "config.json").read_text())
    said = json.loads((export / "config.json").read_text())
    # initializer_range is an option of `--model llama`.
    changed = {"auto_map", "transformers_version", "torch_dtype", "use_cache", "initializer_range"}
    assert {key: said.get(key) for key in base.keys() - changed} == {key: base[key] for key in base.keys() - changed}
    assert "auto_map" not in said and said["torch_dtype"] == said["dtype"]


def test_the_tokenizer_is_the_one_of_training(export: Path) -> None:
    from tokenizers import Tokenizer

    trained, loaded = (AutoTokenizer.from_pretrained(folder) for folder in (export.parent / "base", export))
    direct = Tokenizer.from_file(str(export / "tokenizer.json"))
    for text in read_export.TEXTS:
        assert loaded(text)["input_ids"] == direct.encode(text).ids == trained(text)["input_ids"]
    assert loaded.special_tokens_map == trained.special_tokens_map
    assert loaded.all_special_tokens == trained.all_special_tokens
    for generation in (True, False):
        rendered = [
            each.apply_chat_template(read_export.CHAT, tokenize=False, add_generation_prompt=generation)
            for each in (loaded, trained)
        ]
        assert rendered[0] == rendered[1]
    said = json.loads((export / "tokenizer_config.json").read_text())
    assert said["tokenizer_class"] == "PreTrainedTokenizerFast"  # TokenizersBackend is unknown to 4.57
    assert not isinstance(said.get("extra_special_tokens"), list)  # of which 4.57 asks .keys()
    before = json.loads((export / "tokenizer.json").read_text())["pre_tokenizer"] or {}
    if "add_prefix_space" in before:  # 4.57 sets it to what is said here
        assert said["add_prefix_space"] == before["add_prefix_space"]
    assert (export / "tokenizer.model").exists() == (export.parent / "base" / "tokenizer.model").exists()


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3["original_max_position_embeddings"] = 64
LONG: dict[str, Any] = {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
LOCAL = {"rope_type": "default", "rope_theta": 300.0}
DERIVED: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("llama", {"rope_theta": 7.0}, {"rope_theta": 7.0, "rope_scaling": None}),
    ("llama", {**LLAMA3, "rope_theta": 7.0}, {"rope_theta": 7.0, "rope_scaling": LLAMA3}),
    (
        "stablelm",
        {"rope_theta": 7.0, "partial_rotary_factor": 0.5},
        {"rope_theta": 7.0, "partial_rotary_factor": 0.5, "rope_scaling": None},
    ),
    (
        "gpt_neox",
        {"rope_theta": 7.0, "partial_rotary_factor": 0.5},
        {"rotary_emb_base": 7.0, "rotary_pct": 0.5, "rope_scaling": None},
    ),
    (
        "gemma3_text",
        {
            "sliding_attention": LOCAL,
            "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 7.0},
        },
        {"rope_theta": 7.0, "rope_local_base_freq": 300.0, "rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    ),
    (
        "modernbert-decoder",
        {"sliding_attention": LOCAL, "full_attention": {"rope_type": "default", "rope_theta": 7.0}},
        {"global_rope_theta": 7.0, "local_rope_theta": 300.0, "rope_scaling": None},
    ),
    # 4.57 refuses any other key in these two.
    (
        "olmo2",
        {"rope_type": "linear", "factor": 2.0, "rope_theta": 7.0},
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
    ),
    (
        "phi3",
        {"rope_type": "longrope", **LONG, "rope_theta": 7.0, "original_max_position_embeddings": 64},
        {"rope_theta": 7.0, "rope_scaling": {"type": "longrope", **LONG}, "original_max_position_embeddings": 64},
    ),
]


@pytest.mark.parametrize(("kind", "new", "old"), DERIVED, ids=[f"{kind}-{len(new)}" for kind, new, _ in DERIVED])
def test_a_model_that_has_only_the_new_keys_is_described_by_the_old_ones_too(
    kind: str, new: dict[str, Any], old: dict[str, Any]
) -> None:
    """``old``: what the configuration classes of 4.57.6 take for the same model."""
    shape = {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2}
    more = {"original_max_position_embeddings": 64} if kind == "phi3" else {}
    given = copy.deepcopy(new if "full_attention" in new else {"rope_type": "default"} | new)
    config = AutoConfig.for_model(kind, **shape, **more, rope_parameters=given)
    for base in (None, json.loads(config.to_json_string())):  # a base that version 5 wrote
        said = model_config(config, base)
        assert {key: said.get(key) for key in old} == old
        # And this version still reads the same from it.
        again = type(config)(**{key: value for key, value in said.items() if key != "model_type"})
        assert {key: value for key, value in again.rope_parameters.items() if key != "type"} == config.rope_parameters


def test_what_the_run_changed_is_said_under_every_name() -> None:
    base = {"model_type": "llama", "rope_theta": 7.0, "rope_scaling": {"type": "linear", "factor": 2.0}}
    base |= {"vocab_size": 50, "hidden_size": 32, "num_attention_heads": 2, "torch_dtype": "float16"}
    changed = {"rope_type": "dynamic", "factor": 3.0, "rope_theta": 9.0}
    config = AutoConfig.for_model(**base | {"rope_scaling": None, "rope_parameters": changed, "vocab_size": 60})
    config.update({"dtype": "float32"})
    said = model_config(config, base)
    assert (said["rope_theta"], said["rope_parameters"], said["vocab_size"]) == (9.0, changed, 60)
    assert said["rope_scaling"] == {"rope_type": "dynamic", "factor": 3.0}
    assert said["torch_dtype"] == said["dtype"] == "float32"


def test_a_configuration_of_every_type_is_read_again_with_the_same_rope() -> None:
    """Some classes, such as Gemma 4's, do not take the older keys beside the new ones."""
    different = []
    for model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        try:
            config = AutoConfig.for_model(model_type)
        except Exception:  # some have no defaults that go together
            continue
        said = model_config(config, None)
        again = AutoConfig.for_model(said.pop("model_type"), **said)
        rope, written = (each.to_dict().get("rope_parameters") for each in (config, again))
        different += [model_type] if rope != written else []
    assert not different


def test_a_configuration_of_every_type_describes_the_same_model_when_it_is_written_again() -> None:
    different = []
    for model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        try:
            config = AutoConfig.for_model(model_type)
        except Exception:  # some have no defaults that go together
            continue
        said = architecture_of(model_config(config, None))
        again = architecture_of(json.loads(config.to_json_string(use_diff=False), object_hook=special_float))
        assert said["model_type"] == config.model_type and len(said) > 3
        different += [(model_type, key) for key in said if key in again and again[key] != said[key]]
    assert not different


def test_what_describes_no_model_is_left_out() -> None:
    """Of a type that transformers does not know, too, as a package's model may have."""
    values = {"model_type": "none", "width": 8, "inner": {"heads": 2, "dtype": "float16", "architectures": ["A"]}}
    more = {"torch_dtype": "float32", "transformers_version": "5", "x_version": 1, "use_cache": True, "vocab_size": 9}
    of_tokens = {"eos_token_id": [1, 2], "inner.": {}, "_name_or_path": "a"}
    assert architecture_of(values | more | of_tokens) == {"model_type": "none", "width": 8, "inner.heads": 2}


def test_infinity_is_written_as_before() -> None:
    """transformers 5 writes an object, which 4.57 takes for the bound of a clamp."""
    assert model_config(Mamba2Config(), None)["time_step_limit"] == [0.0, float("inf")]


def test_what_a_program_left_in_a_tokenizer_is_not_exported(tmp_path: Path) -> None:
    exports.write_tokenizer("byte BPE", tmp_path)
    file = tmp_path / "tokenizer_config.json"
    left = {"auto_map": {"AutoTokenizer": [None, "tokenization_x.X"]}, "is_local": True, "backend": "tokenizers"}
    file.write_text(json.dumps(json.loads(file.read_text()) | left))
    tokenizer = read_tokenizer(tmp_path)
    tokenizer(["a long text"], truncation=True, max_length=2)
    tokenizer.chat_template = "{{ '\u2028\x85\x0b \\ud83d \U0001f44b' }}{# \ufeff #}"
    write_tokenizer(tokenizer, tmp_path / "out")
    said = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert not said.keys() & {"auto_map", "is_local", "backend", "extra_special_tokens"}
    assert json.loads((tmp_path / "out" / "tokenizer.json").read_text())["truncation"] is None
    assert tokenizer.backend_tokenizer.truncation is not None  # the one in use is left as it was
    again = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert again.chat_template == "{{ '\u2028\x85\x0b \\ud83d \U0001f44b' }}{# \ufeff #}"


def test_deltas_and_what_is_made_of_them_say_the_same(tmp_path: Path) -> None:
    base = pretrained_at(Source(str(exports.make_base("llama, llama3 RoPE", tmp_path / "base")), "ckpt_path"))
    assert "auto_map" in base.config
    only_new = {key: value for key, value in base.config.items() if key not in ("rope_theta", "rope_scaling")}
    only_new["rope_parameters"] = {**LLAMA3, "rope_theta": 500000.0}
    file = base.folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"tokenizer_class": "TokenizersBackend"}))
    write_delta(replace(base, config=only_new), base, tmp_path / "delta")
    said = json.loads((tmp_path / "delta" / "config.json").read_text())
    assert (said["rope_theta"], said["rope_scaling"]) == (500000.0, LLAMA3) and "auto_map" not in said
    tokenizer = json.loads((tmp_path / "delta" / "tokenizer_config.json").read_text())
    assert tokenizer["tokenizer_class"] == "PreTrainedTokenizerFast"
