"""Checkpoints: found, told apart, read exactly, and explained where something is wrong with them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_files import SHAPE
from checkpoint_files import llama
from checkpoint_files import save_delta
from checkpoint_files import save_hf
from checkpoint_files import save_meta
from checkpoint_files import save_pickle
from safetensors.torch import load_file
from safetensors.torch import save_file
from transformers import AutoConfig
from transformers import AutoModelForCausalLM
from transformers import GPT2Config
from transformers import MixtralConfig
from transformers import Qwen2Config

from panda.cli.train import main
from panda.configuration.arguments import parse_arguments
from panda.configuration.configure import configure
from panda.configuration.options import RunOptions
from panda.engine.placement import place
from panda.engine.processes import Processes
from panda.registry import UserError
from panda.registry.resolve import Resolved
from panda.run.assembly import load_tokenizer
from panda.run.model import build_outline
from panda.run.model import model_context
from panda.weights.finding import find_pretrained
from panda.weights.pretrained import fitted

IDS = torch.arange(80).reshape(2, 40) * 11 % 259


def configured(*argv: object) -> Resolved:
    flags = [str(word) for word in ("--max_seq_length", 64, *argv)]
    return configure(
        parse_arguments(flags if "--model" in flags or "--arch" in flags else ["--model", "llama", *flags])
    ).resolved


def loaded(*argv: object) -> Any:
    """The module of a run with these flags, with its weights, as the runner makes it on one CPU."""
    resolved = configured(*argv)
    pretrained = find_pretrained(resolved.core)
    assert pretrained is not None
    context = model_context(resolved, load_tokenizer(resolved.core.tokenizer), pretrained)
    module = build_outline(resolved, context)
    assert module is not None
    assert all(parameter.is_meta for parameter in module.parameters()), "nothing is initialised"
    place(module, fitted(module, pretrained), RunOptions(), {}, Processes(0, 1, torch.device("cpu")))
    return module.eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model.eval()(IDS).logits
    return result


@pytest.fixture(scope="module")
def model() -> Any:
    return llama()


@pytest.fixture(scope="module")
def folder(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in sharded safetensors. Tests that spoil it copy it first."""
    return save_hf(model, tmp_path_factory.mktemp("hf") / "tiny")


@pytest.fixture
def spoilt(folder: Path, tmp_path: Path) -> Path:
    shutil.copytree(folder, tmp_path / "spoilt")
    return tmp_path / "spoilt"


# -- what is read is what was saved ----------------------------------------------------------


def test_safetensors_give_the_model_that_was_saved(model: Any, folder: Path) -> None:
    assert torch.equal(logits(loaded("--ckpt_path", folder)), logits(model))


def test_every_tensor_is_a_copy_and_no_view_of_the_file(folder: Path, tmp_path: Path) -> None:
    copied = tmp_path / "copy"
    shutil.copytree(folder, copied)
    module = loaded("--ckpt_path", copied)
    before = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(1)
    again = loaded("--ckpt_path", copied)
    assert all(torch.equal(parameter, before[name]) for name, parameter in again.named_parameters())


def test_tied_embeddings_stay_one_tensor(tmp_path: Path) -> None:
    tied = llama(tie_word_embeddings=True)
    module = loaded("--ckpt_path", save_hf(tied, tmp_path / "tied"))
    assert module.lm_head.weight is module.model.embed_tokens.weight
    assert torch.equal(logits(module), logits(tied))


@pytest.mark.parametrize("split_vocabulary", [False, True])
def test_metas_format_is_joined_and_reordered(model: Any, tmp_path: Path, split_vocabulary: bool) -> None:
    path = save_meta(model, tmp_path / "meta", split_vocabulary=split_vocabulary)
    module = loaded("--ckpt_path", path, "--allow_pickle", "--max_position_embeddings", 128)
    expected = model.state_dict()
    got = module.state_dict()
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], expected[name]) for name in expected)


def test_metas_format_computes_what_metas_code_does(model: Any, tmp_path: Path) -> None:
    path = save_meta(model, tmp_path / "meta", ranks=1)
    state = torch.load(path / "consolidated.00.pth", weights_only=True)
    module = loaded("--ckpt_path", path, "--allow_pickle")
    assert torch.allclose(logits(module), meta_forward(state, IDS), atol=1e-4, rtol=0)


def meta_forward(state: dict[str, torch.Tensor], ids: torch.Tensor) -> torch.Tensor:
    """LLaMA as its paper and Meta's published code have it: rotation of neighbours, as complex numbers."""
    heads, kv_heads, eps = 4, 2, 1e-5

    def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight

    def rotated(x: torch.Tensor) -> torch.Tensor:  # [rows, length, heads, width]
        width = x.shape[-1]
        angles = torch.outer(torch.arange(x.shape[1]), 10000.0 ** (-torch.arange(0, width, 2) / width))
        turned = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2)) * torch.polar(
            torch.ones_like(angles), angles
        ).unsqueeze(1)
        return torch.view_as_real(turned).flatten(-2)

    x = state["tok_embeddings.weight"][ids]
    rows, length, hidden = x.shape
    mask = torch.full((length, length), float("-inf")).triu(1)
    for layer in range(2):
        w = {name.removeprefix(f"layers.{layer}."): value for name, value in state.items()}
        h = norm(x, w["attention_norm.weight"])
        q, k, v = (
            (h @ w[f"attention.w{part}.weight"].T).view(rows, length, count, hidden // heads)
            for part, count in (("q", heads), ("k", kv_heads), ("v", kv_heads))
        )
        q, k = rotated(q), rotated(k)
        k, v = (part.repeat_interleave(heads // kv_heads, 2) for part in (k, v))
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / (hidden // heads) ** 0.5 + mask
        attended = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v).reshape(rows, length, hidden)
        x = x + attended @ w["attention.wo.weight"].T
        h = norm(x, w["ffn_norm.weight"])
        gate = torch.nn.functional.silu(h @ w["feed_forward.w1.weight"].T)
        x = x + (gate * (h @ w["feed_forward.w3.weight"].T)) @ w["feed_forward.w2.weight"].T
    return norm(x, state["norm.weight"]) @ state["output.weight"].T


def test_a_delta_is_added_to_its_base(tmp_path: Path) -> None:
    """As PandaLLM's: the fine-tune has an entry more than its base, and embedding and output whole."""
    base, target = llama(1, vocab_size=258), llama(2)
    save_hf(base, tmp_path / "base")
    save_delta(target, base, tmp_path / "tiny-delta")
    module = loaded("--ckpt_path", tmp_path / "tiny-delta", "--base_path", tmp_path / "base")
    assert torch.allclose(logits(module), logits(target), atol=1e-4)
    with pytest.raises(UserError, match=r"is a delta: the difference .* Name those weights with `base_path`"):
        configured("--ckpt_path", tmp_path / "tiny-delta")


def test_pickles_are_loaded_when_asked_for_in_so_many_words(model: Any, tmp_path: Path) -> None:
    path = save_pickle(model, tmp_path / "old")
    with pytest.raises(UserError, match=r"holds its weights in pickles \(\*\.bin\*\), .*`--allow_pickle`"):
        configured("--ckpt_path", path)
    assert torch.equal(logits(loaded("--ckpt_path", path, "--allow_pickle")), logits(model))


class Evil:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return Path.touch, (Path("was-run"),)  # type: ignore[return-value]


def test_a_pickle_that_runs_code_is_refused_even_then(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = save_pickle(model, tmp_path / "old")
    torch.save({"model.norm.weight": Evil()}, path / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"pytorch_model\.bin: damaged, or not a pickle of tensors only"):
        loaded("--ckpt_path", path, "--allow_pickle")
    assert not (tmp_path / "was-run").exists()


OTHERS: dict[str, Callable[[], Any]] = {
    "qwen2": lambda: Qwen2Config(**SHAPE | {"vocab_size": 270}, tie_word_embeddings=True),
    "gpt2": lambda: GPT2Config(vocab_size=259, n_embd=32, n_layer=2, n_head=4, n_positions=128),
}


@pytest.mark.parametrize("name", OTHERS)
def test_hf_takes_any_causal_language_model(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    other = AutoModelForCausalLM.from_config(OTHERS[name]())
    path = save_hf(other, tmp_path / name, shards=False)
    assert torch.equal(logits(loaded("--model", "hf", "--ckpt_path", path)), logits(other))
    with pytest.raises(UserError, match=f"model_type is '{name}'. `--model hf` accepts any"):
        configured("--ckpt_path", path)


def test_a_mixture_of_experts_that_lacks_a_tensor_of_an_expert_is_refused(tmp_path: Path) -> None:
    mixtral = AutoModelForCausalLM.from_config(MixtralConfig(**SHAPE, num_local_experts=3))
    path = save_hf(mixtral, tmp_path / "mixtral", shards=False)
    assert torch.equal(logits(loaded("--model", "hf", "--ckpt_path", path)), logits(mixtral))
    weights = load_file(path / "model.safetensors")
    experts = "model.layers.1.block_sparse_moe.experts"
    for absent, said in {
        (f"{experts}.1.w1.weight",): "gate_up_proj: transformers cannot join 5 tensors",
        (f"{experts}.1.w2.weight",): r"down_proj is \[2, 32, 48\] and should be \[3, 32, 48\]",
        tuple(f"{experts}.{expert}.w2.weight" for expert in range(3)): "missing from it: .*down_proj",
    }.items():
        save_file({n: t for n, t in weights.items() if n not in absent}, path / "model.safetensors", {"format": "pt"})
        with pytest.raises(UserError, match=said):
            loaded("--model", "hf", "--ckpt_path", path)


def test_hf_takes_weights_that_were_saved_without_the_head(tmp_path: Path) -> None:
    """As gpt2 itself is on the hub: names without the prefix of the model around."""
    torch.manual_seed(0)
    other = AutoModelForCausalLM.from_config(OTHERS["gpt2"]())
    path = save_hf(other, tmp_path / "gpt2", shards=False)
    file = path / "model.safetensors"
    save_file({name.removeprefix("transformer."): tensor for name, tensor in load_file(file).items()}, file)
    assert torch.equal(logits(loaded("--model", "hf", "--ckpt_path", path)), logits(other))


# -- where it is found -----------------------------------------------------------------------


def test_a_folder_comes_before_the_shelf_and_that_before_the_hub(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    hub = tmp_path / "hub" / "models--tiny"
    shutil.copytree(folder, hub / "snapshots" / "abc")
    (hub / "refs").mkdir()
    (hub / "refs" / "main").write_text("abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub._snapshot_download.constants.HF_HUB_CACHE", str(tmp_path / "hub"))

    def found() -> str:
        pretrained = find_pretrained(configured("--ckpt_path", "tiny").core)
        assert pretrained is not None
        return pretrained.describe()

    assert "snapshots/abc (Hugging Face hub, from its cache): safetensors, llama" in found()
    (hub / "snapshots" / "abc" / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"snapshots/abc has no tokenizer that transformers loads"):
        found()
    shutil.copytree(folder, "pretrained-models/tiny")
    assert found() == "pretrained-models/tiny (in ./pretrained-models): safetensors, llama"
    shutil.copytree(folder, "tiny")
    assert found() == "tiny (a folder): safetensors, llama"


def test_what_is_nowhere_is_told_with_every_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        configured("--ckpt_path", "lama")
    assert str(caught.value) == (
        f"ckpt_path: 'lama' was not found. Looked for the folder {tmp_path}/lama; the folder"
        f" {tmp_path}/pretrained-models/lama; lama in the cache of the Hugging Face hub."
    )


# -- what a run follows, and what contradicts ------------------------------------------------


def test_options_that_nobody_set_follow_the_checkpoint(folder: Path) -> None:
    settings = configured("--ckpt_path", folder).settings
    for key, value in {"hidden_size": 32, "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "vocab_size": 259}.items():
        assert (settings[key].value, settings[key].origin) == (value, f"checkpoint {folder}")
    assert configured("--ckpt_path", folder, "--hidden_size", 32).settings["hidden_size"].origin == "--hidden_size"


def test_an_arch_that_contradicts_the_checkpoint_is_an_error_with_both_values(folder: Path) -> None:
    with pytest.raises(UserError) as caught:
        configured("--arch", "llama-7b", "--rms_norm_eps", "1e-6", "--ckpt_path", folder)
    message = str(caught.value)
    assert f"checkpoint {folder} has another shape:" in message
    assert "hidden_size is 4096 (arch llama-7b), but 32 in the checkpoint" in message
    assert "rms_norm_eps is 1e-06 (--rms_norm_eps), but 1e-05 in the checkpoint" in message
    assert "vocab_size" not in message, "a fine-tune may have more entries than the family's first tokenizer"


def test_the_tokenizer_beside_the_weights_is_taken_unless_one_is_given(folder: Path, spoilt: Path) -> None:
    assert configured("--ckpt_path", folder).core.tokenizer == str(folder)
    given = "panda:data/sample/tokenizer"
    assert configured("--ckpt_path", folder, "--tokenizer", given).core.tokenizer == given
    (spoilt / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"has no tokenizer that transformers loads .* with `tokenizer`"):
        configured("--ckpt_path", spoilt)
    (spoilt / "tokenizer.model").write_bytes(b"")
    assert configured("--ckpt_path", spoilt).core.tokenizer == str(spoilt)


def test_a_tokenizer_with_more_entries_is_an_error_or_adds_rows(tmp_path: Path) -> None:
    small = llama(vocab_size=257)
    path = save_hf(small, tmp_path / "small")
    with pytest.raises(UserError, match=r"it needs 259 rows .*, and the checkpoint in .* has 257 .*`--extend_vocab`"):
        loaded("--ckpt_path", path)
    module = loaded("--ckpt_path", path, "--extend_vocab")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        known, got = small.state_dict()[name], module.state_dict()[name]
        assert torch.equal(got[:257], known)
        assert torch.allclose(got[257:], known.mean(0).expand(2, -1), atol=1e-6)
    assert module.config.vocab_size == 259


def test_rows_are_added_to_a_vocabulary_that_the_configuration_of_the_text_part_states(tmp_path: Path) -> None:
    sizes = {"vocab_size": 257, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "head_dim": 8}
    text = sizes | {"num_attention_heads": 2, "num_key_value_heads": 1}
    seen = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = seen | {"image_size": 28, "patch_size": 14}
    config = AutoConfig.for_model("gemma3", text_config=text, vision_config=vision, mm_tokens_per_image=4)
    model = AutoModelForCausalLM.from_config(config)
    folder = save_hf(model, tmp_path / "of-images", shards=False)
    module = loaded("--model", "hf", "--ckpt_path", folder, "--extend_vocab")
    rows = module.get_input_embeddings().weight
    assert module.config.text_config.vocab_size == len(rows) == 259
    known = model.get_input_embeddings().weight
    assert torch.equal(rows[:257], known)
    torch.testing.assert_close(rows[258], known.mean(0))


def test_more_positions_than_the_checkpoint_has_are_refused(folder: Path) -> None:
    with pytest.raises(UserError, match=r"max_seq_length: 129 \(--max_seq_length\), but .* is made for 128 positions"):
        configure(parse_arguments(["--model", "llama", "--max_seq_length", "129", "--ckpt_path", str(folder)]))


# -- what can be wrong with it ---------------------------------------------------------------


def test_a_truncated_file_is_told_with_its_name(spoilt: Path) -> None:
    file = sorted(spoilt.glob("*.safetensors"))[1]
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(UserError, match=f"{file.name}: damaged, or not safetensors"):
        loaded("--ckpt_path", spoilt)


def test_a_missing_shard_is_told_with_its_name(spoilt: Path) -> None:
    file = sorted(spoilt.glob("*.safetensors"))[1]
    file.unlink()
    with pytest.raises(UserError, match=f"1 of .* files of weights are missing, .*: {file.name}"):
        loaded("--ckpt_path", spoilt)


def test_an_index_that_names_what_is_in_no_file_is_told(spoilt: Path) -> None:
    file = spoilt / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    index["weight_map"]["model.layers.9.x"] = next(iter(index["weight_map"].values()))
    file.write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"it lists tensors that are in no file: model\.layers\.9\.x"):
        loaded("--ckpt_path", spoilt)


def test_missing_unexpected_and_misshaped_tensors_are_told_at_once(model: Any, tmp_path: Path) -> None:
    path = save_hf(model, tmp_path / "tiny", shards=False)
    file = path / "model.safetensors"
    state = load_file(file)
    del state["model.layers.1.mlp.up_proj.weight"]
    state["model.layers.2.mlp.up_proj.weight"] = torch.zeros(2)
    state["model.norm.weight"] = torch.zeros(31)
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(4)  # older transformers stored it
    save_file(state, file)
    with pytest.raises(UserError) as caught:
        loaded("--ckpt_path", path)
    assert str(caught.value).splitlines()[1:4] == [
        "missing from it: model.layers.1.mlp.up_proj.weight",
        "in it and not in the model: model.layers.2.mlp.up_proj.weight",
        "of another shape: model.norm.weight is [31] and should be [32]",
    ]


def test_a_folder_without_config_is_told_with_what_it_has(spoilt: Path, tmp_path: Path) -> None:
    (spoilt / "config.json").unlink()
    run = tmp_path / "run"
    for adds, hint in (
        ("provenance.json", r"a run without an export: `panda export .*/run` writes one"),
        ("adapter_config.json", r"holds adapters.* `panda export RUN --merge`"),
        ("manifest.json", r"a checkpoint of a run: `panda export .*/run --output NAME` writes its model"),
    ):
        shutil.rmtree(run, ignore_errors=True)
        run.mkdir()
        (run / adds).write_text("{}")
        with pytest.raises(UserError, match=f"has no config.json, so it is not a checkpoint of a model; .*{hint}"):
            configured("--ckpt_path", run)
    with pytest.raises(UserError, match=r"holds adapters.* `panda export RUN --merge`"):
        alone = tmp_path / "alone"
        alone.mkdir()
        (alone / "adapter_config.json").write_text("{}")
        configured("--ckpt_path", alone)
    with pytest.raises(
        UserError, match=r"has no config.json, so it is not a checkpoint of a model; it has .*model-00001"
    ):
        configured("--ckpt_path", spoilt)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="it is empty"):
        configured("--ckpt_path", tmp_path / "empty")
    (tmp_path / "empty" / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(UserError, match="has no weights"):
        configured("--ckpt_path", tmp_path / "empty")
    (tmp_path / "empty" / "config.json").write_text("{}")
    (tmp_path / "empty" / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="it has no 'model_type'"):
        configured("--ckpt_path", tmp_path / "empty")


def test_a_tokenizer_without_an_end_is_told(spoilt: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = json.loads((spoilt / "tokenizer_config.json").read_text())
    (spoilt / "tokenizer_config.json").write_text(json.dumps(config | {"eos_token": None}))
    data = ("--instruction_tuning_data_dir", "panda:data/sample/instruct", "--max_seq_length", "64")
    assert main(["--model", "llama", "--ckpt_path", str(spoilt), *data]) == 2
    assert "it has no end-of-sequence token" in capsys.readouterr().err


def test_quantised_weights_are_refused(spoilt: Path) -> None:
    config = json.loads((spoilt / "config.json").read_text())
    (spoilt / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(UserError, match=r"are quantised \(gptq\), and cannot be trained"):
        configured("--ckpt_path", spoilt)


def test_a_part_of_metas_that_is_missing_is_told(model: Any, tmp_path: Path) -> None:
    path = save_meta(model, tmp_path / "meta", ranks=2)
    (path / "consolidated.00.pth").unlink()
    with pytest.raises(UserError, match="parts are missing"):
        loaded("--ckpt_path", path, "--allow_pickle")
    (path / "params.json").write_text("{}")
    with pytest.raises(UserError, match="not the parameters of a LLaMA"):
        configured("--ckpt_path", path, "--allow_pickle")


def test_a_base_without_a_delta_and_a_delta_on_a_delta_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is neither a delta nor adapters, so it has no base"):
        configured("--ckpt_path", folder, "--base_path", folder)
    shutil.copytree(folder, tmp_path / "a-delta")
    with pytest.raises(UserError, match="is a delta itself"):
        configured("--ckpt_path", tmp_path / "a-delta", "--base_path", tmp_path / "a-delta")


def test_a_delta_of_another_base_is_told(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "a-delta")
    other = save_hf(llama(intermediate_size=64), tmp_path / "other")
    with pytest.raises(
        UserError, match=r"not the base of .*: model.layers.0.mlp.gate_proj.weight is \[48, 32\] and \["
    ):
        loaded("--ckpt_path", tmp_path / "a-delta", "--base_path", other)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"hidden_size": None}, r"config\.json: it does not state 'hidden_size'"),
        ({"num_attention_heads": None}, r"config\.json: it does not state 'num_attention_heads'"),
        ({"hidden_size": "big"}, r"config\.json: hidden_size: 'big' is not an integer >= 1"),
        ({"num_attention_heads": 5}, r"checkpoint .*spoilt: hidden_size 32 is not divisible by num_heads 5"),
        ({"rope_parameters": {"rope_type": "llama3"}}, r"does not state factor, low_freq_factor, high_freq_factor"),
        ({"rope_scaling": "linear"}, r"rope_scaling in its config.json is 'linear'; expected an object such as"),
        ({"quantization_config": "odd"}, r"are quantised \(odd\), and cannot be trained"),
        ({"vocab_size": None}, r"embed_tokens\.weight is \[259, 32\] and should be \[32000, 32\]"),
    ],
)
def test_a_configuration_that_says_too_little_or_nonsense_is_told(
    spoilt: Path, changes: dict[str, Any], told: str
) -> None:
    file = spoilt / "config.json"
    config = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    with pytest.raises(UserError, match=told):
        loaded("--ckpt_path", spoilt)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        # transformers 5.0 does not look at types, and torch refuses the text.
        ({"hidden_size": "big"}, r"config\.json.*(expected int, got str|argument 'size' failed)"),
        ({"model_type": "lama"}, r"of model_type 'lama': Unrecognized model identifier: lama\."),
        ({"model_type": "own", "auto_map": {}}, r"Its own code \(auto_map\) is not run"),
    ],
)
def test_what_transformers_cannot_make_of_a_configuration_is_told_in_brief(
    spoilt: Path, changes: dict[str, Any], told: str
) -> None:
    file = spoilt / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(UserError, match=told) as caught:
        loaded("--model", "hf", "--ckpt_path", spoilt)
    assert len(str(caught.value)) < 700, "and not with all that it knows"


def test_a_tokenizer_that_cannot_be_read_is_told_as_that(spoilt: Path) -> None:
    (spoilt / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match=r"spoilt: no tokenizer could be loaded from it: "):
        loaded("--ckpt_path", spoilt)


def test_what_git_leaves_in_place_of_a_large_file_is_told(model: Any, spoilt: Path, tmp_path: Path) -> None:
    pickled = save_pickle(model, tmp_path / "old") / "pytorch_model.bin"
    for file in (sorted(spoilt.glob("*.safetensors"))[1], pickled):
        file.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
        with pytest.raises(UserError, match=f"{file.name}: this is the pointer that git leaves .*`git lfs pull`"):
            loaded("--ckpt_path", file.parent, "--allow_pickle")


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors.index.json"])
def test_the_pointers_of_other_files_are_told_as_well(spoilt: Path, name: str) -> None:
    (spoilt / name).write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(UserError, match=f"{name}: this is the pointer that git leaves .*`git lfs pull`"):
        loaded("--ckpt_path", spoilt)


def test_a_link_that_leads_nowhere_is_a_file_that_is_missing(model: Any, spoilt: Path, tmp_path: Path) -> None:
    """As in a snapshot of the hub's cache that was copied without its blobs."""
    file = sorted(spoilt.glob("*.safetensors"))[1]
    file.unlink()
    file.symlink_to("../blobs/gone")
    with pytest.raises(UserError, match=f"1 of .* files of weights are missing, .*: {file.name}"):
        loaded("--ckpt_path", spoilt)
    single = save_hf(model, tmp_path / "single", shards=False) / "model.safetensors"
    single.unlink()
    single.symlink_to("../blobs/gone")
    with pytest.raises(UserError, match="has no weights: none of"):
        loaded("--ckpt_path", single.parent)


def test_a_truncated_pickle_and_a_type_that_is_not_read_are_told(model: Any, tmp_path: Path) -> None:
    file = save_pickle(model, tmp_path / "old") / "pytorch_model.bin"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"pytorch_model\.bin: damaged, or not a pickle: .* Fetch it again"):
        loaded("--ckpt_path", file.parent, "--allow_pickle")
    file = save_hf(model, tmp_path / "new", shards=False) / "model.safetensors"
    file.write_bytes(file.read_bytes().replace(b'"F32"', b'"U32"'))
    with pytest.raises(UserError, match=r"model\.safetensors: \S+ is of type U32, which panda does not read"):
        loaded("--ckpt_path", file.parent)
