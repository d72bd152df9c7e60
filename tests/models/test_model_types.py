"""Some of the models in docs/models.md, compared with plain transformers; `python tests/model_types.py` does all."""

from __future__ import annotations

import re

import pytest
import torch
from launching import TESTS
from launching import run_script
from model_types import ENTRIES
from model_types import TABLE
from model_types import TYPES
from model_types import tiny

from panda.models.forward.router_loss import has_router_loss
from panda.models.hf import HfOptions
from panda.models.hf import build_hf
from panda.registry import UserError
from panda.registry.contexts import ModelContext

ROW = re.compile(r"^\| ([\w-]+) \| (?:yes)? *\| (yes)? *\| [^|]+ \| ([^|]+) \| loads \|$", re.MULTILINE)
SOME = ("qwen3", "gpt_neox", "mixtral", "deepseek_v3", "qwen3_5_moe_text", "mamba2")
PACKED = {"qwen3", "gpt_neox", "mixtral", "deepseek_v3"}
ROUTED = {"mixtral", "qwen3_5_moe_text"}


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What the command prints, which fails for a model that differs."""
    return run_script(TESTS / "model_types.py", *SOME, cwd=tmp_path_factory.mktemp("types"))


def test_some_train_as_with_plain_transformers_and_their_exports_load(table: str) -> None:
    found = {name: (router, packed) for name, router, packed in ROW.findall(table)}
    assert found.keys() == set(SOME)
    assert {name for name, (_, packed) in found.items() if packed != "refused"} == PACKED
    assert {name for name, (router, _) in found.items() if router} == ROUTED


def test_the_page_has_every_type_and_as_many_as_it_should() -> None:
    rows = ROW.findall(TABLE.read_text(encoding="utf-8"))
    assert [name for name, _, _ in rows] == TYPES
    assert len(rows) >= 45 and sum(bool(router) for _, router, _ in rows) >= 8


def config(model_type: str, **changes: object) -> dict[str, object]:
    return {**tiny(model_type).config.to_dict(), **changes}


def built(model_type: str, options: HfOptions, **changes: object) -> torch.nn.Module:
    context = ModelContext(
        ENTRIES, 64, pad_token_id=0, bos_token_id=1, eos_token_id=2, config=config(model_type, **changes)
    )
    with torch.device("meta"):
        return build_hf(options, context)


@pytest.mark.parametrize(
    ("coefficient", "states", "weight"), [(None, False, None), (None, True, 0.5), (0.1, False, 0.1)]
)
def test_the_router_loss_is_on_where_the_option_or_the_checkpoint_says_so(
    coefficient: float | None, states: bool, weight: float | None
) -> None:
    model = built("mixtral", HfOptions(router_aux_loss_coef=coefficient), output_router_logits=states)
    assert getattr(getattr(model, "step_loss", None), "weight", None) == weight
    assert not hasattr(built("mixtral", HfOptions(router_aux_loss_coef=0), output_router_logits=True), "step_loss")


@pytest.mark.parametrize("model_type", ["llama", "deepseek_v3"])
def test_a_router_loss_is_refused_for_a_model_that_has_none(model_type: str) -> None:
    with pytest.raises(UserError, match=r"router_aux_loss_coef: .* has no router loss that panda knows"):
        built(model_type, HfOptions(router_aux_loss_coef=0.1))
    assert not has_router_loss(tiny(model_type))


def test_a_vocabulary_that_is_too_small_is_refused_before_anything_is_loaded() -> None:
    with pytest.raises(UserError, match=f"has {ENTRIES} entries, and LlamaForCausalLM has 100 rows"):
        built("llama", HfOptions(), vocab_size=100)


def test_a_checkpoint_of_another_shape_than_the_arch_is_refused() -> None:
    same = HfOptions(hf_model_type="qwen3", hf_shape=("hidden_size=32", "vocab_size=7"))
    assert built("qwen3", same)
    with pytest.raises(UserError, match="num_hidden_layers is 3, but 2 in the checkpoint"):
        built("qwen3", HfOptions(hf_model_type="qwen3", hf_config=("num_hidden_layers=3",)))


def test_values_of_a_config_are_json_or_text_and_later_ones_count() -> None:
    options = HfOptions(
        "qwen3", ("hidden_size=32", "rms_norm_eps=1e-05", "layer_types=[1, 2]"), ("hidden_size=64", "a=b")
    )
    assert options.written == {"hidden_size": 64, "rms_norm_eps": 1e-5, "layer_types": [1, 2], "a": "b"}
    with pytest.raises(UserError, match="hf_config: 'hidden_size' is not NAME=VALUE"):
        HfOptions("qwen3", hf_config=("hidden_size",))
    with pytest.raises(UserError, match="give that too"):
        HfOptions(hf_config=("hidden_size=2",))


def test_a_model_without_a_checkpoint_needs_a_type_and_positions_enough() -> None:
    context = ModelContext(ENTRIES, 64, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    with pytest.raises(UserError, match=r"which model\?"):
        build_hf(HfOptions(), context)
    with pytest.raises(UserError, match="max_seq_length: 64 exceeds the model's 32 positions"):
        build_hf(HfOptions("qwen3", ("max_position_embeddings=32",)), context)
