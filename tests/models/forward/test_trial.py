"""A model that looks ahead, or whose output is not what training needs, is refused before it is trained."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from checkpoint_files import add_tokenizer
from checkpoint_files import llama
from transformers import AutoConfig
from transformers import AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from panda.cli.main import main
from panda.configuration.arguments import parse_arguments
from panda.configuration.configure import configure
from panda.models.forward.trial import refuse_encoder
from panda.models.forward.trial import refuse_unfit
from panda.registry import UserError
from panda.runner import train

CPU = torch.device("cpu")
BERT = {"vocab_size": 259, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}


def bert(**changes: Any) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model("bert", **BERT, **changes)).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_encoder_looks_ahead_and_a_decoder_does_not(dtype: torch.dtype) -> None:
    refuse_unfit(llama().eval().to(dtype), "llama", 259, CPU)
    refuse_unfit(bert(is_decoder=True).to(dtype), "bert", 259, CPU)
    with pytest.raises(UserError, match=r"looks ahead: .*encoder such as BERT"):
        refuse_unfit(bert().to(dtype), "bert", 259, CPU)


def encoders() -> list[str]:
    """Types whose class for causal language models asks for `is_decoder`."""
    asking = []
    for model_type, name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items():
        kind = getattr(transformers, name if isinstance(name, str) else name[0])
        if "add `is_decoder=True" in inspect.getsource(sys.modules[kind.__module__]):
            asking.append(model_type)
    return asking


def test_an_encoder_is_refused_without_weights_only_where_the_trial_refuses_it() -> None:
    found = encoders()
    assert {"bert", "roberta", "electra", "xlm-roberta"} <= set(found) and len(found) >= 12
    for model_type in found:
        for decoder in (False, True):
            values = BERT | {"is_decoder": decoder, "embedding_size": 32, "max_position_embeddings": 64}
            values |= {
                "hidden_dropout_prob": 0.0,
                "pad_token_id": 0,
                "languages": ["en_XX"],
                "default_language": "en_XX",
            }
            config = AutoConfig.for_model(model_type, **values)
            torch.manual_seed(0)
            model: Any = AutoModelForCausalLM.from_config(config).eval()
            refusal = None
            try:
                refuse_encoder(model, model_type)
            except UserError as problem:
                refusal = str(problem)
            assert (refusal is not None) is not decoder, model_type
            if refusal:
                with pytest.raises(UserError, match="looks ahead"):
                    refuse_unfit(model, model_type, 259, CPU)
    refuse_encoder(llama(), "llama")
    refuse_encoder(torch.nn.Linear(1, 1), "odd")


def test_a_mixture_of_experts_whose_rounding_depends_on_other_rows_is_not_refused() -> None:
    def forward(ids: torch.Tensor) -> torch.Tensor:
        noise = 1e-3 * torch.sin(ids.sum().float() + ids.sum(1, keepdim=True))  # of the whole batch, and of the row
        return torch.nn.functional.one_hot(ids, 300).float() + noise.unsqueeze(2)

    refuse_unfit(forward, "experts", 259, CPU)


UNFIT: dict[str, tuple[Callable[[torch.Tensor], Any], str]] = {
    "a vocabulary that is too small": (lambda ids: torch.zeros(*ids.shape, 258), r"\[2, 16, 258\]; expected logits"),
    "a class for each row": (lambda ids: torch.zeros(2, 300), r"of shape \[2, 300\]"),
    "the last token only": (lambda ids: torch.zeros(2, 1, 300), r"of shape \[2, 1, 300\]"),
    "no tensor": (lambda ids: {"logits": 1}, "a dict"),
    "no numbers": (lambda ids: torch.full((*ids.shape, 300), torch.nan), "not finite"),
}


@pytest.mark.parametrize("name", UNFIT)
def test_an_output_of_another_shape_is_refused(name: str) -> None:
    forward, said = UNFIT[name]
    with pytest.raises(UserError, match=said):
        refuse_unfit(forward, "odd", 259, CPU)


def test_a_run_that_would_train_an_encoder_is_refused(
    processes: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bert().save_pretrained(tmp_path / "bert")
    add_tokenizer(tmp_path / "bert")
    monkeypatch.chdir(tmp_path)
    flags = ["--model", "hf", "--ckpt_path", "bert", "--instruction_tuning_data_dir", "panda:data/sample/instruct"]
    flags += ["--max_seq_length", "256", "--max_samples", "8", "--precision", "bf16", "--output_dir", "run"]
    assert main(["check", *flags]) == 2
    assert "model hf: refused, since it looks ahead: BertLMHeadModel is causal only" in capsys.readouterr().err
    with pytest.raises(UserError, match="looks ahead: BertLMHeadModel"):
        train(configure(parse_arguments(flags)))
    # An encoder that transformers does not warn of.
    monkeypatch.setattr("panda.run.preparation.refuse_encoder", lambda *_: None)
    assert main(["check", *flags]) == 0
    assert "not tried yet: whether the model looks ahead" in capsys.readouterr().out
    with pytest.raises(UserError, match="model hf: refused, since it looks ahead: its prediction"):
        train(configure(parse_arguments(flags)))
    assert not list(tmp_path.rglob("checkpoints"))
